"""The parts of a step's loss, one row each. Metrics, curves, model cards and the configuration read
this table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Part(NamedTuple):
    """One term of the weighted sum."""

    name: str  # in metrics.jsonl; the key of its weight is loss.<name>_weight
    output: str | None  # its field of DistillationOutput; None: a loss over hidden states
    title: str  # in a model card and a report; {T} is the temperature
    unit: str  # of its curve
    rows: str  # which rows it is a mean over: the field of `driver.micro_batch.Normalizers`

    @property
    def weight(self) -> str:
        return f"{self.name}_weight"


LOSSES = (
    Part("kd", "kd", "{divergence} at T = {T:g}", "soft-target loss, nats", "rows"),
    Part("ce", "ce", "{objective} cross entropy", "hard-label cross entropy, nats", "labelled"),
    Part("hidden_cos", None, "hidden-state cosine", "cosine loss of hidden states", "tokens"),
    Part("logit_cos", "cos", "logit cosine", "cosine loss of logits", "rows"),
    Part("mse", "mse", "logit squared error", "squared error of logits, summed over V", "rows"),
)
AGREEMENT = "agreement"  # the share of kd's rows where both models have the same largest logit
NOTHING_MASKED = "no held-out token was masked, so nothing was measured"
# The logged values in this order, each with the title and unit of its curve.
LOGGED = {
    "loss": ("Training loss", "weighted sum of its parts"),
    **{part.name: (part.name, part.unit) for part in LOSSES},
    AGREEMENT: ("agreement", "share of rows where both have one first choice"),
}


def weighted_sum(loss: Mapping[str, Any]) -> str:
    """Describe a loss, given the keys of its section: "5 x KL at T = 2, 2 x ...". A part of weight
    0, or without one, is left out. With objective causal, it is one of next tokens."""
    weights = {part.title: loss.get(part.weight) for part in LOSSES}
    said = [f"{weight:g} x {title}" for title, weight in weights.items() if weight]
    divergence = {"jsd": "JSD", "reverse_kl": "reverse KL"}.get(loss.get("divergence", ""), "KL")
    objective = "next-token" if loss.get("objective") == "causal" else "masked-LM"
    temperature = loss.get("temperature", 1.0)
    return ", ".join(said).format(T=temperature, divergence=divergence, objective=objective)
