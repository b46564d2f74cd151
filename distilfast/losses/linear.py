"""The fused head: losses and gradients from hidden states and head weights, no (N, V) in memory.

It takes the rows in chunks. For each chunk:

1. One matrix product per side multiplies the hidden states with the head weight (products.py).
2. The loss kernel turns the products into logits in registers, and overwrites the student's
   products with the gradient of the logits.
3. Two more products give the chunk's share of the gradients of hidden states and weight.

No tensor of size N x V exists, and nothing is computed twice: recomputing the logits in the
backward would cost another product per side.

The gradients are computed for a grad_output of 1 and scaled in the backward. In two cases the
backward runs the whole head again instead: with `reduction="none"`, where each row has its own
grad_output, and in fp16, where the gradient of a mean is too small to be stored before the loss
scale is applied.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from distilfast.losses import backends
from distilfast.losses.arguments import (
    SOFT,
    check_ensemble_mode,
    check_labels,
    check_like,
    check_mask,
    check_options,
    check_statistics,
    check_teacher,
    check_tensor,
    check_used,
    check_vocab,
    normalize_weights,
)
from distilfast.losses.dense import DetailedOutput, DistillationOutput, as_output
from distilfast.losses.linear_operator import HeadCall, linear_distillation_op
from distilfast.losses.operators import Numbers
from distilfast.losses.products import HALVES
from distilfast.losses.rows import as_matrix, flatten_rows


def linear_distillation_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | Sequence[Tensor] | None,
    teacher_weight: Tensor | Sequence[Tensor] | None,
    labels: Tensor | None = None,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | Sequence[Tensor] | None = None,
    logit_scale: float | tuple[float, float] = 1.0,
    logit_softcap: float | tuple[float | None, float | None] | None = None,
    teacher_weights: Sequence[float] | None = None,
    ensemble: str = "probability",
    chunk_rows: int | str = "auto",
    accum_dtype: torch.dtype | None = None,
    logits_dtype: torch.dtype | None = None,
    temperature: float = 2.0,
    kd_weight: float = 1.0,
    ce_weight: float = 0.0,
    cos_weight: float = 0.0,
    mse_weight: float = 0.0,
    divergence: str = "forward_kl",
    jsd_beta: float = 0.5,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    vocab_size: int | None = None,
    reduction: str = "mean",
    kd_normalizer: float | Tensor | None = None,
    ce_normalizer: float | Tensor | None = None,
    inplace_backward: bool = False,
    statistics: bool = False,
    backend: str = "auto",
) -> DistillationOutput | DetailedOutput:
    """Return the `distillation_loss` of the logits h W^T + b without holding all logits.

    The other keywords are those of `distillation_loss`.

    Args:
        student_hidden: (..., D_s).
        student_weight: (V_s, D_s), as ``nn.Linear.weight`` or a tied embedding.
        teacher_hidden: (..., D_t), or a sequence: an ensemble. May not require a gradient.
            All that is a teacher's has to be None if only ce_weight is > 0.
        teacher_weight: (V_t, D_t), or a sequence. A teacher's weight and bias are constants here,
            whether they require a gradient or not.
        labels: (...) int64.
        student_bias, teacher_bias: (V_s,) and (V_t,) or a sequence of them; None: no bias.
        logit_scale: logits are multiplied by it. A pair (student, teacher) if they differ.
        logit_softcap: c; after scaling, logits become c tanh(logits / c). None: no softcap. A pair
            if they differ.
        teacher_weights, ensemble: as ``weights`` and ``mode`` of `combine_teachers`.
        chunk_rows: rows in a chunk, or "auto": as many as fit a fixed memory budget (CHUNK_BYTES).
        accum_dtype: the dtype in which the chunks' shares of the weight's gradient are summed.
            None is fp32 (fp64 for fp64). The dtype of the hidden states saves V D 4 bytes but
            rounds at every chunk (docs/kernels.md has the error).
        logits_dtype: the dtype of the logits of 16-bit hidden states; None is fp32. The dtype of
            the hidden states halves the memory of a chunk, but rounds the logits before they are
            subtracted: near the teacher the gradient's error exceeds the gradient
            (docs/exactness.md).
        inplace_backward: accepted, without effect: there are no logits to overwrite.

    Under autocast the products run in its dtype, and the gradients of an fp32 weight and bias are
    summed and returned in fp32. Logits, scale, softcap, losses and the sums over chunks are fp32.
    The gradient of the logits is rounded to 16 bits for its products, after teacher and student
    have been subtracted. On a CPU a chunk's share of the weight's gradient is rounded too; on CPUs
    without products of that dtype both stay fp32. With ``reduction="none"``, or in fp16, the
    backward computes the head a second time.

    On a CPU, rows that no loss needs (mask 0, no label) are not projected. On a GPU they are,
    because counting them would wait for the device; leave them out if that matters.

    Returns:
        As `distillation_loss`. The gradient flows to student_hidden, student_weight and
        student_bias.

    Raises:
        ValueError: names the argument, what was expected and what was passed.

    Example:
        >>> import torch
        >>> hidden, weight = torch.randn(4, 8, requires_grad=True), torch.randn(16, 8)
        >>> teacher_hidden, teacher_weight = torch.randn(4, 12), torch.randn(16, 12)
        >>> out = linear_distillation_loss(hidden, weight, teacher_hidden, teacher_weight)
        >>> out.loss.backward()
        >>> hidden.grad.shape
        torch.Size([4, 8])
    """
    weights = {
        "kd_weight": kd_weight,
        "ce_weight": ce_weight,
        "cos_weight": cos_weight,
        "mse_weight": mse_weight,
    }
    normalizers = {"kd_normalizer": kd_normalizer, "ce_normalizer": ce_normalizer}
    check_options(temperature, weights, divergence, jsd_beta, reduction, normalizers)
    teachers = {
        "teacher_hidden": teacher_hidden,
        "teacher_weight": teacher_weight,
        "teacher_bias": teacher_bias,
        "teacher_weights": teacher_weights,
    }
    check_used(weights, SOFT, {**teachers, "mask": mask, "kd_normalizer": kd_normalizer})
    check_used(weights, ("ce_weight",), {"labels": labels, "ce_normalizer": ce_normalizer})
    check_statistics(statistics, kd_weight)
    check_ensemble_mode("ensemble", ensemble)
    scales = _pair("logit_scale", logit_scale, 1.0)
    softcaps = _pair("logit_softcap", logit_softcap, 0.0)
    if chunk_rows != "auto" and (type(chunk_rows) is not int or chunk_rows < 1):
        raise ValueError(f"chunk_rows: expected 'auto' or a whole number >= 1, got {chunk_rows!r}")

    soft = any(weights[name] for name in SOFT)
    t_hidden = _as_teachers("teacher_hidden", teacher_hidden, soft)
    t_weight = _as_teachers("teacher_weight", teacher_weight, soft)
    t_bias = [None] * len(t_hidden) if teacher_bias is None else _as_list(teacher_bias)
    for name, group in (("teacher_weight", t_weight), ("teacher_bias", t_bias)):
        if len(group) != len(t_hidden):
            raise ValueError(
                f"{name}: expected {len(t_hidden)}, one for each teacher_hidden, got {len(group)}"
            )
    if len(t_hidden) > 1 and ensemble == "probability" and (cos_weight or mse_weight):
        raise ValueError(
            "cos_weight, mse_weight: expected 0 with ensemble='probability', whose logits are "
            f"known only up to a constant, got {cos_weight} and {mse_weight}; use ensemble='logit'"
        )
    shares = normalize_weights("teacher_weights", teacher_weights, len(t_hidden)) if soft else []
    check_tensor("student_hidden", student_hidden)
    leading, device = student_hidden.shape[:-1], student_hidden.device
    _check_head("student", student_hidden, student_weight, student_bias, leading, device)
    for k, (h, w) in enumerate(zip(t_hidden, t_weight, strict=True)):
        check_teacher("teacher_hidden", h)
        _check_head("teacher", h, w, t_bias[k], leading, device)
    vocab = check_vocab(
        ("student_weight", student_weight.shape[0]),
        [("teacher_weight", w.shape[0]) for w in t_weight],
        vocab_size,
    )
    check_labels(labels, ignore_index, ce_weight, leading, device)
    check_mask(mask, leading, device)

    if torch.is_autocast_enabled(device.type):  # the operator casts the heads
        dtype = torch.get_autocast_dtype(device.type)
        student_hidden, *t_hidden = (
            h if h.dtype == torch.float64 else h.to(dtype) for h in (student_hidden, *t_hidden)
        )
    else:
        _check_one_dtype("student", student_hidden, student_weight, student_bias)
        for h, w, b in zip(t_hidden, t_weight, t_bias, strict=True):
            _check_one_dtype("teacher", h, w, b)
    accum_dtype = _accum_dtype(accum_dtype, student_hidden.dtype)
    logits_dtype = _logits_dtype(logits_dtype, [student_hidden.dtype, *(h.dtype for h in t_hidden)])
    read = (student_hidden, *t_hidden, student_weight)  # under autocast of different dtypes
    backend = backends.choose(backend, device, [x.dtype for x in read])

    rows, totals = flatten_rows(labels, mask, device, reduction, kd_normalizer, ce_normalizer)
    if not soft:  # then only a label can make a row needed
        totals[0] = 0.0
    heads = scales[0], softcaps[0], scales[1], softcaps[1]
    numbers = Numbers(
        temperature, tuple(weights.values()), jsd_beta, tuple(totals), heads, tuple(shares)
    )
    trained = (student_hidden, student_weight, student_bias)
    wanted = [x is not None and x.requires_grad and torch.is_grad_enabled() for x in trained]
    late = reduction == "none" or student_hidden.dtype == torch.float16
    sums, rounded = (str(dtype).removeprefix("torch.") for dtype in (accum_dtype, logits_dtype))
    named = divergence, reduction, backend, ensemble, sums, rounded
    call = HeadCall(*named, late, wanted[0], wanted[1], wanted[2], statistics)
    loss, parts, *_, found = linear_distillation_op(
        as_matrix(student_hidden),
        student_weight,
        student_bias,
        [as_matrix(h) for h in t_hidden],
        [w.detach() for w in t_weight],
        [
            w.new_empty(0) if b is None else b.detach()
            for w, b in zip(t_weight, t_bias, strict=True)
        ],
        *rows,
        None,
        numbers.flat(),
        [ignore_index, vocab, 0 if chunk_rows == "auto" else int(chunk_rows)],
        str(call),
    )
    return as_output(loss, parts, leading, reduction, found if statistics else None)


def _as_teachers(name: str, value: Any, needed: bool) -> list[Tensor]:
    if value is None and not needed:
        return []
    teachers = _as_list(value)
    if not teachers:
        raise ValueError(f"{name}: expected a tensor or a sequence of them, got an empty one")
    for t in teachers:
        check_tensor(name, t)
    return teachers


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _accum_dtype(wanted: torch.dtype | None, dtype: torch.dtype) -> torch.dtype:
    widest = torch.float64 if dtype == torch.float64 else torch.float32
    if wanted is None:
        return widest
    if wanted not in (widest, dtype):
        known = " or ".join(str(x) for x in dict.fromkeys((None, widest, dtype)))
        raise ValueError(f"accum_dtype: expected {known}, got {wanted!r}")
    return wanted


def _logits_dtype(wanted: torch.dtype | None, dtypes: Sequence[torch.dtype]) -> torch.dtype:
    """Check the dtype of the logits. A 16-bit one has to be the dtype of some hidden states."""
    if wanted is None or wanted == torch.float32:
        return torch.float32
    if wanted not in HALVES or wanted not in dtypes:
        known = " or ".join(
            str(x) for x in (None, torch.float32, *HALVES) if x not in HALVES or x in dtypes
        )
        raise ValueError(f"logits_dtype: expected {known}, got {wanted!r}")
    return wanted


def _check_head(
    side: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, leading: torch.Size, device: Any
) -> None:
    check_tensor(f"{side}_weight", weight)
    if hidden.ndim == 0 or hidden.shape[:-1] != leading:
        raise ValueError(
            f"{side}_hidden: expected the leading shape of student_hidden {tuple(leading)}, "
            f"got shape {tuple(hidden.shape)}"
        )
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"{side}_weight: expected (V, {hidden.shape[-1]}) to match {side}_hidden "
            f"{tuple(hidden.shape)}, got {tuple(weight.shape)}"
        )
    for name, value in (("hidden", hidden), ("weight", weight)):
        if value.device != device:
            raise ValueError(
                f"{side}_{name}: expected device {device} (student_hidden's), got {value.device}"
            )
    if bias is not None:
        check_tensor(f"{side}_bias", bias)
        check_like(f"{side}_bias", bias, weight.shape[:1], device)


def _check_one_dtype(side: str, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None and value.dtype != hidden.dtype:
            raise ValueError(
                f"{side}_{name}: expected the dtype of {side}_hidden, {hidden.dtype}, got "
                f"{value.dtype} (use torch.autocast to mix them)"
            )


def _pair(name: str, value: Any, none: float) -> tuple[float, float]:
    """Return (student, teacher) from one value or a pair; None becomes ``none``."""
    pair = value if isinstance(value, (tuple, list)) else (value, value)
    if len(pair) != 2:
        raise ValueError(f"{name}: expected a number or a pair (student, teacher), got {value!r}")
    for x in pair:
        is_number = isinstance(x, (int, float)) and not isinstance(x, bool)
        if x is not None and not (is_number and 0 < x < float("inf")):
            raise ValueError(f"{name}: expected finite numbers > 0, got {value!r}")
    student, teacher = (none if x is None else float(x) for x in pair)
    return student, teacher
