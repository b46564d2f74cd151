"""Every loss over the vocabulary and its gradient, a row a program: two reads, one write.

The mathematics, for a row with student logits s and teacher logits t, in bits, so that the
hardware's 2^x serves. With c = log2(e) / T,

    x_s = c s - m_s      e_s = 2^x_s      l_s = sum e_s      and the same for t,

where m is any number near the row's maximum: it drops out of everything below. p_s = e_s / l_s.

    forward KL   sum p_t (log p_t - log p_s) = ln2 (d / l_t - log2 l_t + log2 l_s)
                 with d = sum e_t (x_t - x_s);        its gradient  T (p_s - p_t)
    reverse KL   the same with s and t swapped;       T ln2 p_s (x_s - x_t - d / l_s)
    JSD          each side's KL from M = beta p_t + (1 - beta) p_s, which needs l_s and l_t and so
                 one sweep more;                      (1 - beta) T p_s (log(p_s / M) - KL_s)
    CE at T = 1  log l_1 - log e_1[label], e_1 = 2^(T x_s) as a power of e_s for T = 1, 2, 3, 4;
                 at another T an exponential against an m of its own
    cosine       1 - s.t / (|s| |t|);                 (r s - t) / (|s| |t|), r = s.t / |s|^2
    MSE          the sum of (s - t)^2;                2 (s - t)

The first sweep forms the sums, the last the gradient; it walks backwards, so that it finds in L2
what was read last.

A divergence that is small is the difference of large sums, of which little is left. Such a row
takes a sweep more, with no negative term in it. With d = log q - log p, p of the teacher, q of the
student, and since p and q both sum to 1,

    KL(p || q) = sum p phi(d)             phi(x) = e^x - 1 - x
    KL(q || p) = sum q phi(-d)
    KL(p || m) = sum p psi(m / p - 1)     psi(x) = x - log(1 + x), and so is KL(q || m)

each by a series where |d| is small and as it stands where it is not. d comes from s - t, which is
exact there; an error of its constant counts only squared. The gradient, too, is taken from d.

No barrier in a sweep: every thread keeps an m and sums of its own, merged once at the row's end.
m is the maximum rounded up to a whole number. A thread whose maximum grows then rescales its sums
by a power of two: exactly, and with integer instructions in place of an exponential. d is rescaled
with its differences shifted, so that no offset of the logits ever reaches it.

16 bytes a load and store, whatever the row's length: a row is a body, from its first 16-byte
boundary to its last, and edges, fewer than VECTOR elements at either end, read as one small tile.

A side's logits may be made of what is stored: c tanh(a x / c), with the gradient's factor
a (1 - (y / c)^2). That is a fused head's business, whose products x are all that it stores.

Sources: Hinton et al. 2015, section 2.1; the online softmax is Milakov and Gimelshein 2018.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from distilfast_kernels import rows
from distilfast_kernels.rows import FLOOR, INF, LN_2, LOG2_E, TINY, log2

FORWARD_KL, REVERSE_KL, JSD = tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
# What a sweep adds up between the first and the last.
MIXTURE, SMALL, STATISTICS = tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
# In bits: below it a divergence is computed without differences of large sums.
SMALL_BITS = tl.constexpr(2.0**-6)
# Up to |d| = NEAR the series err by 2e-6 of their value; beyond, the differences do.
NEAR = tl.constexpr(0.125)
DIVERGENCES = {"forward_kl": 1, "reverse_kl": 2, "jsd": 3}

# --- Kernel: where a row's elements are -----------------------------------------------------------


@triton.jit
def _logits(x, scale, softcap):
    """softcap tanh(scale x / softcap); tanh y = 1 - 2 / (1 + e^2y), and its series where that
    cancels."""
    x *= scale
    if softcap > 0:
        y = x / softcap
        y2 = y * y
        series = -0.33333334 + y2 * (0.13333334 + y2 * (-0.053968254 + y2 * 0.021869488))
        far = 1.0 - 2.0 / (1.0 + tl.exp2(y * (2 * LOG2_E)))
        x = softcap * tl.where(y2 > 0.0625, far, y + y * (y2 * series))
    return x


@triton.jit
def _slope(y, scale, softcap):
    """The derivative of _logits, from what it returned."""
    slope = tl.full(y.shape, 1.0, tl.float32) * scale
    if softcap > 0:
        ratio = y / softcap
        slope *= 1.0 - ratio * ratio
    return slope


@triton.jit
def _load(
    s_ptr,
    t_ptr,
    where,
    soft,
    heads,
    SOFT: tl.constexpr,
    LAST: tl.constexpr,
    HEADS: tl.constexpr,
):
    """A tile of both rows in fp32; LAST where no other sweep will want it. Where the row has no
    soft targets the teacher's is not read: the student's stands in, so every difference is 0."""
    policy: tl.constexpr = "evict_first" if LAST else "evict_last"
    s = tl.load(s_ptr + where, eviction_policy=policy).to(tl.float32)
    if HEADS:
        s = _logits(s, heads[0], heads[1])
    t = s
    if SOFT:
        t = tl.load(t_ptr + where, mask=soft, other=0.0, eviction_policy=policy).to(tl.float32)
        if HEADS:
            t = _logits(t, heads[2], heads[3])
        t = tl.where(soft, t, s)
    return s, t


@triton.jit
def _load_some(s_ptr, t_ptr, where, exists, soft, heads, SOFT: tl.constexpr, HEADS: tl.constexpr):
    """The same for a tile that the row does not fill: minus infinity where there is no column."""
    s = tl.load(s_ptr + where, mask=exists, other=-INF).to(tl.float32)
    if HEADS:
        s = tl.where(exists, _logits(s, heads[0], heads[1]), -INF)
    t = s
    if SOFT:
        t = tl.load(t_ptr + where, mask=exists & soft, other=-INF).to(tl.float32)
        if HEADS:
            t = tl.where(exists, _logits(t, heads[2], heads[3]), -INF)
        t = tl.where(soft, t, s)
    return s, t


# --- Kernel: the arithmetic of one tile -----------------------------------------------------------


@triton.jit
def _power(e, power):
    """e^power for 1, 2, 3, 4."""
    result = e
    if power > 1:
        result = result * e
    if power > 2:
        result = result * e
    if power > 3:
        result = result * e
    return result


@triton.jit
def _gap(x, y):
    """x - y, finite where x is minus infinity: 0 log 0 = 0, as 2^x is 0 there. Where 2^x is not 0
    the difference is above -127, so the bound changes nothing. NaN is not above anything."""
    gap = x - y
    return tl.where(gap > -1024.0, gap, -1024.0)


@triton.jit
def _log2_mixture(e_s, e_t, share_s, share_t):
    """log2 of l_s M, against which x_s and x_t are measured."""
    return log2(tl.maximum(share_s * e_s + share_t * e_t, TINY))


@triton.jit
def _phi(x):
    """e^x - 1 - x for |x| <= NEAR."""
    p = 8.3333333e-3 + x * 1.3888889e-3
    p = 4.1666667e-2 + x * p
    p = 1.6666667e-1 + x * p
    return x * x * (0.5 + x * p)


@triton.jit
def _psi(x):
    """x - log(1 + x) for |x| <= e^NEAR - 1."""
    p = -1.4285714e-1 + x * 1.25e-1
    p = 1.6666667e-1 + x * p
    p = -0.2 + x * p
    p = 0.25 + x * p
    p = -3.3333333e-1 + x * p
    return x * x * (0.5 + x * p)


@triton.jit
def _apart(s, t, scale, offset, log_ratio):
    """d in bits, and whether it is small; finite where a side, or both, are minus infinity. What is
    subtracted first is large, and cancels exactly."""
    d = ((s - t) * scale - offset) - log_ratio
    d = tl.where(d > -100.0, tl.minimum(d, 100.0), -100.0)
    return d, tl.abs(d) * LN_2 < NEAR


@triton.jit
def _log_shares(d, near, beta):
    """log(p / m) and log(q / m) in nats, with psi of m / p - 1 and of m / q - 1 where d is small.
    From ratios: log2 is exact near 1."""
    nats = d * LN_2
    u, w = (1 - beta) * (nats + _phi(nats)), beta * (_phi(-nats) - nats)
    psi_u, psi_w = _psi(u), _psi(w)
    of_p = tl.where(near, psi_u - u, -LN_2 * log2(beta + (1 - beta) * tl.exp2(d)))
    of_q = tl.where(near, psi_w - w, -LN_2 * log2((1 - beta) + beta * tl.exp2(-d)))
    return of_p, of_q, psi_u, psi_w


@triton.jit
def _excluded(s, t):
    """Columns that both sides rule out: they have no part in cosine and MSE."""
    return (s == -INF) & (t == -INF)


@triton.jit
def _no_sums(THREADS: tl.constexpr):
    zero = tl.zeros([THREADS], tl.float32)
    floor = zero + FLOOR
    return floor, zero, floor, zero, zero, floor, zero, zero, zero, zero, zero


@triton.jit
def _add_sums(
    s,
    t,
    sums,
    how,
    KD: tl.constexpr,
    CE: tl.constexpr,
    WHOLE: tl.constexpr,
    COS: tl.constexpr,
    MSE: tl.constexpr,
):
    """First sweep: the sums of each thread, with a tile more."""
    m_s, l_s, m_t, l_t, d, m_1, l_1, ss, tt, st, sq = sums
    scale, power, labelled, _label = how
    if KD != 0 or CE:
        m_s, fall_s, x_s = rows.exponents(s, scale, m_s)
        e_s, a_s = tl.exp2(x_s), rows.exp2_whole(fall_s)
        if KD != 0:
            m_t, fall_t, x_t = rows.exponents(t, scale, m_t)
            e_t, a_t = tl.exp2(x_t), rows.exp2_whole(fall_t)
            if KD == FORWARD_KL:
                d = a_t * (d + l_t * (fall_t - fall_s)) + rows.thread_sum(e_t * _gap(x_t, x_s))
            if KD == REVERSE_KL:
                d = a_s * (d + l_s * (fall_s - fall_t)) + rows.thread_sum(e_s * _gap(x_s, x_t))
            l_t = l_t * a_t + rows.thread_sum(e_t)
            l_s = l_s * a_s + rows.thread_sum(e_s)
        if CE:
            if labelled:
                if not WHOLE:
                    m_1, fall_1, x_1 = rows.exponents(s, LOG2_E, m_1)
                    l_1 = l_1 * rows.exp2_whole(fall_1) + rows.thread_sum(tl.exp2(x_1))
                else:
                    l_1 = l_1 * _power(a_s, power) + rows.thread_sum(_power(e_s, power))
    if COS or MSE:
        out = _excluded(s, t)
        if COS:
            a, b = tl.where(out, 0.0, s), tl.where(out, 0.0, t)
            ss, tt, st = (
                ss + rows.thread_sum(a * a),
                tt + rows.thread_sum(b * b),
                st + rows.thread_sum(a * b),
            )
        if MSE:
            gap = tl.where(out, 0.0, s - t)
            sq += rows.thread_sum(gap * gap)
    return m_s, l_s, m_t, l_t, d, m_1, l_1, ss, tt, st, sq


@triton.jit
def _merge(
    sums,
    power,
    KD: tl.constexpr,
    CE: tl.constexpr,
    WHOLE: tl.constexpr,
    COS: tl.constexpr,
    MSE: tl.constexpr,
):
    """The threads' sums, brought to a common m a side and added: a few barriers, once a row."""
    m_s, l_s, m_t, l_t, d, m_1, l_1, ss, tt, st, sq = sums
    top_s, top_t, top_1 = 0.0, 0.0, 0.0
    if KD != 0 or CE:
        top_s, top_t = rows.max_two(m_s, m_t)
        a_s, a_t = rows.exp2_whole(m_s - top_s), rows.exp2_whole(m_t - top_t)
        if KD == FORWARD_KL:
            d = a_t * (d + l_t * ((m_t - top_t) - (m_s - top_s)))
        if KD == REVERSE_KL:
            d = a_s * (d + l_s * ((m_s - top_s) - (m_t - top_t)))
        if CE:
            if not WHOLE:
                top_1 = tl.max(m_1, 0)
                l_1 = l_1 * rows.exp2_whole(m_1 - top_1)
            else:
                l_1 = l_1 * _power(a_s, power)
        l_s, l_t, d, l_1 = rows.sum_four(l_s * a_s, l_t * a_t, d, l_1)
    else:
        l_s, l_t, d, l_1 = 0.0, 0.0, 0.0, 0.0
    if COS or MSE:
        ss, tt, st, sq = rows.sum_four(ss, tt, st, sq)
    else:
        ss, tt, st, sq = 0.0, 0.0, 0.0, 0.0
    return top_s, top_t, l_s, l_t, d, top_1, l_1, ss, tt, st, sq


@triton.jit
def _add_more(s, t, cols, sums, row, WHAT: tl.constexpr, KD: tl.constexpr):
    """A middle sweep: its sums with a tile more.

    MIXTURE, of JSD: sum e_t log2(p_t / M) and sum e_s log2(p_s / M), up to log2 l.
    SMALL: the divergence's terms, times l_s, of JSD those of either side; and the sum of q - p.
    STATISTICS: sum e x of either side, the largest logits and their columns.
    """
    scale, top_s, top_t, share_s, share_t, to_s, log_ratio, beta = row
    x_s, x_t = s * scale - top_s, t * scale - top_t
    e_s, e_t = tl.exp2(x_s), tl.exp2(x_t)
    if WHAT == MIXTURE:
        a, b = sums
        mixture = _log2_mixture(e_s, e_t, share_s, share_t)
        a += rows.thread_sum(e_t * _gap(x_t, mixture))
        b += rows.thread_sum(e_s * _gap(x_s, mixture))
        sums = (a, b)
    if WHAT == SMALL:
        a, b, left = sums
        e_t *= to_s
        d, near = _apart(s, t, scale, top_s - top_t, log_ratio)
        nats = d * LN_2
        left += rows.thread_sum(tl.where(near, e_t * (nats + _phi(nats)), e_s - e_t))
        if KD == FORWARD_KL:
            a += rows.thread_sum(tl.where(near, e_t * _phi(nats), e_s - e_t - e_t * nats))
        if KD == REVERSE_KL:
            a += rows.thread_sum(tl.where(near, e_s * _phi(-nats), e_t - e_s + e_s * nats))
        if KD == JSD:
            of_p, of_q, psi_u, psi_w = _log_shares(d, near, beta)
            mixture = (1 - beta) * e_s + beta * e_t
            a += rows.thread_sum(
                e_t * tl.where(near, psi_u, of_p) + tl.where(near, 0.0, mixture - e_t)
            )
            b += rows.thread_sum(
                e_s * tl.where(near, psi_w, of_q) + tl.where(near, 0.0, mixture - e_s)
            )
        sums = (a, b, left)
    if WHAT == STATISTICS:
        h_s, h_t, best_s, best_t, col_s, col_t = sums
        h_s += rows.thread_sum(e_s * _gap(x_s, 0.0))
        h_t += rows.thread_sum(e_t * _gap(x_t, 0.0))
        best_s, col_s = rows.first_highest(s, cols, best_s, col_s)
        best_t, col_t = rows.first_highest(t, cols, best_t, col_t)
        sums = (h_s, h_t, best_s, best_t, col_s, col_t)
    return sums


@triton.jit
def _middle_sweep(
    sums,
    row,
    places,
    extent,
    soft,
    heads,
    WHAT: tl.constexpr,
    KD: tl.constexpr,
    HEADS: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_V: tl.constexpr,
    LAST: tl.constexpr,
):
    """From the newest tile back to the oldest."""
    s_row, t_row, _g_row, s_body, t_body, _g_body = places
    head, body, n_full, tile, edge, is_edge = extent
    if n_full * BLOCK_V < body:
        rest = n_full * BLOCK_V + tile
        s, t = _load_some(s_body, t_body, rest, rest < body, soft, heads, True, HEADS)
        sums = _add_more(s, t, head + rest, sums, row, WHAT, KD)
    for i in range(0, n_full):
        at = (n_full - 1 - i) * BLOCK_V
        s, t = _load(s_body + at, t_body + at, tile, soft, heads, True, LAST, HEADS)
        sums = _add_more(s, t, head + at + tile, sums, row, WHAT, KD)
    if VECTOR > 1:
        edge_s, edge_t = _load_some(s_row, t_row, edge, is_edge, soft, heads, True, HEADS)
        sums = _add_more(edge_s, edge_t, edge, sums, row, WHAT, KD)
    return sums


@triton.jit
def _gradient(
    s,
    t,
    cols,
    row,
    how,
    heads,
    KD: tl.constexpr,
    CE: tl.constexpr,
    WHOLE: tl.constexpr,
    COS: tl.constexpr,
    MSE: tl.constexpr,
    HEADS: tl.constexpr,
    SMALL_KD: tl.constexpr,
):
    """Last sweep: the gradient of a tile in fp32, from the row's scalars."""
    (
        top_s,
        top_t,
        by_s,
        to_s,
        mean,
        spoilt,
        share_s,
        share_t,
        top_1,
        by_1,
        by_label,
        by_cos,
        ratio,
        by_gap,
        log_ratio,
        beta,
    ) = row
    scale, power, labelled, label = how
    g = tl.zeros_like(s)
    if KD != 0 or CE:
        x_s, x_t = s * scale - top_s, t * scale - top_t
        e_s = tl.exp2(x_s)
        if SMALL_KD:
            d, near = _apart(s, t, scale, top_s - top_t, log_ratio)
            if KD == FORWARD_KL:
                e_t, nats = to_s * tl.exp2(x_t), d * LN_2
                g = by_s * tl.where(near, e_t * (nats + _phi(nats)), e_s - e_t)
            if KD == REVERSE_KL:
                g = by_s * (e_s * (d - mean))
            if KD == JSD:
                _p, of_q, _u, _w = _log_shares(d, near, beta)
                g = by_s * (e_s * (of_q * LOG2_E - mean))
        else:
            if KD == FORWARD_KL:
                # Two probabilities that may nearly cancel: one rounding before, none of a product.
                g = by_s * (e_s - to_s * tl.exp2(x_t))
            if KD == REVERSE_KL:
                g = by_s * (e_s * (_gap(x_s, x_t) - mean)) + spoilt
            if KD == JSD:
                mixture = _log2_mixture(e_s, tl.exp2(x_t), share_s, share_t)
                g = by_s * (e_s * (_gap(x_s, mixture) - mean))
        if CE:
            if labelled:
                if not WHOLE:
                    g += by_1 * tl.exp2(s * LOG2_E - top_1)
                else:
                    g += by_1 * _power(e_s, power)
                g -= tl.where(cols == label, by_label, 0.0)
    if COS or MSE:
        out = _excluded(s, t)
        if COS:
            g += by_cos * (tl.where(out, 0.0, s) * ratio - tl.where(out, 0.0, t))
        if MSE:
            g += tl.where(out, 0.0, s - t) * by_gap
    if HEADS:
        g *= _slope(s, heads[0], heads[1])
    return g


@triton.jit
def _last_sweep(
    places,
    extent,
    row,
    how,
    heads,
    soft,
    KD: tl.constexpr,
    CE: tl.constexpr,
    WHOLE: tl.constexpr,
    COS: tl.constexpr,
    MSE: tl.constexpr,
    HEADS: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_V: tl.constexpr,
    SOFT: tl.constexpr,
    SMALL_KD: tl.constexpr,
):
    """The gradient, from the newest tile back to the oldest."""
    s_row, t_row, g_row, s_body, t_body, g_body = places
    head, body, n_full, tile, edge, is_edge = extent
    dtype: tl.constexpr = g_row.dtype.element_ty
    if n_full * BLOCK_V < body:
        rest = n_full * BLOCK_V + tile
        s, t = _load_some(s_body, t_body, rest, rest < body, soft, heads, SOFT, HEADS)
        g = _gradient(s, t, head + rest, row, how, heads, KD, CE, WHOLE, COS, MSE, HEADS, SMALL_KD)
        tl.store(g_body + rest, g.to(dtype), mask=rest < body)
    for i in range(0, n_full):
        at = (n_full - 1 - i) * BLOCK_V
        s, t = _load(s_body + at, t_body + at, tile, soft, heads, SOFT, True, HEADS)
        g = _gradient(
            s, t, head + at + tile, row, how, heads, KD, CE, WHOLE, COS, MSE, HEADS, SMALL_KD
        )
        tl.store(g_body + at + tile, g.to(dtype), eviction_policy="evict_first")
    if VECTOR > 1:
        s, t = _load_some(s_row, t_row, edge, is_edge, soft, heads, SOFT, HEADS)
        g = _gradient(s, t, edge, row, how, heads, KD, CE, WHOLE, COS, MSE, HEADS, SMALL_KD)
        tl.store(g_row + edge, g.to(dtype), mask=is_edge)


# --- Kernel ---------------------------------------------------------------------------------------


@triton.jit(
    do_not_specialize=["n_rows", "n_cols", "n_padded", "ignore_index", "power"]
    + [f"stride_{x}" for x in ("s", "t", "g", "kd_scale", "ce_scale")],
    # A row reads one element of each, wherever it lies.
    do_not_specialize_on_alignment=[f"{x}_ptr" for x in ("labels", "mask", "kd_scale", "ce_scale")],
)
def distillation_kernel(
    s_ptr,
    t_ptr,
    g_ptr,
    labels_ptr,
    mask_ptr,
    kd_scale_ptr,
    ce_scale_ptr,
    rows_ptr,
    statistics_ptr,
    stride_s,
    stride_t,
    stride_g,
    stride_kd_scale,
    stride_ce_scale,
    n_rows,
    n_cols,
    n_padded,
    ignore_index,
    power,
    temperature,
    kd_weight,
    ce_weight,
    cos_weight,
    mse_weight,
    beta,
    heads,
    KD: tl.constexpr,
    CE: tl.constexpr,
    WHOLE: tl.constexpr,
    COS: tl.constexpr,
    MSE: tl.constexpr,
    MASK: tl.constexpr,
    GRADIENT: tl.constexpr,
    HEADS: tl.constexpr,
    COUNTED: tl.constexpr,
    EXACT: tl.constexpr,
    VECTOR: tl.constexpr,
    TILES: tl.constexpr,
    THREADS: tl.constexpr,
):
    """s and t, (n_rows, n_cols) -> rows, (4, n_rows): kd, ce, cos, mse; g, (n_rows, n_padded);
    if COUNTED statistics, (3, n_rows)."""
    SOFT: tl.constexpr = KD != 0 or COS or MSE
    BLOCK_V: tl.constexpr = TILES * THREADS * VECTOR
    row = tl.program_id(0).to(tl.int64)
    offset_s, offset_t, offset_g = row * stride_s, row * stride_t, row * stride_g
    head, body = rows.split(offset_s, n_cols, VECTOR)
    s_row, s_body = s_ptr + offset_s, s_ptr + rows.aligned(offset_s, head, VECTOR)
    t_row, t_body = t_ptr + offset_t, t_ptr + rows.aligned(offset_t, head, VECTOR)
    g_row, g_body = g_ptr + offset_g, g_ptr + rows.aligned(offset_g, head, VECTOR)
    n_full = body // BLOCK_V
    tile = rows.tile(TILES, THREADS, VECTOR)
    rest = n_full * BLOCK_V + tile
    edge, is_edge = rows.edges(head, body, n_cols, THREADS, VECTOR)
    places = s_row, t_row, g_row, s_body, t_body, g_body
    extent = head, body, n_full, tile, edge, is_edge
    dtype: tl.constexpr = g_ptr.dtype.element_ty

    # What this row needs. A row that needs nothing is not read.
    weight = 1.0
    soft = tl.full([], SOFT, tl.int1)
    if SOFT:
        soft &= tl.load(kd_scale_ptr + row * stride_kd_scale) != 0
    if SOFT and MASK:
        weight = tl.load(mask_ptr + row).to(tl.float32)
        soft &= weight != 0
    label = tl.full([], 0, tl.int32)
    labelled = tl.full([], False, tl.int1)
    if CE:
        wanted = tl.load(labels_ptr + row)
        counted = tl.load(ce_scale_ptr + row * stride_ce_scale) != 0
        labelled = (wanted != ignore_index) & counted
        known = (wanted >= 0) & (wanted < n_cols)
        label = tl.where(known, wanted, 0).to(tl.int32)
        # Before any thread can have written over it; the barriers of the sums keep it so.
        at_label = tl.load(s_ptr + offset_s + label, mask=labelled, other=0.0).to(tl.float32)
        if HEADS:
            at_label = _logits(at_label, heads[0], heads[1])
    if GRADIENT:
        for start in range(n_cols, n_padded, BLOCK_V):
            padding = start + tl.arange(0, BLOCK_V)
            tl.store(g_row + padding, 0.0, mask=padding < n_padded)
    if not (soft | labelled):
        for _ in tl.static_range(4):
            tl.store(rows_ptr + row, 0.0)
            rows_ptr += n_rows
        if COUNTED:
            for _ in tl.static_range(3):
                tl.store(statistics_ptr + row, 0.0)
                statistics_ptr += n_rows
        if GRADIENT:
            nothing = tl.zeros([TILES, THREADS, VECTOR], dtype)
            for i in range(0, n_full):
                tl.store(g_body + i * BLOCK_V + tile, nothing)
            tl.store(g_body + rest, nothing, mask=rest < body)
            tl.store(g_row + edge, 0.0, mask=is_edge)
        return

    # First sweep: the sums.
    scale = LOG2_E / temperature
    how = scale, power, labelled, label
    ONLY: tl.constexpr = not GRADIENT and KD != JSD
    sums = _no_sums(THREADS)
    if VECTOR > 1:
        edge_s, edge_t = _load_some(s_row, t_row, edge, is_edge, soft, heads, SOFT, HEADS)
        sums = _add_sums(edge_s, edge_t, sums, how, KD, CE, WHOLE, COS, MSE)
    for i in range(0, n_full):
        at = i * BLOCK_V
        s, t = _load(s_body + at, t_body + at, tile, soft, heads, SOFT, ONLY, HEADS)
        sums = _add_sums(s, t, sums, how, KD, CE, WHOLE, COS, MSE)
    if n_full * BLOCK_V < body:
        s, t = _load_some(s_body, t_body, rest, rest < body, soft, heads, SOFT, HEADS)
        sums = _add_sums(s, t, sums, how, KD, CE, WHOLE, COS, MSE)
    merged = _merge(sums, power, KD, CE, WHOLE, COS, MSE)
    top_s, top_t, l_s, l_t, d, top_1, l_1, ss, tt, st, sq = merged

    # The row's losses, and the factors of its gradient. The scales are applied in fp32, before
    # anything is rounded.
    kd, ce, cos, mse = 0.0, 0.0, 0.0, 0.0
    by_s, to_s, mean, spoilt, share_s, share_t = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    by_1, by_label, by_cos, ratio, by_gap = 0.0, 0.0, 0.0, 0.0, 0.0
    small, log_ratio = tl.full([], False, tl.int1), 0.0
    # Loaded again, as registers are dear in the sweeps.
    by_row = weight * tl.load(kd_scale_ptr + row * stride_kd_scale)
    if KD != 0:
        by_kd = by_row * kd_weight * temperature
        # Where neither row holds a NaN, only tiny * inf can have made d one: minus infinity on the
        # right where the left probability underflows. It is tiny and not 0, and d infinite.
        d = tl.where((d != d) & (l_s == l_s) & (l_t == l_t), INF, d)
        to_s = tl.div_rn(l_s, l_t)
        share_s, share_t = 1 - beta, beta * to_s
        log_ratio = tl.log2(to_s)
        none = tl.zeros([THREADS], tl.float32)
        middle = scale, top_s, top_t, share_s, share_t, to_s, log_ratio, beta
        if COUNTED:
            zero = tl.zeros([THREADS], tl.int32)
            counts = _middle_sweep(
                (none, none, none - INF, none - INF, zero, zero),
                middle,
                places,
                extent,
                soft,
                heads,
                STATISTICS,
                KD,
                HEADS,
                VECTOR,
                BLOCK_V,
                False,
            )
            h_s, h_t, best_s, best_t, col_s, col_t = counts
            h_s = LN_2 * (tl.log2(l_s) - tl.sum(h_s, 0) / l_s)
            h_t = LN_2 * (tl.log2(l_t) - tl.sum(h_t, 0) / l_t)
            same = rows.first_column(best_s, col_s) == rows.first_column(best_t, col_t)
            same = tl.where(h_s + h_t == h_s + h_t, tl.where(same, 1.0, 0.0), float("nan"))
            counted = statistics_ptr + row
            tl.store(counted, tl.where(soft, h_s, 0.0))
            tl.store(counted + n_rows, tl.where(soft, h_t, 0.0))
            tl.store(counted + n_rows + n_rows, tl.where(soft, same, 0.0))
        if KD == FORWARD_KL:
            kd = d / l_t - tl.log2(l_t) + tl.log2(l_s)
            by_s = by_kd / l_s
        if KD == REVERSE_KL:
            mean = d / l_s
            kd = mean - tl.log2(l_s) + tl.log2(l_t)
            by_s = by_kd * LN_2 / l_s
            spoilt = tl.where(kd < INF, 0.0, float("nan"))
        if KD == JSD:
            a, b = _middle_sweep(
                (none, none),
                middle,
                places,
                extent,
                soft,
                heads,
                MIXTURE,
                KD,
                HEADS,
                VECTOR,
                BLOCK_V,
                not GRADIENT,
            )
            mean = tl.sum(b, 0) / l_s
            kd = beta * (tl.sum(a, 0) / l_t + tl.log2(to_s)) + (1 - beta) * mean
        if EXACT:
            small = soft & (kd < SMALL_BITS)
        if small:
            a, b, left = _middle_sweep(
                (none, none, none),
                middle,
                places,
                extent,
                soft,
                heads,
                SMALL,
                KD,
                HEADS,
                VECTOR,
                BLOCK_V,
                not GRADIENT,
            )
            kd = LOG2_E * tl.sum(a, 0) / l_s
            # What is left of the sum of q - p, which is 0, is what the constant in d is off.
            log_ratio += LOG2_E * tl.sum(left, 0) / l_s
            if KD == REVERSE_KL:
                mean = kd
            if KD == JSD:
                mean = LOG2_E * tl.sum(b, 0) / l_s
                kd = beta * kd + (1 - beta) * mean
        if KD == JSD:
            by_s = tl.where(kd == kd, by_kd * LN_2 * (1 - beta) / l_s, float("nan"))
        kd = tl.where(soft, kd * (LN_2 * temperature * temperature) * weight, 0.0)
    if CE:
        if not WHOLE:
            x_label = at_label * LOG2_E - top_1
        else:
            x_label = temperature * (at_label * scale - top_s)
        ce = LN_2 * (tl.log2(l_1) - x_label)
        # A label outside the vocabulary makes its own row NaN: asking about it would be a wait.
        ce = tl.where(labelled, tl.where(known, ce, float("nan")), 0.0)
        by_label = ce_weight * tl.load(ce_scale_ptr + row * stride_ce_scale)
        by_label = tl.where(known, by_label, float("nan"))
        by_1 = by_label / l_1
    if COS:
        # A zero vector has no direction: distance 1, gradient 0.
        zero = ((ss == 0) | (tt == 0)) & (ss + tt == ss + tt)
        by_length = tl.where(zero, 0.0, rows.reciprocal_root(ss) * rows.reciprocal_root(tt))
        cosine = st * by_length
        cos = tl.where(soft, (1 - cosine) * weight, 0.0)
        by_cos = by_row * cos_weight * by_length
        # Outside the mask sums of what the row holds may be infinite, and must not spoil its CE.
        ratio = tl.where(soft & (zero == 0), tl.div_rn(st, ss), 0.0)
    if MSE:
        mse = tl.where(soft, sq * weight, 0.0)
        by_gap = tl.where(sq < INF, by_row * mse_weight * 2, float("nan"))
    out = rows_ptr + row
    tl.store(out, kd)
    tl.store(out + n_rows, ce)
    tl.store(out + n_rows + n_rows, cos)
    tl.store((out + n_rows) + n_rows + n_rows, mse)

    # Last sweep: the gradient.
    if GRADIENT:
        scalars = (top_s, top_t, by_s, to_s, mean, spoilt, share_s, share_t)
        scalars += (top_1, by_1, by_label, by_cos, ratio, by_gap, log_ratio, beta)
        if small:
            _last_sweep(
                places,
                extent,
                scalars,
                how,
                heads,
                soft,
                KD,
                CE,
                WHOLE,
                COS,
                MSE,
                HEADS,
                VECTOR,
                BLOCK_V,
                SOFT,
                True,
            )
        else:
            _last_sweep(
                places,
                extent,
                scalars,
                how,
                heads,
                soft,
                KD,
                CE,
                WHOLE,
                COS,
                MSE,
                HEADS,
                VECTOR,
                BLOCK_V,
                SOFT,
                False,
            )


# --- Launcher -------------------------------------------------------------------------------------


class Variant(NamedTuple):
    """What is compiled for: the terms, and the shape of a tile. All else are arguments."""

    KD: int
    CE: bool
    WHOLE: bool  # beside a CE: T is 1, 2, 3 or 4
    COS: bool
    MSE: bool
    MASK: bool
    GRADIENT: bool
    HEADS: bool  # a side's logits are to be made first
    COUNTED: bool  # statistics, in a sweep of their own
    EXACT: bool  # small divergences, in a sweep of their own; never without, but to count the rest
    VECTOR: int
    TILES: int
    THREADS: int

    @property
    def num_warps(self) -> int:
        return self.THREADS // 32

    @property
    def maxnreg(self) -> int | None:
        """The registers of a thread, at most. With 64 a multiprocessor holds two programs of 16
        warps; left alone, the compiler takes a dozen more, and one is left. None: as it likes."""
        both = self.KD and (self.COS or self.MSE)  # their sums take some 100
        return 64 if self.num_warps == 16 and not both else None


def variant(
    options: Any,
    labels: bool,
    mask: bool,
    gradient: bool,
    itemsizes: list[int],
    aligned: bool,
    heads: bool = False,
    counted: bool = False,
) -> Variant:
    """The kernel for these options; ``itemsizes`` are those of student, teacher and gradient, in
    bytes.

    VECTOR neighbours fill the 16 bytes of a store. Of more the compiler would make two stores, and
    bring the tile into their layout through shared memory first, with barriers, every turn.
    """
    kd = DIVERGENCES[options.divergence] if options.kd_weight else 0
    ce = labels and bool(options.ce_weight)
    whole = ce and _power_of(kd, options.temperature) > 0
    cos, mse = bool(options.cos_weight), bool(options.mse_weight)
    # Without a gradient there is nothing to find again, and 32 warps would be left 32 registers.
    warps = rows.warps_for(options.vocab_size * sum(itemsizes[:2]), most=32 if gradient else 16)
    if kd and (cos or mse):
        # Their sums take some 100 registers, 32 warps have 64.
        warps = min(warps, 16 if gradient else 8)
    elif gradient and warps == 16 and (heads or kd == DIVERGENCES["jsd"] or (ce and not whole)):
        warps = 32  # 16 would be given 64 registers and a spill, one program of 32 is not
    vector = vector_of(itemsizes)
    return Variant(
        KD=kd,
        CE=ce,
        WHOLE=whole,
        COS=cos,
        MSE=mse,
        MASK=mask,
        GRADIENT=gradient,
        HEADS=heads,
        COUNTED=counted,
        EXACT=bool(kd),
        VECTOR=vector if aligned else 1,
        TILES=8 // (vector if aligned else 1),
        THREADS=32 * warps,
    )


def vector_of(itemsizes: list[int]) -> int:
    """The elements of an access: 16 bytes of student or gradient, whichever has the wider ones."""
    return 16 // max(itemsizes[0], itemsizes[-1])


def distillation(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    mask: Tensor | None,
    kd_scale: Tensor,
    ce_scale: Tensor,
    options: Any,
    gradient: Tensor | None,
    heads: Any = ((1.0, 0.0, None), (1.0, 0.0, None)),
    bias_gradient: Tensor | None = None,
    statistics: Tensor | None = None,
) -> Tensor:
    """`distilfast.reference.distillation` for bf16, fp16 and fp32, of heads without a bias: a GPU's
    product adds it for nothing. bias_gradient in fp32.

    Logits whose innermost dimension is not the vocabulary are copied first. ``gradient`` has to be
    dense in it, and may be ``student`` where that is; of another dtype it has memory of its own.

    The bias' gradient is a pass of its own over the gradient, 2 bytes a logit in bf16: a program
    has one row, and partial sums in fp32 would be 8 bytes of traffic for each.
    """
    if any(head[2] is not None for head in heads):
        raise ValueError("heads: expected none with a bias")
    student = student if student.stride(1) == 1 else student.contiguous()
    teacher = teacher if teacher.stride(1) == 1 else teacher.contiguous()
    n_rows = student.shape[0]
    losses = torch.empty(4, n_rows, dtype=torch.float32, device=student.device)
    if n_rows == 0:
        return losses
    written = student if gradient is None else gradient
    itemsizes = [x.element_size() for x in (student, teacher, written)]
    chosen = variant(
        options,
        labels is not None,
        mask is not None,
        gradient is not None,
        itemsizes,
        rows.is_aligned([student, teacher, written], vector_of(itemsizes)),
        any(head[:2] != (1.0, 0.0) for head in heads),
        statistics is not None,
    )
    temperature = options.temperature if chosen.KD else 1.0
    distillation_kernel[(n_rows,)](
        student,
        teacher,
        written,
        None if labels is None else labels.contiguous(),
        None if mask is None else mask.contiguous(),
        kd_scale,
        ce_scale,
        losses,
        statistics,
        student.stride(0),
        teacher.stride(0),
        written.stride(0),
        kd_scale.stride(0) if kd_scale.ndim else 0,
        ce_scale.stride(0) if ce_scale.ndim else 0,
        n_rows,
        options.vocab_size,
        student.shape[1],
        options.ignore_index,
        _power_of(chosen.KD, temperature),
        temperature,
        options.kd_weight,
        options.ce_weight,
        options.cos_weight,
        options.mse_weight,
        options.jsd_beta,
        tuple(float(x) for head in heads for x in head[:2]),
        **chosen._asdict(),
        num_warps=chosen.num_warps,
        maxnreg=chosen.maxnreg,
    )
    if gradient is not None and bias_gradient is not None:
        bias_gradient += gradient[:, : options.vocab_size].sum(0, dtype=torch.float32)
    return losses


def _power_of(kd: int, temperature: float) -> int:
    """T where e_1 is a small power of e_s, else 0. Without a KD everything is at T = 1."""
    if not kd:
        return 1
    return int(temperature) if temperature in (1, 2, 3, 4) else 0
