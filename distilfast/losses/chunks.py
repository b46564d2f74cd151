"""The products of the fused head, for one chunk of rows at a time.

A side's logits exist only for the rows of one chunk. Their gradient overwrites them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from distilfast.losses import backends, reference
from distilfast.losses.backends import Backend
from distilfast.losses.products import Products
from distilfast.losses.reference import Head, Options
from distilfast.losses.scratch import Scratch

# The most memory that the logits of a chunk may take, all sides together. Products reach full speed
# at some hundred rows on a CPU and some thousand on a GPU. Each further chunk reads and writes the
# weight's gradient once more: docs/kernels.md. On a CPU more than MOST_ROWS are slower again.
CHUNK_BYTES = {"cpu": 256 << 20, "cuda": 4 << 30}
FEWEST_ROWS, MOST_ROWS = {"cpu": 512, "cuda": 1}, {"cpu": 1024, "cuda": 1 << 30}
# The most memory, on a CPU, for a chunk's share of the weight's gradient before it is added to the
# sum. A large head's share is computed in several parts.
SHARE_BYTES = 64 << 20
# Rows of logits begin at multiples of this many elements, where products and kernels are fast.
ALIGNMENT = 64


class Side(NamedTuple):
    """A head in the dtype of its products, cut to the vocabulary.

    It is cut because padding must contribute nothing, and it may hold NaN: 0 * NaN is NaN. On a GPU
    zeros fill it up to a multiple of ALIGNMENT.
    """

    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,); None if the loss kernel adds it, or there is none
    head: Head  # the steps left to the loss kernel
    logits_dtype: torch.dtype
    products: Products

    @staticmethod
    def of(
        weight: Tensor,
        bias: Tensor | None,
        head: Head,
        vocab_size: int,
        dtype: torch.dtype,
        logits_dtype: torch.dtype,
        backend: Backend,
    ) -> Side:
        products = Products.of(dtype, logits_dtype, weight.device.type, backend)

        def fit(x: Tensor, dtype: torch.dtype) -> Tensor:
            x = x[:vocab_size].to(dtype)
            missing = _padded(vocab_size) - vocab_size if x.is_cuda else 0
            return torch.cat([x, x.new_zeros(missing, *x.shape[1:])]) if missing else x

        if bias is not None and backend.adds_bias and not products.kernel:
            in_fp32 = bias[:vocab_size].to(torch.float32).contiguous()
            head, bias = head._replace(bias=in_fp32), None
        if bias is not None:
            wide = torch.float32 if products.widened else logits_dtype
            bias = fit(bias, wide).contiguous()
        return Side(fit(weight, dtype), bias, head, logits_dtype, products)

    def logits(self, hidden: Tensor, out: Tensor) -> Tensor:
        """Compute h W^T (+ b) of (n, D) into the first n rows and V columns of ``out``."""
        out = out[: hidden.shape[0], : self.weight.shape[0]]
        self.products.logits(hidden, self.weight, self.bias, out)
        return out

    @property
    def gradient_dtype(self) -> torch.dtype:
        """The dtype of the logits' gradient."""
        return self.logits_dtype if self.products.wide_gradient else self.weight.dtype


class WeightGradient:
    """The sum over chunks of gradient^T hidden, (V, D), in a given dtype."""

    def __init__(
        self, side: Side, dtype: torch.dtype, like: Tensor, backend: Backend, scratch: Scratch
    ):
        shape, device = side.weight.shape, side.weight.device
        # Whether the sum itself is the result, or the result is rounded or padded from it.
        self.is_result = (shape, dtype) == (like.shape, like.dtype)
        empty = torch.empty if self.is_result else scratch.empty
        self.total = empty(shape, dtype=dtype, device=device)
        self.like = like
        self.begun = False
        self.products = side.products
        # Memory for a share, if PyTorch's product cannot add to the sum itself.
        self.share = None
        made = torch.float32 if side.products.wide_gradient else side.weight.dtype
        if made != dtype and not side.weight.is_cuda:
            rows = max(1, SHARE_BYTES // (shape[1] * made.itemsize))
            self.share = scratch.empty((min(rows, shape[0]), shape[1]), made, device)
            in_fp32 = dtype == torch.float32
            self.accumulate = backend.accumulate if in_fp32 else backends.torch_accumulate

    def add(self, gradient: Tensor, hidden: Tensor) -> None:
        if self.share is not None:
            most = len(self.share)
            parts = zip(gradient.split(most, dim=1), self.total.split(most), strict=True)
            for some, total in parts:
                share = self.share[: len(total)]
                self.products.weight_gradient(some, hidden, share, False)
                self.accumulate(total, share, self.begun)
        else:
            self.products.weight_gradient(gradient, hidden, self.total, self.begun)
        self.begun = True

    def result(self, vocab_size: int) -> Tensor:
        """Return the sum in the shape and dtype of ``like``."""
        total = self.total if self.begun else self.total.zero_()
        if self.is_result:
            return total
        result = self.like.new_empty(self.like.shape)
        result[:vocab_size] = total[:vocab_size]
        result[vocab_size:] = 0
        return result


class Target:
    """The teachers' logits of a chunk, as products and the Head that turns them into logits.

    For an ensemble: one teacher's logits at a time, plus a running mixture.
    """

    def __init__(
        self,
        sides: Sequence[Side],
        shares: Sequence[float],
        ensemble: str,
        options: Options,
        backend: Backend,
    ):
        self.sides, self.shares = sides, shares
        self.ensemble, self.options = ensemble, options
        self.combine = backend.combine_teachers
        self.dtypes = list({side.logits_dtype for side in sides})
        if len(sides) > 1:  # room for the mixture, and for logits wider than their products
            compute = reference.accumulation_dtype(*(side.weight for side in sides))
            apart = any(not x.head.plain and x.logits_dtype != compute for x in sides)
            self.dtypes += [compute] * (2 if apart else 1)

    def allocate(self, rows: int, scratch: Scratch) -> None:
        """Allocate memory for chunks of up to ``rows`` rows."""
        device, width = self.sides[0].weight.device, self.options.vocab_size
        self.buffers = [
            rows_of_logits(rows, width, dtype, device, scratch) for dtype in self.dtypes
        ]

    def __call__(self, hidden: Sequence[Tensor]) -> tuple[Tensor, Head]:
        vocab_size, mixed = self.options.vocab_size, 0.0
        if len(self.sides) == 1:
            return self.sides[0].logits(hidden[0], self.buffers[0]), self.sides[0].head
        part = slice(hidden[0].shape[0]), slice(vocab_size)
        z = self.buffers[-1][part]
        for side, share, h in zip(self.sides, self.shares, hidden, strict=True):
            logits = side.logits(h, self.buffers[self.dtypes.index(side.logits_dtype)])[part]
            if not side.head.plain:
                if logits.dtype != z.dtype:
                    logits = self.buffers[-2][part].copy_(logits)
                logits = side.head.logits_(logits)
            if mixed:
                shares = [mixed / (mixed + share), share / (mixed + share)]
                temperature = self.options.temperature
                self.combine([z, logits], shares, temperature, self.ensemble, vocab_size, z)
            else:
                z.copy_(logits)
            mixed += share
        return z, Head()


def rows_of_logits(
    rows: int, width: int, dtype: torch.dtype, device: torch.device, scratch: Scratch
) -> Tensor:
    return scratch.empty((rows, _padded(width)), dtype, device)


def _padded(n: int) -> int:
    return -(-n // ALIGNMENT) * ALIGNMENT


def chunks_of(
    hidden: Tensor,
    needed: Tensor | None,
    rows: int,
    vocab_size: int,
    dtypes: Sequence[torch.dtype],
) -> Sequence[slice | Tensor]:
    """Return the rows of each chunk: ``rows`` of them, or as many as the budget allows if 0.

    On a CPU, rows that nothing needs are left out. On a GPU, counting them would wait for the
    device.
    """
    selected = None
    if needed is not None and not hidden.is_cuda:
        selected = needed.nonzero()[:, 0]
    n = hidden.shape[0] if selected is None else len(selected)
    if n == 0:
        return []
    if not rows:
        kind = "cpu" if hidden.device.type == "cpu" else "cuda"
        row_bytes = _padded(vocab_size) * sum(dtype.itemsize for dtype in dtypes)
        most = max(1, CHUNK_BYTES[kind] // row_bytes // ALIGNMENT) * ALIGNMENT
        most = min(max(most, FEWEST_ROWS[kind]), MOST_ROWS[kind])
        rows = -(-n // -(-n // most))  # the fewest chunks, of nearly equal size
        rows = _padded(rows)
    if selected is not None:
        return selected.split(rows)
    return [slice(i, min(i + rows, n)) for i in range(0, n, rows)]


def length(chunk: slice | Tensor) -> int:
    return chunk.stop - chunk.start if isinstance(chunk, slice) else len(chunk)
