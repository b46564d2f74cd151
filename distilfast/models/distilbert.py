"""Make a DistilBERT's configuration and weights from a BERT's (Sanh et al. 2019)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from distilfast.errors import ConfigError


def distilbert_config(teacher: Any, n_layers: int) -> Any:
    """The configuration of a DistilBERT with ``n_layers`` layers of a BERT.

    Raises:
        ConfigError: its LayerNorms have another epsilon than DistilBERT's.
    """
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
        dropout=teacher.hidden_dropout_prob,
        attention_dropout=teacher.attention_probs_dropout_prob,
        activation=teacher.hidden_act,
        initializer_range=teacher.initializer_range,
        pad_token_id=teacher.pad_token_id,
        tie_word_embeddings=teacher.tie_word_embeddings,
    )


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


def bert_to_distilbert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A BERT's weights under DistilBERT's names.

    DistilBERT has no token types. BERT adds token-type embedding 0 to every token of a single text;
    here it is added to the position embeddings.
    """
    state = dict(state)
    token_type = state.pop("bert.embeddings.token_type_embeddings.weight")
    state.pop("cls.predictions.bias", None)  # a second name of the decoder's bias
    position = "bert.embeddings.position_embeddings.weight"
    state[position] = state[position] + token_type[0]
    renamed = {}
    for name, value in state.items():
        for old, new in _RENAMED:
            name = name.replace(old, new)
        renamed[name] = value
    return renamed


@torch.no_grad()
def unfold_token_type(student: Any, teacher: Any) -> None:
    """Give a DistilBERT the position embeddings of its BERT alone."""
    positions = student.distilbert.embeddings.position_embeddings.weight
    positions.copy_(teacher.bert.embeddings.position_embeddings.weight)
