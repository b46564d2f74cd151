"""The families of encoders: how to get a model's hidden states, features and head."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distilfast.errors import ConfigError
from distilfast.models.tokenizers import vocabulary_size


@dataclass(frozen=True)
class Family:
    """How to take a masked-LM model of one family apart.

    hidden: (model, input_ids, attention_mask) -> (B, L, D), the last hidden states. The mask is
        (B, L), or None if there is no padding. `attend` suits bodies that use no other mask.
    features: (model, (n, D)) -> (n, D), the input of the head's product with the vocabulary.
    head: the nn.Linear of that product. Its weight may be tied to the embeddings.
    layers: prefix of the layers' names in the state dict.
    head_prefix: prefix of the names of the head's own weights.
    transform: names of the head's dense layer and LayerNorm before the product.
    n_layers, dropouts: names in the model's config.
    logit_scale, logit_softcap: functions of the model's config. The product is multiplied by the
        scale; with a softcap c it then becomes c tanh(product / c).
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
    """The attention mask for a body in which every token attends to every other.

    In every forward, transformers reads a (B, L) mask to see whether there is padding, and waits
    for the GPU to do so. It uses a (B, 1, L, L) mask as it is.

    Args:
        mask: (B, L), 0 at padding; None if there is none.
    """
    if mask is None or mask.device.type == "cpu":
        return mask
    causal = getattr(model.config, "is_decoder", False)
    if causal or model.config._attn_implementation != "sdpa":
        return mask
    return spread(mask)


def spread(mask: Tensor) -> Tensor:
    """A (B, L) mask as (B, 1, L, L) bool, as transformers has it for PyTorch's fused attention."""
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
    """The scale and the softcap of a model's logits."""
    parts = family(model)
    return parts.logit_scale(model.config), parts.logit_softcap(model.config)


def logits_at(model: Any, input_ids: Tensor, attention_mask: Tensor | None, rows: Tensor) -> Tensor:
    """The (n, V) logits at ``rows`` of the B x L positions, computed by way of `Family`.

    `linear_distillation_loss` computes the same chunk by chunk. The head's weight is read here, as
    it is there.
    """
    parts = family(model)
    hidden = parts.hidden(model, input_ids, attention_mask).flatten(0, 1)
    return logits(model, parts.features(model, hidden[rows]), parts.head(model))


def logits(model: Any, features: Tensor, head: nn.Linear) -> Tensor:
    """A model's (n, V) logits for (n, D) features. ``head`` is the model's own, or a copy."""
    product = nn.functional.linear(features, head.weight, head.bias)
    scale, softcap = logit_scaling(model)
    if scale != 1:
        product = product * scale
    return product if softcap is None else softcap * torch.tanh(product / softcap)


# As a share of the largest logit. The same head differs by 6e-7 in another order of summation
# (measured up to width 768). A softcap c shows once the largest logit is above c / 180.
HEAD_TOLERANCE = 1e-5


@torch.no_grad()
def check_head(what: str, model: Any, tokenizer: Any) -> None:
    """Check on 13 tokens that `logits_at` gives the model's own logits.

    A head that does more than `Family` says would otherwise be distilled wrongly without an error.
    The check takes 0.14 s for a BERT-base on one core.

    Args:
        what: the model's name in the error.

    Raises:
        ConfigError: the logits differ by more than rounding, or are not finite, or all 0.
    """
    width = min(8, model.config.max_position_embeddings)
    input_ids = torch.linspace(0, vocabulary_size(tokenizer) - 1, 2 * width).long().view(2, width)
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
    if not own.any():
        raise ConfigError(f"{what}: expected logits that say something, got zeros alone")
    difference = _difference(own, ours)
    if not difference <= HEAD_TOLERANCE:
        raise ConfigError(
            f"{what}: expected the logits of a {model.config.model_type} to be its head's product, "
            f"got a difference of {difference:.1e} of the largest logit, probably "
            f"{_cause(own, ours)}; its row of FAMILIES in distilfast/models/families.py has to say "
            "so"
        )


def _difference(own: Tensor, ours: Tensor) -> float:
    """The largest difference, as a share of the largest logit."""
    smallest = torch.finfo(own.dtype).tiny
    return float((own - ours).abs().max() / own.abs().max().clamp_min(smallest))


def _cause(own: Tensor, ours: Tensor) -> str:
    """Name what explains the difference."""
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
    """Find the softcap c at the largest product, where c tanh(product / c) has to be the model's
    own logit. Bisection works because this value rises with c."""
    place = ours.abs().argmax()
    product, logit = float(ours.abs().flatten()[place]), float(own.abs().flatten()[place])
    low, high = 1e-3 * product, 1e3 * product
    for _ in range(60):
        middle = (low + high) / 2
        capped = middle * math.tanh(product / middle)
        low, high = (middle, high) if capped < logit else (low, middle)
    return high
