"""The two forwards of a micro-batch: the teacher side's, and the student's with the loss.

`Distillation` is the module that DeepSpeed gets. Its forward runs the student's body, reads the
head's weight and calls the fused loss. It must read the weight there: under ZeRO-3 a weight exists
only inside the forward of the module that DeepSpeed got.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distilfast import models
from distilfast.config import LossConfig
from distilfast.data import MicroBatch
from distilfast.loss_parts import AGREEMENT, LOGGED, LOSSES
from distilfast.losses import (
    DetailedOutput,
    DistillationOutput,
    hidden_cosine_loss,
    normalize_weights,
)
from distilfast.losses.linear import linear_distillation_loss
from distilfast.models import Parts, Teacher

PARTS = tuple(LOGGED)  # the values that are summed over a step


@dataclass(frozen=True)
class Targets:
    """The teachers' outputs for a micro-batch, one entry a teacher."""

    hidden: list[Tensor]  # (tokens, D)
    features: list[Tensor]  # (rows of the vocabulary loss, D)


@dataclass(frozen=True)
class Normalizers:
    """The counts of the whole step, over all ranks and micro-batches: 0-d tensors on the device.

    They are in a plain object because DeepSpeed casts tensor arguments to bf16.
    """

    rows: Tensor  # of kd, logit_cos and mse
    labelled: Tensor  # of ce
    tokens: Tensor  # of hidden_cos


def vocabulary_rows(batch: MicroBatch, config: LossConfig) -> Tensor:
    """The rows that the losses over the vocabulary need. The head is applied to no others. A causal
    LM's last token of a text predicts nothing, so it is in no such loss."""
    return batch.tokens if config.all_rows and not batch.shifted else batch.labelled


class Bodies(nn.Module):
    """The teachers without their heads.

    forward(batch, tokens, rows, n) -> two lists with an entry for each of the first n teachers: the
    hidden states at ``tokens``, and the features at ``rows``. If ``tokens`` or ``rows`` is None,
    its list is empty.
    """

    def __init__(self, teachers: Sequence[Parts]):
        super().__init__()
        self.parts = teachers
        self.models = nn.ModuleList(parts.model for parts in teachers)

    def forward(
        self, batch: MicroBatch, tokens: Tensor | None, rows: Tensor | None, n: int
    ) -> tuple[list[Tensor], list[Tensor]]:
        inputs = batch.input_ids, batch.attention_mask, batch.position_ids
        hidden, features = [], []
        for parts in itertools.islice(self.parts, n):
            states = parts.hidden(*inputs).flatten(0, 1)
            if tokens is not None:
                hidden.append(states[tokens])
            if rows is not None:
                features.append(parts.features(states[rows]))
        return hidden, features


class TeacherSide:
    """The teachers on the device, in the dtype to run in.

    This is not a module, so it is never trained, saved or partitioned with the student.

    Args:
        shard: partitions the teachers over the ranks and returns their forward. Their heads are
            copied before that, as the student's forward reads them whole. None: every rank holds
            all of the teachers.
    """

    def __init__(
        self,
        teachers: Sequence[Teacher],
        config: LossConfig,
        device: torch.device,
        dtype: torch.dtype,
        shard: Callable[[nn.Module], Callable[..., Any]] | None = None,
    ):
        self.config = config
        self.parts = [t.parts for t in teachers]
        for parts in self.parts:
            models.cast(parts.model, device, dtype)
        self.weights = normalize_weights("teacher", [t.weight for t in teachers], len(teachers))
        self.heads = [parts.head for parts in self.parts]
        self.bodies: Callable[..., Any] = Bodies(self.parts)
        if shard is not None:
            self.heads = copy.deepcopy(self.heads)
            self.bodies = shard(self.bodies)

    @torch.no_grad()
    def __call__(self, batch: MicroBatch) -> Targets:
        config = self.config
        tokens = batch.tokens if config.hidden_cos_weight else None
        rows = vocabulary_rows(batch, config) if config.vocabulary else None
        return Targets(*self.bodies(batch, tokens, rows, len(self.parts)))

    @torch.no_grad()
    def predict(self, batch: MicroBatch) -> Tensor:
        """The first teacher's logits in the rows with a label, (labelled, V)."""
        _, (features,) = self.bodies(batch, None, batch.labelled, 1)
        return self.parts[0].logits(features, self.heads[0])


class Distillation(nn.Module):
    """The student and its loss.

    forward(batch, targets, normalizers) -> the loss, 0-d, and the (7,) detached PARTS. Their sums
    over the micro-batches of a step on all ranks are the loss and parts of the step.

    forward(batch) -> the student's logits in the rows with a label, (labelled, V). Evaluation calls
    this, because it has to read the head in here, too.

    columns: how many columns of the logits all models have.
    """

    def __init__(self, student: Any, config: LossConfig, teacher: TeacherSide):
        super().__init__()
        self.student = student
        self.parts = models.take_apart(student, "student")
        self.config = config
        self.teacher = teacher  # not a module, so its weights are not this module's
        # Heads are padded to different numbers of rows, as Qwen's: columns beyond this are padding.
        self.columns = min(len(head.weight) for head in (self.parts.head, *teacher.heads))

    def forward(
        self,
        batch: MicroBatch,
        targets: Targets | None = None,
        normalizers: Normalizers | None = None,
    ) -> tuple[Tensor, Tensor] | Tensor:
        inputs = batch.input_ids, batch.attention_mask, batch.position_ids
        hidden = self.parts.hidden(*inputs).flatten(0, 1)
        if normalizers is None:
            return self.parts.logits(self.parts.features(hidden[batch.labelled]))
        config = self.config
        loss = hidden.new_zeros((), dtype=torch.float32)
        values = dict.fromkeys(PARTS, loss)
        if config.vocabulary or config.ce_weight:
            out = self._vocabulary_loss(batch, hidden, targets, normalizers)
            loss = loss + out.loss
            values |= {part.name: getattr(out, part.output) for part in LOSSES if part.output}
            if isinstance(out, DetailedOutput):
                values[AGREEMENT] = out.agreement.sum() / normalizers.rows.clamp(min=1)
        if config.hidden_cos_weight:
            cosine = self._hidden_loss(batch, hidden, targets, normalizers)
            loss = loss + config.hidden_cos_weight * cosine
            values["hidden_cos"] = cosine
        values["loss"] = loss
        return loss, torch.stack([values[name].detach() for name in PARTS])

    def _vocabulary_loss(
        self,
        batch: MicroBatch,
        hidden: Tensor,
        targets: Targets | None,
        normalizers: Normalizers,
    ) -> DistillationOutput | DetailedOutput:
        config, parts = self.config, self.parts
        rows, head = vocabulary_rows(batch, config), parts.head
        soft = self._soft(targets) if config.vocabulary else {}
        # All teachers have the same scale and softcap: see `checks.check_teachers`.
        teacher = self.teacher.parts[0]
        return linear_distillation_loss(
            parts.features(hidden[rows]),
            head.weight,
            soft.pop("teacher_hidden", None),
            soft.pop("teacher_weight", None),
            batch.labels[rows] if config.ce_weight else None,
            student_bias=head.bias,
            logit_scale=(parts.scale, teacher.scale),
            logit_softcap=(parts.softcap, teacher.softcap),
            temperature=config.temperature,
            kd_weight=config.kd_weight,
            ce_weight=config.ce_weight,
            cos_weight=config.logit_cos_weight,
            mse_weight=config.mse_weight,
            divergence=config.divergence,
            jsd_beta=config.jsd_beta,
            kd_normalizer=normalizers.rows if config.vocabulary else None,
            ce_normalizer=normalizers.labelled if config.ce_weight else None,
            statistics=bool(config.kd_weight),
            vocab_size=self.columns,
            backend=config.backend,
            **soft,
        )

    def _soft(self, targets: Targets | None) -> dict[str, Any]:
        """The teachers' arguments of the vocabulary loss."""
        assert targets is not None
        return {
            "teacher_hidden": targets.features,
            "teacher_weight": [head.weight for head in self.teacher.heads],
            "teacher_bias": [head.bias for head in self.teacher.heads],
            "teacher_weights": self.teacher.weights,
            "ensemble": self.config.ensemble,
        }

    def _hidden_loss(
        self,
        batch: MicroBatch,
        hidden: Tensor,
        targets: Targets | None,
        normalizers: Normalizers,
    ) -> Tensor:
        """The cosine distance of the last hidden states, as the weighted mean over teachers."""
        assert targets is not None
        states, backend = hidden[batch.tokens], self.config.backend
        losses = [
            weight
            * hidden_cosine_loss(states, target, normalizer=normalizers.tokens, backend=backend)
            for weight, target in zip(self.teacher.weights, targets.hidden, strict=True)
        ]
        return torch.stack(losses).sum()
