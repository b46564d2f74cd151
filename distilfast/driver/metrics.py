"""The metrics of a run while it trains: metrics.jsonl, TensorBoard and the progress bar."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from distilfast import atomic
from distilfast.loss_parts import NOTHING_MASKED
from distilfast.progress import Bar
from distilfast.report.numbers import fixed, percent, perplexity
from distilfast.report.training_run import read_metrics


class Metrics:
    """Writes metrics.jsonl, one line for each step and each evaluation, and TensorBoard's files.

    A resumed run continues after the line of its checkpoint. Later lines of the killed run are cut
    off, so that no step is there twice.
    """

    def __init__(self, folder: Path, start: int, tensorboard: bool):
        self.path = folder / "metrics.jsonl"
        kept = read_metrics(self.path) if self.path.is_file() and start else []
        kept = [line for line in kept if line["step"] <= start]
        atomic.write(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        self.file = self.path.open("a", encoding="utf-8", buffering=1)
        self.tokens = max((line["tokens"] for line in kept if "tokens" in line), default=0)
        self.writer = _tensorboard(folder / "tensorboard", start) if tensorboard else None

    def write(self, line: dict[str, Any]) -> None:
        """Write a line, which holds its step. It gets no timestamp."""
        self.file.write(json.dumps(line) + "\n")
        if self.writer:
            for name, value in line.items():
                if name != "step" and value is not None:
                    self.writer.add_scalar(name, value, line["step"])

    def sync(self) -> None:
        """Force all lines to disk: a checkpoint must not be on disk before its lines."""
        os.fsync(self.file.fileno())

    def lines(self) -> list[dict[str, Any]]:
        return read_metrics(self.path)

    def close(self) -> None:
        self.file.close()
        if self.writer:
            self.writer.close()


def _tensorboard(folder: Path, start: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=start + 1 if start else None)


class Progress(Bar):
    """The driver's progress bar, shown on the first rank only.

    It shows only figures that the step already has on the host, so it never waits for a device.
    """

    def __init__(self, name: str, steps: int, start: int, shown: bool):
        super().__init__(name, steps, start, shown, unit="step")

    def step(self, line: dict[str, Any]) -> None:
        """Show a step's line of metrics."""
        figures = f"loss {fixed(line['loss'], 3)}  {line['tokens_per_second']:,.0f} tokens/s"
        self.update(line["step"], figures)

    def evaluated(self, step: int, scores: dict[str, Any]) -> None:
        """Show an evaluation."""
        loss, accuracy, agreement = (scores[f"eval_{x}"] for x in ("loss", "accuracy", "agreement"))
        if loss is None:
            self.say(f"step {step}: {NOTHING_MASKED}")
            return
        shown = "" if agreement is None else f", agreement {percent(agreement)}"
        if scores.get("eval_kl") is not None:
            shown += f", KL {fixed(scores['eval_kl'], 3)}, perplexity {perplexity(loss)}"
        self.say(
            f"step {step}: held-out loss {fixed(loss, 3)}, accuracy {percent(accuracy)}{shown}"
        )
