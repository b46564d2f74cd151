"""The cosine distance of hidden states and its gradient, all layers in one launch.

The mathematics, for a row with student s and teacher t of one layer: the distance is
1 - s.t / (|s| |t|) (Sanh et al. 2019, section 3), its gradient (r s - t) / (|s| |t|) with
r = s.t / |s|^2. A zero vector has no direction: distance 1, gradient 0.

A row is read once: it stays in registers between its sums and its gradient. Only a row longer than
MAX_BLOCK_D elements is read again, from L2. A program takes several short rows, and every layer of
them, so that the mean over layers is added in one order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from distilfast_kernels.rows import INF, reciprocal_root

# --- Kernel ---------------------------------------------------------------------------------------


@triton.jit
def _load(s_ptr, t_ptr, at, exists):
    """Both sides in fp32. What both rule out (minus infinity) has no part in the cosine."""
    s = tl.load(s_ptr + at, mask=exists, other=0.0).to(tl.float32)
    t = tl.load(t_ptr + at, mask=exists, other=0.0).to(tl.float32)
    out = (s == -INF) & (t == -INF)
    return tl.where(out, 0.0, s), tl.where(out, 0.0, t)


@triton.jit(
    do_not_specialize=["n_rows", "stride_scale"],
    do_not_specialize_on_alignment=["mask_ptr", "scale_ptr"],
)
def hidden_cosine_kernel(
    s_ptrs,
    t_ptrs,
    g_ptrs,
    mask_ptr,
    scale_ptr,
    rows_ptr,
    stride_scale,
    n_rows,
    n_cols,
    share,
    LAYERS: tl.constexpr,
    MASK: tl.constexpr,
    GRADIENT: tl.constexpr,
    ONCE: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A tuple of LAYERS dense (n_rows, n_cols) a side -> rows, (n_rows,), and a tuple of gradients.

    share: of a layer in the mean. ONCE: a row fits BLOCK_D. ADD: to what rows holds.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = tl.arange(0, BLOCK_D)
    inside = row < n_rows
    weight = tl.full([BLOCK_N], 1.0, tl.float32)
    if MASK:
        weight = tl.load(mask_ptr + row, mask=inside, other=0).to(tl.float32)
    scale = tl.load(scale_ptr + row * stride_scale, mask=inside, other=0.0)
    used = inside & (weight != 0) & (scale != 0)
    scale = scale * weight * share
    first = row[:, None] * n_cols + cols[None, :]
    total = tl.zeros([BLOCK_N], tl.float32)
    if ADD:
        total = tl.load(rows_ptr + row, mask=inside, other=0.0)
    for layer in tl.static_range(LAYERS):
        s_ptr, t_ptr, g_ptr = s_ptrs[layer], t_ptrs[layer], g_ptrs[layer]
        if ONCE:
            s, t = _load(s_ptr, t_ptr, first, used[:, None] & (cols < n_cols)[None, :])
            ss, tt, st = tl.sum(s * s, 1), tl.sum(t * t, 1), tl.sum(s * t, 1)
        else:
            ss = tl.zeros([BLOCK_N], tl.float32)
            tt, st = ss, ss
            for i in range(0, n_cols, BLOCK_D):
                s, t = _load(s_ptr, t_ptr, first + i, used[:, None] & (i + cols < n_cols)[None, :])
                ss, tt, st = ss + tl.sum(s * s, 1), tt + tl.sum(t * t, 1), st + tl.sum(s * t, 1)
        zero = ((ss == 0) | (tt == 0)) & (ss + tt == ss + tt)
        by_length = tl.where(zero, 0.0, reciprocal_root(ss) * reciprocal_root(tt))
        total += (1 - st * by_length) * share * weight
        if GRADIENT:
            by = (scale * by_length)[:, None]
            ratio = tl.where(zero, 0.0, tl.div_rn(st, ss))[:, None]
            if ONCE:
                g = tl.where(used[:, None], by * (s * ratio - t), 0.0).to(g_ptr.dtype.element_ty)
                tl.store(g_ptr + first, g, mask=inside[:, None] & (cols < n_cols)[None, :])
            else:
                for i in range(0, n_cols, BLOCK_D):
                    exists = (i + cols < n_cols)[None, :]
                    s, t = _load(s_ptr, t_ptr, first + i, used[:, None] & exists)
                    g = tl.where(used[:, None], by * (s * ratio - t), 0.0)
                    g = g.to(g_ptr.dtype.element_ty)
                    tl.store(g_ptr + first + i, g, mask=inside[:, None] & exists)
    tl.store(rows_ptr + row, tl.where(used, total, 0.0), mask=inside)


# --- Launcher -------------------------------------------------------------------------------------

# Elements of a side in a program's tile; with 4 warps they are 16 a thread, with 8 warps 32.
BLOCK_ELEMENTS = 2048
MAX_BLOCK_D = 8192
# Layers of one launch; each is unrolled.
MAX_LAYERS = 8


def tile(n_cols: int) -> tuple[int, int, int]:
    """BLOCK_N, BLOCK_D and the number of warps for rows of n_cols elements."""
    block_d = min(MAX_BLOCK_D, triton.next_power_of_2(max(1, n_cols)))
    return max(1, BLOCK_ELEMENTS // block_d), block_d, 4 if block_d <= 4096 else 8


def hidden_cosine(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    mask: Tensor | None,
    scale: Tensor,
    gradients: Sequence[Tensor],
) -> Tensor:
    """`distilfast.reference.hidden_cosine` for bf16, fp16, fp32; ``gradients`` are contiguous."""
    n_rows = student[0].shape[0]
    launches = _launches([x.shape[1] for x in student])
    rows = torch.empty(n_rows, dtype=torch.float32, device=student[0].device)
    if n_rows == 0:
        return rows
    for launch, layers in enumerate(launches):
        s = tuple(x.contiguous() for x in student[layers])
        n_cols = s[0].shape[1]
        block_n, block_d, num_warps = tile(n_cols)
        hidden_cosine_kernel[(triton.cdiv(n_rows, block_n),)](
            s,
            tuple(x.contiguous() for x in teacher[layers]),
            tuple(gradients[layers]) if gradients else s,
            None if mask is None else mask.contiguous(),
            scale,
            rows,
            scale.stride(0) if scale.ndim else 0,
            n_rows,
            n_cols,
            1 / len(student),
            LAYERS=len(s),
            MASK=mask is not None,
            GRADIENT=bool(gradients),
            ONCE=block_d >= n_cols,
            ADD=launch > 0,
            BLOCK_N=block_n,
            BLOCK_D=block_d,
            num_warps=num_warps,
        )
    return rows


def _launches(widths: list[int]) -> list[slice]:
    """Neighbouring layers of one width, at most MAX_LAYERS of them, share a launch."""
    starts = [0]
    for layer in range(1, len(widths)):
        if widths[layer] != widths[layer - 1] or layer - starts[-1] == MAX_LAYERS:
            starts.append(layer)
    return [slice(a, b) for a, b in zip(starts, [*starts[1:], len(widths)], strict=True)]
