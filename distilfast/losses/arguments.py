"""Checks of the arguments' types, shapes and values, made before any work."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from distilfast.losses.divergences import DIVERGENCES
from distilfast.losses.reference import Options

SOFT = ("kd_weight", "cos_weight", "mse_weight")  # the weights of the losses that read a teacher
FP32 = torch.finfo(torch.float32)
FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def check_tensor(name: str, value: Any, dtypes: Sequence[torch.dtype] = FLOATS) -> None:
    """Raise a ValueError unless the value is a plain tensor of one of these dtypes."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    if type(value).__name__ in ("DTensor", "ShardedTensor"):
        raise ValueError(
            f"{name}: expected a plain tensor, got a {type(value).__name__}; "
            "gather it first (.full_tensor())"
        )
    if value.dtype not in dtypes:
        expected = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        hint = "; use .bool()" if torch.bool in dtypes else ""
        raise ValueError(f"{name}: expected dtype {expected}, got {value.dtype}{hint}")


def check_teacher(name: str, value: Tensor) -> None:
    if value.requires_grad:
        raise ValueError(
            f"{name}: the teacher gets no gradient, but requires_grad is True; "
            f"pass {name}.detach() or run the teacher under torch.no_grad()"
        )


def check_like(name: str, value: Tensor, shape: torch.Size, device: torch.device) -> None:
    """Raise a ValueError unless shape and device are those of the student's rows."""
    if value.shape != shape:
        raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(value.shape)}")
    if value.device != device:
        raise ValueError(f"{name}: expected device {device} (the student's), got {value.device}")


def check_options(
    temperature: float,
    weights: dict[str, float],
    divergence: str,
    jsd_beta: float,
    reduction: str,
    normalizers: dict[str, Any],
) -> None:
    """Check the scalars that every loss over the vocabulary takes."""
    # Plain comparisons, which NaN fails: torch.compile may pass symbols in place of numbers.
    if not _is_number(temperature) or not 0 < temperature < math.inf:
        raise ValueError(f"temperature: expected a finite number > 0, got {shown(temperature)}")
    for name, weight in weights.items():
        if not _is_number(weight) or not 0 <= weight < math.inf:
            raise ValueError(f"{name}: expected a finite number >= 0, got {shown(weight)}")
    if not any(weights.values()):
        names = ", ".join(weights)
        raise ValueError(f"{names}: expected at least one weight > 0, got all 0")
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence: expected one of {DIVERGENCES}, got {divergence!r}")
    if not _is_number(jsd_beta) or not 0 < jsd_beta < 1:
        raise ValueError(f"jsd_beta: expected a number between 0 and 1, got {shown(jsd_beta)}")
    check_reduction(reduction, normalizers)


def check_used(weights: dict[str, float], readers: Sequence[str], given: dict[str, Any]) -> None:
    """Raise a ValueError if an argument is given that only losses of weight 0 would read.

    ``readers`` are the names of those losses' weights. None is an argument that is not given.
    """
    if any(weights[name] for name in readers):
        return
    for name, value in given.items():
        if value is not None:
            raise ValueError(
                f"{name}: expected None, as nothing reads it where {', '.join(readers)} "
                f"{'is' if len(readers) == 1 else 'are'} 0, got a {type(value).__name__}"
            )


def check_statistics(statistics: bool, kd_weight: float) -> None:
    if not isinstance(statistics, bool):
        raise ValueError(f"statistics: expected True or False, got {shown(statistics)}")
    if statistics and not kd_weight:
        raise ValueError("statistics: needs kd_weight > 0, whose softmaxes they are of, got 0")


def check_reduction(reduction: str, normalizers: dict[str, Any]) -> None:
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction: expected 'mean', 'sum' or 'none', got {reduction!r}")
    for name, value in normalizers.items():
        if value is None:
            continue
        if reduction != "mean":
            raise ValueError(
                f"{name}: goes with reduction='mean' only, got reduction={reduction!r}"
            )
        if isinstance(value, Tensor):
            if value.ndim or value.is_complex() or value.dtype == torch.bool:
                raise ValueError(
                    f"{name}: expected a number or a 0-d tensor, got shape {tuple(value.shape)} "
                    f"of {value.dtype}"
                )
            if value.device.type != "cpu" or torch.compiler.is_compiling():
                continue  # reading the value would wait for the device
            value = value.item()
        if not _is_number(value) or not 0 <= value < math.inf:
            raise ValueError(f"{name}: expected a finite number >= 0, got {value!r}")
        if value and not FP32.tiny <= value <= FP32.max:
            raise ValueError(
                f"{name}: expected 0 or a number from {FP32.tiny:.1e} to {FP32.max:.1e}, as fp32 "
                f"has them, got {value!r}"
            )


def check_vocab(
    student: tuple[str, int], teachers: Sequence[tuple[str, int]], vocab_size: int | None
) -> int:
    """Return the vocabulary's size: ``vocab_size``, or the width that all sides share.

    ``student`` and ``teachers`` are pairs of an argument's name and its width.
    """
    if vocab_size is None:
        for name, width in teachers:
            if width != student[1]:
                raise ValueError(
                    f"vocab_size: needed where the widths differ, {student[0]} has {student[1]} "
                    f"columns and {name} {width}"
                )
        vocab_size = student[1]
    if not isinstance(vocab_size, int) or isinstance(vocab_size, bool) or vocab_size < 1:
        raise ValueError(f"vocab_size: expected a whole number >= 1, got {vocab_size!r}")
    for name, width in (student, *teachers):
        if width < vocab_size:
            raise ValueError(f"vocab_size: {name} has {width} columns, got vocab_size={vocab_size}")
    return vocab_size


def check_labels(
    labels: Tensor | None, ignore_index: int, ce_weight: float, rows: torch.Size, device: Any
) -> None:
    if not isinstance(ignore_index, int) or isinstance(ignore_index, bool):
        raise ValueError(f"ignore_index: expected a whole number, got {ignore_index!r}")
    if labels is None:
        if ce_weight:
            raise ValueError(
                f"labels: needed where ce_weight > 0 (ce_weight={ce_weight}), got None"
            )
        return
    check_tensor("labels", labels, (torch.int64,))
    check_like("labels", labels, rows, device)


def check_mask(mask: Tensor | None, rows: torch.Size, device: torch.device) -> None:
    if mask is not None:
        check_tensor("mask", mask, (torch.bool, *FLOATS))
        check_like("mask", mask, rows, device)


def check_values(labels: Tensor | None, mask: Tensor | None, options: Options) -> None:
    """Check the values of labels and mask on a CPU.

    On a GPU this would wait for the device. There a wrong label makes its own row NaN instead.
    """
    if labels is not None and labels.device.type == "cpu" and labels.numel():
        ignored = labels == options.ignore_index
        low, high = labels.masked_fill(ignored, 0).aminmax()
        if low < 0 or high >= options.vocab_size:
            wrong = ~ignored & ((labels < 0) | (labels >= options.vocab_size))
            row = int(wrong.nonzero()[0])
            raise ValueError(
                f"labels: expected {options.ignore_index} (ignore_index) or 0 to "
                f"{options.vocab_size - 1}, got {int(labels[row])} in row {row}"
            )
    check_mask_values(mask)


def check_mask_values(mask: Tensor | None) -> None:
    if mask is not None and mask.device.type == "cpu":
        wrong = ~(mask >= 0) | mask.isinf()
        if wrong.any():
            row = int(wrong.nonzero()[0])
            raise ValueError(
                f"mask: expected finite row weights >= 0, got {float(mask[row])} in row {row}"
            )


def shown(value: Any) -> str:
    """A wrong argument in one line."""
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def as_layers(name: str, value: Any) -> list[Tensor]:
    layers = list(value) if isinstance(value, (list, tuple)) else [value]
    if not layers:
        raise ValueError(f"{name}: expected a tensor or a list of layers, got an empty list")
    for layer in layers:
        check_tensor(name, layer)
        if layer.ndim == 0:
            raise ValueError(f"{name}: expected (..., D), got a 0-d tensor")
    return layers


def check_ensemble_mode(name: str, mode: str) -> None:
    if mode not in ("probability", "logit"):
        raise ValueError(f"{name}: expected 'probability' or 'logit', got {mode!r}")


def normalize_weights(name: str, weights: Sequence[float] | None, count: int) -> list[float]:
    """Return the ensemble's weights scaled to sum to 1; None gives equal weights."""
    if weights is None:
        return [1 / count] * count
    if len(weights) != count:
        raise ValueError(f"{name}: expected {count} numbers, one a teacher, got {len(weights)}")
    for weight in weights:
        if not _is_number(weight) or not 0 <= weight < math.inf:
            raise ValueError(f"{name}: expected finite numbers >= 0, got {shown(weight)}")
    if sum(weights) == 0:
        raise ValueError(f"{name}: expected at least one weight > 0, got all 0")
    return [float(weight) / sum(weights) for weight in weights]
