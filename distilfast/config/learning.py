"""The sections of the schema that say how a student learns: loss, optimiser and batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from distilfast.errors import expect, fraction, not_negative, positive
from distilfast.loss_parts import LOSSES


@dataclass(frozen=True)
class LossConfig:
    """The weighted sum that the student learns from.

    Args:
        temperature: T of the soft targets.
        kd_weight: weight of kd: T^2 times the divergence over the vocabulary.
        ce_weight: weight of the cross entropy at the masked positions; of a causal LM, of the next
            tokens.
        hidden_cos_weight: weight of the cosine distance between the last hidden states.
        logit_cos_weight: weight of the cosine distance between the logits.
        mse_weight: weight of the squared error of the logits, summed over the vocabulary.
        divergence: the divergence in kd; forward_kl is KL(teacher || student).
        jsd_beta: the teacher's share in the mixture of jsd.
        kd_rows: the tokens that kd, logit_cos and mse are computed on: all (except padding), or
            the masked ones. Of a causal LM always those that have a next token.
        ensemble: how several teachers become one: by the mean of probabilities or of logits.
        backend: the implementation of the losses.
    """

    temperature: float = 2.0
    kd_weight: float = 5.0
    ce_weight: float = 2.0
    hidden_cos_weight: float = 1.0
    logit_cos_weight: float = 0.0
    mse_weight: float = 0.0
    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = "forward_kl"
    jsd_beta: float = 0.5
    kd_rows: Literal["all", "masked"] = "all"
    ensemble: Literal["probability", "logit"] = "probability"
    backend: Literal["auto", "triton", "cpp", "torch"] = "auto"

    def __post_init__(self) -> None:
        positive("loss.temperature", self.temperature)
        weights = {f"loss.{part.weight}": getattr(self, part.weight) for part in LOSSES}
        for key, weight in weights.items():
            not_negative(key, weight)
        expect(any(weights.values()), ", ".join(weights), "at least one weight > 0", "all 0")
        expect(0 < self.jsd_beta < 1, "loss.jsd_beta", "0 < x < 1", self.jsd_beta)

    @property
    def vocabulary(self) -> bool:
        """Whether the teacher's logits are needed."""
        return bool(self.kd_weight or self.logit_cos_weight or self.mse_weight)

    @property
    def all_rows(self) -> bool:
        """Whether the losses over the vocabulary take all tokens, not only the masked ones."""
        return self.vocabulary and self.kd_rows == "all"

    @property
    def needs_teacher(self) -> bool:
        return self.vocabulary or self.hidden_cos_weight > 0


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW or LAMB, with warm-up, decay and clipping.

    Args:
        name: adamw or lamb (You et al., arXiv:1904.00962). A LAMB step is proportional to each
            matrix's own norm. It is for batches so large that AdamW would need a rate at which
            some layers diverge (in the paper, up to 32,768 sequences of 512 tokens).
        learning_rate: the peak rate. With lamb, a step changes a matrix by this share of its norm.
            Rule of thumb for a batch k times as large: multiply the rate by sqrt(k) for adamw and
            lamb (Krizhevsky, arXiv:1404.5997; Hoffer et al., arXiv:1705.08741; You et al.). SGD
            would take k (Goyal et al., arXiv:1706.02677). Warm-up keeps its number of steps, so
            multiply warmup_ratio by k if the number of epochs stays the same. Example: 4,096
            sequences with 5e-4 and 0.05 become 16,384 (k = 4) with 1e-3 and 0.2.
        weight_decay: decay of the weights; biases and LayerNorms have none.
        betas: Adam's decay rates.
        epsilon: Adam's epsilon.
        warmup_ratio: the share of the steps over which the rate rises from 0.
        decay: the rate after warm-up: linear falls to 0 after the last step.
        max_grad_norm: gradients with a larger norm are scaled down to it; 0: never.
    """

    name: Literal["adamw", "lamb"] = "adamw"
    learning_rate: float = 5e-4
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.98)
    epsilon: float = 1e-6
    warmup_ratio: float = 0.05
    decay: Literal["linear", "constant"] = "linear"
    max_grad_norm: float = 5.0

    def __post_init__(self) -> None:
        positive("optimizer.learning_rate", self.learning_rate)
        not_negative("optimizer.weight_decay", self.weight_decay)
        ok = all(0 <= beta < 1 for beta in self.betas)
        expect(ok, "optimizer.betas", "two numbers from 0 up to 1", self.betas)
        positive("optimizer.epsilon", self.epsilon)
        fraction("optimizer.warmup_ratio", self.warmup_ratio)
        not_negative("optimizer.max_grad_norm", self.max_grad_norm)


@dataclass(frozen=True)
class BatchConfig:
    """The batch of one optimiser step, over all ranks. Set sequences or tokens.

    Args:
        sequences: examples in a step; 4096 if both this and tokens are null.
        tokens: tokens in a step, without padding. An example belongs to the step that its first
            token falls into.
        micro_sequences: most sequences in a forward, each of one example or packed. A rank
            accumulates as many micro-batches as this, the batch and the number of ranks require;
            the gradient does not depend on it.
        activation_checkpointing: the student's layers keep their inputs alone for the backward,
            which computes the rest again. Less memory, one more forward of the student's layers,
            the same gradient.
        warmup_from: sequences or tokens of the first step; they rise linearly from there. Early in
            training, small batches learn more from each example; later, a larger batch does what a
            lower learning rate would (Smith et al. 2018, "Don't decay the learning rate, increase
            the batch size", arXiv:1711.00489). null: every step has the whole batch.
        warmup_steps: the first step with the whole batch; 0 without warmup_from.
    """

    sequences: int | None = None
    tokens: int | None = None
    micro_sequences: int = 32
    activation_checkpointing: bool = False
    warmup_from: int | None = None
    warmup_steps: int = 0

    def __post_init__(self) -> None:
        both = self.sequences, self.tokens
        hint = "; unset the other, as in --batch.sequences null"
        expect(None in both, "batch.sequences, batch.tokens", "one of the two", both, hint)
        if both == (None, None):
            object.__setattr__(self, "sequences", 4096)
        for key in ("sequences", "tokens", "micro_sequences", "warmup_from"):
            value = getattr(self, key)
            expect(value is None or value >= 1, f"batch.{key}", "at least 1", value)
        warmup = self.warmup_from, self.warmup_steps
        expect(
            self.warmup_steps == 0 if self.warmup_from is None else self.warmup_steps >= 1,
            "batch.warmup_from, batch.warmup_steps",
            "null and 0, or both at least 1",
            warmup,
        )
        expect(
            self.warmup_from is None or self.warmup_from <= self.size,
            "batch.warmup_from",
            f"at most batch.{self.unit} ({self.size})",
            self.warmup_from,
        )

    @property
    def unit(self) -> str:
        """The unit of a step's size: sequences or tokens."""
        return "sequences" if self.tokens is None else "tokens"

    @property
    def size(self) -> int:
        """The size of a whole step, in its unit."""
        size = self.sequences if self.tokens is None else self.tokens
        assert size is not None
        return size

    def before(self, step: int) -> int:
        """The sum of the sizes of all steps before this one. It depends on the step alone, so a run
        can resume anywhere. Sizes are within 1 of the line from warmup_from to the whole size."""
        if self.warmup_from is None:
            return step * self.size
        rising = min(step, self.warmup_steps)
        pairs = rising * (rising - 1) // 2
        rise = (self.size - self.warmup_from) * pairs // self.warmup_steps
        return rising * self.warmup_from + rise + (step - rising) * self.size

    def check(self, ranks: int, max_length: int) -> None:
        """Check that every step has an example for each rank.

        Raises:
            ConfigError: the smallest step may have fewer examples than ranks.
        """
        key = self.unit if self.warmup_from is None else "warmup_from"
        least, what = ranks, "the number of ranks"
        if self.tokens is not None:
            least, what = max_length * ranks, f"data.max_length x ranks ({max_length} x {ranks})"
        smallest = getattr(self, key)
        expect(smallest >= least, f"batch.{key}", f"at least {least}, {what}", smallest)
