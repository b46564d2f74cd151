"""Make a student from layers of its teacher."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from distilfast.config import StudentConfig
from distilfast.errors import ConfigError
from distilfast.models.families import FAMILIES, family


def layers_of(config: StudentConfig, n_layers: int) -> list[int]:
    """The teacher's layers that the student keeps. For 12 layers, alternate is [0, 2, 4, 7, 9, 11].

    Raises:
        ConfigError: an index is outside the teacher.
    """
    if config.layers == "all":
        return list(range(n_layers))
    if config.layers == "alternate":
        spaced = torch.linspace(0, n_layers - 1, -(-n_layers // 2), dtype=torch.float64)
        return spaced.round().long().tolist()
    for layer in config.layers:
        if not isinstance(layer, int) or layer >= n_layers:
            raise ConfigError(
                f"student.layers: expected indices 0 to {n_layers - 1} of the teacher's {n_layers} "
                f"layers, got {config.layers}"
            )
    return list(config.layers)


def make_student(teacher: Any, config: StudentConfig, seed: int) -> Any:
    """Make an fp32 student of the teacher's family, or a DistilBERT for a BERT.

    Args:
        teacher: a masked-LM model.
        config: the student's layers, architecture and initial weights.
        seed: seed of a random initialisation.

    Raises:
        ConfigError: a layer is outside the teacher, or the architecture does not fit it.
    """
    kind = teacher.config.model_type
    layers = layers_of(config, getattr(teacher.config, family(teacher).n_layers))
    to_distilbert = kind == "bert" and config.architecture in ("auto", "distilbert")
    if config.architecture == "distilbert" and kind not in ("bert", "distilbert"):
        raise ConfigError(f"student.architecture: expected same for a {kind} teacher")
    make_config = _distilbert_config if to_distilbert else _same_config
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed % 2**63)
        student_config = make_config(teacher.config, len(layers), config.dropout)
        student = (
            type(teacher)(student_config) if not to_distilbert else _distilbert(student_config)
        )
    if config.init == "random":
        return student.train()
    state = _keep_layers(teacher.state_dict(), family(teacher).layers, layers)
    if to_distilbert:
        state = _bert_to_distilbert(state, config.fold_token_type)
    if not config.copy_mlm_transform:
        drop = family(student).transform
        state = {name: value for name, value in state.items() if not name.startswith(drop)}
    missing, unexpected = student.load_state_dict(state, strict=False)
    assert not unexpected, unexpected
    allowed = () if config.copy_mlm_transform else family(student).transform
    assert all(name.startswith(allowed) for name in missing), missing
    student.tie_weights()
    return student.train()


def _same_config(teacher: Any, n_layers: int, dropout: float | None) -> Any:
    parts = FAMILIES[teacher.model_type]
    config = type(teacher).from_dict(teacher.to_dict())
    setattr(config, parts.n_layers, n_layers)
    if dropout is not None:
        for name in parts.dropouts:
            setattr(config, name, dropout)
    return config


def _distilbert_config(teacher: Any, n_layers: int, dropout: float | None) -> Any:
    import transformers

    if teacher.layer_norm_eps != 1e-12:
        raise ConfigError(
            "student.architecture: expected same, since DistilBERT's LayerNorms have eps 1e-12 and "
            f"the teacher's {teacher.layer_norm_eps}"
        )
    return transformers.DistilBertConfig(
        vocab_size=teacher.vocab_size,
        max_position_embeddings=teacher.max_position_embeddings,
        n_layers=n_layers,
        n_heads=teacher.num_attention_heads,
        dim=teacher.hidden_size,
        hidden_dim=teacher.intermediate_size,
        dropout=teacher.hidden_dropout_prob if dropout is None else dropout,
        attention_dropout=teacher.attention_probs_dropout_prob if dropout is None else dropout,
        activation=teacher.hidden_act,
        initializer_range=teacher.initializer_range,
        pad_token_id=teacher.pad_token_id,
        tie_word_embeddings=teacher.tie_word_embeddings,
    )


def _distilbert(config: Any) -> Any:
    import transformers

    return transformers.DistilBertForMaskedLM(config)


def _keep_layers(state: dict[str, Tensor], prefix: str, layers: list[int]) -> dict[str, Tensor]:
    """The state dict with only the chosen layers, renumbered from 0."""
    kept = {}
    for name, value in state.items():
        if name.startswith(prefix):
            number, _, rest = name.removeprefix(prefix).partition(".")
            if int(number) not in layers:
                continue
            name = f"{prefix}{layers.index(int(number))}.{rest}"
        kept[name] = value
    return kept


# Pairs of BERT's and DistilBERT's names, in the order of replacement.
_RENAMED = (
    ("bert.encoder.layer.", "distilbert.transformer.layer."),
    ("bert.embeddings.", "distilbert.embeddings."),
    ("attention.self.query", "attention.q_lin"),
    ("attention.self.key", "attention.k_lin"),
    ("attention.self.value", "attention.v_lin"),
    ("attention.output.dense", "attention.out_lin"),
    ("attention.output.LayerNorm", "sa_layer_norm"),
    ("intermediate.dense", "ffn.lin1"),
    ("output.dense", "ffn.lin2"),
    ("output.LayerNorm", "output_layer_norm"),
    ("cls.predictions.transform.dense", "vocab_transform"),
    ("cls.predictions.transform.LayerNorm", "vocab_layer_norm"),
    ("cls.predictions.decoder", "vocab_projector"),
)


def _bert_to_distilbert(state: dict[str, Tensor], fold_token_type: bool) -> dict[str, Tensor]:
    """A BERT's weights under DistilBERT's names.

    DistilBERT has no token types. BERT adds token-type embedding 0 to every token of a single text;
    ``fold_token_type`` adds it to the position embeddings.
    """
    state = dict(state)
    token_type = state.pop("bert.embeddings.token_type_embeddings.weight")
    state.pop("cls.predictions.bias", None)  # a second name of the decoder's bias
    position = "bert.embeddings.position_embeddings.weight"
    if fold_token_type:
        state[position] = state[position] + token_type[0]
    renamed = {}
    for name, value in state.items():
        for old, new in _RENAMED:
            name = name.replace(old, new)
        renamed[name] = value
    return renamed
