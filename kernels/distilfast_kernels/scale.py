"""A gradient times what the backward brings, in place and in fp32; times 1 costs nothing.

`loss.backward()` brings 1, a loss scale or 1 / accumulation something else, and only the device
knows which: asking would be a wait. So every program reads the factor, and leaves if it is 1.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from distilfast_kernels import rows

# --- Kernel ---------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["stride_g", "stride_by", "n_cols"])
def scale_kernel(
    g_ptr,
    by_ptr,
    stride_g,
    stride_by,
    n_cols,
    VECTOR: tl.constexpr,
    TILES: tl.constexpr,
    THREADS: tl.constexpr,
):
    """One row of g, (n_rows, n_cols), times by, () or (n_rows,)."""
    row = tl.program_id(0).to(tl.int64)
    by = tl.load(by_ptr + row * stride_by).to(tl.float32)
    if by == 1:
        return
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


# --- Launcher -------------------------------------------------------------------------------------


def scale(gradient: Tensor, by: Tensor) -> None:
    """gradient, (N, M), dense along its rows, *= by, () or (N,)."""
    n_rows, n_cols = gradient.shape
    if n_rows == 0 or n_cols == 0:
        return
    vector = 16 // gradient.element_size() if rows.is_aligned([gradient], 1) else 1
    warps = rows.warps_for(n_cols * gradient.element_size(), most=8)
    scale_kernel[(n_rows,)](
        gradient,
        by,
        gradient.stride(0),
        by.stride(0) if by.ndim else 0,
        n_cols,
        VECTOR=vector,
        TILES=16 // vector,
        THREADS=32 * warps,
        num_warps=warps,
    )
