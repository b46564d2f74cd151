"""The matrix products of a fused head: logits from hidden states, and the gradients' way back.

Logits of 16-bit hidden states are wanted in fp32. Near the teacher two softmaxes nearly cancel, and
logits rounded to bf16 would leave a gradient that is mostly noise: docs/exactness.md. What makes
such a product depends on the machine, and so does the dtype in which the gradient of the logits
goes into its own two products:

    machine                        logits                                 gradient
    GPU                            torch.mm(..., out_dtype=fp32)          16 bits
    CPU with bf16 dot products     a kernel of ours (backend cpp)         16 bits
                                   fp32 products that multiply in bf16    16 bits
    any other CPU, and fp16        fp32 products                          fp32

fp32 products take blocks of the weight, widened when they are needed, so that no fp32 copy of a
head exists. A product of two bf16 numbers is exact in fp32, so all of these differ in the order of
their sums alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distilfast.losses.backends import Backend
from distilfast.machine import multiplies_bf16

# Of a weight, widened at a time: what a core's cache holds (docs/kernels.md).
BLOCK_BYTES = 3 << 20
HALVES = (torch.bfloat16, torch.float16)


class Products(NamedTuple):
    """How a side's products are made. ``h`` is (n, D), ``weight`` (V, D), a gradient (n, V)."""

    backend: Backend
    kernel: bool = False  # the backend's own product makes the logits
    widened: bool = False  # fp32 products of blocks make them
    in_bf16: bool = False  # and multiply in bf16

    @staticmethod
    def of(
        dtype: torch.dtype, logits_dtype: torch.dtype, device: str, backend: Backend
    ) -> Products:
        """For hidden states and a weight of ``dtype``, and logits of ``logits_dtype``."""
        if device == "cuda" or dtype not in HALVES:
            return Products(backend)
        fast = dtype == torch.bfloat16 and multiplies_bf16()
        if fast and logits_dtype == dtype:
            return Products(backend)
        # Tiles of AMX, which PyTorch uses, multiply faster than the dot products of the kernel.
        tiles = torch.cpu._is_amx_tile_supported()
        kernel = fast and not tiles and backend.multiplies()
        return Products(backend, kernel, not kernel, fast)

    @property
    def wide_gradient(self) -> bool:
        """Whether the gradient of the logits stays in their dtype, and its products are fp32's."""
        return self.widened and not self.in_bf16

    def logits(self, h: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
        """out = h W^T (+ b), (n, V)."""
        if self.kernel:
            self.backend.product(h, weight, bias, out)
        elif self.widened:
            wide = h.to(torch.float32)
            with _multiplying_in_bf16(self.in_bf16):
                for columns, block in _blocks(weight):
                    to = out[:, columns]
                    made = _product(wide, block, None if bias is None else bias[columns], to)
                    if made is not to:
                        to.copy_(made)
        else:
            _product(h, weight, bias, out)

    def hidden_gradient(self, gradient: Tensor, weight: Tensor, out: Tensor) -> None:
        """out = gradient W, (n, D)."""
        if not self.wide_gradient:
            torch.mm(gradient, weight, out=out)
            return
        total = out.new_empty(out.shape, dtype=torch.float32)
        for columns, block in _blocks(weight):
            part = gradient[:, columns].to(torch.float32)
            torch.addmm(total, part, block, beta=int(columns.start > 0), out=total)
        out.copy_(total)

    def weight_gradient(self, gradient: Tensor, h: Tensor, out: Tensor, begun: bool) -> None:
        """out = gradient^T h, (V, D), or is added to. On a CPU no 16 bits can be added to fp32."""
        if self.wide_gradient:
            gradient, h = gradient.to(torch.float32), h.to(torch.float32)
        how: dict[str, Any] = {"beta": int(begun), "out": out}
        if out.dtype != gradient.dtype:
            how["out_dtype"] = out.dtype
        torch.addmm(out, gradient.T, h, **how)


def _product(h: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """h W^T (+ b) in the dtype of ``out`` and in its memory, if PyTorch can do that: on a GPU any
    16 bits give fp32, on a CPU a product has one dtype."""
    how: dict[str, Any] = {}
    if out.dtype == h.dtype:
        how["out"] = out
    elif out.is_cuda:
        how["out"], how["out_dtype"] = out, out.dtype
    if bias is None:
        return torch.mm(h, weight.T, **how)
    return torch.addmm(bias, h, weight.T, **how)


def _blocks(weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The weight in fp32, by blocks of its rows, each in the memory of the one before."""
    n_rows, width = weight.shape
    rows = max(64, BLOCK_BYTES // (4 * max(width, 1)) // 64 * 64)
    block = weight.new_empty((min(rows, n_rows), width), dtype=torch.float32)
    for start in range(0, n_rows, rows):
        part = slice(start, min(start + rows, n_rows))
        yield part, block[: part.stop - start].copy_(weight[part])


@contextlib.contextmanager
def _multiplying_in_bf16(wanted: bool) -> Iterator[None]:
    """PyTorch's fp32 products round their operands to bf16, which these operands do not feel, and
    add in fp32. The setting is the process's, and as it was afterwards."""
    if not wanted:
        yield
        return
    settings: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before
