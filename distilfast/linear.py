"""The fused head: losses and gradients from hidden states and head weights, no (N, V) in memory.

The rows are taken in chunks. A chunk's logits are made by one product a side, the loss writes their
gradient over them, and two products turn it into the chunk's share of the gradients of hidden
states and weight. Nothing of size N x V exists, and nothing is computed twice: recomputing logits
in a backward would cost another product a side.

The gradients are those for a grad_output of 1, to be scaled in the backward. Two cases run the
whole head again there instead: `reduction="none"`, where each row has a grad_output of its own, and
fp16, where the gradient of a mean is too small to be stored before the loss scale is applied.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distilfast import backends, reference
from distilfast.losses import (
    DistillationOutput,
    as_arguments,
    as_options,
    as_output,
    check_ensemble_mode,
    check_labels,
    check_like,
    check_mask,
    check_options,
    check_teacher,
    check_tensor,
    check_values,
    check_vocab,
    combine_teachers_op,
    flatten_rows,
    normalize_weights,
    reduce_parts,
    scale_gradient,
)
from distilfast.reference import PARTS, Options

# What the logits of a chunk, student and teacher together, may take up. The products are at their
# best from some thousand rows on, and each further chunk reads and writes the weight's gradient.
CHUNK_BYTES = 256 << 20


@dataclass(frozen=True)
class Head:
    """One side's head: logits = softcap tanh(scale (h W^T + b) / softcap); softcap 0 means none."""

    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    scale: float
    softcap: float

    def trim(self, vocab_size: int) -> Head:
        """Without the rows from ``vocab_size`` on."""
        bias = None if self.bias is None else self.bias[:vocab_size]
        return Head(self.weight[:vocab_size], bias, self.scale, self.softcap)

    def logits(self, hidden: Tensor) -> Tensor:
        """(n, D) -> (n, V), a new tensor."""
        logits = torch.nn.functional.linear(hidden, self.weight, self.bias)
        if self.scale != 1:
            logits *= self.scale
        if self.softcap:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits

    def backward_(self, gradient: Tensor, logits: Tensor | None) -> None:
        """The gradient of the logits becomes, in place, that of h W^T + b. Only a softcap needs
        the logits: d/dx c tanh(x / c) = 1 - (y / c)^2."""
        if self.softcap:
            assert logits is not None
            compute = reference.accumulation_dtype(logits)  # 1 - y^2 cancels in bf16
            gradient *= 1 - (logits.to(compute) / self.softcap) ** 2
        if self.scale != 1:
            gradient *= self.scale


@torch.library.custom_op("distilfast::linear_distillation", mutates_args=())
def linear_distillation_op(
    student_hidden: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    teacher_hidden: list[Tensor],
    teacher_weight: list[Tensor],
    teacher_bias: list[Tensor],
    labels: Tensor | None,
    mask: Tensor | None,
    kd_scale: Tensor,
    ce_scale: Tensor,
    scalars: list[float],
    divergence: str,
    ignore_index: int,
    vocab_size: int,
    heads: list[float],
    teacher_weights: list[float],
    ensemble: str,
    chunk_rows: int,
    reduction: str,
    late: bool,
    backend: str,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The loss, the parts, and the gradients of hidden, weight and bias (empty if not wanted).

    kd_scale and ce_scale are () or, in a late backward of reduction="none", (N,). ``late`` leaves
    the gradients to the backward, which calls this again without it.
    """
    if late:
        wanted = [False] * 3
    options = as_options(scalars, divergence, ignore_index, vocab_size)
    check_values(labels, mask, options)
    distillation = backends.BACKENDS[backend].distillation
    student_scale, student_softcap, teacher_scale, teacher_softcap = heads
    # Padding is left out of the heads: whatever it holds, 0 * NaN included, it must add nothing.
    student = Head(student_weight, student_bias, student_scale, student_softcap).trim(vocab_size)
    teachers = [
        Head(w, teacher_bias[k] if teacher_bias else None, teacher_scale, teacher_softcap).trim(
            vocab_size
        )
        for k, w in enumerate(teacher_weight)
    ]
    want_hidden, want_weight, want_bias = wanted
    compute = reference.accumulation_dtype(student_hidden, *teacher_hidden)
    rows = torch.zeros(len(PARTS), len(student_hidden), dtype=compute, device=student_hidden.device)
    d_hidden, d_weight, d_bias = _gradients(student_hidden, student_weight, compute, wanted)

    needed = _needed_rows(labels, mask, options)
    for chunk in _chunks(student_hidden, needed, chunk_rows or _budget_rows(vocab_size)):
        hidden = student_hidden[chunk]
        if needed is not None:  # a row that nothing needs must not reach the weight's gradient
            hidden = torch.where(needed[chunk, None], hidden, 0)
        logits = student.logits(hidden)
        z = [head.logits(h[chunk]) for head, h in zip(teachers, teacher_hidden, strict=True)]
        if len(z) > 1:
            target = combine_teachers_op(
                z, teacher_weights, options.temperature, ensemble, vocab_size, backend
            )
        else:
            target = z[0] if z else logits  # without a teacher nothing reads it
        del z
        capped = logits.clone() if any(wanted) and student.softcap else None
        gradient = logits if any(wanted) else None
        rows[:, chunk] = distillation(
            logits,
            target,
            None if labels is None else labels[chunk],
            None if mask is None else mask[chunk],
            kd_scale[chunk] if kd_scale.ndim else kd_scale,
            ce_scale[chunk] if ce_scale.ndim else ce_scale,
            options,
            gradient,
        )
        if gradient is None:
            continue
        student.backward_(gradient, capped)
        if want_hidden:
            d_hidden[chunk] = gradient @ student.weight
        if want_weight:
            d_weight[:vocab_size] += gradient.T @ hidden
        if want_bias:
            d_bias[:vocab_size] += gradient.sum(0, dtype=compute)

    loss, parts = reduce_parts(rows, kd_scale, ce_scale, options, reduction)
    if want_weight:
        d_weight = d_weight.to(student_weight.dtype)
    if want_bias and student_bias is not None:
        d_bias = d_bias.to(student_bias.dtype)
    return loss, parts, d_hidden, d_weight, d_bias


def _gradients(
    hidden: Tensor, weight: Tensor, compute: torch.dtype, wanted: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Zeroed gradients of hidden, weight and bias; weight and bias in the dtype to sum in, since a
    bf16 sum over chunks would lose what is small beside what is there."""
    return (
        torch.zeros_like(hidden) if wanted[0] else hidden.new_empty(0),
        torch.zeros_like(weight, dtype=compute) if wanted[1] else weight.new_empty(0),
        weight.new_zeros(weight.shape[0], dtype=compute) if wanted[2] else weight.new_empty(0),
    )


def _budget_rows(vocab_size: int) -> int:
    """Rows whose logits, student's and teacher's in fp32, fit the budget."""
    return max(64, CHUNK_BYTES // (2 * 4 * vocab_size))


def _needed_rows(labels: Tensor | None, mask: Tensor | None, options: Options) -> Tensor | None:
    """(N,) bool, the rows that some part needs; None: all of them."""
    soft = options.kd_weight or options.cos_weight or options.mse_weight
    if soft and mask is None:
        return None
    wanted = [] if not soft or mask is None else [mask != 0]
    wanted += [] if labels is None else [labels != options.ignore_index]
    return torch.stack(wanted).any(0)


def _chunks(hidden: Tensor, needed: Tensor | None, rows: int) -> Sequence[slice | Tensor]:
    """The rows of each chunk. On a CPU the rows that nothing needs are left out altogether; on a
    GPU counting them would wait for the device."""
    if needed is not None and hidden.device.type == "cpu" and not needed.all():
        return needed.nonzero()[:, 0].split(rows) if needed.any() else []
    return [slice(i, i + rows) for i in range(0, hidden.shape[0], rows)]


@linear_distillation_op.register_fake
def _(
    student_hidden: Tensor, student_weight: Tensor, student_bias: Tensor | None, *others: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    kd_scale, (reduction, late, _, wanted) = others[5], others[-4:]
    n_rows = [student_hidden.shape[0]] if reduction == "none" else []
    bias_like = student_weight if student_bias is None else student_bias
    if late:
        wanted = [False] * 3
    return (
        kd_scale.new_empty(n_rows),
        kd_scale.new_empty([len(PARTS), *n_rows]),
        torch.empty_like(student_hidden) if wanted[0] else student_hidden.new_empty(0),
        torch.empty_like(student_weight) if wanted[1] else student_weight.new_empty(0),
        bias_like.new_empty(student_weight.shape[0] if wanted[2] else 0),
    )


def _linear_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    loss, *rest = output
    ctx.set_materialize_grads(False)  # else autograd makes zeros as large as the gradients
    ctx.mark_non_differentiable(*rest)
    *ctx.settings, ctx.late, ctx.backend, ctx.wanted = inputs[10:]
    ctx.teacher_counts = [len(group) for group in inputs[3:6]]
    ctx.others = len(inputs) - 6
    if not ctx.late:
        ctx.save_for_backward(loss, *rest[1:])
        return
    student = inputs[:3]
    teachers = [x for group in inputs[3:6] for x in group]
    ctx.save_for_backward(loss, *student, *inputs[6:10], *teachers)


def _linear_backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if grad_loss is None:
        return *[None] * 3, *([None] * n for n in ctx.teacher_counts), *[None] * ctx.others
    if ctx.late:
        loss, *saved = ctx.saved_tensors
        student, (labels, mask, kd_scale, ce_scale), teachers = saved[:3], saved[3:7], saved[7:]
        groups = []
        for count in ctx.teacher_counts:
            groups.append([t.detach() for t in teachers[:count]])
            teachers = teachers[count:]
        _, _, *gradients = linear_distillation_op(
            *(None if x is None else x.detach() for x in student),
            *groups,
            labels,
            mask,
            kd_scale * grad_loss.detach(),
            ce_scale * grad_loss.detach(),
            *ctx.settings,
            False,
            ctx.backend,
            ctx.wanted,
        )
        grad_loss = grad_loss.new_ones(())
    else:
        loss, *gradients = ctx.saved_tensors
    scaled = [
        scale_gradient(g, grad_loss, loss, ctx.backend) if wanted else None
        for g, wanted in zip(gradients, ctx.wanted, strict=True)
    ]
    return *scaled, *([None] * n for n in ctx.teacher_counts), *[None] * ctx.others


linear_distillation_op.register_autograd(_linear_backward, setup_context=_linear_context)


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
    backend: str = "auto",
) -> DistillationOutput:
    """`distillation_loss` of the logits h W^T + b, which are never held: chunk by chunk of rows.

    Args:
        student_hidden: (..., D_s).
        student_weight: (V_s, D_s), as ``nn.Linear.weight`` or a tied embedding.
        teacher_hidden: (..., D_t), or a sequence: an ensemble. May not require a gradient. None,
            as teacher_weight, where ce_weight alone is > 0.
        teacher_weight: (V_t, D_t), or a sequence. A teacher's weight and bias are constants here,
            whether they require a gradient or not.
        labels: (...) int64.
        student_bias, teacher_bias: (V_s,) and (V_t,) or a sequence; None: no bias.
        logit_scale: logits are multiplied by it; a pair (student, teacher) where they differ.
        logit_softcap: c, logits become c tanh(logits / c) after scaling; None: none; a pair where
            they differ.
        teacher_weights, ensemble: as ``weights`` and ``mode`` of `combine_teachers`.
        chunk_rows: rows a chunk, or "auto": what fits a fixed memory budget.
        inplace_backward: accepted, without effect: there are no logits to overwrite.

    The other keywords are those of `distillation_loss`. Under autocast the products run in its
    dtype. Losses and the sums over chunks are fp32; a chunk's product is rounded to the dtype of
    its inputs. With ``reduction="none"``, or in fp16, the backward computes the head a second time.

    Returns:
        DistillationOutput(loss, kd, ce, cos, mse); the gradient flows to student_hidden,
        student_weight and student_bias.

    Raises:
        ValueError: naming the argument, what was expected and what came.

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
    check_ensemble_mode("ensemble", ensemble)
    scales = _pair("logit_scale", logit_scale, 1.0)
    softcaps = _pair("logit_softcap", logit_softcap, 0.0)
    if chunk_rows != "auto" and (type(chunk_rows) is not int or chunk_rows < 1):
        raise ValueError(f"chunk_rows: expected 'auto' or a whole number >= 1, got {chunk_rows!r}")

    soft = bool(kd_weight or cos_weight or mse_weight)
    t_hidden = _as_teachers("teacher_hidden", teacher_hidden, soft)
    t_weight = _as_teachers("teacher_weight", teacher_weight, soft)
    t_bias = _as_teachers("teacher_bias", teacher_bias, False)
    for name, group in (("teacher_weight", t_weight), ("teacher_bias", t_bias)):
        if len(group) != len(t_hidden) and not (name == "teacher_bias" and teacher_bias is None):
            raise ValueError(
                f"{name}: expected {len(t_hidden)}, one for each teacher_hidden, got {len(group)}"
            )
    if len(t_hidden) > 1 and ensemble == "probability" and (cos_weight or mse_weight):
        raise ValueError(
            "cos_weight, mse_weight: expected 0 with ensemble='probability', whose logits are "
            f"known only up to a constant, got {cos_weight} and {mse_weight}; use ensemble='logit'"
        )
    shares = normalize_weights("teacher_weights", teacher_weights, max(1, len(t_hidden)))
    check_tensor("student_hidden", student_hidden)
    leading, device = student_hidden.shape[:-1], student_hidden.device
    _check_head("student", student_hidden, student_weight, student_bias, leading, device)
    for k, (h, w) in enumerate(zip(t_hidden, t_weight, strict=True)):
        check_teacher("teacher_hidden", h)
        _check_head("teacher", h, w, t_bias[k] if t_bias else None, leading, device)
    vocab = check_vocab(
        ("student_weight", student_weight.shape[0]),
        [("teacher_weight", w.shape[0]) for w in t_weight],
        vocab_size,
    )
    check_labels(labels, ignore_index, ce_weight, leading, device)
    check_mask(mask, leading, device)

    if not soft:  # the labels alone: no teacher is projected
        t_hidden, t_weight, t_bias, shares = [], [], [], [1.0]

    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
        student_hidden, student_weight = student_hidden.to(dtype), student_weight.to(dtype)
        student_bias = None if student_bias is None else student_bias.to(dtype)
        t_hidden, t_weight, t_bias = (
            [x.to(dtype) for x in group] for group in (t_hidden, t_weight, t_bias)
        )
    _check_one_dtype("student", student_hidden, student_weight, student_bias)
    for k, (h, w) in enumerate(zip(t_hidden, t_weight, strict=True)):
        _check_one_dtype("teacher", h, w, t_bias[k] if t_bias else None)
    backend = backends.choose(backend, device, [x.dtype for x in (student_hidden, *t_hidden)])

    scalars = [float(x) for x in (temperature, *weights.values(), jsd_beta)]
    options = as_options(scalars, divergence, ignore_index, vocab)
    rows = flatten_rows(
        leading.numel(),
        device,
        reference.accumulation_dtype(student_hidden, *t_hidden),
        labels if ce_weight else None,
        mask,
        reduction,
        kd_normalizer,
        ce_normalizer,
        ignore_index,
    )
    trained = (student_hidden, student_weight, student_bias)
    loss, parts, *_ = linear_distillation_op(
        student_hidden.reshape(-1, student_hidden.shape[-1]),
        student_weight,
        student_bias,
        [h.reshape(-1, h.shape[-1]) for h in t_hidden],
        [w.detach() for w in t_weight],
        [b.detach() for b in t_bias],
        *rows,
        *as_arguments(options),
        [scales[0], softcaps[0], scales[1], softcaps[1]],
        shares,
        ensemble,
        0 if chunk_rows == "auto" else int(chunk_rows),
        reduction,
        reduction == "none" or student_hidden.dtype == torch.float16,
        backend,
        [x is not None and x.requires_grad and torch.is_grad_enabled() for x in trained],
    )
    return as_output(loss, parts, leading, reduction)


def _as_teachers(name: str, value: Any, needed: bool) -> list[Tensor]:
    if value is None and not needed:
        return []
    teachers = list(value) if isinstance(value, (list, tuple)) else [value]
    if not teachers:
        raise ValueError(f"{name}: expected a tensor or a sequence of them, got an empty one")
    for t in teachers:
        check_tensor(name, t)
    return teachers


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
    """(student, teacher) from one value or a pair; None becomes ``none``."""
    pair = value if isinstance(value, (tuple, list)) else (value, value)
    if len(pair) != 2:
        raise ValueError(f"{name}: expected a number or a pair (student, teacher), got {value!r}")
    for x in pair:
        is_number = isinstance(x, (int, float)) and not isinstance(x, bool)
        if x is not None and not (is_number and 0 < x < float("inf")):
            raise ValueError(f"{name}: expected finite numbers > 0, got {value!r}")
    student, teacher = (none if x is None else float(x) for x in pair)
    return student, teacher
