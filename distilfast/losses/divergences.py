"""The divergences of the specification, exact near the teacher. Notation: reference.py."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")


class Term(NamedTuple):
    """A loss for each row, (N,), and its gradient, (N, V), or None if not requested."""

    loss: Tensor
    gradient: Tensor | None


# Up to this |log q - log p|, series replace differences that would cancel.
NEAR = 0.125


def divergence(
    s: Tensor, t: Tensor, temperature: float, kind: str, beta: float, gradient: bool
) -> Term:
    """Return T^2 times the divergence of q from p (Hinton et al. 2015, section 2.1).

    forward_kl: KL(p || q). reverse_kl: KL(q || p).
    jsd: beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q.

    T^2 keeps the gradient's size independent of T, since d/ds carries a factor 1 / T twice.
    An infinite reverse KL has no gradient: the whole row of the gradient is NaN.

    Near the teacher a divergence is a small difference of large sums. To avoid the cancellation, it
    is summed from terms p (e^d - 1 - d), with d = log q - log p. As p and q sum to 1, the sum of
    these terms is the same. Each is exact to its last digits and never negative. A constant error
    in d has only a squared effect.
    """
    x_s, x_t = s / temperature, t / temperature
    p, q = x_t.softmax(-1), x_s.softmax(-1)
    p_is_0, q_is_0 = x_t == -math.inf, x_s == -math.inf
    d = _log_ratio(s, t, temperature).masked_fill_(p_is_0 & q_is_0, 0)
    near = d.abs() < NEAR
    # The sum of q - p should be 0. If rounding makes it differ, d has a constant error: remove it.
    d = d - torch.where(near, p * d.expm1(), q - p).sum(-1, keepdim=True)
    # Where a softmax underflows, the probability is tiny and not 0: tiny * inf is inf.
    if kind == "forward_kl":
        loss = _excess(p, q, d, near).masked_fill_(q_is_0 & ~p_is_0, math.inf).sum(-1)
        grad = torch.where(near, p * d.expm1(), q - p) if gradient else None
    elif kind == "reverse_kl":
        loss = _excess(q, p, -d, near).masked_fill_(p_is_0 & ~q_is_0, math.inf).sum(-1)
        grad = q * (d.masked_fill(q_is_0, 0) - loss[:, None]) if gradient else None
        if grad is not None:
            grad = grad.masked_fill(loss.isinf()[:, None], math.nan)
    else:
        p_over_m = _log_share(d.neg(), 1 - beta).masked_fill_(p_is_0, 0)
        q_over_m = _log_share(d, beta).masked_fill_(q_is_0, 0)
        # KL(p || m) is the sum of p (u - log(1 + u)), u = m / p - 1; KL(q || m) likewise.
        of_p = torch.where(near, _psi((1 - beta) * d.expm1()), p_over_m)
        of_q = torch.where(near, _psi(beta * d.neg().expm1()), q_over_m)
        apart = (p - q).masked_fill_(near, 0)
        kl_p_m = (p * of_p).sub_(apart, alpha=1 - beta).sum(-1)
        kl_q_m = (q * of_q).add_(apart, alpha=beta).sum(-1)
        loss = beta * kl_p_m + (1 - beta) * kl_q_m
        grad = (1 - beta) * q * _from_mean(q, q_over_m, kl_q_m, d, beta) if gradient else None
    return Term(temperature**2 * loss, None if grad is None else grad.mul_(temperature))


def _log_ratio(s: Tensor, t: Tensor, temperature: float) -> Tensor:
    """Return log q - log p. Of two ways to compute s - t, take the one that rounds less."""
    top_s, top_t = s.amax(-1, keepdim=True), t.amax(-1, keepdim=True)
    below_s, below_t = s - top_s, t - top_t
    direct = (s - t).abs() < -(below_s + below_t)
    apart = torch.where(direct, (s - t) - (top_s - top_t), below_s - below_t)
    sums = [(x / temperature).logsumexp(-1, keepdim=True) for x in (below_s, below_t)]
    return (apart / temperature).sub_(sums[0] - sums[1])


def _from_mean(q: Tensor, q_over_m: Tensor, kl_q_m: Tensor, d: Tensor, beta: float) -> Tensor:
    """Return log(q / m) minus its mean under q.

    If student and teacher have little in common, log(q / m) is nearly -log(1 - beta) everywhere.
    Then the difference to that value is used, which loses no digits.
    """
    farthest = -math.log1p(-beta)
    rest = (d.clamp(min=-80).neg_().exp_() * (beta / (1 - beta))).log1p_().neg_()
    saturated = (kl_q_m > farthest / 2)[:, None]
    values = torch.where(saturated, rest, q_over_m)
    return values - torch.where(saturated, (q * rest).sum(-1, keepdim=True), kl_q_m[:, None])


def _excess(p: Tensor, q: Tensor, d: Tensor, near: Tensor) -> Tensor:
    """Return p (e^d - 1 - d), with q = p e^d: the terms of KL(p || q). If p is 0, return q."""
    finite = d.clamp(torch.finfo(d.dtype).min, torch.finfo(d.dtype).max)
    return torch.where(near, p * _phi(d), q - p - p * finite)


def _phi(x: Tensor) -> Tensor:
    """Return e^x - 1 - x for a small x: x^2 / 2 (1 + x / 3 (1 + x / 4 (...)))."""
    series = torch.ones_like(x)
    for k in range(15 if x.dtype == torch.float64 else 8, 2, -1):
        series.mul_(x).div_(k).add_(1)
    return series.mul_(x).mul_(x).div_(2)


def _psi(x: Tensor) -> Tensor:
    """Return x - log(1 + x) for a small x: x^2 (1 / 2 - x (1 / 3 - x (1 / 4 - ...)))."""
    series = torch.zeros_like(x)
    for k in range(22 if x.dtype == torch.float64 else 10, 1, -1):
        series.mul_(-x).add_(1 / k)
    return series.mul_(x).mul_(x)


def _log_share(d: Tensor, share: float) -> Tensor:
    """Return log(q / m), with m = share p + (1 - share) q and d = log q - log p."""
    low = d.clamp(max=0)
    below = low - math.log(share) - (low.exp() * ((1 - share) / share)).log1p_()
    return torch.where(d < -1, below, -(share * d.clamp(min=-1).neg_().expm1_()).log1p_())
