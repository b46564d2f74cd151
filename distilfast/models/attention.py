"""Prove which tokens a causal model attends to: none that comes later, and none of another document
in a packed sequence.

transformers masks other documents where positions restart and no mask is given. Not every class
follows: some compute their positions themselves, and a recurrent state goes on into the next
document. So it is tried, with windows made shorter than the text.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distilfast.errors import ConfigError
from distilfast.models.parts import Parts, difference, evaluating
from distilfast.models.proof import TOLERANCE, narrow, text

# The documents of two packed sequences, in tokens: of one token, and longer than a window.
PACKED = ((7, 1, 11, 5), (1, 3, 20))
SHORT = ((1, 2, 1), (3, 1))  # for a model with fewer positions


@torch.no_grad()
def check_causal(what: str, parts: Parts) -> None:
    """Check that the logits at a token do not depend on the tokens after it.

    Args:
        what: the model's key and name, which begin the error.

    Raises:
        ConfigError: they do.
    """
    model, input_ids = parts.model, text(parts.model)
    half = input_ids.shape[1] // 2
    other = torch.cat([input_ids[:, :half], input_ids[:, half:].flip(0, 1)], dim=1)
    with evaluating(model):
        before, after = (_logits(parts, ids, torch.ones_like(ids)) for ids in (input_ids, other))
    off = difference(before[:, :half], after[:, :half])
    if not off <= TOLERANCE:
        raise ConfigError(
            f"{what}: expected a causal LM, got a {type(model).__name__} that reads the tokens to "
            f"come (they change its logits by {off:.1e} of the largest)"
        )


@torch.no_grad()
def packs(parts: Parts) -> bool:
    """Whether the logits of packed documents are those of each document alone, to rounding.

    Args:
        parts: of a causal model in fp32, with the attention implementation that it will have.
    """
    model = parts.model
    input_ids = text(model)
    rows = PACKED if input_ids.shape[1] >= sum(PACKED[0]) else SHORT
    width = sum(rows[0])
    input_ids = input_ids[:, :width]
    places = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in rows])
    try:
        with narrow(model), evaluating(model):
            packed = _logits(parts, input_ids, None, places.to(input_ids.device))
            alone = torch.stack(
                [
                    torch.cat(
                        [
                            _logits(parts, x[None], torch.ones_like(x[None]))[0]
                            for x in ids.split(row)
                        ]
                    )
                    for ids, row in zip(input_ids, rows, strict=True)
                ]
            )
    except Exception:  # what a class says to positions that it does not take
        return False
    return difference(alone, packed) <= TOLERANCE


def _logits(
    parts: Parts, input_ids: Tensor, mask: Tensor | None, places: Tensor | None = None
) -> Tensor:
    """All logits of a batch, (B, L, V) fp32."""
    hidden = parts.hidden(input_ids, mask, places)
    logits = parts.logits(parts.features(hidden.flatten(0, 1)))
    return logits.float().view(*input_ids.shape, -1)
