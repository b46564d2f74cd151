"""Casting a model to bf16 gives the one that transformers loads in bf16."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from distilfast import models
from distilfast.config import BatchConfig, Config, LossConfig
from distilfast.driver import engine, export, micro_batch, processes

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 2048,
    "pad_token_id": 0,
}
LONG = torch.arange(1, 1025)[None] % 96


def make(kind: str) -> Any:
    """A model with rotary embeddings, drawn so that positions show in its hidden states."""
    torch.manual_seed(0)
    if kind == "llama":
        config = transformers.LlamaConfig(**SIZES, initializer_range=0.3)
        return transformers.LlamaForCausalLM(config).eval()
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
    config = transformers.ModernBertConfig(**SIZES, **tokens, initializer_range=0.3)
    return transformers.ModernBertForMaskedLM(config).eval()


@torch.no_grad()
def hidden(model: Any) -> Tensor:
    return model.base_model(LONG)[0]


@pytest.mark.parametrize("kind", ["llama", "modernbert"])
def test_cast_model_is_the_one_that_is_loaded_in_bf16(kind: str, tmp_path: Path) -> None:
    """To the bit; `Module.to` alone gives another one."""
    made = make(kind)
    made.save_pretrained(tmp_path)
    load = type(made).from_pretrained
    loaded = load(tmp_path, dtype=torch.bfloat16).eval()
    models.cast(made, torch.device("cpu"), torch.bfloat16)
    assert torch.equal(hidden(made), hidden(loaded))
    plain = load(tmp_path, dtype=torch.float32).eval().to(torch.bfloat16)
    assert not torch.allclose(hidden(plain), hidden(loaded), atol=0.1)


def test_teacher_side_casts_so() -> None:
    model = make("modernbert")
    teacher = models.Teacher("t", 1.0, model, True)
    before = {n: b.clone() for n, b in model.named_buffers() if b.is_floating_point()}
    assert before
    micro_batch.TeacherSide([teacher], LossConfig(), torch.device("cpu"), torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    after = dict(model.named_buffers())
    assert all(torch.equal(after[name], b) for name, b in before.items())


class _Student(nn.Module):
    def __init__(self, model: Any):
        super().__init__()
        self.model = model


def test_student_trains_in_bf16_with_exact_frequencies() -> None:
    """DeepSpeed casts it; the exported model will have them, too."""
    model = make("llama")
    before = {n: b.clone() for n, b in model.named_buffers() if b.is_floating_point()}
    assert before
    config = Config(steps=1, precision="bf16", batch=BatchConfig(sequences=1))
    engine.Engine(_Student(model), config, processes.start())
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    after = dict(model.named_buffers())
    assert all(torch.equal(after[name], b) for name, b in before.items())


class _WithBuffer(nn.Module):
    """A part of a model whose buffer is saved, as the decay of MiniMax's layers is."""

    def __init__(self) -> None:
        super().__init__()
        self.decay = nn.Buffer(torch.zeros(3))


def test_saved_buffers_are_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make("llama")
    kind = type(made)

    class Extended(kind):  # type: ignore[misc, valid-type]
        def __init__(self, config: Any):
            super().__init__(config)
            self.model.extra = _WithBuffer()

    student = Extended(made.config)
    student.model.extra.decay.fill_(2)
    weights = {n: p.detach() for n, p in student.named_parameters(remove_duplicate=False)}

    class Tokenizer:
        mask_token = None

        def save_pretrained(self, folder: Path) -> None:
            pass

    monkeypatch.setattr(export, "card", lambda *_: "")
    config = replace(Config(steps=1), output=str(tmp_path))
    export.export(student, weights, Tokenizer(), config, {}, tmp_path / "model")
    loaded = Extended.from_pretrained(tmp_path / "model")
    assert torch.equal(loaded.model.extra.decay, torch.full((3,), 2.0))
