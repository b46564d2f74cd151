"""The job of a study: fine-tune one model on one task from one seed."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict

from distilfast import tasks
from distilfast.studies.folder import read_tokens
from distilfast.studies.jobs import Result, Tell
from distilfast.tasks import Task, fine_tuning
from distilfast.tasks.fine_tuning import FineTuning


def fine_tune(
    source: str,
    task: Task,
    files: Mapping[str, str],
    pad_token: int,
    settings: FineTuning,
    seed: int,
    *,
    device: str,
    tell: Tell,
) -> Result:
    """A job: fine-tune one model on one task from one seed; score it on the development sets."""
    splits = {split: read_tokens(file) for split, file in files.items()}
    length = settings.max_length or task.max_length
    model = fine_tuning.load(source, task, seed, length).to(device)
    began = time.monotonic()
    fine_tuning.fine_tune(
        model, splits["train"], task, settings, seed, pad_token=pad_token, tell=tell
    )
    seconds = time.monotonic() - began
    metrics = {}
    for split in task.dev:
        logits = fine_tuning.predict(model, splits[split], settings, pad_token=pad_token)
        metrics[split] = tasks.score(task, splits[split], logits)
    return {
        "score": metrics[task.dev[0]]["score"],
        "metrics": metrics,
        "seed": seed,
        "train_time_s": seconds,
        "settings": asdict(settings),
    }
