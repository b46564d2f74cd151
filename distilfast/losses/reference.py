"""The specification: every loss and its gradient in plain PyTorch, one function for each term.

This file defines what distilfast computes. It is also the backend that works everywhere, and a
baseline of the bench. It is written to be read; the fused backends are written to be fast.

Notation. A row is one token. s and t are its student and teacher logits over the vocabulary, T the
temperature, p = softmax(t / T) and q = softmax(s / T). Each function takes (N, V) tensors in the
dtype to compute in (fp32 or fp64). It returns the (N,) losses and, on request, their (N, V)
gradient with respect to s.

Minus infinity marks a token that a model excludes. In every divergence 0 * log 0 = 0, so a column
that is excluded on both sides adds nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from distilfast.losses.divergences import Term, divergence

PARTS = ("kd", "ce", "cos", "mse")
STATISTICS = ("student_entropy", "teacher_entropy", "agreement")


class Options(NamedTuple):
    """The scalars that every backend receives. They define what to compute for each row."""

    temperature: float
    kd_weight: float
    ce_weight: float
    cos_weight: float
    mse_weight: float
    jsd_beta: float
    divergence: str
    ignore_index: int
    vocab_size: int

    @property
    def weights(self) -> tuple[float, ...]:
        """The weights in the order of PARTS."""
        return self.kd_weight, self.ce_weight, self.cos_weight, self.mse_weight


class Head(NamedTuple):
    """Turns a head's products x into logits: softcap tanh(scale (x + bias) / softcap)."""

    scale: float = 1.0
    softcap: float = 0.0  # none
    bias: Tensor | None = None  # (V,), in the dtype computed in

    @property
    def plain(self) -> bool:
        """Whether the products already are the logits."""
        return self.scale == 1 and not self.softcap and self.bias is None

    def logits_(self, x: Tensor) -> Tensor:
        """Turn products into logits, in place."""
        if self.bias is not None:
            x += self.bias
        if self.scale != 1:
            x *= self.scale
        return x.div_(self.softcap).tanh_().mul_(self.softcap) if self.softcap else x

    def backward_(self, gradient: Tensor, logits: Tensor) -> Tensor:
        """Turn the gradient of the logits into that of the products, in place.

        With y = c tanh(x / c), dy/dx = 1 - (y / c)^2.
        """
        if self.softcap:
            slope = 1 - (logits / self.softcap) ** 2
            gradient *= slope.masked_fill_(gradient == 0, 0)  # 0 * NaN is 0 in a row left out
        return gradient.mul_(self.scale) if self.scale != 1 else gradient


PLAIN = (Head(), Head())  # of student and teacher


def row_statistics(s: Tensor, t: Tensor, temperature: float) -> Tensor:
    """Return the STATISTICS of each row, (3, N).

    They are the entropies of q and p in nats, and the agreement: 1 if the largest logits of both
    stand in the same column, else 0. If several are largest, the first counts.
    """
    entropies = []
    for x in (s / temperature, t / temperature):
        log_p = x.log_softmax(-1)
        entropies.append(-(log_p.exp() * log_p.masked_fill(x == -math.inf, 0)).sum(-1))
    columns = torch.arange(s.shape[-1], device=s.device)
    first = [columns.where(x == x.amax(-1, keepdim=True), s.shape[-1]).amin(-1) for x in (s, t)]
    agreement = (first[0] == first[1]).to(s.dtype)
    unknown = entropies[0].isnan() | entropies[1].isnan()
    return torch.stack([*entropies, agreement.masked_fill_(unknown, math.nan)])


def cross_entropy(s: Tensor, labels: Tensor, gradient: bool) -> Term:
    """Return -log softmax(s)[label] at temperature 1. A label outside [0, V) makes its row NaN."""
    valid = (labels >= 0) & (labels < s.shape[-1])
    index = labels.clamp(0, s.shape[-1] - 1)[:, None]
    log_q = s.log_softmax(-1)
    loss = -log_q.gather(-1, index)[:, 0].masked_fill(~valid, math.nan)
    if not gradient:
        return Term(loss, None)
    grad = log_q.exp()
    grad.scatter_add_(-1, index, grad.new_full(index.shape, -1.0))
    return Term(loss, grad.masked_fill_(~valid[:, None], math.nan))


def cosine_distance(s: Tensor, t: Tensor, gradient: bool) -> Term:
    """Return 1 - s.t / (|s| |t|). A zero vector has no direction: distance 1, gradient 0."""
    excluded = (s == -math.inf) & (t == -math.inf)
    s, t = s.masked_fill(excluded, 0), t.masked_fill(excluded, 0)
    ss, tt = (s * s).sum(-1), (t * t).sum(-1)
    zero = ((ss == 0) | (tt == 0)) & ~(ss + tt).isnan()
    inverse_s, inverse_t = ss.rsqrt().masked_fill(zero, 0), tt.rsqrt().masked_fill(zero, 0)
    cosine = (s * t).sum(-1) * inverse_s * inverse_t
    if not gradient:
        return Term(1 - cosine, None)
    grad = s * (cosine * inverse_s**2)[:, None] - t * (inverse_s * inverse_t)[:, None]
    return Term(1 - cosine, grad)


def squared_error(s: Tensor, t: Tensor, gradient: bool) -> Term:
    """Return the sum over the vocabulary of (s - t)^2. If not finite, its gradient is NaN."""
    difference = (s - t).masked_fill((s == -math.inf) & (t == -math.inf), 0)
    loss = (difference * difference).sum(-1)
    if not gradient:
        return Term(loss, None)
    return Term(loss, (2 * difference).masked_fill(~loss.isfinite()[:, None], math.nan))


def distillation(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    mask: Tensor | None,
    kd_scale: Tensor,
    ce_scale: Tensor,
    options: Options,
    gradient: Tensor | None,
    heads: tuple[Head, Head] = PLAIN,
    bias_gradient: Tensor | None = None,
    statistics: Tensor | None = None,
) -> Tensor:
    """Compute every part of the loss for each row, and the gradient of their weighted sum.

    Args:
        student: (N, V_s) logits, or products that ``heads`` turns into logits; bf16, fp16, fp32 or
            fp64.
        teacher: (N, V_t), likewise.
        labels: (N,) int64; ``options.ignore_index`` where there is no hard label. None: no labels.
        mask: (N,) row weights of kd, cos and mse, bool or float. None: all ones.
        kd_scale: () or (N,), multiplies the gradient of kd, cos and mse. A row where it is 0 counts
            as outside the mask.
        ce_scale: () or (N,), multiplies the gradient of ce. A row where it is 0 counts as
            unlabelled.
        options: the scalars; columns from ``options.vocab_size`` on are padding.
        gradient: (N, V_s), overwritten with the gradient; or None. It may be ``student`` itself.
            Or it may have another dtype and (not in triton) start each row where ``student`` does.
        heads: the Heads of student and teacher.
        bias_gradient: (vocab_size,), in the dtype computed in; or None. The sum of ``gradient``
            over the rows is added to it, before ``gradient`` is rounded (triton: after).
        statistics: (3, N), overwritten with STATISTICS; or None. Needs kd_weight > 0.

    Returns:
        (4, N): kd, ce, cos and mse; all but ce are times the mask. A row that a part leaves out is
        exactly 0 there, whatever the row holds. A part of weight 0 is 0.
    """
    n_rows, vocab = student.shape[0], options.vocab_size
    compute = accumulation_dtype(student, teacher)
    s, t = (x[:, :vocab].to(compute) for x in (student, teacher))
    s, t = (x if h.plain else h.logits_(x.clone()) for h, x in zip(heads, (s, t), strict=True))
    rows = torch.zeros(len(PARTS), n_rows, dtype=compute, device=student.device)
    total: Tensor | None = None
    mask = counting(mask, kd_scale, n_rows, compute)

    def add(part: str, weight: float, used: Tensor | None, scale: Tensor, term: Term) -> None:
        """Add a term, times the row weights ``used``.

        A row of weight 0 is overwritten with 0: a multiplication would keep its NaN.
        """
        nonlocal total
        loss, grad = term
        rows[PARTS.index(part)] = loss if used is None else (loss * used).masked_fill(used == 0, 0)
        if grad is None:
            return
        scale = weight * scale.to(compute) if used is None else weight * scale.to(compute) * used
        grad.mul_(scale[:, None] if scale.ndim else scale)
        if used is not None:
            grad.masked_fill_((used == 0)[:, None], 0)
        total = grad if total is None else total.add_(grad)

    wanted = gradient is not None
    if options.kd_weight:
        if statistics is not None:
            statistics[:] = row_statistics(s, t, options.temperature)
            if mask is not None:
                statistics.masked_fill_(mask == 0, 0)
        term = divergence(s, t, options.temperature, options.divergence, options.jsd_beta, wanted)
        add("kd", options.kd_weight, mask, kd_scale, term)
    if options.ce_weight and labels is not None:
        labelled = (labels != options.ignore_index) & (ce_scale != 0)
        term = cross_entropy(s, labels.masked_fill(~labelled, 0), wanted)
        add("ce", options.ce_weight, labelled.to(compute), ce_scale, term)
    if options.cos_weight:
        add("cos", options.cos_weight, mask, kd_scale, cosine_distance(s, t, wanted))
    if options.mse_weight:
        add("mse", options.mse_weight, mask, kd_scale, squared_error(s, t, wanted))
    if gradient is not None:
        if total is not None:
            total = heads[0].backward_(total, s)
            if bias_gradient is not None:
                bias_gradient += total.sum(0)
        gradient[:, :vocab] = 0 if total is None else total
        gradient[:, vocab:] = 0
    return rows


def hidden_cosine(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    mask: Tensor | None,
    scale: Tensor,
    gradients: Sequence[Tensor],
) -> Tensor:
    """Compute the mean over layers of the cosine distance of each row's hidden states.

    Args:
        student, teacher: a list with one (N, D) per layer.
        mask: (N,) row weights, bool or float, or None.
        scale: () or (N,), multiplies the gradient. A row where it is 0 counts as outside the mask.
        gradients: a list with one (N, D) per layer, overwritten with the gradient; empty if none is
            wanted.

    Returns:
        (N,), times the mask; exactly 0 where the mask is 0.
    """
    compute = accumulation_dtype(*student, *teacher)
    total = torch.zeros(student[0].shape[0], dtype=compute, device=student[0].device)
    mask = counting(mask, scale, len(total), compute)
    for layer, (s, t) in enumerate(zip(student, teacher, strict=True)):
        loss, grad = cosine_distance(s.to(compute), t.to(compute), bool(gradients))
        total += loss / len(student)
        if grad is not None:
            row_scale = scale.to(compute) / len(student) * (1 if mask is None else mask)
            grad = grad * (row_scale[:, None] if row_scale.ndim else row_scale)
            if mask is not None:
                grad = grad.masked_fill((mask == 0)[:, None], 0)
            gradients[layer].copy_(grad)
    return total if mask is None else (total * mask).masked_fill(mask == 0, 0)


def combine_teachers(
    logits: Sequence[Tensor],
    weights: Sequence[float],
    temperature: float,
    mode: str,
    vocab_size: int,
) -> Tensor:
    """Return logits z, (N, vocab_size), with the ensemble's softmax at T (Hinton et al. 2015, 1).

    "probability", the arithmetic mean: z = T log sum_k w_k softmax(t_k / T).
    "logit", the geometric mean: z = sum_k w_k t_k.
    The weights sum to 1; a teacher of weight 0 is not read.
    """
    compute = accumulation_dtype(*logits)
    z: Tensor | None = None
    for teacher, weight in zip(logits, weights, strict=True):
        if weight == 0:
            continue
        t = teacher[:, :vocab_size].to(compute)
        if mode == "probability":
            term = (t / temperature).log_softmax(-1) + math.log(weight)
            z = term if z is None else torch.logaddexp(z, term)
        else:
            z = weight * t if z is None else z + weight * t
    assert z is not None  # the weights sum to 1
    return temperature * z if mode == "probability" else z


def counting(
    mask: Tensor | None, scale: Tensor, n_rows: int, compute: torch.dtype
) -> Tensor | None:
    """Return the mask in the dtype computed in, and 0 where the scale is 0. None: all ones."""
    # On a GPU the scale's value is not read: that would wait for the device.
    if not scale.is_cuda and bool((scale != 0).all()):
        return None if mask is None else mask.to(compute)
    used = (scale != 0).to(compute).expand(n_rows)
    return used if mask is None else mask.to(compute) * used


def row_scales(
    totals: tuple[float | Tensor | None, float | Tensor | None],
    labels: Tensor | None,
    mask: Tensor | None,
    n_rows: int,
    ignore_index: int,
    compute: torch.dtype,
    device: torch.device,
    needed: Tensor | None = None,
) -> Tensor:
    """Return the factors of the sums over rows, (2,).

    They are 1 / the total of kd, cos and mse, and 1 / the total of ce. A total of 0 gives 0, as
    nothing counts then.

    Args:
        totals: the two totals, each a number, a 0-d tensor or None. None stands for the sum of the
            mask (without a mask, the number of rows) and for the number of labels that are not
            ``ignore_index``.
        compute: the dtype of the result.
        needed: (N,) bool, overwritten with `needed_rows`; or None.
    """
    kd, ce = totals
    if kd is None:
        kd = float(n_rows) if mask is None else mask.to(compute).sum()
    if ce is None:
        ce = 0.0 if labels is None else (labels != ignore_index).sum()
    total = torch.stack(
        [
            x.to(device, compute, non_blocking=True)
            if isinstance(x, Tensor)
            else torch.full((), x, dtype=compute, device=device)  # a copy would make the host wait
            for x in (kd, ce)
        ]
    )
    scales = total.reciprocal().masked_fill_(total <= 0, 0)
    if needed is not None:
        needed.copy_(needed_rows(scales, labels, mask, ignore_index))
    return scales


def needed_rows(
    scales: Tensor, labels: Tensor | None, mask: Tensor | None, ignore_index: int
) -> Tensor:
    """Return whether any part needs a row, () or (N,) bool. The scales are (2,) or (2, N)."""
    kd_scale, ce_scale = scales.unbind()
    needed = kd_scale != 0
    if mask is not None:
        needed = needed & (mask != 0)
    if labels is not None:
        needed = needed | ((labels != ignore_index) & (ce_scale != 0))
    return needed


def reduce_rows(
    rows: Tensor, scales: Tensor, weights: Sequence[float], reduction: str
) -> tuple[Tensor, Tensor]:
    """Reduce the parts over the rows; return their weighted sum and the parts.

    Args:
        rows: (P, N), the first P of PARTS for each row; a part of weight 0 is 0.
        scales: as `row_scales` returns them.
        weights: P numbers.
        reduction: "none" neither sums the rows nor applies the scales.

    Returns:
        () and (P,); (N,) and (P, N) with "none".
    """
    parts = rows
    if reduction != "none":
        kd_scale, ce_scale = scales.unbind()
        parts = rows.sum(1) * torch.stack([kd_scale, ce_scale, kd_scale, kd_scale][: len(rows)])
    # A part of weight 0 is left out. The weights stay on the host: copying them to the device would
    # make the host wait.
    used = [(weight, part) for weight, part in zip(weights, parts, strict=True) if weight]
    loss = used[0][0] * used[0][1]
    for weight, part in used[1:]:
        loss = loss.add_(part, alpha=weight)
    return loss, parts


def product(hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """out = h W^T (+ b) of (n, D) and (V, D), computed in the dtype of ``out``, (n, V)."""
    torch.mm(hidden.to(out.dtype), weight.to(out.dtype).T, out=out)
    if bias is not None:
        out += bias


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """Return the dtype of sums and softmaxes: fp64 if a tensor is fp64, else fp32."""
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32
