"""The schema of a run, and its documentation.

Each class checks its own values; what needs more than one class is checked in `Config`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from distilfast.errors import expect, fraction, not_negative, positive
from distilfast.parts import LOSSES


@dataclass(frozen=True)
class TeacherSpec:
    """A teacher of an ensemble.

    Args:
        name: hub name or folder.
        weight: its share of the ensemble; the weights are normalised.
        revision: commit of the hub's repository, to pin it.
    """

    name: str
    weight: float = 1.0
    revision: str | None = None


@dataclass(frozen=True)
class SourceSpec:
    """A data set of the hub, pinned.

    Args:
        name: hub name.
        config: its configuration, such as 20231101.en.
        revision: commit of its repository.
        split: the split to read.
        column: the column with the text.
    """

    name: str
    config: str | None = None
    revision: str | None = None
    split: str = "train"
    column: str = "text"


@dataclass(frozen=True)
class StudentConfig:
    """The student's shape and where its weights come from.

    Args:
        layers: the teacher's layers to keep: alternate is round(linspace(0, L-1, ceil(L/2))), all,
            or a list such as [0, 2, 4, 7, 9, 11].
        init: weights from the (first) teacher, or random.
        architecture: auto is distilbert for a BERT teacher and the teacher's own otherwise; same
            is the teacher's own.
        dropout: null is the family's own; 0 makes a batch exact whatever its split.
        fold_token_type: add BERT's token-type embedding 0, which DistilBERT has no place for, to
            the position embeddings. The original code drops it.
        copy_mlm_transform: start the masked-LM transform from the teacher's.
    """

    layers: Literal["alternate", "all"] | list[int] = "alternate"
    init: Literal["teacher", "random"] = "teacher"
    architecture: Literal["auto", "distilbert", "same"] = "auto"
    dropout: float | None = None
    fold_token_type: bool = True
    copy_mlm_transform: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.layers, str):
            expect(len(self.layers) > 0, "student.layers", "at least one layer", self.layers)
            rising = all(a < b for a, b in zip(self.layers, self.layers[1:], strict=False))
            expect(rising and self.layers[0] >= 0, "student.layers", "rising indices", self.layers)
        if self.dropout is not None:
            fraction("student.dropout", self.dropout)


@dataclass(frozen=True)
class DataConfig:
    """Text, and the tokens made of it.

    Args:
        source: a file or folder of .txt, .jsonl, .parquet or .csv, a hub name, or a list of them
            (hub entries may be {name, config, revision, split, column}).
        prepared: folder of the tokens; made from source where it is missing. null: in output.
        column: the column with the text, in .jsonl, .parquet and .csv.
        txt_rows: what one text of a .txt file is.
        max_length: tokens an example, special tokens included; longer texts are cut into several.
        min_length: shorter examples are dropped.
        max_unknown: examples with this share of unknown tokens or more are dropped.
        heldout: the share of the texts kept for evaluation, whole texts, at least one.
    """

    source: str | list[str | SourceSpec] | None = None
    prepared: str | None = None
    column: str = "text"
    txt_rows: Literal["line", "paragraph", "document"] = "line"
    max_length: int = 512
    min_length: int = 12
    max_unknown: float = 0.5
    heldout: float = 0.01

    def __post_init__(self) -> None:
        expect(self.max_length >= 3, "data.max_length", "at least 3", self.max_length)
        expect(self.min_length >= 3, "data.min_length", "at least 3", self.min_length)
        expect(
            self.min_length <= self.max_length,
            "data.min_length",
            f"at most data.max_length ({self.max_length})",
            self.min_length,
        )
        expect(0 < self.max_unknown <= 1, "data.max_unknown", "0 < x <= 1", self.max_unknown)
        expect(0 < self.heldout < 1, "data.heldout", "0 < x < 1", self.heldout)


@dataclass(frozen=True)
class MaskingConfig:
    """Which tokens the model has to guess, drawn afresh at every epoch.

    Args:
        probability: expected share of the non-padding tokens.
        mask: the share of the chosen tokens that become [MASK].
        random: the share that become a random token.
        keep: the share that stay as they are. The three sum to 1.
        smoothing: rare tokens are chosen more often, by the weight count^-smoothing.
    """

    probability: float = 0.15
    mask: float = 0.8
    random: float = 0.1
    keep: float = 0.1
    smoothing: float = 0.7

    def __post_init__(self) -> None:
        expect(0 < self.probability < 1, "masking.probability", "0 < x < 1", self.probability)
        shares = (self.mask, self.random, self.keep)
        ok = min(shares) >= 0 and math.isclose(sum(shares), 1, abs_tol=1e-9)
        expect(ok, "masking.mask, random, keep", "numbers >= 0 of sum 1", shares)
        not_negative("masking.smoothing", self.smoothing)


@dataclass(frozen=True)
class LossConfig:
    """The weighted sum that the student learns from.

    Args:
        temperature: T of the soft targets.
        kd_weight: of T^2 KL(teacher || student) over the vocabulary.
        ce_weight: of the masked-LM cross entropy at the masked positions.
        hidden_cos_weight: of the cosine distance between last hidden states.
        logit_cos_weight: of the cosine distance between logits.
        mse_weight: of the squared error of the logits, summed over the vocabulary.
        divergence: what kd measures.
        jsd_beta: the teacher's share in jsd's mixture.
        kd_rows: the tokens of kd, logit_cos and mse: all (non-padding) or the masked ones.
        ensemble: how several teachers become one: the mean of probabilities or of logits.
        backend: of the losses.
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
        """Whether the losses over the vocabulary are of all tokens, or of the masked ones alone."""
        return self.vocabulary and self.kd_rows == "all"

    @property
    def needs_teacher(self) -> bool:
        return self.vocabulary or self.hidden_cos_weight > 0


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW or LAMB, with warm-up, decay and clipping.

    Args:
        name: adamw; or lamb (You et al., arXiv:1904.00962), whose steps are in proportion to each
            matrix' own norm, for batches so large that AdamW would need a rate at which some
            layers diverge (theirs: up to 32,768 sequences of 512 tokens).
        learning_rate: the peak; of lamb, the share of its norm that a matrix changes by in a step.
            Rules of thumb for a batch k times as large: times sqrt(k) for adamw and lamb
            (Krizhevsky, arXiv:1404.5997; Hoffer et al., arXiv:1705.08741; You et al.), where SGD
            would take k (Goyal et al., arXiv:1706.02677). Warm-up keeps its number of steps, so
            warmup_ratio is times k over as many epochs. From 4,096 sequences, 5e-4 and 0.05 to
            16,384: k is 4, so 1e-3 and 0.2.
        weight_decay: not applied to biases and LayerNorms.
        betas: Adam's decay rates.
        epsilon: Adam's.
        warmup_ratio: the share of the steps over which the rate rises from 0.
        decay: what it does after that, down to 0 after the last step.
        max_grad_norm: gradients are scaled down to this norm; 0: never.
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
    """One optimiser step, all ranks together.

    Args:
        sequences: examples a step, 4096 if tokens is null, too; or
        tokens: tokens a step, padding aside. An example belongs to the step in which its first
            token falls.
        micro_sequences: at most so many examples a forward. How often a rank accumulates follows
            from this, the step and the ranks, and changes no gradient.
        warmup_from: the first step's sequences or tokens; they rise linearly from there. Small
            batches learn more from each example at first, and later on a larger batch does what a
            lower learning rate would (Smith et al. 2018, "Don't decay the learning rate, increase
            the batch size", arXiv:1711.00489). null: every step is whole.
        warmup_steps: the first whole step; 0 without warmup_from.
    """

    sequences: int | None = None
    tokens: int | None = None
    micro_sequences: int = 32
    warmup_from: int | None = None
    warmup_steps: int = 0

    def __post_init__(self) -> None:
        both = self.sequences, self.tokens
        expect(None in both, "batch.sequences, batch.tokens", "one of the two", both)
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
        """What a step is measured in: sequences or tokens."""
        return "sequences" if self.tokens is None else "tokens"

    @property
    def size(self) -> int:
        """Of a whole step, in its unit."""
        size = self.sequences if self.tokens is None else self.tokens
        assert size is not None
        return size

    def before(self, step: int) -> int:
        """The sizes of all steps before this one, summed: a function of the step alone, so that a
        run can go on anywhere. Sizes are within 1 of the line from warmup_from to the whole."""
        if self.warmup_from is None:
            return step * self.size
        rising = min(step, self.warmup_steps)
        pairs = rising * (rising - 1) // 2
        rise = (self.size - self.warmup_from) * pairs // self.warmup_steps
        return rising * self.warmup_from + rise + (step - rising) * self.size

    def check(self, ranks: int, max_length: int) -> None:
        """That every step has an example for each rank.

        Raises:
            ConfigError: the smallest step may have fewer.
        """
        key = self.unit if self.warmup_from is None else "warmup_from"
        least, what = ranks, "the number of ranks"
        if self.tokens is not None:
            least, what = max_length * ranks, f"data.max_length x ranks ({max_length} x {ranks})"
        smallest = getattr(self, key)
        expect(smallest >= least, f"batch.{key}", f"at least {least}, {what}", smallest)


@dataclass(frozen=True)
class EvaluateConfig:
    """Evaluation on the held-out part, at the first, each ``every``-th and the last step.

    Args:
        every: steps between evaluations; 0: the first and last only.
        max_examples: at most this many held-out examples; null: all.
    """

    every: int = 500
    max_examples: int | None = None

    def __post_init__(self) -> None:
        expect(self.every >= 0, "evaluate.every", "a number >= 0", self.every)
        ok = self.max_examples is None or self.max_examples >= 1
        expect(ok, "evaluate.max_examples", "null or at least 1", self.max_examples)


@dataclass(frozen=True)
class ZeroConfig:
    """DeepSpeed's partitioning over the ranks.

    Args:
        stage: 0 keeps everything on every rank, 1 splits the optimiser's state, 2 the gradients
            too, 3 the weights too.
        offload: what is kept in the host's memory, and the optimizer's step taken there: none,
            the optimizer's state (stages 1 to 3), or the parameters and that state (stage 3).
        shard_teacher: split the teachers' weights, too, but for a copy of their heads (stage 3).
            Each layer is gathered at every forward; with offload parameters, from the host's
            memory. At start each device has to hold all teachers once.
    """

    stage: Literal[0, 1, 2, 3] = 1
    offload: Literal["none", "optimizer", "parameters"] = "none"
    shard_teacher: bool = False

    def __post_init__(self) -> None:
        lowest = {"none": 0, "optimizer": 1, "parameters": 3}[self.offload]
        why = f"{lowest} or more with zero.offload {self.offload} (only what is split can be moved)"
        expect(self.stage >= lowest, "zero.stage", why, self.stage)
        if self.shard_teacher:
            why = "3 with zero.shard_teacher (below it no weights are split)"
            expect(self.stage == 3, "zero.stage", why, self.stage)


@dataclass(frozen=True)
class CheckpointConfig:
    """What a killed run goes on from.

    Args:
        every: steps between checkpoints; 0: only when stopped by a signal.
        keep: the newest so many are kept.
    """

    every: int = 1000
    keep: int = 3

    def __post_init__(self) -> None:
        expect(self.every >= 0, "checkpoint.every", "a number >= 0", self.every)
        expect(self.keep >= 1, "checkpoint.keep", "at least 1", self.keep)


@dataclass(frozen=True)
class Config:
    """A run.

    Args:
        teacher: hub name or folder, or a list of names or {name, weight, revision}: an ensemble.
        student: the student.
        data: text and tokens.
        masking: what has to be guessed.
        loss: what is learned from.
        optimizer: how.
        batch: one step.
        steps: optimiser steps; or
        epochs: passes over the data (whole steps, rounded down).
        evaluate: on held-out text.
        zero: DeepSpeed's partitioning.
        precision: bf16 (weights and activations; masters, sums and gradients of a step in fp32),
            fp32, or auto: bf16 where the device has instructions for it, else fp32. A run that is
            resumed keeps its own.
        seed: of masks, order and whatever else is drawn.
        checkpoint: what a killed run goes on from.
        resume: auto goes on from the newest checkpoint in output; never wants an empty output.
        rank_timeout_s: a rank that does not answer for so many seconds ends the others, which name
            it. What a rank computes or waits for is no silence.
        tensorboard: write TensorBoard's event files beside metrics.jsonl.
        output: folder of the run.
    """

    teacher: str | list[str | TeacherSpec] = "bert-base-uncased"
    student: StudentConfig = field(default_factory=StudentConfig)
    data: DataConfig = field(default_factory=DataConfig)
    masking: MaskingConfig = field(default_factory=MaskingConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    steps: int | None = None
    epochs: float | None = None
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    zero: ZeroConfig = field(default_factory=ZeroConfig)
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    seed: int = 56
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    resume: Literal["auto", "never"] = "auto"
    rank_timeout_s: float = 300.0
    tensorboard: bool = True
    output: str = "runs/distilfast"

    def __post_init__(self) -> None:
        given = (self.steps is None) + (self.epochs is None)
        expect(given == 1, "steps, epochs", "one of the two", (self.steps, self.epochs))
        if self.steps is not None:
            expect(self.steps >= 1, "steps", "at least 1", self.steps)
        if self.epochs is not None:
            positive("epochs", self.epochs)
        expect(0 <= self.seed < 2**64, "seed", "0 to 2^64 - 1", self.seed)
        ok = 5 <= self.rank_timeout_s <= 86_400
        expect(ok, "rank_timeout_s", "5 to 86,400 seconds", self.rank_timeout_s)
        expect(bool(self.output), "output", "a folder", self.output)
        expect(len(self.teachers) > 0, "teacher", "at least one teacher", self.teacher)
        for teacher in self.teachers:
            expect(bool(teacher.name), "teacher", "a name", teacher.name)
            not_negative("teacher: weight", teacher.weight)
        expect(sum(t.weight for t in self.teachers) > 0, "teacher", "a weight > 0", self.teacher)
        expect(
            self.precision != "bf16" or self.zero.stage >= 1,
            "zero.stage",
            "1, 2 or 3 with precision bf16 (DeepSpeed sums bf16 gradients in bf16 at stage 0)",
            self.zero.stage,
        )
        ensemble = len(self.teachers) > 1 and self.loss.ensemble == "probability"
        expect(
            not (ensemble and (self.loss.mse_weight or self.loss.logit_cos_weight)),
            "loss.mse_weight, loss.logit_cos_weight",
            "0 with ensemble probability, whose logits are known only up to a constant",
            (self.loss.mse_weight, self.loss.logit_cos_weight),
        )

    @property
    def teachers(self) -> list[TeacherSpec]:
        """The teachers as a list of specs, whatever form the key had."""
        value: Sequence[str | TeacherSpec] = (
            [self.teacher] if isinstance(self.teacher, str) else self.teacher
        )
        return [TeacherSpec(t) if isinstance(t, str) else t for t in value]

    @property
    def token_folder(self) -> Path:
        """Where the tokens are, or are to be made."""
        return Path(self.data.prepared or Path(self.output) / "tokens")

    @property
    def sources(self) -> list[SourceSpec]:
        """The sources as a list of specs, whatever form the key had."""
        source = self.data.source
        value = [] if source is None else [source] if isinstance(source, str) else source
        return [SourceSpec(s, column=self.data.column) if isinstance(s, str) else s for s in value]
