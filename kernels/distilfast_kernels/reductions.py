"""What stands around the row kernels: one launch before them, one after.

Before: the totals that the losses are divided by are counted, the sum of the mask and the number of
labels, and turned into scales; a total of 0 gives 0. After: the rows' losses are summed, scaled and
weighted. Each is a single program, so the order of every sum is fixed. It reads 4 to 16 bytes a
row, where a row kernel moves 6 bytes a logit. PyTorch's own operators would launch 8 to 16 kernels.

No value reaches the host on the way.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

# --- Kernels --------------------------------------------------------------------------------------


@triton.jit
def _reciprocal(total):
    """1 / total, 0 for 0. NaN stays."""
    return tl.where(total <= 0, 0.0, tl.div_rn(1.0, tl.where(total == 0, 1.0, total)))


@triton.jit(
    do_not_specialize=["n_rows", "ignore_index"],
    do_not_specialize_on_alignment=["labels_ptr", "mask_ptr", "kd_total_ptr", "ce_total_ptr"],
)
def scales_kernel(
    labels_ptr,
    mask_ptr,
    kd_total_ptr,
    ce_total_ptr,
    needed_ptr,
    scales_ptr,
    n_rows,
    ignore_index,
    kd_total,
    ce_total,
    COUNT_MASK: tl.constexpr,
    COUNT_LABELS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Labels and mask, (n_rows,) or None -> scales, (2,). A total is counted, or read from where
    its pointer says, or the number beside it. needed, (n_rows,) bool: some part needs the row."""
    if kd_total_ptr is not None:
        kd_total = tl.load(kd_total_ptr).to(tl.float32)
    if ce_total_ptr is not None:
        ce_total = tl.load(ce_total_ptr).to(tl.float32)
    if COUNT_MASK or COUNT_LABELS or needed_ptr is not None:
        masked = tl.zeros([BLOCK_N], tl.float32)
        labelled = tl.zeros([BLOCK_N], tl.int32)
        for start in range(0, n_rows, BLOCK_N):
            row = start + tl.arange(0, BLOCK_N)
            inside = row < n_rows
            soft = inside
            if mask_ptr is not None:
                weight = tl.load(mask_ptr + row, mask=inside, other=0).to(tl.float32)
                masked += weight
                soft = weight != 0
            hard = row < 0
            if labels_ptr is not None:
                label = tl.load(labels_ptr + row, mask=inside, other=ignore_index)
                hard = label != ignore_index
                labelled += hard.to(tl.int32)
            if needed_ptr is not None:
                # A total that is given may be 0, and then nothing of its part counts.
                if not COUNT_MASK:
                    soft &= tl.zeros([BLOCK_N], tl.float32) + kd_total > 0
                if not COUNT_LABELS:
                    hard &= tl.zeros([BLOCK_N], tl.float32) + ce_total > 0
                tl.store(needed_ptr + row, soft | hard, mask=inside)
        if COUNT_MASK:
            kd_total = tl.sum(masked, 0)
        if COUNT_LABELS:
            ce_total = tl.sum(labelled, 0).to(tl.float32)
    tl.store(scales_ptr, _reciprocal(kd_total))
    tl.store(scales_ptr + 1, _reciprocal(ce_total))


@triton.jit
def _weights(weights, part, PARTS: tl.constexpr):
    """A tuple of numbers as a vector."""
    vector = tl.zeros([PARTS], tl.float32)
    for p in tl.static_range(PARTS):
        vector = tl.where(part == p, weights[p], vector)
    return vector


@triton.jit(do_not_specialize=["n_rows"])
def reduce_kernel(
    rows_ptr,
    scales_ptr,
    loss_ptr,
    parts_ptr,
    n_rows,
    weights,
    PARTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """rows, (PARTS, n_rows) -> parts, (PARTS,), scaled, and loss, (1,), their weighted sum."""
    part = tl.arange(0, PARTS)
    weight = _weights(weights, part, PARTS)
    first = rows_ptr + part.to(tl.int64)[:, None] * n_rows
    total = tl.zeros([PARTS, BLOCK_N], tl.float32)
    for start in range(0, n_rows, BLOCK_N):
        row = start + tl.arange(0, BLOCK_N)[None, :]
        # The rows of a part of weight 0 hold 0.
        wanted = (row < n_rows) & (weight != 0)[:, None]
        total += tl.load(first + row, mask=wanted, other=0.0)
    scale = tl.load(scales_ptr + (part == 1).to(tl.int32))  # ce, the second part, has its own
    reduced = tl.sum(total, 1) * scale
    tl.store(parts_ptr + part, reduced)
    tl.store(loss_ptr, tl.sum(tl.where(weight != 0, weight * reduced, 0.0), 0))


@triton.jit(do_not_specialize=["n_rows"])
def weigh_kernel(rows_ptr, loss_ptr, n_rows, weights, PARTS: tl.constexpr, BLOCK_N: tl.constexpr):
    """rows, (PARTS, n_rows) -> loss, (n_rows,), their weighted sum."""
    part = tl.arange(0, PARTS)
    weight = _weights(weights, part, PARTS)[:, None]
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    wanted = (row < n_rows) & (weight != 0)
    values = tl.load(rows_ptr + part[:, None].to(tl.int64) * n_rows + row, mask=wanted, other=0.0)
    loss = tl.sum(tl.where(weight != 0, weight * values, 0.0), 0)[None, :]
    tl.store(loss_ptr + row, loss, mask=row < n_rows)


# --- Launchers ------------------------------------------------------------------------------------

# Rows a turn of the single program: 8 labels, or 4 of each part, a thread.
BLOCK_N, NUM_WARPS = 4096, 16


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
    """`distilfast.reference.row_scales`."""
    pointers: list[Tensor | None] = []
    numbers = []
    for total in totals:
        if isinstance(total, Tensor) and (total.is_cuda or total.device == device):
            # On another GPU it must not be waited for.
            pointers.append(total.to(device, non_blocking=True))
            numbers.append(0.0)
        else:  # a tensor of the host's can be read
            pointers.append(None)
            numbers.append(0.0 if total is None else float(total))
    if totals[0] is None and mask is None:
        numbers[0] = float(n_rows)
    scales = torch.empty(2, dtype=compute, device=device)
    scales_kernel[(1,)](
        None if labels is None else labels.contiguous(),
        None if mask is None else mask.contiguous(),
        *pointers,
        needed,
        scales,
        n_rows,
        ignore_index,
        *numbers,
        COUNT_MASK=totals[0] is None and mask is not None,
        COUNT_LABELS=totals[1] is None and labels is not None,
        BLOCK_N=BLOCK_N,
        num_warps=NUM_WARPS,
    )
    return scales


def reduce_rows(
    rows: Tensor, scales: Tensor, weights: Sequence[float], reduction: str
) -> tuple[Tensor, Tensor]:
    """`distilfast.reference.reduce_rows`, of one part or four."""
    n_parts, n_rows = rows.shape
    weights = tuple(float(w) for w in weights)
    if reduction == "none":
        loss = torch.empty(n_rows, dtype=rows.dtype, device=rows.device)
        if n_rows:
            weigh_kernel[(triton.cdiv(n_rows, BLOCK_N // 4),)](
                rows, loss, n_rows, weights, PARTS=n_parts, BLOCK_N=BLOCK_N // 4, num_warps=4
            )
        return loss, rows
    loss = torch.empty((), dtype=rows.dtype, device=rows.device)
    parts = torch.empty(n_parts, dtype=rows.dtype, device=rows.device)
    reduce_kernel[(1,)](
        rows,
        scales,
        loss,
        parts,
        n_rows,
        weights,
        PARTS=n_parts,
        BLOCK_N=BLOCK_N // 2,
        num_warps=NUM_WARPS,
    )
    return loss, parts
