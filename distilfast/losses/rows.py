"""The rows of a call: flattened logits and labels, and the normalisers of their losses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Rows(NamedTuple):
    """Labels, mask and normalisers of a call, with flat rows."""

    labels: Tensor | None  # (N,) int64
    mask: Tensor | None  # (N,), bool or float
    kd_normalizer: Tensor | None  # (), of kd, cos and mse; None unless the caller gave a tensor
    ce_normalizer: Tensor | None  # (), of ce; likewise


# Marks a normaliser that is not a number: it is a tensor, or has to be counted.
NO_NUMBER = -1.0


def flatten_rows(
    labels: Tensor | None,
    mask: Tensor | None,
    device: torch.device,
    reduction: str,
    kd_normalizer: float | Tensor | None,
    ce_normalizer: float | Tensor | None,
) -> tuple[Rows, list[float]]:
    """Return the Rows, and a number for each of the two normalisers.

    The Rows hold labels and mask as vectors, and the normalisers that are tensors. The number of
    a normaliser is NO_NUMBER if it is a tensor or not given. The operators count one that is not
    given, on the device.
    """
    tensors: list[Tensor | None] = []
    numbers = []
    for value in (kd_normalizer, ce_normalizer):
        if value is not None and not isinstance(value, Tensor) and torch.compiler.is_compiling():
            # torch.compile compiles anew for each number that an operator receives, but not for
            # each value of a tensor. The product accepts a symbol; torch.full would fix its value.
            value = torch.ones((), dtype=torch.float64, device=device) * value
        if value is None and reduction != "mean":
            value = 1.0
        tensors.append(value.detach() if isinstance(value, Tensor) else None)
        numbers.append(NO_NUMBER if value is None or isinstance(value, Tensor) else float(value))
    flat_labels = None if labels is None else labels.reshape(-1)
    flat_mask = None if mask is None else mask.detach().reshape(-1)
    return Rows(flat_labels, flat_mask, *tensors), numbers


Total = float | Tensor | None


def as_totals(rows: Rows, numbers: Sequence[float]) -> tuple[Total, Total]:
    """Undo `flatten_rows`: return the normalisers as `reference.row_scales` takes them."""
    tensors = rows.kd_normalizer, rows.ce_normalizer
    kd, ce = (
        tensor if tensor is not None else None if number == NO_NUMBER else number
        for tensor, number in zip(tensors, numbers, strict=True)
    )
    return kd, ce


def rows_like(like: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """Return an empty (N, width) matrix, with the row stride of ``like`` if that is only padding.

    With one stride, a kernel finds the rows of both at the same alignment.
    """
    stride = like.stride(0)
    padded = like.stride(1) == 1 and width <= stride < width + 128
    return like.new_empty_strided(
        (like.shape[0], width), (stride if padded else width, 1), dtype=dtype
    )


def as_matrix(x: Tensor) -> Tensor:
    """Reshape (..., V) to (N, V)."""
    return x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
