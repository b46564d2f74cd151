"""Gradients times what the backward brings, in place and in fp32; times 1 costs nothing.

`loss.backward()` brings 1, a loss scale or 1 / accumulation something else, and only the device
knows which: asking would be a wait. So every program reads the factor, and leaves if it is 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from distilfast_kernels import rows

# --- Kernel ---------------------------------------------------------------------------------------


@triton.jit
def _scale_row(
    g_ptr,
    row,
    stride_g,
    n_cols,
    by,
    VECTOR: tl.constexpr,
    TILES: tl.constexpr,
    THREADS: tl.constexpr,
):
    BLOCK: tl.constexpr = TILES * THREADS * VECTOR
    dtype: tl.constexpr = g_ptr.dtype.element_ty
    head, body = rows.split(row * stride_g, n_cols, VECTOR)
    g_body = g_ptr + rows.aligned(row * stride_g, head, VECTOR)
    tile = rows.tile(TILES, THREADS, VECTOR)
    for i in range(0, body // BLOCK):
        at = g_body + i * BLOCK + tile
        tl.store(at, (tl.load(at).to(tl.float32) * by).to(dtype))
    rest = body // BLOCK * BLOCK + tile
    g = tl.load(g_body + rest, mask=rest < body).to(tl.float32)
    tl.store(g_body + rest, (g * by).to(dtype), mask=rest < body)
    if VECTOR > 1:
        edge, is_edge = rows.edges(head, body, n_cols, THREADS, VECTOR)
        at = g_ptr + row * stride_g + edge
        edge_g = tl.load(at, mask=is_edge).to(tl.float32)
        tl.store(at, (edge_g * by).to(dtype), mask=is_edge)


@triton.jit(do_not_specialize=["stride_by"])
def scale_kernel(
    g_ptrs,
    by_ptr,
    odd_strides,
    odd_n_rows,
    odd_n_cols,
    stride_by,
    K: tl.constexpr,
    VECTORS: tl.constexpr,
    THREADS: tl.constexpr,
):
    """A tuple of K gradients, (n_rows, n_cols) each, times by, () or a factor a row. A program
    takes every num_programs-th row of each. The numbers come as `rows.odd`."""
    if stride_by == 0:
        if tl.load(by_ptr) == 1:
            return
    for k in tl.static_range(K):
        for i in range(tl.program_id(0), odd_n_rows[k] // 2, tl.num_programs(0)):
            row = tl.cast(i, tl.int64)
            by = tl.load(by_ptr + row * stride_by).to(tl.float32)
            if by != 1:
                _scale_row(
                    g_ptrs[k],
                    row,
                    odd_strides[k] // 2,
                    odd_n_cols[k] // 2,
                    by,
                    VECTORS[k],
                    16 // VECTORS[k],
                    THREADS,
                )


# --- Launcher -------------------------------------------------------------------------------------

# Gradients of one launch; each is unrolled.
MAX_GRADIENTS = 8
# 16 programs of 4 warps on each of an H200's 132 multiprocessors. More would be started only to
# find a factor of 1.
MAX_PROGRAMS = 2112
NUM_WARPS = 4


def scale(gradients: Sequence[Tensor], by: Tensor) -> None:
    """Each gradient, (N, M), dense along its rows, *= by, () or (N,)."""
    filled = [g for g in gradients if g.numel()]
    for start in range(0, len(filled), MAX_GRADIENTS):
        some = filled[start : start + MAX_GRADIENTS]
        vectors = [16 // g.element_size() if rows.is_aligned([g], 1) else 1 for g in some]
        scale_kernel[(min(MAX_PROGRAMS, max(len(g) for g in some)),)](
            tuple(some),
            by,
            rows.odd(g.stride(0) for g in some),
            rows.odd(g.shape[0] for g in some),
            rows.odd(g.shape[1] for g in some),
            by.stride(0) if by.ndim else 0,
            K=len(some),
            VECTORS=tuple(vectors),
            THREADS=32 * NUM_WARPS,
            num_warps=NUM_WARPS,
        )
