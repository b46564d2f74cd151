"""An ensemble of teachers as one set of logits, streamed: no teacher's softmax is held in memory.

The mathematics, for teachers t_k with weights w_k that sum to 1 (Hinton et al. 2015, section 1):

    probability   z = T log sum_k w_k softmax(t_k / T), the arithmetic mean
    logit         z = sum_k w_k t_k, the geometric mean

In bits: with y_k = t_k log2(e) / T - log2(sum of its 2^x) + log2 w_k, z = T ln2 log2 sum_k 2^y_k.
The first sweep finds each teacher's sum, as the sweep in distillation.py does; the second,
backwards, adds the teachers against the largest so far, one exponential each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from distilfast_kernels import rows
from distilfast_kernels.rows import FLOOR, INF, LN_2, LOG2_E, log2

# --- Kernel ---------------------------------------------------------------------------------------


@triton.jit
def _add(t, m, total, scale):
    m, fall, x = rows.exponents(t.to(tl.float32), scale, m)
    return m, total * rows.exp2_whole(fall) + rows.thread_sum(tl.exp2(x))


@triton.jit
def _combine(
    t_ptrs,
    offsets,
    at,
    exists,
    weights,
    tops,
    shifts,
    scale,
    by,
    K: tl.constexpr,
    MEAN: tl.constexpr,
):
    """z of a tile. offsets: where each teacher's begins. y is (t scale - top) + shift, in this
    order, so that no offset of the logits costs a digit."""
    t = tl.load(t_ptrs[0] + offsets[0] + at, mask=exists).to(tl.float32)
    if MEAN:
        top = (t * scale - tops[0]) + shifts[0]
        total = tl.full(t.shape, 1.0, tl.float32)
        for k in tl.static_range(1, K):
            t = tl.load(t_ptrs[k] + offsets[k] + at, mask=exists).to(tl.float32)
            y = (t * scale - tops[k]) + shifts[k]
            # Equal ones differ by 0, minus infinity included.
            e = tl.exp2(tl.where(y == top, 0.0, -tl.abs(y - top)))
            total = tl.where(y > top, total * e + 1.0, total + e)
            top = tl.where(y > top, y, tl.where(y == y, top, y))
        z = by * (top + log2(total))
    else:
        z = t * weights[0]
        for k in tl.static_range(1, K):
            t = tl.load(t_ptrs[k] + offsets[k] + at, mask=exists).to(tl.float32)
            z += t * weights[k]
    return z


@triton.jit(do_not_specialize=["stride_z", "n_cols"])
def combine_kernel(
    t_ptrs,
    z_ptr,
    odd_strides,
    stride_z,
    weights,
    log2_weights,
    n_cols,
    temperature,
    K: tl.constexpr,
    MEAN: tl.constexpr,
    VECTOR: tl.constexpr,
    TILES: tl.constexpr,
    THREADS: tl.constexpr,
):
    """A tuple of K (n_rows, n_cols) -> z, (n_rows, n_cols) fp32. MEAN: the arithmetic one."""
    BLOCK_V: tl.constexpr = TILES * THREADS * VECTOR
    row = tl.program_id(0).to(tl.int64)
    head, body = rows.split(row * stride_z, n_cols, VECTOR)
    n_full = body // BLOCK_V
    tile = rows.tile(TILES, THREADS, VECTOR)
    rest = n_full * BLOCK_V + tile
    edge, is_edge = rows.edges(head, body, n_cols, THREADS, VECTOR)
    scale = LOG2_E / temperature
    starts, bodies, tops, shifts = (), (), (), ()
    for k in tl.static_range(K):
        row_k = row * (odd_strides[k] // 2)
        body_k = rows.aligned(row_k, head, VECTOR)
        starts += (row_k,)
        bodies += (body_k,)
        if MEAN:
            m = tl.full([THREADS], FLOOR, tl.float32)
            total = tl.zeros([THREADS], tl.float32)
            if VECTOR > 1:
                t = tl.load(t_ptrs[k] + row_k + edge, mask=is_edge, other=-INF)
                m, total = _add(t, m, total, scale)
            for i in range(0, n_full):
                at = body_k + i * BLOCK_V
                m, total = _add(tl.load(t_ptrs[k] + at + tile), m, total, scale)
            if n_full * BLOCK_V < body:
                u = tl.load(t_ptrs[k] + body_k + rest, mask=rest < body, other=-INF)
                m, total = _add(u, m, total, scale)
            top = tl.max(m, 0)
            total = tl.sum(total * rows.exp2_whole(m - top), 0)
            tops += (top,)
            shifts += (log2_weights[k] - tl.log2(total),)
    by = temperature * LN_2
    z_body = z_ptr + rows.aligned(row * stride_z, head, VECTOR)
    if n_full * BLOCK_V < body:
        z = _combine(t_ptrs, bodies, rest, rest < body, weights, tops, shifts, scale, by, K, MEAN)
        tl.store(z_body + rest, z, mask=rest < body)
    for i in range(0, n_full):
        at = (n_full - 1 - i) * BLOCK_V + tile
        z = _combine(t_ptrs, bodies, at, None, weights, tops, shifts, scale, by, K, MEAN)
        tl.store(z_body + at, z)
    if VECTOR > 1:
        z_edge = _combine(t_ptrs, starts, edge, is_edge, weights, tops, shifts, scale, by, K, MEAN)
        tl.store(z_ptr + row * stride_z + edge, z_edge, mask=is_edge)


# --- Launcher -------------------------------------------------------------------------------------


def combine_teachers(
    logits: Sequence[Tensor],
    weights: Sequence[float],
    temperature: float,
    mode: str,
    vocab_size: int,
    z: Tensor,
) -> None:
    """`distilfast.reference.combine_teachers` for bf16, fp16 and fp32, into z, (N, vocab_size)."""
    used = [(t, w) for t, w in zip(logits, weights, strict=True) if w]
    teachers = [t if t.stride(1) == 1 else t.contiguous() for t, _ in used]
    if z.shape[0] == 0:
        return
    # 16 bytes of z, which is what is stored: see `distillation.variant`.
    vector = 16 // z.element_size()
    row_bytes = vocab_size * sum(t.element_size() for t in teachers)
    warps = rows.warps_for(row_bytes, most=16)
    vector = vector if rows.is_aligned([*teachers, z], vector) else 1
    combine_kernel[(z.shape[0],)](
        tuple(teachers),
        z,
        rows.odd(t.stride(0) for t in teachers),
        z.stride(0),
        tuple(float(w) for _, w in used),
        tuple(math.log2(w) for _, w in used),
        vocab_size,
        temperature,
        K=len(teachers),
        MEAN=mode == "probability",
        VECTOR=vector,
        TILES=8 // vector,
        THREADS=32 * warps,
        num_warps=warps,
    )
