"""Distillation on a task: the teachers' logits in files, and the job that trains a student."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distilfast import atomic, tasks
from distilfast.errors import ConfigError, expect, not_negative, positive, shown
from distilfast.losses import combine_teachers
from distilfast.studies.folder import read_tokens
from distilfast.studies.jobs import Result, Tell
from distilfast.tasks import Encoded, Task, fine_tuning
from distilfast.tasks.fine_tuning import FineTuning, SoftTargets

COMBINED = 1024  # the number of examples whose logits are combined at a time


@dataclass(frozen=True)
class Teaching:
    """The settings of a distillation on a task.

    Args:
        temperature: T of the soft targets.
        kd_weight: the weight of T^2 KL(teacher || student) at T.
        ce_weight: the weight of the cross entropy of the hard labels at temperature 1.
        ensemble: probability is the arithmetic mean of the teachers' distributions at T, logit
            their geometric mean.
        weights: each teacher's weight in the ensemble; they are scaled to sum to 1.
    """

    temperature: float = 2.0
    kd_weight: float = 0.5
    ce_weight: float = 0.5
    ensemble: str = "probability"
    weights: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        positive("--temperature", self.temperature)
        positive("--kd_weight", self.kd_weight)
        not_negative("--ce_weight", self.ce_weight)
        for weight in self.weights:
            not_negative("--weights", weight)
        expect(sum(self.weights) > 0, "--weights", "a weight > 0", self.weights)

    def combine(self, logits: Sequence[Tensor], task: Task, temperature: float) -> Tensor:
        """Return the ensemble's logits at T, (n, outputs) or (n, 2, L), or its numbers."""
        if len(logits) == 1:
            return logits[0]
        if task.kind == "number":
            shares = torch.tensor(self.weights) / sum(self.weights)
            return (torch.stack(list(logits)) * shares[:, None, None]).sum(0)
        weights = list(self.weights)
        return combine_teachers(list(logits), weights, temperature=temperature, mode=self.ensemble)


@dataclass(frozen=True)
class Taught:
    """The soft targets that a student learns from."""

    by: str | None  # the name in targets to learn from; None: labels alone
    targets: dict[str, str]  # files by name, for the loss and for the agreement
    teaching: Teaching


def learn(
    source: str,
    task: Task,
    files: Mapping[str, str],
    tokenizer: Any,
    settings: FineTuning,
    seed: int,
    taught: Taught | None,
    keep: str | None,
    *,
    device: str,
    tell: Tell,
) -> Result:
    """A job: train a student, or without ``taught`` a teacher. Its model is saved to ``keep``."""
    splits = {split: read_tokens(file) for split, file in files.items()}
    train, soft = splits["train"], None
    if taught and taught.by:
        own = read_targets(taught.targets[taught.by])
        rows = [own["train"]]
        if "transfer" in splits:
            train = train + splits["transfer"]
            rows.append(own["transfer"])
        how = taught.teaching
        soft = SoftTargets(torch.cat(rows), how.temperature, how.kd_weight, how.ce_weight)
    length = settings.max_length or task.max_length
    model = fine_tuning.load(source, task, seed, length).to(device)
    pad_token = tokenizer.pad_token_id
    fine_tuning.fine_tune(
        model, train, task, settings, seed, pad_token=pad_token, targets=soft, tell=tell
    )
    dev = splits[task.dev[0]]
    predicted = fine_tuning.predict(model, dev, settings, pad_token=pad_token)
    score = tasks.score(task, dev, predicted)
    if keep:
        model.to("cpu").save_pretrained(keep)
        tokenizer.save_pretrained(keep)
    result: Result = {"score": score["score"], "metrics": score, "seed": seed}
    if taught:
        targets = targets_of(taught.targets, task.dev[0])
        result["agreement"] = agreements(task, dev, predicted, targets)
    return result


def logits(
    source: str,
    task: Task,
    files: Mapping[str, str],
    pad_token: int,
    settings: FineTuning,
    place: str,
    *,
    device: str,
    tell: Tell,
) -> Result:
    """A job: compute a teacher's logits of every set, and save them to ``place``."""
    from safetensors.torch import save_file

    model = fine_tuning.load(source, task, 0, settings.max_length or task.max_length).to(device)
    found = {}
    for split, file in files.items():
        found[split] = fine_tuning.predict(model, read_tokens(file), settings, pad_token=pad_token)
        tell(len(found) / len(files))
    with atomic.file(Path(place)) as temporary:  # other runs may share the cache
        save_file(found, temporary)
    return {"splits": {split: len(x) for split, x in found.items()}}


def cached_logits(place: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Read a teacher's logits, by set of the data.

    Raises:
        ConfigError: the file is damaged, or does not hold finite logits of these shapes.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        found = load_file(place)
    except SafetensorError as error:
        raise ConfigError(
            f"{place}: expected a teacher's logits, got a damaged file ({error}); remove it to "
            "compute them again"
        ) from error
    got = {split: tuple(logits.shape) for split, logits in found.items()}
    if got != {split: tuple(shape) for split, shape in shapes.items()}:
        raise ConfigError(
            f"{place}: expected a teacher's logits of the shapes {shown(shapes)}, got {shown(got)};"
            " remove it to compute them again"
        )
    for split, logits in found.items():
        if not logits.isfinite().all():
            raise ConfigError(f"{place}: expected finite logits of a teacher for {split}")
    return found


def read_targets(file: str) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(file)


def targets_of(files: Mapping[str, str], split: str) -> dict[str, Tensor]:
    return {name: read_targets(file)[split] for name, file in files.items()}


def agreements(
    task: Task, examples: Encoded, logits: Tensor, targets: Mapping[str, Tensor]
) -> dict[str, float]:
    """Return the fidelity to each teacher, x 100.

    It is the share of examples whose class, or answer's text, is the teacher's. For numbers it is
    Pearson's correlation with the teacher's.
    """
    measure = tasks.METRICS["Pearson"] if task.kind == "number" else same
    own = tasks.predictions(task, examples, logits)
    return {
        name: 100 * measure(tasks.predictions(task, examples, t), own)
        for name, t in targets.items()
    }


def same(theirs: np.ndarray, own: np.ndarray) -> float:
    """Return the share of equal entries."""
    return float((theirs == own).mean())
