"""The families of encoders: where hidden states, features and head of a model are."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distilfast.errors import ConfigError


@dataclass(frozen=True)
class Family:
    """How a masked-LM model of a family is taken apart.

    hidden: (model, input_ids, attention_mask) -> (B, L, D), the last hidden states. The mask is
        (B, L), or None where nothing is padding; `attend` is for bodies without other masks.
    features: (model, (n, D)) -> (n, D), what the head's product over the vocabulary is applied to.
    head: the nn.Linear of that product; its weight may be tied to the embeddings.
    layers: prefix of the layers' names in the state dict.
    head_prefix: prefix of the head's own names.
    n_layers, dropouts: names in the model's config.
    logit_scale, logit_softcap: of the model's config; the product is multiplied by the scale, and
        with a softcap c becomes c tanh(product / c).
    """

    hidden: Callable[[Any, Tensor, Tensor | None], Tensor]
    features: Callable[[Any, Tensor], Tensor]
    head: Callable[[Any], nn.Linear]
    layers: str
    head_prefix: str
    transform: tuple[str, ...]
    n_layers: str
    dropouts: tuple[str, str]
    logit_scale: Callable[[Any], float] = lambda config: 1.0
    logit_softcap: Callable[[Any], float | None] = lambda config: None


def attend(model: Any, mask: Tensor | None) -> Tensor | None:
    """The attention mask to give to a body in which every token attends to every other.

    transformers reads a (B, L) mask to see whether anything is padding, and waits for the GPU to do
    so, in every forward. It takes a (B, 1, L, L) one as it is.

    Args:
        mask: (B, L), 0 at the padding; None: nothing is padding.
    """
    if mask is None or mask.device.type == "cpu":
        return mask
    causal = getattr(model.config, "is_decoder", False)
    if causal or model.config._attn_implementation != "sdpa":
        return mask
    return spread(mask)


def spread(mask: Tensor) -> Tensor:
    """(B, 1, L, L) bool, what transformers makes of a (B, L) mask for PyTorch's fused attention."""
    batch, length = mask.shape
    return mask.bool()[:, None, None, :].expand(batch, 1, length, length)


def _distilbert_features(model: Any, hidden: Tensor) -> Tensor:
    return model.vocab_layer_norm(model.activation(model.vocab_transform(hidden)))


FAMILIES = {
    "bert": Family(
        hidden=lambda m, ids, mask: m.bert(ids, attention_mask=attend(m, mask)).last_hidden_state,
        features=lambda m, hidden: m.cls.predictions.transform(hidden),
        head=lambda m: m.cls.predictions.decoder,
        layers="bert.encoder.layer.",
        head_prefix="cls.predictions.",
        transform=("cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm"),
        n_layers="num_hidden_layers",
        dropouts=("hidden_dropout_prob", "attention_probs_dropout_prob"),
    ),
    "distilbert": Family(
        hidden=lambda m, ids, mask: (
            m.distilbert(ids, attention_mask=attend(m, mask)).last_hidden_state
        ),
        features=_distilbert_features,
        head=lambda m: m.vocab_projector,
        layers="distilbert.transformer.layer.",
        head_prefix="vocab_",
        transform=("vocab_transform", "vocab_layer_norm"),
        n_layers="n_layers",
        dropouts=("dropout", "attention_dropout"),
    ),
}


def family(model: Any) -> Family:
    return FAMILIES[model.config.model_type]


def logit_scaling(model: Any) -> tuple[float, float | None]:
    """The scale and the softcap of its logits."""
    parts = family(model)
    return parts.logit_scale(model.config), parts.logit_softcap(model.config)


def logits_at(model: Any, input_ids: Tensor, attention_mask: Tensor | None, rows: Tensor) -> Tensor:
    """The logits at some of the B x L positions, (n, V), by way of `Family`: what
    `linear_distillation_loss` computes chunk by chunk, with the head's weight read as it is
    there."""
    parts = family(model)
    hidden = parts.hidden(model, input_ids, attention_mask).flatten(0, 1)
    return logits(model, parts.features(model, hidden[rows]), parts.head(model))


def logits(model: Any, features: Tensor, head: nn.Linear) -> Tensor:
    """What a model makes of (n, D) features with its head, or a copy of that, (n, V)."""
    product = nn.functional.linear(features, head.weight, head.bias)
    scale, softcap = logit_scaling(model)
    if scale != 1:
        product = product * scale
    return product if softcap is None else softcap * torch.tanh(product / softcap)


# Of the largest logit. The same head in another order of summation differs by 6e-7 (measured up to
# 768 wide); a softcap c shows once the largest logit is beyond c / 180.
HEAD_TOLERANCE = 1e-5


@torch.no_grad()
def check_head(what: str, model: Any, tokenizer: Any) -> None:
    """That `logits_at` gives the model's own logits, tried on 13 tokens (0.14 s for a BERT-base on
    one core): a head that does more would be distilled wrongly, in silence.

    Args:
        what: the model's name in the error.

    Raises:
        ConfigError: they differ by more than rounding.
    """
    width = min(8, model.config.max_position_embeddings)
    input_ids = torch.linspace(0, len(tokenizer) - 1, 2 * width).long().view(2, width)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, -3:] = 0
    rows = attention_mask.flatten().nonzero()[:, 0]
    training = model.training
    model.eval()
    own = model(input_ids, attention_mask=attention_mask).logits.flatten(0, 1)[rows]
    ours = logits_at(model, input_ids, attention_mask, rows)
    model.train(training)
    if not own.isfinite().all():
        raise ConfigError(f"{what}: expected finite logits, got NaN or inf")
    difference = _difference(own, ours)
    if not difference <= HEAD_TOLERANCE:
        raise ConfigError(
            f"{what}: expected the logits of a {model.config.model_type} to be its head's product, "
            f"got a difference of {difference:.1e} of the largest logit, probably "
            f"{_cause(own, ours)}; its row of FAMILIES in distilfast/models.py has to say so"
        )


def _difference(own: Tensor, ours: Tensor) -> float:
    """The largest, over the largest logit."""
    smallest = torch.finfo(own.dtype).tiny
    return float((own - ours).abs().max() / own.abs().max().clamp_min(smallest))


def _cause(own: Tensor, ours: Tensor) -> str:
    """What explains the difference."""
    scale = float((own * ours).sum() / (ours * ours).sum())
    softcap = _softcap(own, ours)
    explained = {
        f"a logit_scale of {scale:.4g}": ours * scale,
        f"a logit_softcap of {softcap:.4g}": softcap * torch.tanh(ours / softcap),
        "a bias added after the product": ours + (own - ours).mean(0),
    }
    for cause, logits in explained.items():
        if _difference(own, logits) <= HEAD_TOLERANCE:
            return cause
    return "another layer before the product, such as a norm, or several things at once"


def _softcap(own: Tensor, ours: Tensor) -> float:
    """The c for which c tanh(product / c) is the model's own logit where the product is largest,
    by bisection: it rises with c."""
    place = ours.abs().argmax()
    product, logit = float(ours.abs().flatten()[place]), float(own.abs().flatten()[place])
    low, high = 1e-3 * product, 1e3 * product
    for _ in range(60):
        middle = (low + high) / 2
        capped = middle * math.tanh(product / middle)
        low, high = (middle, high) if capped < logit else (low, middle)
    return high
