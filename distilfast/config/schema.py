"""The schema of a run's configuration. The `Args:` sections are the text of `--help`.

Each class checks its own values. `Config` checks what involves more than one class. The sections
`loss`, `optimizer` and `batch` are in `learning.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from distilfast.config.learning import BatchConfig, LossConfig, OptimizerConfig
from distilfast.errors import expect, fraction, not_negative, positive, shown


@dataclass(frozen=True)
class TeacherSpec:
    """A teacher of an ensemble.

    Args:
        name: hub name or folder.
        weight: its share of the ensemble; the weights are normalised.
        revision: commit of the hub's repository, which pins the teacher.
    """

    name: str
    weight: float = 1.0
    revision: str | None = None


@dataclass(frozen=True)
class SourceSpec:
    """A data set of the hub, pinned.

    Args:
        name: hub name.
        config: the data set's configuration, such as 20231101.en.
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
    """The student's shape and where its weights come from: some layers of the teacher, or a model
    that exists already.

    Args:
        model: hub name or folder of a language model with the teacher's tokenizer and objective,
            such as the model/ of a finished run. The student begins as this model, of any family,
            width and depth; of another width than the teacher's with loss.hidden_cos_weight 0. The
            keys layers, architecture, fold_token_type and copy_mlm_transform then keep their
            defaults. null: the student is made of the teacher's layers.
        revision: commit of the hub's repository, which pins the model.
        layers: the teacher's layers that the student keeps: alternate, which is
            round(linspace(0, L-1, ceil(L/2))); all; or a list such as [0, 2, 4, 7, 9, 11].
        init: teacher copies the weights from the (first) teacher, or from model if it is given;
            random draws them.
        architecture: same is the teacher's own; auto is distilbert for a BERT teacher, else same.
        dropout: null keeps the dropout of the teacher's configuration, or of model's. With 0, a
            step computes the same on any split of its batch.
        fold_token_type: add BERT's token-type embedding 0 to the position embeddings, as DistilBERT
            has no token types. The original code drops this embedding.
        copy_mlm_transform: copy the masked-LM transform's weights from the teacher.
    """

    model: str | None = None
    revision: str | None = None
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
        expect(self.model != "", "student.model", "a name", self.model)
        if self.model is None:
            why = "null without student.model"
            expect(self.revision is None, "student.revision", why, self.revision)
            return
        for key in ("layers", "architecture", "fold_token_type", "copy_mlm_transform"):
            value, default = getattr(self, key), type(self).__dataclass_fields__[key].default
            why = f"{shown(default)} with student.model, which is not made of the teacher's layers"
            expect(value == default, f"student.{key}", why, value)

    @property
    def origin(self) -> str | None:
        """What a student with a ``model`` comes from, in words; None without one."""
        if self.model is None:
            return None
        name = self.model + (f" ({self.revision})" if self.revision else "")
        return f"drawn, in the shape of {name}" if self.init == "random" else f"from {name}"


@dataclass(frozen=True)
class DataConfig:
    """The text and the store of its tokens.

    Args:
        source: a file or folder of .txt, .jsonl, .json, .parquet or .csv, a hub name, or a list of
            them (entries may be {name, column}; those of the hub config, revision and split, too).
            Hidden files are not read.
        prepared: folder of the tokens; made from source if it is missing, and else compared with
            its files by their contents. null: in output.
        column: the column with the text, in .jsonl, .parquet and .csv. A cell is read as it is
            written; one that is empty or JSON's null is no text.
        txt_rows: the unit of a .txt file that counts as one text.
        max_length: most tokens in an example, special tokens included. A longer text is cut into
            several examples. For a causal LM a text is its tokens and the tokenizer's end token.
        min_length: fewest tokens in an example; shorter ones are dropped.
        special_tokens: what the words [MASK] or [SEP] in a text are: text, words like others, or
            the special tokens.
        max_unknown: an example is dropped if its share of unknown tokens is this or more.
        heldout: the share of the texts that is held out for evaluation: whole texts, at least one,
            and equal ones together.
        packing: of a causal LM, put several examples into one sequence of at most max_length
            tokens, with attention that never crosses them and positions that restart: true; false,
            an example a sequence; or auto, which is true where the logits of a packed sequence are
            proven to be those of its examples alone. The gradient does not depend on it.
    """

    source: str | list[str | SourceSpec] | None = None
    prepared: str | None = None
    column: str = "text"
    txt_rows: Literal["line", "paragraph", "document"] = "line"
    max_length: int = 512
    min_length: int = 12
    special_tokens: Literal["text", "tokens"] = "text"
    max_unknown: float = 0.5
    heldout: float = 0.01
    packing: Literal["auto"] | bool = "auto"

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
    """The tokens that a masked LM has to guess. They are drawn anew in every epoch.

    Args:
        probability: the expected share of the non-padding tokens that is chosen.
        mask: the share of the chosen tokens that become [MASK].
        random: the share of the chosen tokens that become a random token.
        keep: the share of the chosen tokens that stay as they are. The three shares sum to 1.
        smoothing: tokens are chosen by the weight count^-smoothing, so rare ones more often.
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
class EvaluateConfig:
    """Evaluation on held-out text: before the first step, each ``every`` steps and after the last.

    Args:
        every: steps between evaluations; 0: only before the first step and after the last.
        max_examples: most held-out examples to evaluate on; null: all.
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
        stage: 0 keeps everything on every rank, 1 partitions the optimiser's state, 2 the gradients
            too, 3 the weights too.
        offload: the state that is kept in the host's memory, where the optimiser then takes its
            step: none; optimizer, its state (stages 1 to 3); parameters, these and the optimiser's
            state (stage 3).
        shard_teacher: partition the teachers' weights too, except a copy of their heads (stage 3).
            Each layer is gathered in every forward, with offload parameters from the host's memory.
            At the start, each device must have room for all teachers.
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
    """The checkpoints that a stopped or killed run resumes from.

    Args:
        every: steps between checkpoints; 0: only when stopped by a signal.
        keep: how many of the newest checkpoints are kept.
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
        teacher: hub name or folder; or, for an ensemble, a list of names or of
            {name, weight, revision}.
        objective: what the models are trained for: masked, to guess masked tokens; causal, to guess
            each next token; auto, as the teacher is. A resumed run keeps its objective.
        student: the student's shape and initial weights, or a model that it begins as.
        data: the text and its tokens.
        masking: the tokens that a masked LM has to guess.
        loss: the loss that the student is trained with.
        optimizer: the optimiser and its schedule.
        batch: the batch of one step.
        steps: optimiser steps. Set this or epochs.
        epochs: passes over the data, rounded down to whole steps, of which they have to hold one.
            Set this or steps.
        evaluate: evaluation on held-out text.
        zero: DeepSpeed's partitioning.
        precision: bf16 (weights and activations in bf16; master weights, sums and a step's
            gradients in fp32), fp32, or auto: bf16 if the device has instructions for it, else
            fp32. A resumed run keeps its precision.
        seed: seed of the masks, the order of examples and everything else that is drawn.
        checkpoint: when checkpoints are written and how many are kept.
        resume: auto resumes from the newest checkpoint in output; never requires an empty output.
        rank_timeout_s: if a rank does not answer for this many seconds, the other ranks name it and
            end. A rank that computes or waits still answers. A checkpoint fails if a rank's part of
            it does not grow for as long.
        tensorboard: write TensorBoard's event files beside metrics.jsonl.
        output: folder of the run.
    """

    teacher: str | list[str | TeacherSpec] = "bert-base-uncased"
    objective: Literal["auto", "masked", "causal"] = "auto"
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
        both = self.steps, self.epochs
        hint = "; set one, in a file after --config or as in --steps 1000"
        expect(both != (None, None), "steps, epochs", "one of the two", both, hint)
        hint = "; unset the other, as in --steps null"
        expect(None in both, "steps, epochs", "one of the two", both, hint)
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
        """The teachers as a list of specs, from any form that the key may have."""
        value: Sequence[str | TeacherSpec] = (
            [self.teacher] if isinstance(self.teacher, str) else self.teacher
        )
        return [TeacherSpec(t) if isinstance(t, str) else t for t in value]

    @property
    def token_folder(self) -> Path:
        """The folder where the tokens are, or will be made."""
        return Path(self.data.prepared or Path(self.output) / "tokens")

    @property
    def sources(self) -> list[SourceSpec]:
        """The sources as a list of specs, from any form that the key may have."""
        source = self.data.source
        value = [] if source is None else [source] if isinstance(source, str) else source
        return [SourceSpec(s, column=self.data.column) if isinstance(s, str) else s for s in value]
