"""Prove that a model's parts give its own logits."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from distilfast.errors import ConfigError
from distilfast.models.parts import Parts, difference, evaluating, last_hidden, probe, take_apart

# As a share of the largest logit. The same head differs by 6e-7 in another order of summation
# (measured up to width 768). A softcap c shows once the largest logit is above c / 180.
HEAD_TOLERANCE = 1e-5


@torch.no_grad()
def check_head(what: str, model: Any) -> Parts:
    """Take a model apart, and check on 13 tokens that the parts give the model's own logits.

    A head that does more would otherwise be distilled wrongly without an error. The check takes
    0.14 s for a BERT-base on one core.

    Args:
        what: the model's name in the error.
        model: in fp32.

    Raises:
        ConfigError: the model has no such parts, its logits differ by more than rounding, or they
            are not finite, or all 0.
    """
    parts = take_apart(model, what)
    input_ids, mask = probe(model)
    rows = mask.flatten().nonzero()[:, 0]
    with evaluating(model):
        own = model(input_ids, attention_mask=mask).logits.flatten(0, 1)[rows]
        if not own.isfinite().all():
            raise ConfigError(f"{what}: expected finite logits, got NaN or inf")
        if not own.any():
            raise ConfigError(f"{what}: expected logits that say something, got zeros alone")
        ours = parts.logits_at(input_ids, mask, rows)
        if parts.softcap is not None:
            _check_softcap(what, parts, input_ids, mask, rows, own)
    found = difference(own, ours)
    if not found <= HEAD_TOLERANCE:
        raise ConfigError(
            f"{what}: expected the logits of a {model.config.model_type} to be its head's product, "
            f"got a difference of {found:.1e} of the largest logit, probably {_cause(own, ours)}"
        )
    return parts


def _check_softcap(
    what: str, parts: Parts, input_ids: Tensor, mask: Tensor, rows: Tensor, own: Tensor
) -> None:
    """Check a softcap on logits so large that it shows: on hidden states that are multiplied.

    A class may have the field and not read it, which small logits would not tell.
    """
    assert parts.softcap is not None
    louder = 2 * parts.softcap / float(own.abs().max())
    body = parts.model.get_submodule(parts.body)

    def multiplied(module: Any, args: Any, output: Any) -> None:
        last_hidden(output).mul_(louder)

    hook = body.register_forward_hook(multiplied)
    try:
        loud = parts.model(input_ids, attention_mask=mask).logits.flatten(0, 1)[rows]
        found = difference(loud, parts.logits_at(input_ids, mask, rows))
    finally:
        hook.remove()
    if not found <= HEAD_TOLERANCE:
        raise ConfigError(
            f"{what}: expected a {parts.model.config.model_type} with a softcap of "
            f"{parts.softcap:g}, as its configuration says, got logits without"
        )


def _cause(own: Tensor, ours: Tensor) -> str:
    """Name what explains the difference."""
    scale = float((own * ours).sum() / (ours * ours).sum())
    softcap = _softcap(own, ours)
    explained = {
        f"a scale of {scale:.4g}": ours * scale,
        f"a softcap of {softcap:.4g}": softcap * torch.tanh(ours / softcap),
        "a bias added after the product": ours + (own - ours).mean(0),
    }
    for cause, logits in explained.items():
        if difference(own, logits) <= HEAD_TOLERANCE:
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
