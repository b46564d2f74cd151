"""The public losses over dense logits and hidden states.

The mathematics stands in `reference.py`, the choice of an implementation in `backends.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from distilfast.losses import backends
from distilfast.losses.arguments import (
    SOFT,
    as_layers,
    check_ensemble_mode,
    check_labels,
    check_like,
    check_mask,
    check_options,
    check_reduction,
    check_statistics,
    check_teacher,
    check_tensor,
    check_used,
    check_vocab,
    normalize_weights,
)
from distilfast.losses.operators import (
    Call,
    Numbers,
    combine_teachers_op,
    distillation_op,
    hidden_cosine_op,
    is_overwritable,
)
from distilfast.losses.rows import as_matrix, flatten_rows


class DistillationOutput(NamedTuple):
    """The loss and its parts, fp32 (fp64 for fp64 inputs).

    ``loss`` is the weighted sum of the parts and carries the gradient. The parts are unweighted,
    detached, and reduced as the loss is. A part of weight 0 is 0.
    """

    loss: Tensor
    kd: Tensor
    ce: Tensor
    cos: Tensor
    mse: Tensor


class DetailedOutput(NamedTuple):
    """A DistillationOutput with the statistics of each row, which ``statistics=True`` adds.

    Statistics have the shape of the rows, (...), are detached and computed at the temperature.
    Outside the mask they are 0.
    """

    loss: Tensor
    kd: Tensor
    ce: Tensor
    cos: Tensor
    mse: Tensor
    student_entropy: Tensor  # in nats
    teacher_entropy: Tensor  # in nats
    agreement: Tensor  # 1 where both have their largest logit in the same column, else 0


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
    """Return the weighted sum of soft-target and hard-label losses over the vocabulary.

    Per row, with student logits s, teacher logits t and temperature T:

    - kd: T^2 KL(softmax(t / T) || softmax(s / T)) (Hinton et al. 2015, section 2.1), or another
      ``divergence``;
    - ce: -log softmax(s)[label] at temperature 1;
    - cos: 1 - s.t / (|s| |t|) over the vocabulary;
    - mse: the sum over the vocabulary of (s - t)^2.

    Args:
        student_logits: (..., V_s), bf16, fp16, fp32 or fp64 (fp64: torch backend only).
        teacher_logits: (..., V_t), the same leading shape; the dtype may differ. Gets no gradient.
            With ce_weight alone it is not read.
        labels: (...) int64, never shifted here; ``ignore_index`` where there is no hard label.
            None if ce_weight is 0, since nothing would read them.
        temperature: T, of the soft targets on both sides; > 0.
        kd_weight, ce_weight, cos_weight, mse_weight: >= 0, not all 0. A part of weight 0 is not
            computed and is 0.
        divergence: "forward_kl", "reverse_kl" or "jsd". Near the teacher, jsd is
            ``jsd_beta * (1 - jsd_beta)`` times the KL, so a weight tuned for one is wrong for the
            other.
        jsd_beta: the teacher's share of the mixture, 0 < jsd_beta < 1.
        mask: (...) bool, or float row weights >= 0, for kd, cos and mse. None: all ones. With
            ce_weight alone only None: ignored rows of ce have the label ``ignore_index``.
        ignore_index: the label of rows without a hard label.
        vocab_size: columns from here on are padding; required if V_s != V_t.
        reduction: "mean" divides kd, cos and mse by the sum of the mask, and ce by the number of
            labelled rows (a divisor of 0 gives 0). "sum" does not divide. "none" returns (...),
            times the mask.
        kd_normalizer, ce_normalizer: a number or 0-d tensor that replaces those divisors: the
            global count of a batch that is spread over micro-batches and ranks. Only for parts
            whose weight is not 0.
        inplace_backward: the backward overwrites ``student_logits`` with its gradient. This saves
            a tensor of its size and costs a second reading of both logits. Nothing else may read
            the student's logits afterwards. Works for rows that are dense or padded; other logits
            are not overwritten.
        statistics: also return the entropies of student and teacher at T, and whether their
            largest logits stand in the same column. One value a row, 0 outside the mask. Needs
            kd_weight > 0.
        backend: "auto", "triton", "cpp" or "torch".

    Near the teacher kd keeps its relative accuracy: with fp32 logits its relative error is at most
    1e-3 down to 1e-6 nats, and it is never negative (docs/exactness.md).

    Returns:
        DistillationOutput(loss, kd, ce, cos, mse). With ``statistics`` a DetailedOutput, which
        adds student_entropy, teacher_entropy and agreement.

    Raises:
        ValueError: names the argument, what was expected and what was passed.

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
    check_used(weights, SOFT, {"mask": mask, "kd_normalizer": kd_normalizer})
    check_used(weights, ("ce_weight",), {"labels": labels, "ce_normalizer": ce_normalizer})
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

    rows, totals = flatten_rows(labels, mask, device, reduction, kd_normalizer, ce_normalizer)
    # In place is for eager mode: compiled code itself decides which memory may be overwritten.
    flat = as_matrix(student_logits)
    inplace = inplace_backward and not torch.compiler.is_compiling()
    inplace = inplace and is_overwritable(flat, student_logits)
    late = inplace or student_logits.dtype == torch.float16
    wanted = student_logits.requires_grad and torch.is_grad_enabled()
    loss, parts, _, _, found = distillation_op(
        flat,
        as_matrix(teacher_logits),
        *rows,
        Numbers(temperature, tuple(weights.values()), jsd_beta, tuple(totals)).flat(),
        [ignore_index, vocab],
        str(Call(divergence, reduction, backend, wanted, late, inplace, statistics)),
    )
    return as_output(loss, parts, leading, reduction, found if statistics else None)


def as_output(
    loss: Tensor,
    parts: Tensor,
    leading: torch.Size,
    reduction: str,
    statistics: Tensor | None = None,
) -> DistillationOutput | DetailedOutput:
    """Give the operator's outputs the shape of the rows: (...) with "none", else 0-d.

    Statistics, (3, N), always get the shape of the rows.
    """
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
    """Return the cosine distance of hidden states, 1 - s.t / (|s| |t|).

    From Sanh et al. 2019, section 3.

    Args:
        student_hidden: (..., D), or a list with one such tensor per layer. The loss of a list is
            the mean over layers.
        teacher_hidden: the same shapes. Gets no gradient.
        mask: (...) bool, or float row weights >= 0. None: all ones.
        reduction: "mean" divides by the sum of the mask (a sum of 0 gives 0), "sum" does not,
            "none" returns (...).
        normalizer: a number or 0-d tensor that replaces the sum of the mask.
        backend: "auto", "triton", "cpp" or "torch".

    Returns:
        fp32 (fp64 for fp64 inputs), 0-d or (...). A zero vector gives 1 and a zero gradient.

    Raises:
        ValueError: names the argument, what was expected and what was passed.

    Example:
        >>> import torch
        >>> hidden_cosine_loss(torch.tensor([[3.0, 4.0]]), torch.tensor([[4.0, 3.0]])).item()
        0.03999...
    """
    check_reduction(reduction, {"normalizer": normalizer})
    student = as_layers("student_hidden", student_hidden)
    teacher = as_layers("teacher_hidden", teacher_hidden)
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


def combine_teachers(
    logits: Sequence[Tensor],
    weights: Sequence[float] | None = None,
    *,
    temperature: float,
    mode: str = "probability",
    vocab_size: int | None = None,
) -> Tensor:
    """Return logits z of an ensemble: softmax(z / T) is its distribution.

    From Hinton et al. 2015, section 1.

    Args:
        logits: the logits of K teachers, (..., V_k), with one leading shape. None of them may
            require a gradient.
        weights: K numbers >= 0, scaled to sum to 1; None: equal. The logits of a teacher of weight
            0 are not read.
        temperature: T > 0, the temperature at which z will be used.
        mode: "probability", the arithmetic mean: z = T log sum_k w_k softmax(t_k / T); or "logit",
            the geometric mean: z = sum_k w_k t_k.
        vocab_size: columns from here on are padding; required if the widths differ.

    Returns:
        (..., vocab_size) fp32 (fp64 for fp64 inputs).

    Raises:
        ValueError: names the argument, what was expected and what was passed.

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


class DistillationLoss(nn.Module):
    """`distillation_loss` with fixed keywords, which are checked when the module is created.

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
        # A call without rows finds wrong keywords now and not at the first step.
        width = keywords.get("vocab_size") or 2
        probe = torch.zeros(0, width if isinstance(width, int) else 2)
        backend = keywords.get("backend", "auto")
        known = {**keywords, "backend": "torch" if backend in tuple(backends.BACKENDS) else backend}
        labels = torch.zeros(0, dtype=torch.int64) if keywords.get("ce_weight") else None
        distillation_loss(probe, probe, labels, **known)

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
