"""The parts of a step's loss, one row each. Metrics, curves, model cards and the configuration read
this table."""

from __future__ import annotations

from typing import NamedTuple


class Part(NamedTuple):
    """One term of the weighted sum."""

    name: str  # in metrics.jsonl; the key of its weight is loss.<name>_weight
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
AGREEMENT = "agreement"  # the share of kd's rows where both models have the same largest logit
# The logged values in this order, each with the title and unit of its curve.
LOGGED = {
    "loss": ("Training loss", "weighted sum of its parts"),
    **{part.name: (part.name, part.unit) for part in LOSSES},
    AGREEMENT: ("agreement", "share of rows where both have one first choice"),
}
