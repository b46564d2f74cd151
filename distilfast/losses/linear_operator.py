"""The custom operator of the fused head: losses over the vocabulary from hidden states.

It is opaque to torch.compile, and all backends share it. Only one chunk's logits exist at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distilfast.losses import backends, reference
from distilfast.losses.arguments import check_values
from distilfast.losses.chunks import (
    Side,
    Target,
    WeightGradient,
    chunks_of,
    length,
    rows_of_logits,
)
from distilfast.losses.operators import Numbers, finished, late_scales, scale_gradients
from distilfast.losses.products import HALVES
from distilfast.losses.reference import PARTS, Head, Options
from distilfast.losses.rows import Rows, as_totals
from distilfast.losses.scratch import Scratch


class HeadCall(NamedTuple):
    """The settings of the operator's call, passed as one string: see `operators.Call`."""

    divergence: str
    reduction: str
    backend: str
    ensemble: str
    accum_dtype: str
    logits_dtype: str  # if the hidden states have 16 bits
    late: bool  # the backward computes the gradients: it calls the operator with late=False
    hidden: bool  # which gradients are wanted
    weight: bool
    bias: bool
    statistics: bool

    @property
    def wanted(self) -> tuple[bool, bool, bool]:
        return self.hidden, self.weight, self.bias

    def __str__(self) -> str:
        return " ".join(map(str, self[:6])) + "".join(f" {int(flag)}" for flag in self[6:])

    @staticmethod
    @functools.cache
    def read(text: str) -> HeadCall:
        words = text.split()
        return HeadCall(*words[:6], *(flag == "1" for flag in words[6:]))  # type: ignore[arg-type]

    def dtype_of_logits(self, hidden: Tensor) -> torch.dtype:
        """Return fp32 for 16-bit hidden states, unless their own dtype is requested."""
        kept = hidden.dtype not in HALVES or hidden.dtype == getattr(torch, self.logits_dtype)
        return hidden.dtype if kept else torch.float32


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
    kd_normalizer: Tensor | None,
    ce_normalizer: Tensor | None,
    scales: Tensor | None,
    numbers: list[float],
    sizes: list[int],
    how: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return loss, parts, gradients of hidden, weight and bias, scales, and statistics.

    A gradient is empty if not wanted, or late. The scales, (2,), are the factors of late
    gradients; empty if ``scales`` is given. The statistics, (3, N), are empty if not wanted.

    The products are in the dtypes of the hidden states. A teacher without a bias has an empty one.
    A late backward passes ``scales``, (2,) or (2, N), which include the grad_output; with None they
    come from the normalisers. ``sizes`` ends with the rows of a chunk.
    """
    call, named = HeadCall.read(how), Numbers.read(numbers)
    options = named.options(sizes, call.divergence)
    check_values(labels, mask, options)
    with backends.on_device(student_hidden):
        return _linear_distillation(
            (student_hidden, student_weight, student_bias),
            (teacher_hidden, teacher_weight, teacher_bias),
            Rows(labels, mask, kd_normalizer, ce_normalizer),
            scales,
            options,
            named,
            sizes[-1],
            call,
        )


def _linear_distillation(
    student_tensors: tuple[Tensor, Tensor, Tensor | None],
    teacher_tensors: tuple[list[Tensor], list[Tensor], list[Tensor]],
    each: Rows,
    scales: Tensor | None,
    options: Options,
    numbers: Numbers,
    chunk_rows: int,
    call: HeadCall,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    student_hidden, student_weight, student_bias = student_tensors
    teacher_hidden, teacher_weight, teacher_bias = teacher_tensors
    labels, mask = each.labels, each.mask
    want_hidden, want_weight, want_bias = [False] * 3 if call.late else call.wanted
    training = want_hidden or want_weight or want_bias
    vocab_size, backend = options.vocab_size, backends.BACKENDS[call.backend]
    n_rows, device = student_hidden.shape[0], student_hidden.device
    compute = reference.accumulation_dtype(student_hidden, *teacher_hidden)

    scale, softcap, teacher_scale, teacher_softcap = numbers.heads
    head, dtype = Head(scale, softcap), student_hidden.dtype
    wide = call.dtype_of_logits(student_hidden)
    student = Side.of(student_weight, student_bias, head, vocab_size, dtype, wide, backend)
    used = [k for k, share in enumerate(numbers.shares) if share]
    teachers = []
    for k in used:
        head, dtype = Head(teacher_scale, teacher_softcap), teacher_hidden[k].dtype
        bias = teacher_bias[k] if len(teacher_bias[k]) else None
        wide = call.dtype_of_logits(teacher_hidden[k])
        teachers.append(Side.of(teacher_weight[k], bias, head, vocab_size, dtype, wide, backend))
    shares = [numbers.shares[k] for k in used]
    target = Target(teachers, shares, call.ensemble, options, backend)

    by, needed = _scales(each, scales, options, numbers.totals, n_rows, compute, device, backend)
    # A gradient of fewer bits than the logits lies in the logits' memory if the backend can do
    # that, else in its own.
    narrower = training and student.gradient_dtype != student.logits_dtype
    apart = narrower and not backend.overwrites
    dtypes = [student.logits_dtype, *target.dtypes, *([student.gradient_dtype] if apart else [])]
    chunks = chunks_of(student_hidden, needed, chunk_rows, vocab_size, dtypes)
    most = max((length(chunk) for chunk in chunks), default=0)
    scratch = Scratch()
    logits = rows_of_logits(most, vocab_size, student.logits_dtype, device, scratch)
    gradients = logits.view(student.gradient_dtype) if narrower and not apart else logits
    if apart:
        gradients = rows_of_logits(most, vocab_size, student.gradient_dtype, device, scratch)
    if teachers:
        target.allocate(most, scratch)

    # Slices cover all rows. With selections, the rows left out have to be 0.
    made = torch.empty if chunks and isinstance(chunks[0], slice) else torch.zeros
    rows = made(len(PARTS), n_rows, dtype=compute, device=device)
    d_hidden = made(
        student_hidden.shape if want_hidden else 0, dtype=student_hidden.dtype, device=device
    )
    weight_gradient = None
    if want_weight:
        accum_dtype = getattr(torch, call.accum_dtype)
        if len(chunks) == 1 and student_weight.dtype == student.weight.dtype:
            accum_dtype = student_weight.dtype  # there is no sum over chunks
        weight_gradient = WeightGradient(student, accum_dtype, student_weight, backend, scratch)
    d_bias = torch.zeros(len(student_weight), dtype=compute, device=device) if want_bias else None
    kd_scale, ce_scale = by.unbind()
    statistics = student_hidden.new_empty(0, dtype=compute)
    if call.statistics:
        statistics = student_hidden.new_zeros((3, n_rows), dtype=compute)
    for chunk in chunks:
        hidden = student_hidden[chunk]
        if needed is not None and isinstance(chunk, slice):
            # A row that nothing needs may hold NaN, which must not reach the weight's gradient.
            hidden = torch.where(needed[chunk, None], hidden, 0)
        s = student.logits(hidden, logits)
        gradient = gradients[: s.shape[0], : s.shape[1]] if training else None
        found = statistics.new_empty(3, s.shape[0]) if call.statistics else None
        t, t_head = s, student.head  # without a teacher nothing reads it
        if teachers:
            t, t_head = target([teacher_hidden[k][chunk] for k in used])
        of_chunk = backend.distillation(
            s,
            t,
            None if labels is None else labels[chunk],
            None if mask is None else mask[chunk],
            kd_scale[chunk] if kd_scale.ndim else kd_scale,
            ce_scale[chunk] if ce_scale.ndim else ce_scale,
            options,
            gradient,
            (student.head, t_head),
            None if d_bias is None else d_bias[:vocab_size],
            found,
        )
        if found is not None:
            statistics[:, chunk] = found
        if isinstance(chunk, slice) and len(chunks) == 1:
            rows = of_chunk
        else:
            rows[:, chunk] = of_chunk
        if gradient is not None and want_hidden:
            made_here = d_hidden[chunk]  # a copy, if the chunk is a selection
            student.products.hidden_gradient(gradient, student.weight, made_here)
            if not isinstance(chunk, slice):
                d_hidden[chunk] = made_here
        if gradient is not None and weight_gradient:
            weight_gradient.add(gradient, hidden)

    loss, parts = backend.reduce_rows(rows, by, options.weights, call.reduction)
    bias_like = student_weight if student_bias is None else student_bias
    d_weight = student_weight.new_empty(0)
    if weight_gradient:
        d_weight = weight_gradient.result(vocab_size)
    d_bias = bias_like.new_empty(0) if d_bias is None else d_bias.to(bias_like.dtype)
    scratch.keep()
    by = by if scales is None else by.new_empty(0)
    return loss, parts, d_hidden, d_weight, d_bias, by, statistics


def _scales(
    each: Rows,
    scales: Tensor | None,
    options: Options,
    given: Sequence[float],
    n_rows: int,
    compute: torch.dtype,
    device: torch.device,
    backend: backends.Backend,
) -> tuple[Tensor, Tensor | None]:
    """Return the scales, and (N,) bool: which rows some part needs; None if all."""
    labels, mask, ignore_index = each.labels, each.mask, options.ignore_index
    totals = as_totals(each, given)
    if scales is not None:
        needed = reference.needed_rows(scales, labels, mask, ignore_index).expand(n_rows)
    else:
        needed = None
        # If the host knows that the total is not 0, every row is needed. If it is 0, no soft loss
        # counts.
        if mask is not None or isinstance(totals[0], Tensor) or totals[0] == 0:
            needed = torch.empty(n_rows, dtype=torch.bool, device=device)
        scales = backend.row_scales(
            totals, labels, mask, n_rows, ignore_index, compute, device, needed
        )
    if needed is not None and not needed.is_cuda and needed.all():
        needed = None
    return scales, needed


@linear_distillation_op.register_fake
def _(
    student_hidden: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    teacher_hidden: list[Tensor],
    *others: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    call, scales = HeadCall.read(others[-1]), others[6]
    n_rows = [student_hidden.shape[0]] if call.reduction == "none" else []
    bias_like = student_weight if student_bias is None else student_bias
    hidden, weight, bias = [False] * 3 if call.late else call.wanted
    compute = reference.accumulation_dtype(student_hidden, *teacher_hidden)
    like = student_hidden.new_empty(0, dtype=compute)
    return (
        like.new_empty(n_rows),
        like.new_empty([len(PARTS), *n_rows]),
        student_hidden.new_empty(student_hidden.shape if hidden else 0),
        student_weight.new_empty(student_weight.shape if weight else 0),
        bias_like.new_empty(student_weight.shape[0] if bias else 0),
        like.new_empty(2 if scales is None else 0),
        like.new_empty((3, student_hidden.shape[0]) if call.statistics else 0),
    )


def _linear_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    loss, *rest, scales, statistics = output
    ctx.set_materialize_grads(False)  # else autograd makes zeros as large as the gradients
    ctx.mark_non_differentiable(*rest, scales, statistics)
    *ctx.settings, how = inputs[11:]
    ctx.call = HeadCall.read(how)
    ctx.teacher_counts = [len(group) for group in inputs[3:6]]
    if not ctx.call.late:
        ctx.save_for_backward(loss, *rest[1:])
        return
    student = inputs[:3]
    teachers = [x for group in inputs[3:6] for x in group]
    ctx.save_for_backward(loss, scales, *inputs[6:8], *student, *teachers)


def _linear_backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Any, ...]:
    nothing = *([None] * n for n in ctx.teacher_counts), *[None] * 8
    if grad_loss is None:
        return *[None] * 3, *nothing
    call, wanted = ctx.call, ctx.call.wanted
    if call.late:
        loss, scales, labels, mask, *saved = ctx.saved_tensors
        student, teachers = saved[:3], saved[3:]
        groups = []
        for count in ctx.teacher_counts:
            groups.append([t.detach() for t in teachers[:count]])
            teachers = teachers[count:]
        _, _, *gradients, _, _ = linear_distillation_op(
            *(None if x is None else x.detach() for x in student),
            *groups,
            labels,
            mask,
            None,
            None,
            late_scales(scales, grad_loss),
            *ctx.settings,
            str(call._replace(late=False, statistics=False)),
        )
        made = [
            finished(g, loss, call.backend) for g, w in zip(gradients, wanted, strict=True) if w
        ]
    else:
        loss, *gradients = ctx.saved_tensors
        made = scale_gradients(
            [g for g, w in zip(gradients, wanted, strict=True) if w], grad_loss, loss, call.backend
        )
    found = iter(made)
    return *(next(found) if w else None for w in wanted), *nothing


linear_distillation_op.register_autograd(_linear_backward, setup_context=_linear_context)
