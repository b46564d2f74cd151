"""The rows of a call: logits and labels flattened, and the normalisers of their losses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Rows(NamedTuple):
    """What every row's loss needs beside its logits, flat, and what the sums are divided by."""

    labels: Tensor | None  # (N,) int64
    mask: Tensor | None  # (N,), bool or float
    kd_normalizer: Tensor | None  # (), of kd, cos and mse, where it is a tensor
    ce_normalizer: Tensor | None  # (), of ce


# In place of a normaliser that is a number: there is none, so it is counted, or a tensor.
NO_NUMBER = -1.0


def flatten_rows(
    labels: Tensor | None,
    mask: Tensor | None,
    device: torch.device,
    reduction: str,
    kd_normalizer: float | Tensor | None,
    ce_normalizer: float | Tensor | None,
) -> tuple[Rows, list[float]]:
    """Labels and mask as vectors, normalisers that are tensors, and beside them a number for each
    normaliser, or NO_NUMBER. What is neither is counted by the operators, on the device."""
    tensors: list[Tensor | None] = []
    numbers = []
    for value in (kd_normalizer, ce_normalizer):
        if value is not None and not isinstance(value, Tensor) and torch.compiler.is_compiling():
            # Code is compiled for an operator's numbers, but for any value of a tensor. A product
            # takes a number as a symbol, where torch.full would want to know it.
            value = torch.ones((), dtype=torch.float64, device=device) * value
        if value is None and reduction != "mean":
            value = 1.0
        tensors.append(value.detach() if isinstance(value, Tensor) else None)
        numbers.append(NO_NUMBER if value is None or isinstance(value, Tensor) else float(value))
    flat_labels = None if labels is None else labels.reshape(-1)
    flat_mask = None if mask is None else mask.detach().reshape(-1)
    return Rows(flat_labels, flat_mask, *tensors), numbers


Total = float | Tensor | None


def as_totals(rows: Rows, numbers: Sequence[float]) -> tuple[Total, Total]:
    """The way back from `flatten_rows`, as `reference.row_scales` takes them."""
    tensors = rows.kd_normalizer, rows.ce_normalizer
    kd, ce = (
        tensor if tensor is not None else None if number == NO_NUMBER else number
        for tensor, number in zip(tensors, numbers, strict=True)
    )
    return kd, ce


def rows_like(like: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """An empty (N, width), its rows as far apart as those of ``like`` if that is mere padding: then
    a kernel finds both at the same alignment."""
    stride = like.stride(0)
    padded = like.stride(1) == 1 and width <= stride < width + 128
    return like.new_empty_strided(
        (like.shape[0], width), (stride if padded else width, 1), dtype=dtype
    )


def as_matrix(x: Tensor) -> Tensor:
    """(..., V) as (N, V)."""
    return x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
