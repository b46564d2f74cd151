"""Activation checkpointing: the same gradients from fewer saved tensors, in several families."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from distilfast import models
from distilfast.config import ConfigError
from distilfast.models import layers

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2 = {"vocab_size": 96, "n_embd": 32, "n_layer": 6, "n_head": 4, "n_positions": 64}
KINDS: dict[str, dict[str, Any]] = {
    "BertForMaskedLM": SIZES,
    "RobertaForMaskedLM": SIZES,
    "ModernBertForMaskedLM": {**SIZES, "local_attention": 8, "cls_token_id": 1, "sep_token_id": 2},
    "GPT2LMHeadModel": {**GPT2, "bos_token_id": 1, "eos_token_id": 2},
    "LlamaForCausalLM": {**SIZES, "num_key_value_heads": 2},
}
KEY = "batch.activation_checkpointing"


def build(kind: str, dropout: float, **changes: Any) -> Any:
    config = getattr(transformers, kind).config_class(**{**KINDS.get(kind, SIZES), **changes})
    layers.set_dropout(config, dropout)
    torch.manual_seed(0)
    return getattr(transformers, kind)(config).train()


def backward(model: Any) -> tuple[dict[str, Tensor], int]:
    """The gradients of a loss over the parts, and the bytes that its forward keeps for the
    backward beside the weights."""
    parts = models.take_apart(model)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(3, 96, (4, 32), generator=generator)
    mask = torch.ones_like(input_ids)
    mask[1, -9:] = 0
    torch.manual_seed(2)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = parts.hidden(input_ids, mask)
    held = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    rows = mask.flatten().bool()
    logits = parts.logits(parts.features(hidden.flatten(0, 1)[rows]))
    nn.functional.cross_entropy(logits, input_ids.flatten()[rows]).backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, held


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_the_same_from_a_third_of_what_is_kept(kind: str, dropout: float) -> None:
    plain = build(kind, dropout)
    checkpointed = copy.deepcopy(plain)
    models.checkpoint_activations(checkpointed, KEY)
    (wanted, all_of_it), (found, kept) = backward(plain), backward(checkpointed)
    assert any(gradient.abs().max() > 1e-4 for gradient in wanted.values())
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert kept < all_of_it / 3


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_draws_at_every_step(kind: str) -> None:
    """The test above would see no draw that was forgotten if there were none."""
    model = build(kind, 0.3)
    models.checkpoint_activations(model, KEY)
    parts, input_ids = models.take_apart(model), torch.arange(3, 35)[None]
    first, second = (parts.hidden(input_ids, torch.ones_like(input_ids)) for _ in range(2))
    assert not torch.equal(first, second)


def test_family_that_cannot_is_one_line() -> None:
    model = build("XLMWithLMHeadModel", 0.0, n_layers=2)
    line = rf"^{KEY}: expected false with a xlm, whose layers transformers cannot compute again$"
    with pytest.raises(ConfigError, match=line):
        models.checkpoint_activations(model, KEY)
