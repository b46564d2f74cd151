"""The matrix products of a fused head: logits from hidden states, and the gradients' way back.

Logits of 16-bit hidden states have to be fp32. Near the teacher the two softmaxes nearly cancel,
and logits rounded to bf16 would give a gradient that is mostly noise: docs/exactness.md. How such a
product is computed depends on the machine. So does the dtype that the gradient of the logits has in
its own two products:

    machine                        logits                                 gradient
    GPU                            torch.mm(..., out_dtype=fp32)          16 bits
    CPU with bf16 dot products     a kernel of ours (backend cpp)         16 bits
                                   fp32 products that multiply in bf16    16 bits
    any other CPU, and fp16        fp32 products                          fp32

fp32 products take the weight in blocks and widen one block at a time, so that no fp32 copy of a
head exists. The product of two bf16 numbers is exact in fp32, so all of these differ only in the
order of their sums.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distilfast.losses.backends import Backend
from distilfast.machine import multiplies_bf16

# The size of a widened block of the weight: it fits a core's cache (docs/kernels.md).
BLOCK_BYTES = 3 << 20
HALVES = (torch.bfloat16, torch.float16)


class Products(NamedTuple):
    """How a side computes its products. ``h`` is (n, D), ``weight`` (V, D), a gradient (n, V)."""

    backend: Backend
    kernel: bool = False  # the backend's own product computes the logits
    widened: bool = False  # fp32 products of blocks compute them
    in_bf16: bool = False  # fp32 products of blocks multiply in bf16

    @staticmethod
    def of(
        dtype: torch.dtype, logits_dtype: torch.dtype, device: str, backend: Backend
    ) -> Products:
        """Choose for hidden states and a weight of ``dtype``, and logits of ``logits_dtype``."""
        if device == "cuda" or dtype not in HALVES:
            return Products(backend)
        fast = dtype == torch.bfloat16 and multiplies_bf16()
        if fast and logits_dtype == dtype:
            return Products(backend)
        # PyTorch uses AMX tiles, which are faster than the dot products of our kernel.
        tiles = torch.cpu._is_amx_tile_supported()
        kernel = fast and not tiles and backend.multiplies()
        return Products(backend, kernel, not kernel, fast)

    @property
    def wide_gradient(self) -> bool:
        """Whether the gradient of the logits keeps the logits' dtype and its products are fp32."""
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
        """out = gradient^T h, (V, D), or out += gradient^T h if ``begun``.

        A CPU's 16-bit products cannot be added to an fp32 ``out``.
        """
        if self.wide_gradient:
            gradient, h = gradient.to(torch.float32), h.to(torch.float32)
        how: dict[str, Any] = {"beta": int(begun), "out": out}
        if out.dtype != gradient.dtype:
            how["out_dtype"] = out.dtype
        torch.addmm(out, gradient.T, h, **how)


def _product(h: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """Return h W^T (+ b), in the dtype and memory of ``out`` if PyTorch can do that.

    On a GPU 16-bit operands can give fp32. On a CPU a product has the dtype of its operands.
    """
    how: dict[str, Any] = {}
    if out.dtype == h.dtype:
        how["out"] = out
    elif out.is_cuda:
        how["out"], how["out_dtype"] = out, out.dtype
    if bias is None:
        return torch.mm(h, weight.T, **how)
    return torch.addmm(bias, h, weight.T, **how)


def _blocks(weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield blocks of the weight's rows in fp32, each in the memory of the block before."""
    n_rows, width = weight.shape
    rows = max(64, BLOCK_BYTES // (4 * max(width, 1)) // 64 * 64)
    block = weight.new_empty((min(rows, n_rows), width), dtype=torch.float32)
    for start in range(0, n_rows, rows):
        part = slice(start, min(start + rows, n_rows))
        yield part, block[: part.stop - start].copy_(weight[part])


@contextlib.contextmanager
def _multiplying_in_bf16(wanted: bool) -> Iterator[None]:
    """Let PyTorch's fp32 products round their operands to bf16 and add in fp32.

    The rounding changes nothing here, as the operands were bf16 before. The setting applies to the
    whole process and is restored afterwards.
    """
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
