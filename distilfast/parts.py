"""What a step's loss is made of, a row each: metrics, curves, cards and configuration read this."""

from __future__ import annotations

from typing import NamedTuple


class Part(NamedTuple):
    """A loss of the weighted sum."""

    name: str  # in metrics.jsonl; in the configuration its weight is loss.<name>_weight
    output: str | None  # its field of DistillationOutput; None: a loss over hidden states
    title: str  # in a model card; {T} is the temperature
    unit: str  # of its curve

    @property
    def weight(self) -> str:
        return f"{self.name}_weight"


LOSSES = (
    Part("kd", "kd", "KL at T = {T:g}", "soft-target loss, nats"),
    Part("ce", "ce", "masked-LM cross entropy", "hard-label cross entropy, nats"),
    Part("hidden_cos", None, "hidden-state cosine", "cosine loss of hidden states"),
    Part("logit_cos", "cos", "logit cosine", "cosine loss of logits"),
    Part("mse", "mse", "logit squared error", "squared error of logits, summed over V"),
)
AGREEMENT = "agreement"  # the share of the rows of kd where both have one first choice
# What is logged, in this order, and what its curve is called: title and unit.
LOGGED = {
    "loss": ("Training loss", "weighted sum of its parts"),
    **{part.name: (part.name, part.unit) for part in LOSSES},
    AGREEMENT: ("agreement", "share of rows where both have one first choice"),
}
