"""The custom operators over dense logits and hidden states. All backends share them.

They are opaque to torch.compile. The forward computes the gradient together with the loss, while
both rows are at hand; the backward returns it. In two cases the backward computes the gradient:
with `inplace_backward`, and in fp16, where the gradient of a mean is too small to be stored before
`grad_output` (the loss scale) is applied.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from distilfast.losses import backends, reference
from distilfast.losses.arguments import check_mask_values, check_values
from distilfast.losses.reference import PARTS, Options
from distilfast.losses.rows import Rows, as_totals, rows_like


class Call(NamedTuple):
    """The settings of an operator's call, passed as one string.

    PyTorch goes through the arguments of a custom operator in Python, in a time that grows with
    the square of their number.
    """

    divergence: str
    reduction: str
    backend: str
    wanted: bool  # a gradient is wanted
    late: bool  # the backward computes the gradient
    inplace: bool  # the gradient overwrites the logits
    statistics: bool = False

    def __str__(self) -> str:
        return " ".join(map(str, self[:3])) + "".join(f" {int(flag)}" for flag in self[3:])

    @staticmethod
    @functools.cache
    def read(text: str) -> Call:
        divergence, reduction, backend, *flags = text.split()
        return Call(divergence, reduction, backend, *(flag == "1" for flag in flags))


class Numbers(NamedTuple):
    """The numbers of an operator by name. `flat` makes them one argument of its schema."""

    temperature: float
    weights: tuple[float, ...]  # in the order of PARTS
    jsd_beta: float
    totals: tuple[float, ...]  # from `flatten_rows`: that of kd, cos and mse, and that of ce
    heads: tuple[float, ...] = ()  # scale and softcap of the student, then of the teachers
    shares: tuple[float, ...] = ()  # the teachers' weights

    def flat(self) -> list[float]:
        groups = self.weights, (self.jsd_beta,), self.totals, self.heads, self.shares
        return [float(self.temperature), *(float(x) for group in groups for x in group)]

    @staticmethod
    def read(flat: Sequence[float]) -> Numbers:
        rest = iter(flat)

        def take(n: int | None) -> tuple[float, ...]:
            return tuple(itertools.islice(rest, n))

        (temperature,), weights, (beta,), totals = take(1), take(len(PARTS)), take(1), take(2)
        return Numbers(temperature, weights, beta, totals, take(4), take(None))

    def options(self, sizes: Sequence[int], divergence: str) -> Options:
        """Return the backends' Options. ``sizes`` begins with ignore_index and vocab_size."""
        (kd, ce, cos, mse), (ignore_index, vocab_size) = self.weights, sizes[:2]
        return Options(
            self.temperature, kd, ce, cos, mse, self.jsd_beta, divergence, ignore_index, vocab_size
        )


@torch.library.custom_op("distilfast::distillation", mutates_args=())
def distillation_op(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    mask: Tensor | None,
    kd_normalizer: Tensor | None,
    ce_normalizer: Tensor | None,
    numbers: list[float],
    sizes: list[int],
    how: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return loss, parts, gradient, scales and statistics.

    The gradient is the one for a grad_output of 1; it is empty if not wanted, or late. The scales,
    (2,), are the factors of a late gradient. The statistics, (3, N), are empty if not wanted.
    """
    call, named = Call.read(how), Numbers.read(numbers)
    options = named.options(sizes, call.divergence)
    check_values(labels, mask, options)
    backend = backends.BACKENDS[call.backend]
    now = call.wanted and not call.late
    gradient = rows_like(student, student.shape[1], student.dtype) if now else None
    compute = reference.accumulation_dtype(student, teacher)
    shape = (3, student.shape[0]) if call.statistics else 0
    statistics = student.new_empty(shape, dtype=compute)
    with backends.on_device(student):
        scales = backend.row_scales(
            as_totals(Rows(labels, mask, kd_normalizer, ce_normalizer), named.totals),
            labels,
            mask,
            student.shape[0],
            options.ignore_index,
            compute,
            student.device,
        )
        rows = backend.distillation(
            student,
            teacher,
            labels,
            mask,
            *scales.unbind(),
            options,
            gradient,
            reference.PLAIN,
            None,
            statistics if call.statistics else None,
        )
        loss, parts = backend.reduce_rows(rows, scales, options.weights, call.reduction)
    gradient = student.new_empty(0) if gradient is None else gradient
    return loss, parts, gradient, scales, statistics


@distillation_op.register_fake
def _(
    student: Tensor, teacher: Tensor, *others: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    call = Call.read(others[-1])
    n_rows = [student.shape[0]] if call.reduction == "none" else []
    now = call.wanted and not call.late
    gradient = rows_like(student, student.shape[1], student.dtype) if now else student.new_empty(0)
    like = student.new_empty(0, dtype=reference.accumulation_dtype(student, teacher))
    return (
        like.new_empty(n_rows),
        like.new_empty([len(PARTS), *n_rows]),
        gradient,
        like.new_empty(2),
        like.new_empty((3, student.shape[0]) if call.statistics else 0),
    )


@torch.library.custom_op("distilfast::distillation_gradient", mutates_args=("gradient",))
def distillation_gradient_op(
    gradient: Tensor,
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    mask: Tensor | None,
    scales: Tensor,
    numbers: list[float],
    sizes: list[int],
    how: str,
) -> None:
    """Compute the gradient alone, into ``gradient``.

    ``gradient`` may be ``student`` itself: see inplace_backward. The scales, (2,) or (2, N),
    already include the grad_output.
    """
    call = Call.read(how)
    options = Numbers.read(numbers).options(sizes, call.divergence)
    with backends.on_device(student):
        backends.BACKENDS[call.backend].distillation(
            student, teacher, labels, mask, *scales.unbind(), options, gradient
        )


def _distillation_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    student, teacher, labels, mask, _, _, *ctx.settings = inputs
    loss, parts, gradient, scales, statistics = output
    ctx.set_materialize_grads(False)  # else autograd makes zeros as large as the gradients
    ctx.mark_non_differentiable(parts, gradient, scales, statistics)
    ctx.call = Call.read(ctx.settings[-1])
    if ctx.call.late:
        ctx.save_for_backward(loss, scales, student, teacher, labels, mask)
    else:
        ctx.save_for_backward(loss, gradient)


def _distillation_backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Any, ...]:
    others = [None] * 8
    if grad_loss is None:
        return None, *others
    call = ctx.call
    if not call.late:
        loss, gradient = ctx.saved_tensors
        return *scale_gradients([gradient], grad_loss, loss, call.backend), *others
    loss, scales, student, *rest = ctx.saved_tensors
    gradient = student.detach()
    if not call.inplace:
        gradient = rows_like(student, student.shape[1], student.dtype)
    distillation_gradient_op(
        gradient, student.detach(), *rest, late_scales(scales, grad_loss), *ctx.settings
    )
    return finished(gradient, loss, call.backend), *others


distillation_op.register_autograd(_distillation_backward, setup_context=_distillation_context)


def late_scales(scales: Tensor, grad_loss: Tensor) -> Tensor:
    """Return the scales times the grad_output: (2,), or (2, N) if each row has its own."""
    grad_loss = grad_loss.detach()
    return scales[:, None] * grad_loss if grad_loss.ndim else scales * grad_loss


def finished(gradient: Tensor, loss: Tensor, backend: str) -> Tensor:
    """Return the gradient. With create_graph it is wrapped so that differentiating it raises."""
    if not torch.is_grad_enabled():
        return gradient
    return cast(Tensor, scale_gradient_op(gradient, loss.new_ones(()), loss, backend))


def scale_gradients(
    gradients: Sequence[Tensor], grad_loss: Tensor, loss: Tensor, backend: str
) -> list[Tensor]:
    """Return each gradient * grad_loss, computed in place if the graph is not kept.

    Then no second backward can need the old values. (Hooks on saved tensors that return the tensor
    they were given do see it change.)
    """
    traced = _is_traced(gradients)
    kept = torch.is_grad_enabled() or torch._C._autograd._get_current_graph_task_keep_graph()
    if traced or kept:
        return [scale_gradient_op(g, grad_loss, loss, backend) for g in gradients]
    if grad_loss.ndim == 0 and grad_loss.device.type == "cpu" and grad_loss == 1:
        return list(gradients)  # a plain loss.backward(); on a GPU the kernel compares with 1
    _scale_in_place(gradients, grad_loss, backend)
    return list(gradients)


def _is_traced(gradients: Sequence[Tensor]) -> bool:
    """Return whether a tracer records the calls. A tracer sees only operators."""
    recorded = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0
    return recorded or any(type(g) is not Tensor for g in gradients)


def _scale_in_place(gradients: Sequence[Tensor], grad_loss: Tensor, backend: str) -> None:
    """Multiply each by grad_loss, () or (N,), with one rounding and one launch for all."""
    rows = [g if g.ndim == 2 else g.reshape(1, -1) for g in gradients]
    dense = [g if g.shape[1] < 2 or g.stride(1) == 1 else g.contiguous() for g in rows]
    with backends.on_device(dense[0]):
        backends.BACKENDS[backend].scale(dense, grad_loss)
    for scaled, own in zip(dense, rows, strict=True):
        if scaled is not own:
            own.copy_(scaled)


@torch.library.custom_op("distilfast::scale_gradient", mutates_args=())
def scale_gradient_op(gradient: Tensor, grad_loss: Tensor, loss: Tensor, backend: str) -> Tensor:
    """Return gradient * grad_loss; differentiating the result raises an error.

    ``loss`` ties the result to the graph. Without it a double backward would see a constant here
    and silently give 0.
    """
    scaled = torch.empty_like(gradient, memory_format=torch.contiguous_format).copy_(gradient)
    _scale_in_place([scaled], grad_loss, backend)
    return scaled


@scale_gradient_op.register_fake
def _(gradient: Tensor, grad_loss: Tensor, loss: Tensor, backend: str) -> Tensor:
    return torch.empty_like(gradient, memory_format=torch.contiguous_format)


def _no_double_backward(ctx: Any, *_: Any) -> None:
    raise RuntimeError(
        "distilfast: the losses can be differentiated once; a double backward (create_graph=True) "
        "is not supported. distilfast.losses.reference holds the formulas to build one on."
    )


scale_gradient_op.register_autograd(_no_double_backward)


def _hidden_gradients(student: list[Tensor]) -> list[Tensor]:
    """Allocate the gradients. Those of fp16 are fp32 until the loss scale has been applied."""
    return [
        torch.empty_like(
            s,
            dtype=torch.float32 if s.dtype == torch.float16 else s.dtype,
            memory_format=torch.contiguous_format,
        )
        for s in student
    ]


@torch.library.custom_op("distilfast::hidden_cosine", mutates_args=())
def hidden_cosine_op(
    student: list[Tensor],
    teacher: list[Tensor],
    mask: Tensor | None,
    normalizer: Tensor | None,
    total: float,
    how: str,
) -> tuple[Tensor, list[Tensor]]:
    call = Call.read(how)
    check_mask_values(mask)
    backend = backends.BACKENDS[call.backend]
    gradients = _hidden_gradients(student) if call.wanted else []
    with backends.on_device(student[0]):
        scales = backend.row_scales(
            as_totals(Rows(None, mask, normalizer, None), (total, 0.0)),
            None,
            mask,
            student[0].shape[0],
            0,
            reference.accumulation_dtype(*student, *teacher),
            student[0].device,
        )
        rows = backend.hidden_cosine(student, teacher, mask, scales[0], gradients)
        if call.reduction == "none":
            return rows, gradients
        loss, _ = backend.reduce_rows(rows[None], scales, (1.0,), call.reduction)
    return loss, gradients


@hidden_cosine_op.register_fake
def _(student: list[Tensor], teacher: list[Tensor], *others: Any) -> tuple[Tensor, list[Tensor]]:
    call = Call.read(others[-1])
    compute = reference.accumulation_dtype(*student, *teacher)
    n_rows = [student[0].shape[0]] if call.reduction == "none" else []
    return student[0].new_empty(n_rows, dtype=compute), (
        _hidden_gradients(student) if call.wanted else []
    )


def _hidden_cosine_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    loss, gradients = output
    ctx.set_materialize_grads(False)  # else autograd makes zeros as large as the gradients
    ctx.mark_non_differentiable(*gradients)
    ctx.backend = Call.read(inputs[-1]).backend
    ctx.save_for_backward(loss, *gradients)


def _hidden_cosine_backward(ctx: Any, grad_loss: Tensor | None, _: Any) -> tuple[Any, ...]:
    loss, *gradients = ctx.saved_tensors
    nothing = [None] * len(gradients)
    if grad_loss is None:
        return nothing, nothing, *[None] * 4
    return scale_gradients(gradients, grad_loss, loss, ctx.backend), nothing, *[None] * 4


hidden_cosine_op.register_autograd(_hidden_cosine_backward, setup_context=_hidden_cosine_context)


@torch.library.custom_op("distilfast::combine_teachers", mutates_args=())
def combine_teachers_op(
    logits: list[Tensor],
    weights: list[float],
    temperature: float,
    mode: str,
    vocab_size: int,
    backend: str,
) -> Tensor:
    z = rows_like(logits[0], vocab_size, reference.accumulation_dtype(*logits))
    combine = backends.BACKENDS[backend].combine_teachers
    with backends.on_device(z):
        combine(logits, weights, temperature, mode, vocab_size, z)
    return z


@combine_teachers_op.register_fake
def _(
    logits: list[Tensor],
    weights: list[float],
    temperature: float,
    mode: str,
    vocab_size: int,
    backend: str,
) -> Tensor:
    return rows_like(logits[0], vocab_size, reference.accumulation_dtype(*logits))


def is_overwritable(flat: Tensor, logits: Tensor) -> bool:
    """Return whether ``flat``, (N, V), is the memory of ``logits``; rows may be padded."""
    own = flat.data_ptr() == logits.data_ptr() and flat.stride(1) == 1
    return own and (flat.shape[0] < 2 or flat.stride(0) >= flat.shape[1])
