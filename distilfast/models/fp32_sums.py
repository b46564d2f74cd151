"""LayerNorms and embeddings in bf16 that sum their gradients in fp32 on a CPU.

On a CPU, PyTorch 2.13 sums these gradients in bf16, row after row. Of 4,096 rows that point one
way, it loses half of the sum, and nothing done with the sum later can bring that back. Under
autocast a LayerNorm does so too wherever its input is bf16: behind the projection of embeddings
that are narrower than the layers (ELECTRA-small, ALBERT), that is everywhere.

According to its source, PyTorch does not do so on a GPU. There, a LayerNorm's gradients are summed
in fp32 (layer_norm_kernel.cu; for more than 65,536 rows, sums of blocks are rounded to bf16 once).
An embedding's gradients are summed in fp32 for more than 3,072 tokens. For fewer, 32 tokens at a
time are, and their sums are added up in bf16 (Embedding.cu).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def use_fp32_sums(model: nn.Module) -> None:
    """Make the LayerNorms and embeddings of a model in bf16 sum their gradients in fp32.

    Where input and weights are fp32, nothing changes.
    """
    for module in model.modules():
        if type(module) in REPLACED:
            module.__class__ = REPLACED[type(module)]


class LayerNorm(nn.LayerNorm):
    """A LayerNorm that computes in fp32, for an input of any dtype."""

    def forward(self, input: Tensor) -> Tensor:
        weight, bias = (None if x is None else x.float() for x in (self.weight, self.bias))
        shape = self.normalized_shape
        return F.layer_norm(input.float(), shape, weight, bias, self.eps).to(input.dtype)


class Embedding(nn.Embedding):
    """An embedding that sums the gradients of a row in fp32 if it was looked up more than once."""

    def forward(self, input: Tensor) -> Tensor:
        if self.weight.dtype == torch.float32:
            return super().forward(input)
        looked_up: Tensor = _Lookup.apply(self.weight, input, self.padding_idx)
        return looked_up


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, input: Tensor, padding: int | None) -> Tensor:
        ctx.save_for_backward(input)
        ctx.shape, ctx.padding = weight.shape, padding
        return F.embedding(input, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (input,) = ctx.saved_tensors
        rows, place = input.unique(return_inverse=True)
        sums = gradient.new_zeros(len(rows), ctx.shape[1], dtype=torch.float32)
        sums.index_add_(0, place.flatten(), gradient.reshape(-1, ctx.shape[1]).float())
        if ctx.padding is not None:
            sums[rows == ctx.padding] = 0
        whole = gradient.new_zeros(ctx.shape)
        whole[rows] = sums.to(gradient.dtype)
        return whole, None, None


REPLACED: dict[type[nn.Module], type[nn.Module]] = {
    nn.LayerNorm: LayerNorm,
    nn.Embedding: Embedding,
}
