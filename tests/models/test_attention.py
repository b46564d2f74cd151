"""Which tokens a causal model attends to, against its own logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import CAUSAL, make_causal
from torch import Tensor

from distilfast import models
from distilfast.config import ConfigError

PACKING = [kind for kind in CAUSAL if kind != "mamba"]
LENGTHS = (7, 12, 5)


def load(kind: str, folder: Path, attention: str = "sdpa") -> Any:
    made = make_causal(folder / kind, kind)
    options = {} if kind == "mamba" else {"attn_implementation": attention}
    return transformers.AutoModelForCausalLM.from_pretrained(made, **options).eval()


def logits(model: Any, input_ids: Tensor, places: Tensor | None = None) -> Tensor:
    parts = models.take_apart(model)
    hidden = parts.hidden(input_ids, None, places)
    return parts.logits(parts.features(hidden.flatten(0, 1))).view(*input_ids.shape, -1)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", PACKING)
def test_nothing_leaks_between_packed_documents(kind: str, attention: str, tmp_path: Path) -> None:
    """Another token in one document moves no bit of another's logits, and its own ones after it."""
    model = load(kind, tmp_path, attention)
    assert models.packs(models.take_apart(model))
    input_ids = torch.randint(1, 300, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(1))
    places = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    packed = logits(model, input_ids, places)
    alone = [logits(model, ids) for ids in input_ids.split(LENGTHS, dim=1)]
    torch.testing.assert_close(packed, torch.cat(alone, dim=1), rtol=1e-5, atol=1e-5)
    for changed in (0, 7, 10, 19):
        other = input_ids.clone()
        other[0, changed] = 301
        moved = (logits(model, other, places) != packed).any(-1)[0]
        document = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))
        after = (torch.arange(sum(LENGTHS)) >= changed) & (document == document[changed])
        assert torch.equal(moved, after), changed


def test_model_that_mixes_documents_is_found(tmp_path: Path, monkeypatch: Any) -> None:
    """A recurrent state goes on into the next document. So do positions that are not passed on."""
    assert not models.packs(models.take_apart(load("mamba", tmp_path)))
    model = load("gpt2", tmp_path)
    parts = models.take_apart(model)
    own = parts.model.transformer.forward
    for kept in (
        {"position_ids": None},
        {"attention_mask": torch.ones(1, 1, 24, 24).bool().tril()},
    ):
        monkeypatch.setattr(
            parts.model.transformer, "forward", lambda *a, _kept=kept, **kw: own(*a, **(kw | _kept))
        )
        assert not models.packs(parts)


def test_model_that_reads_the_tokens_to_come_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    for decoder in (True, False):
        config = transformers.BertConfig(
            vocab_size=100,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=48,
            initializer_range=0.2,
            is_decoder=decoder,
        )
        parts = models.take_apart(transformers.BertLMHeadModel(config).eval())
        if decoder:
            models.check_causal("teacher", parts)
            continue
        with pytest.raises(ConfigError, match=r"^teacher: expected a causal LM, got a BertLMHead"):
            models.check_causal("teacher", parts)
