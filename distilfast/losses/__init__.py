"""The public losses over dense logits and hidden states.

From top to bottom: what is checked, the custom operators (one of each kind, for every backend),
their autograd, the public functions. The mathematics stands in `reference.py`, the choice of an
implementation in `backends.py`.

The gradient is computed together with the loss, where both rows are at hand, and handed out in
the backward. Two cases compute it in the backward instead: `inplace_backward`, and fp16, where a
gradient of a mean is too small to be stored before `grad_output` (the loss scale) is applied.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from numbers import Real
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from distilfast.losses import backends, reference
from distilfast.losses.reference import DIVERGENCES, PARTS, Options

FP32 = torch.finfo(torch.float32)
FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


class DistillationOutput(NamedTuple):
    """loss is the weighted sum of the parts and carries the gradient. The parts are unweighted,
    detached, and reduced as loss is; a part of weight 0 is 0. fp32 (fp64 for fp64 inputs)."""

    loss: Tensor
    kd: Tensor
    ce: Tensor
    cos: Tensor
    mse: Tensor


class DetailedOutput(NamedTuple):
    """A DistillationOutput with what statistics=True asks for: of each row, (...), detached, at the
    temperature; 0 outside the mask."""

    loss: Tensor
    kd: Tensor
    ce: Tensor
    cos: Tensor
    mse: Tensor
    student_entropy: Tensor  # in nats
    teacher_entropy: Tensor
    agreement: Tensor  # 1 where both have their largest logit in the same column, else 0


# --- What is checked: everything that the arguments' types and shapes tell, before any work -------


def check_tensor(name: str, value: Any, dtypes: Sequence[torch.dtype] = FLOATS) -> None:
    """A plain tensor of one of these dtypes, or a ValueError naming it."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    if type(value).__name__ in ("DTensor", "ShardedTensor"):
        raise ValueError(
            f"{name}: expected a plain tensor, got a {type(value).__name__}; "
            "gather it first (.full_tensor())"
        )
    if value.dtype not in dtypes:
        expected = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise ValueError(f"{name}: expected dtype {expected}, got {value.dtype}")


def check_teacher(name: str, value: Tensor) -> None:
    if value.requires_grad:
        raise ValueError(
            f"{name}: the teacher gets no gradient, but requires_grad is True; "
            f"pass {name}.detach() or run the teacher under torch.no_grad()"
        )


def check_like(name: str, value: Tensor, shape: torch.Size, device: torch.device) -> None:
    """The shape and device of the student's rows, or a ValueError with both."""
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
    """The scalars of every loss over the vocabulary."""
    # Comparisons, that NaN fails: torch.compile may hand in symbols for the numbers.
    if not _is_number(temperature) or not 0 < temperature < math.inf:
        raise ValueError(f"temperature: expected a finite number > 0, got {temperature!r}")
    for name, weight in weights.items():
        if not _is_number(weight) or not 0 <= weight < math.inf:
            raise ValueError(f"{name}: expected a finite number >= 0, got {weight!r}")
    if not any(weights.values()):
        names = ", ".join(weights)
        raise ValueError(f"{names}: expected at least one weight > 0, got all 0")
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence: expected one of {DIVERGENCES}, got {divergence!r}")
    if not _is_number(jsd_beta) or not 0 < jsd_beta < 1:
        raise ValueError(f"jsd_beta: expected a number between 0 and 1, got {jsd_beta!r}")
    check_reduction(reduction, normalizers)


def check_statistics(statistics: bool, kd_weight: float) -> None:
    if not isinstance(statistics, bool):
        raise ValueError(f"statistics: expected True or False, got {statistics!r}")
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
                continue  # its value is on the device, and reading it would wait for the device
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
    """The vocabulary's size, from the widths by name and the argument."""
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
    """Labels and mask by value. On a GPU this would wait for the device, so there a wrong label
    makes its own row NaN instead."""
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


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


# --- Rows and their normalisers -------------------------------------------------------------------


class Rows(NamedTuple):
    """What every row's loss needs beside its logits, flat, and what the sums are divided by."""

    labels: Tensor | None  # (N,) int64
    mask: Tensor | None  # (N,), bool or float
    kd_normalizer: Tensor | None  # (), of kd, cos and mse, where it is a tensor
    ce_normalizer: Tensor | None  # (), of ce


# In place of a normaliser that is a number: there is none, so it is counted, or a tensor.
NO_NUMBER = -1.0


def flatten_rows(
    labels: Tensor | None,
    mask: Tensor | None,
    device: torch.device,
    reduction: str,
    kd_normalizer: float | Tensor | None,
    ce_normalizer: float | Tensor | None,
) -> tuple[Rows, list[float]]:
    """Labels and mask as vectors, normalisers that are tensors, and beside them a number for each
    normaliser, or NO_NUMBER. What is neither is counted by the operators, on the device."""
    tensors: list[Tensor | None] = []
    numbers = []
    for value in (kd_normalizer, ce_normalizer):
        if value is not None and not isinstance(value, Tensor) and torch.compiler.is_compiling():
            # Code is compiled for an operator's numbers, but for any value of a tensor. A product
            # takes a number as a symbol, where torch.full would want to know it.
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
    """The way back from `flatten_rows`, as `reference.row_scales` takes them."""
    tensors = rows.kd_normalizer, rows.ce_normalizer
    kd, ce = (
        tensor if tensor is not None else None if number == NO_NUMBER else number
        for tensor, number in zip(tensors, numbers, strict=True)
    )
    return kd, ce


def rows_like(like: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """An empty (N, width), its rows as far apart as those of ``like`` if that is mere padding: then
    a kernel finds both at the same alignment."""
    stride = like.stride(0)
    padded = like.stride(1) == 1 and width <= stride < width + 128
    return like.new_empty_strided(
        (like.shape[0], width), (stride if padded else width, 1), dtype=dtype
    )


# --- The custom operators: opaque to torch.compile, one for all backends --------------------------
# What stands around a row kernel is the operator's, too: two launches, where PyTorch's own would
# be up to 18.


class Call(NamedTuple):
    """How an operator is called: one string of its schema. PyTorch goes through the arguments of a
    custom operator in Python, in a time that grows with the square of their number."""

    divergence: str
    reduction: str
    backend: str
    wanted: bool  # a gradient
    late: bool  # but in the backward
    inplace: bool  # over the logits
    statistics: bool = False

    def __str__(self) -> str:
        return " ".join(map(str, self[:3])) + "".join(f" {int(flag)}" for flag in self[3:])

    @staticmethod
    @functools.cache
    def read(text: str) -> Call:
        divergence, reduction, backend, *flags = text.split()
        return Call(divergence, reduction, backend, *(flag == "1" for flag in flags))


TOTALS = slice(6, 8)  # among an operator's numbers, those of `flatten_rows`


def as_options(numbers: Sequence[float], sizes: Sequence[int], divergence: str) -> Options:
    """Options from an operator's arguments: they begin the numbers and the sizes."""
    temperature, kd, ce, cos, mse, beta = numbers[:6]
    return Options(temperature, kd, ce, cos, mse, beta, divergence, sizes[0], sizes[1])


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
    """The loss, the parts, the gradient for a grad_output of 1 (empty where it is not wanted, or
    late), the scales (2,) by which a late one has to be multiplied, and the statistics (3, N)
    (empty where they are not wanted)."""
    call = Call.read(how)
    options = as_options(numbers, sizes, call.divergence)
    check_values(labels, mask, options)
    backend = backends.BACKENDS[call.backend]
    now = call.wanted and not call.late
    gradient = rows_like(student, student.shape[1], student.dtype) if now else None
    compute = reference.accumulation_dtype(student, teacher)
    shape = (3, student.shape[0]) if call.statistics else 0
    statistics = student.new_empty(shape, dtype=compute)
    with backends.on_device(student):
        scales = backend.row_scales(
            as_totals(Rows(labels, mask, kd_normalizer, ce_normalizer), numbers[TOTALS]),
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
        loss, parts = backend.reduce_rows(rows, scales, options[1:5], call.reduction)
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
    """The gradient alone, into ``gradient``, which may be ``student``: see inplace_backward. The
    scales, (2,) or (2, N), are times the grad_output."""
    call = Call.read(how)
    options = as_options(numbers, sizes, call.divergence)
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
    """The scales times the grad_output: (2,), or (2, N) where each row has its own."""
    grad_loss = grad_loss.detach()
    return scales[:, None] * grad_loss if grad_loss.ndim else scales * grad_loss


def finished(gradient: Tensor, loss: Tensor, backend: str) -> Tensor:
    """The gradient. With create_graph it is wrapped, so that differentiating it raises."""
    if not torch.is_grad_enabled():
        return gradient
    return cast(Tensor, scale_gradient_op(gradient, loss.new_ones(()), loss, backend))


def scale_gradients(
    gradients: Sequence[Tensor], grad_loss: Tensor, loss: Tensor, backend: str
) -> list[Tensor]:
    """Each gradient * grad_loss, in its own memory where nobody can want it again: the graph is not
    kept. (Hooks on saved tensors that hand out what they were given see it change.)"""
    traced = _is_traced(gradients)
    kept = torch.is_grad_enabled() or torch._C._autograd._get_current_graph_task_keep_graph()
    if traced or kept:
        return [scale_gradient_op(g, grad_loss, loss, backend) for g in gradients]
    if grad_loss.ndim == 0 and grad_loss.device.type == "cpu" and grad_loss == 1:
        return list(gradients)  # what a plain loss.backward() brings; a GPU's kernel finds it out
    _scale_in_place(gradients, grad_loss, backend)
    return list(gradients)


def _is_traced(gradients: Sequence[Tensor]) -> bool:
    """Whether somebody records what is done, who sees operators alone."""
    recorded = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0
    return recorded or any(type(g) is not Tensor for g in gradients)


def _scale_in_place(gradients: Sequence[Tensor], grad_loss: Tensor, backend: str) -> None:
    """Each *= grad_loss, () or (N,), rounded once; one launch for all."""
    rows = [g if g.ndim == 2 else g.reshape(1, -1) for g in gradients]
    dense = [g if g.shape[1] < 2 or g.stride(1) == 1 else g.contiguous() for g in rows]
    with backends.on_device(dense[0]):
        backends.BACKENDS[backend].scale(dense, grad_loss)
    for scaled, own in zip(dense, rows, strict=True):
        if scaled is not own:
            own.copy_(scaled)


@torch.library.custom_op("distilfast::scale_gradient", mutates_args=())
def scale_gradient_op(gradient: Tensor, grad_loss: Tensor, loss: Tensor, backend: str) -> Tensor:
    """gradient * grad_loss, and an error for whoever differentiates it again.

    ``loss`` ties the result to the graph: without it a double backward would find a constant here
    and silently be 0.
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
        "is not supported. distilfast.reference holds the formulas to build one on."
    )


scale_gradient_op.register_autograd(_no_double_backward)


def _hidden_gradients(student: list[Tensor]) -> list[Tensor]:
    """Room for the gradients; fp16's are held in fp32 until the loss scale has been applied."""
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


# --- The public functions -------------------------------------------------------------------------


def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
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
    """The weighted sum of soft-target and hard-label losses over the vocabulary.

    Per row, with T the temperature:

    - kd: T^2 KL(softmax(t / T) || softmax(s / T)) (Hinton et al. 2015, section 2.1), or the
      divergence chosen;
    - ce: -log softmax(s)[label] at temperature 1;
    - cos: 1 - s.t / (|s| |t|) over the vocabulary;
    - mse: the sum over the vocabulary of (s - t)^2.

    Args:
        student_logits: (..., V_s), bf16, fp16, fp32 or fp64 (torch backend).
        teacher_logits: (..., V_t), the same leading shape; the dtype may differ. Gets no gradient.
        labels: (...) int64, never shifted here; ``ignore_index`` where there is no hard label.
        temperature: T, of the soft targets on both sides; > 0.
        kd_weight, ce_weight, cos_weight, mse_weight: >= 0, not all 0. A part of weight 0 costs
            nothing and is 0.
        divergence: "forward_kl", "reverse_kl" or "jsd". Near equality jsd is
            ``jsd_beta * (1 - jsd_beta)`` times the KL, so its weight does not carry over.
        jsd_beta: the teacher's share of the mixture, 0 < jsd_beta < 1.
        mask: (...) bool, or float row weights >= 0, for kd, cos and mse. None: all ones.
        ignore_index: the label of rows without a hard label.
        vocab_size: columns from here on are padding; needed where V_s != V_t.
        reduction: "mean" divides kd, cos and mse by the sum of the mask and ce by the number of
            labelled rows (0 gives 0), "sum" does not, "none" returns (...), times the mask.
        kd_normalizer, ce_normalizer: a number or 0-d tensor that replaces those divisors: the
            global count of a batch that is spread over micro-batches and ranks.
        inplace_backward: the backward overwrites ``student_logits`` with its gradient, which saves
            a tensor of its size and costs a second reading of both logits. Nothing else may read
            the student's after that. For rows that are dense or padded; others are left alone.
        statistics: also give, of each row, the entropies of student and teacher at T and whether
            their largest logits stand in the same column. Needs a kd_weight; they are 0 outside the
            mask.
        backend: "auto", "triton", "cpp" or "torch".

    Near the teacher kd keeps its relative accuracy: with fp32 logits it is right to 1e-3 of itself
    down to 1e-6 nats, and it is never negative (docs/exactness.md).

    Returns:
        DistillationOutput(loss, kd, ce, cos, mse); with ``statistics`` a DetailedOutput, which has
        student_entropy, teacher_entropy and agreement, too.

    Raises:
        ValueError: naming the argument, what was expected and what came.

    Example:
        >>> import torch
        >>> student = torch.tensor([[0.0, 0.0]], requires_grad=True)
        >>> teacher = torch.tensor([[2.0, 0.0]])
        >>> out = distillation_loss(student, teacher, temperature=2.0)
        >>> out.loss.backward()
        >>> round(out.kd.item(), 4), [round(g, 4) for g in student.grad[0].tolist()]
        (0.4438, [-0.4621, 0.4621])
    """
    weights = {
        "kd_weight": kd_weight,
        "ce_weight": ce_weight,
        "cos_weight": cos_weight,
        "mse_weight": mse_weight,
    }
    normalizers = {"kd_normalizer": kd_normalizer, "ce_normalizer": ce_normalizer}
    check_options(temperature, weights, divergence, jsd_beta, reduction, normalizers)
    check_statistics(statistics, kd_weight)
    check_tensor("student_logits", student_logits)
    check_tensor("teacher_logits", teacher_logits)
    check_teacher("teacher_logits", teacher_logits)
    if student_logits.ndim == 0 or teacher_logits.ndim == 0:
        raise ValueError("student_logits, teacher_logits: expected (..., V), got a 0-d tensor")
    leading, device = student_logits.shape[:-1], student_logits.device
    if teacher_logits.shape[:-1] != leading:
        raise ValueError(
            f"teacher_logits: expected the leading shape of student_logits {tuple(leading)}, "
            f"got {tuple(teacher_logits.shape[:-1])}"
        )
    if teacher_logits.device != device:
        raise ValueError(
            f"teacher_logits: expected device {device} (the student's), got {teacher_logits.device}"
        )
    vocab = check_vocab(
        ("student_logits", student_logits.shape[-1]),
        [("teacher_logits", teacher_logits.shape[-1])],
        vocab_size,
    )
    check_labels(labels, ignore_index, ce_weight, leading, device)
    check_mask(mask, leading, device)
    backend = backends.choose(backend, device, (student_logits.dtype, teacher_logits.dtype))

    rows, totals = flatten_rows(
        labels if ce_weight else None, mask, device, reduction, kd_normalizer, ce_normalizer
    )
    # Compiled code keeps its own account of what may be overwritten; in place is for eager mode.
    flat = as_matrix(student_logits)
    inplace = inplace_backward and not torch.compiler.is_compiling()
    inplace = inplace and _is_overwritable(flat, student_logits)
    late = inplace or student_logits.dtype == torch.float16
    wanted = student_logits.requires_grad and torch.is_grad_enabled()
    loss, parts, _, _, found = distillation_op(
        flat,
        as_matrix(teacher_logits),
        *rows,
        [float(x) for x in (temperature, *weights.values(), jsd_beta, *totals)],
        [ignore_index, vocab],
        str(Call(divergence, reduction, backend, wanted, late, inplace, statistics)),
    )
    return as_output(loss, parts, leading, reduction, found if statistics else None)


def as_matrix(x: Tensor) -> Tensor:
    """(..., V) as (N, V)."""
    return x if x.ndim == 2 else x.reshape(-1, x.shape[-1])


def _is_overwritable(flat: Tensor, logits: Tensor) -> bool:
    """Whether ``flat``, (N, V), is the logits' own memory, row for row; padding between is fine."""
    own = flat.data_ptr() == logits.data_ptr() and flat.stride(1) == 1
    return own and (flat.shape[0] < 2 or flat.stride(0) >= flat.shape[1])


def as_output(
    loss: Tensor,
    parts: Tensor,
    leading: torch.Size,
    reduction: str,
    statistics: Tensor | None = None,
) -> DistillationOutput | DetailedOutput:
    """The operator's outputs in the shape of the rows: (...) with "none", else 0-d. Statistics,
    (3, N), are of each row in either case."""
    apart = parts.detach().unbind()
    if reduction == "none" and len(leading) != 1:
        loss, apart = loss.reshape(leading), tuple(part.reshape(leading) for part in apart)
    if statistics is None:
        return DistillationOutput(loss, *apart)
    return DetailedOutput(loss, *apart, *(x.reshape(leading) for x in statistics.unbind()))


def hidden_cosine_loss(
    student_hidden: Tensor | Sequence[Tensor],
    teacher_hidden: Tensor | Sequence[Tensor],
    mask: Tensor | None = None,
    *,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """The cosine distance between hidden states, 1 - s.t / (|s| |t|) (Sanh et al. 2019, section 3).

    Args:
        student_hidden: (..., D), or a list of one such tensor a layer: the mean over layers.
        teacher_hidden: the same shapes. Gets no gradient.
        mask: (...) bool, or float row weights >= 0. None: all ones.
        reduction: "mean" divides by the sum of the mask (0 gives 0), "sum", or "none": (...).
        normalizer: a number or 0-d tensor that replaces the sum of the mask.
        backend: "auto", "triton", "cpp" or "torch".

    Returns:
        fp32 (fp64 for fp64 inputs), 0-d or (...). A zero vector gives 1 and a zero gradient.

    Raises:
        ValueError: naming the argument, what was expected and what came.

    Example:
        >>> import torch
        >>> hidden_cosine_loss(torch.tensor([[3.0, 4.0]]), torch.tensor([[4.0, 3.0]])).item()
        0.03999...
    """
    check_reduction(reduction, {"normalizer": normalizer})
    student = _as_layers("student_hidden", student_hidden)
    teacher = _as_layers("teacher_hidden", teacher_hidden)
    if len(student) != len(teacher):
        raise ValueError(
            f"teacher_hidden: expected {len(student)} layers, as student_hidden has, "
            f"got {len(teacher)}"
        )
    leading, device = student[0].shape[:-1], student[0].device
    for s, t in zip(student, teacher, strict=True):
        check_teacher("teacher_hidden", t)
        if s.shape[:-1] != leading:
            raise ValueError(
                f"student_hidden: expected leading shape {tuple(leading)} in every layer, "
                f"got {tuple(s.shape[:-1])}"
            )
        check_like("teacher_hidden", t, s.shape, device)
    check_mask(mask, leading, device)
    backend = backends.choose(backend, device, [x.dtype for x in (*student, *teacher)])
    rows, totals = flatten_rows(None, mask, device, reduction, normalizer, None)
    wanted = any(s.requires_grad for s in student) and torch.is_grad_enabled()
    loss, _ = hidden_cosine_op(
        [as_matrix(s) for s in student],
        [as_matrix(t) for t in teacher],
        rows.mask,
        rows.kd_normalizer,
        totals[0],
        str(Call("none", reduction, backend, wanted, late=False, inplace=False)),
    )
    return cast(Tensor, loss.reshape(leading) if reduction == "none" else loss)


def _as_layers(name: str, value: Any) -> list[Tensor]:
    layers = list(value) if isinstance(value, (list, tuple)) else [value]
    if not layers:
        raise ValueError(f"{name}: expected a tensor or a list of layers, got an empty list")
    for layer in layers:
        check_tensor(name, layer)
        if layer.ndim == 0:
            raise ValueError(f"{name}: expected (..., D), got a 0-d tensor")
    return layers


def combine_teachers(
    logits: Sequence[Tensor],
    weights: Sequence[float] | None = None,
    *,
    temperature: float,
    mode: str = "probability",
    vocab_size: int | None = None,
) -> Tensor:
    """Logits z of an ensemble: softmax(z / T) is its distribution (Hinton et al. 2015, section 1).

    Args:
        logits: K teachers' (..., V_k), one leading shape; none may require a gradient.
        weights: K numbers >= 0, normalised to sum 1; None: equal. A weight of 0 is not read.
        temperature: T > 0, the temperature at which z will be used.
        mode: "probability", the arithmetic mean: z = T log sum_k w_k softmax(t_k / T); or "logit",
            the geometric mean: z = sum_k w_k t_k.
        vocab_size: columns from here on are padding; needed where the widths differ.

    Returns:
        (..., vocab_size) fp32 (fp64 for fp64 inputs).

    Raises:
        ValueError: naming the argument, what was expected and what came.

    Example:
        >>> import torch
        >>> one, two = torch.tensor([0.75, 0.25]).log(), torch.tensor([0.25, 0.75]).log()
        >>> combine_teachers([one, two], temperature=1.0).softmax(-1).tolist()
        [0.5, 0.5]
    """
    if not isinstance(logits, (list, tuple)) or not logits:
        raise ValueError(f"logits: expected a list of at least one tensor, got {type(logits)}")
    check_options(temperature, {"weight": 1.0}, "forward_kl", 0.5, "sum", {})
    check_ensemble_mode("mode", mode)
    for t in logits:
        check_tensor("logits", t)
        check_teacher("logits", t)
        if t.ndim == 0:
            raise ValueError("logits: expected (..., V), got a 0-d tensor")
        if t.shape[:-1] != logits[0].shape[:-1] or t.device != logits[0].device:
            raise ValueError(
                f"logits: expected one leading shape and device, got {tuple(logits[0].shape[:-1])} "
                f"on {logits[0].device} and {tuple(t.shape[:-1])} on {t.device}"
            )
    widths = [("logits", t.shape[-1]) for t in logits]
    vocab = check_vocab(widths[0], widths[1:], vocab_size)
    z = combine_teachers_op(
        [as_matrix(t) for t in logits],
        normalize_weights("weights", weights, len(logits)),
        float(temperature),
        mode,
        vocab,
        backends.choose("auto", logits[0].device, [t.dtype for t in logits]),
    )
    return z.reshape(*logits[0].shape[:-1], vocab)


def check_ensemble_mode(name: str, mode: str) -> None:
    if mode not in ("probability", "logit"):
        raise ValueError(f"{name}: expected 'probability' or 'logit', got {mode!r}")


def normalize_weights(name: str, weights: Sequence[float] | None, count: int) -> list[float]:
    """The ensemble's weights, summing to 1."""
    if weights is None:
        return [1 / count] * count
    if len(weights) != count:
        raise ValueError(f"{name}: expected {count} numbers, one a teacher, got {len(weights)}")
    for weight in weights:
        if not _is_number(weight) or not 0 <= weight < math.inf:
            raise ValueError(f"{name}: expected finite numbers >= 0, got {weight!r}")
    if sum(weights) == 0:
        raise ValueError(f"{name}: expected at least one weight > 0, got all 0")
    return [float(weight) / sum(weights) for weight in weights]


class DistillationLoss(nn.Module):
    """`distillation_loss` with its keywords fixed, checked when the module is made.

    Example:
        >>> import torch
        >>> loss = DistillationLoss(temperature=2.0, kd_weight=5.0, ce_weight=2.0)
        >>> out = loss(torch.zeros(1, 3), torch.zeros(1, 3), torch.tensor([2]))
        >>> round(out.loss.item(), 4)  # 2 log 3
        2.1972
    """

    def __init__(self, **keywords: Any) -> None:
        super().__init__()
        for name in ("mask", "kd_normalizer", "ce_normalizer"):
            if name in keywords:
                raise ValueError(f"{name}: belongs to the call, not to DistillationLoss(...)")
        self.keywords = keywords
        # A row of its own finds wrong keywords now and not at the first step.
        width = keywords.get("vocab_size") or 2
        probe = torch.zeros(0, width if isinstance(width, int) else 2)
        backend = keywords.get("backend", "auto")
        known = {**keywords, "backend": "torch" if backend in tuple(backends.BACKENDS) else backend}
        distillation_loss(probe, probe, torch.zeros(0, dtype=torch.int64), **known)

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        labels: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        kd_normalizer: float | Tensor | None = None,
        ce_normalizer: float | Tensor | None = None,
    ) -> DistillationOutput | DetailedOutput:
        return distillation_loss(
            student_logits,
            teacher_logits,
            labels,
            mask=mask,
            kd_normalizer=kd_normalizer,
            ce_normalizer=ce_normalizer,
            **self.keywords,
        )

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.keywords.items())
