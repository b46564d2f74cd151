"""The public losses over dense logits and hidden states.

From top to bottom: what is checked, the custom operators (one of each kind, for every backend),
their autograd, the public functions. The mathematics stands in `reference.py`, the choice of an
implementation in `backends.py`.

The gradient is computed together with the loss, where both rows are at hand, and handed out in
the backward. Two cases compute it in the backward instead: `inplace_backward`, and fp16, where a
gradient of a mean is too small to be stored before `grad_output` (the loss scale) is applied.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from distilfast import backends, reference
from distilfast.reference import DIVERGENCES, PARTS, Options

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


class DistillationOutput(NamedTuple):
    """loss is the weighted sum of the parts and carries the gradient. The parts are unweighted,
    detached, and reduced as loss is; a part of weight 0 is 0. fp32 (fp64 for fp64 inputs)."""

    loss: Tensor
    kd: Tensor
    ce: Tensor
    cos: Tensor
    mse: Tensor


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
    """What every row's loss needs beside its logits, flat and on the device."""

    labels: Tensor | None  # (N,) int64
    mask: Tensor | None  # (N,) fp32 or fp64
    kd_scale: Tensor  # (), 1 / the normaliser of kd, cos and mse
    ce_scale: Tensor  # (), 1 / the normaliser of ce


def flatten_rows(
    n_rows: int,
    device: torch.device,
    compute: torch.dtype,
    labels: Tensor | None,
    mask: Tensor | None,
    reduction: str,
    kd_normalizer: float | Tensor | None,
    ce_normalizer: float | Tensor | None,
    ignore_index: int,
) -> Rows:
    """Labels and mask as vectors, the normalisers as scales; nothing waits for the device."""
    if labels is not None:
        labels = labels.reshape(-1)
    if mask is not None:
        mask = mask.detach().reshape(-1).to(compute)
    one = torch.ones((), dtype=compute, device=device)
    if reduction != "mean":
        return Rows(labels, mask, one, one)
    kd_scale, ce_scale = one, one
    if kd_normalizer is not None:
        kd_total = _as_scalar(kd_normalizer, one)
        # A normaliser of 0 means that nothing counts; a row left in would give inf or NaN.
        mask = (one.expand(n_rows) if mask is None else mask) * (kd_total > 0)
        kd_scale = _reciprocal(kd_total)
    elif mask is not None:
        kd_scale = _reciprocal(mask.sum())
    else:
        kd_scale = one / max(n_rows, 1)
    if ce_normalizer is not None:
        ce_total = _as_scalar(ce_normalizer, one)
        if labels is not None:
            labels = torch.where(ce_total > 0, labels, ignore_index)
        ce_scale = _reciprocal(ce_total)
    elif labels is not None:
        ce_scale = _reciprocal((labels != ignore_index).sum().to(compute))
    return Rows(labels, mask, kd_scale, ce_scale)


def _as_scalar(value: float | Tensor, like: Tensor) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach().to(like, non_blocking=True)
    return like * value


def _reciprocal(total: Tensor) -> Tensor:
    """1 / total, and 0 for 0: nothing counted gives a loss of 0."""
    return total.reciprocal().masked_fill_(total <= 0, 0)


def reduce_parts(
    rows: Tensor, kd_scale: Tensor, ce_scale: Tensor, options: Options, reduction: str
) -> tuple[Tensor, Tensor]:
    """(4, N) parts of each row -> the loss and the (4,) or (4, N) parts, reduced."""
    parts = rows
    if reduction != "none":
        parts = rows.sum(1) * torch.stack([kd_scale, ce_scale, kd_scale, kd_scale])
    # Weights stay on the host: a tensor of them would have to wait for the device. A part of weight
    # 0 is 0, and left out.
    used = [(w, part) for w, part in zip(options[1:5], parts, strict=True) if w]
    loss = used[0][0] * used[0][1]
    for weight, part in used[1:]:
        loss = loss.add_(part, alpha=weight)
    return loss, parts


def rows_like(like: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """An empty (N, width), its rows as far apart as those of ``like`` if that is mere padding: then
    a kernel finds both at the same alignment."""
    stride = like.stride(0)
    padded = like.stride(1) == 1 and width <= stride < width + 128
    return like.new_empty_strided(
        (like.shape[0], width), (stride if padded else width, 1), dtype=dtype
    )


# --- The custom operators: opaque to torch.compile, one for all backends --------------------------
# Outputs: the loss, the parts, and the gradient for a grad_output of 1 (empty where not asked for).


@torch.library.custom_op("distilfast::distillation", mutates_args=())
def distillation_op(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    mask: Tensor | None,
    kd_scale: Tensor,
    ce_scale: Tensor,
    scalars: list[float],
    divergence: str,
    ignore_index: int,
    vocab_size: int,
    reduction: str,
    late: bool,
    inplace: bool,
    backend: str,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    options = as_options(scalars, divergence, ignore_index, vocab_size)
    check_values(labels, mask, options)
    now = with_gradient and not late
    gradient = rows_like(student, student.shape[1], student.dtype) if now else None
    rows = backends.BACKENDS[backend].distillation(
        student, teacher, labels, mask, kd_scale, ce_scale, options, gradient
    )
    loss, parts = reduce_parts(rows, kd_scale, ce_scale, options, reduction)
    return loss, parts, student.new_empty(0) if gradient is None else gradient


@distillation_op.register_fake
def _(student: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    kd_scale, (reduction, late, _, _, with_gradient) = others[3], others[-5:]
    n_rows = [student.shape[0]] if reduction == "none" else []
    now = with_gradient and not late
    gradient = rows_like(student, student.shape[1], student.dtype) if now else student.new_empty(0)
    return (
        kd_scale.new_empty(n_rows),
        kd_scale.new_empty([len(PARTS), *n_rows]),
        gradient,
    )


@torch.library.custom_op("distilfast::distillation_gradient", mutates_args=("gradient",))
def distillation_gradient_op(
    gradient: Tensor,
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    mask: Tensor | None,
    kd_scale: Tensor,
    ce_scale: Tensor,
    scalars: list[float],
    divergence: str,
    ignore_index: int,
    vocab_size: int,
    backend: str,
) -> None:
    """The gradient alone, into ``gradient``, which may be ``student``: see inplace_backward."""
    options = as_options(scalars, divergence, ignore_index, vocab_size)
    backends.BACKENDS[backend].distillation(
        student, teacher, labels, mask, kd_scale, ce_scale, options, gradient
    )


def _distillation_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    tensors, options, (_, late, inplace, backend, _) = inputs[:6], inputs[6:10], inputs[10:]
    loss, parts, gradient = output
    ctx.set_materialize_grads(False)  # else autograd makes zeros as large as the gradients
    ctx.mark_non_differentiable(parts, gradient)
    ctx.options, ctx.late, ctx.inplace, ctx.backend = options, late, inplace, backend
    ctx.others = len(inputs) - 1
    if late:
        ctx.save_for_backward(loss, *tensors)
    else:
        ctx.save_for_backward(loss, gradient)


def _distillation_backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if grad_loss is None:
        return None, *[None] * ctx.others
    if ctx.late:
        loss, student, teacher, labels, mask, kd_scale, ce_scale = ctx.saved_tensors
        gradient = student.detach()
        if not ctx.inplace:
            gradient = rows_like(student, student.shape[1], student.dtype)
        distillation_gradient_op(
            gradient,
            student.detach(),
            teacher,
            labels,
            mask,
            kd_scale * grad_loss.detach(),
            ce_scale * grad_loss.detach(),
            *ctx.options,
            ctx.backend,
        )
        grad_loss = torch.ones_like(grad_loss)
    else:
        loss, gradient = ctx.saved_tensors
    if not ctx.late or torch.is_grad_enabled():
        gradient = scale_gradient(gradient, grad_loss, loss, ctx.backend)
    return gradient, *[None] * ctx.others


distillation_op.register_autograd(_distillation_backward, setup_context=_distillation_context)


def scale_gradient(gradient: Tensor, grad_loss: Tensor, loss: Tensor, backend: str) -> Tensor:
    """gradient * grad_loss, in the gradient's own memory where nobody can want it again: the graph
    is not kept. (Hooks on saved tensors that hand out what they were given see it change.)"""
    traced = torch.compiler.is_compiling() or type(gradient) is not Tensor
    kept = torch.is_grad_enabled() or torch._C._autograd._get_current_graph_task_keep_graph()
    if traced or kept:
        return scale_gradient_op(gradient, grad_loss, loss, backend)
    if grad_loss.ndim == 0 and grad_loss.device.type == "cpu" and grad_loss == 1:
        return gradient  # what a plain loss.backward() brings; a GPU's kernel finds it out itself
    scale_gradient_inplace_op(gradient, grad_loss, backend)
    return gradient


@torch.library.custom_op("distilfast::scale_gradient_", mutates_args=("gradient",))
def scale_gradient_inplace_op(gradient: Tensor, grad_loss: Tensor, backend: str) -> None:
    """gradient *= grad_loss, () or (N,), rounded once."""
    rows = gradient if gradient.ndim == 2 else gradient.reshape(1, -1)
    if rows.shape[1] < 2 or rows.stride(1) == 1:
        backends.BACKENDS[backend].scale(rows, grad_loss)
    else:
        dense = rows.contiguous()
        backends.BACKENDS[backend].scale(dense, grad_loss)
        rows.copy_(dense)


@torch.library.custom_op("distilfast::scale_gradient", mutates_args=())
def scale_gradient_op(gradient: Tensor, grad_loss: Tensor, loss: Tensor, backend: str) -> Tensor:
    """gradient * grad_loss, and an error for whoever differentiates it again.

    ``loss`` ties the result to the graph: without it a double backward would find a constant here
    and silently be 0.
    """
    scaled = torch.empty_like(gradient, memory_format=torch.contiguous_format).copy_(gradient)
    scale_gradient_inplace_op(scaled, grad_loss, backend)
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
    scale: Tensor,
    reduction: str,
    backend: str,
    with_gradient: bool,
) -> tuple[Tensor, list[Tensor]]:
    check_mask_values(mask)
    gradients = _hidden_gradients(student) if with_gradient else []
    rows = backends.BACKENDS[backend].hidden_cosine(student, teacher, mask, scale, gradients)
    return rows if reduction == "none" else rows.sum() * scale, gradients


@hidden_cosine_op.register_fake
def _(
    student: list[Tensor],
    teacher: list[Tensor],
    mask: Tensor | None,
    scale: Tensor,
    reduction: str,
    backend: str,
    with_gradient: bool,
) -> tuple[Tensor, list[Tensor]]:
    loss = scale.new_empty([student[0].shape[0]] if reduction == "none" else [])
    return loss, _hidden_gradients(student) if with_gradient else []


def _hidden_cosine_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    loss, gradients = output
    ctx.set_materialize_grads(False)  # else autograd makes zeros as large as the gradients
    ctx.mark_non_differentiable(*gradients)
    ctx.backend = inputs[5]
    ctx.save_for_backward(loss, *gradients)


def _hidden_cosine_backward(ctx: Any, grad_loss: Tensor | None, _: Any) -> tuple[Any, ...]:
    loss, *gradients = ctx.saved_tensors
    if grad_loss is None:
        return [None] * len(gradients), [None] * len(gradients), *[None] * 5
    scaled = [scale_gradient(g, grad_loss, loss, ctx.backend) for g in gradients]
    return scaled, [None] * len(scaled), *[None] * 5


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


def as_arguments(options: Options) -> tuple[list[float], str, int, int]:
    """Options as an operator's schema can carry them."""
    return [*options[:6]], options.divergence, options.ignore_index, options.vocab_size


def as_options(
    scalars: list[float], divergence: str, ignore_index: int, vocab_size: int
) -> Options:
    """The way back from `as_arguments`."""
    temperature, kd, ce, cos, mse, beta = scalars
    return Options(temperature, kd, ce, cos, mse, beta, divergence, ignore_index, vocab_size)


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
    backend: str = "auto",
) -> DistillationOutput:
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
        backend: "auto", "triton", "cpp" or "torch".

    Returns:
        DistillationOutput(loss, kd, ce, cos, mse).

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

    compute = reference.accumulation_dtype(student_logits, teacher_logits)
    scalars = [float(x) for x in (temperature, *weights.values(), jsd_beta)]
    options = as_options(scalars, divergence, ignore_index, vocab)
    rows = flatten_rows(
        leading.numel(),
        device,
        compute,
        labels if ce_weight else None,
        mask,
        reduction,
        kd_normalizer,
        ce_normalizer,
        ignore_index,
    )
    # Compiled code keeps its own account of what may be overwritten; in place is for eager mode.
    flat = student_logits.reshape(-1, student_logits.shape[-1])
    inplace = inplace_backward and not torch.compiler.is_compiling()
    inplace = inplace and _is_overwritable(flat, student_logits)
    loss, parts, _ = distillation_op(
        flat,
        teacher_logits.reshape(-1, teacher_logits.shape[-1]),
        *rows,
        *as_arguments(options),
        reduction,
        inplace or student_logits.dtype == torch.float16,
        inplace,
        backend,
        student_logits.requires_grad and torch.is_grad_enabled(),
    )
    return as_output(loss, parts, leading, reduction)


def _is_overwritable(flat: Tensor, logits: Tensor) -> bool:
    """Whether ``flat``, (N, V), is the logits' own memory, row for row; padding between is fine."""
    own = flat.data_ptr() == logits.data_ptr() and flat.stride(1) == 1
    return own and (flat.shape[0] < 2 or flat.stride(0) >= flat.shape[1])


def as_output(
    loss: Tensor, parts: Tensor, leading: torch.Size, reduction: str
) -> DistillationOutput:
    shape = leading if reduction == "none" else torch.Size([])
    return DistillationOutput(loss.reshape(shape), *(p.reshape(shape) for p in parts.detach()))


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
    rows = flatten_rows(
        leading.numel(),
        device,
        reference.accumulation_dtype(*student, *teacher),
        None,
        mask,
        reduction,
        normalizer,
        None,
        ignore_index=-100,
    )
    loss, _ = hidden_cosine_op(
        [s.reshape(-1, s.shape[-1]) for s in student],
        [t.reshape(-1, t.shape[-1]) for t in teacher],
        rows.mask,
        rows.kd_scale,
        reduction,
        backend,
        any(s.requires_grad for s in student) and torch.is_grad_enabled(),
    )
    return cast(Tensor, loss.reshape(leading if reduction == "none" else ()))


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
        [t.reshape(-1, t.shape[-1]) for t in logits],
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
    ) -> DistillationOutput:
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
