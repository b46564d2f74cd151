"""The layers that sum their gradients in fp32, against sums in fp32 and PyTorch's own layers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from distilfast.models import use_fp32_sums

ROWS = 4096


def test_layer_norm_loses_nothing() -> None:
    """4,096 rows in bf16: with PyTorch's own half of the bias' gradient is lost on a CPU."""
    torch.manual_seed(0)
    norm = nn.LayerNorm(64).bfloat16()
    use_fp32_sums(norm)
    gradient = (torch.randn(ROWS, 64) + 0.5).bfloat16()
    norm(torch.randn(ROWS, 64).bfloat16()).backward(gradient)
    torch.testing.assert_close(norm.bias.grad.float(), gradient.float().sum(0), rtol=1e-2, atol=0)


def test_embedding_loses_nothing() -> None:
    """A token that is looked up 2,048 times, as [MASK] is."""
    torch.manual_seed(0)
    table = nn.Embedding(10, 64, padding_idx=0).bfloat16()
    use_fp32_sums(table)
    tokens = torch.randint(0, 10, (ROWS // 64, 64))
    tokens[::2] = 3
    gradient = (torch.rand(*tokens.shape, 64) + 0.5).bfloat16()
    table(tokens).backward(gradient)
    wanted = torch.zeros(10, 64).index_add_(0, tokens.flatten(), gradient.flatten(0, 1).float())
    wanted[0] = 0
    torch.testing.assert_close(table.weight.grad.float(), wanted, rtol=4e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_are_otherwise_pytorchs(dtype: torch.dtype) -> None:
    """Few rows, none looked up twice: the same values and gradients, the same names, twice in a
    row and of inputs of other shapes."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Embedding(30, 16, padding_idx=1), nn.LayerNorm(16)).to(dtype)
    ours = copy.deepcopy(plain)
    use_fp32_sums(ours)
    assert ours.state_dict().keys() == plain.state_dict().keys()
    for tokens in (torch.arange(8).view(2, 4), torch.tensor(9), torch.arange(12).view(1, 3, 4)):
        found = [model(tokens) for model in (ours, plain)]
        gradient = torch.randn_like(found[1])
        for out in found:
            out.backward(gradient)
        torch.testing.assert_close(found[0], found[1])
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        tolerance = 1e-6 if dtype == torch.float32 else 1e-2
        assert (a.grad - b.grad).norm() <= tolerance * b.grad.norm()
