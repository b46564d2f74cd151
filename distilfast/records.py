"""What a run tells while it goes on: metrics.jsonl, TensorBoard, the progress bar."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from distilfast.report import read_metrics


def log_to_stderr() -> None:
    """The library's warnings, and what the assets' downloads say, as lines of the program."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("distilfast: %(message)s"))
    logging.getLogger("distilfast").handlers[:] = [handler]
    logging.getLogger("distilfast.assets").setLevel(logging.INFO)


class Metrics:
    """metrics.jsonl, a line a step and a line an evaluation, and the same for TensorBoard.

    A resumed run goes on behind the line of its checkpoint: what a killed run wrote after that is
    cut off, so that no step stands there twice.
    """

    def __init__(self, folder: Path, start: int, tensorboard: bool):
        self.path = folder / "metrics.jsonl"
        kept = read_metrics(self.path) if self.path.is_file() and start else []
        kept = [line for line in kept if line["step"] <= start]
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        os.replace(temporary, self.path)
        self.file = self.path.open("a", encoding="utf-8", buffering=1)
        self.tokens = max((line["tokens"] for line in kept if "tokens" in line), default=0)
        self.writer = _tensorboard(folder / "tensorboard", start) if tensorboard else None

    def write(self, line: dict[str, Any]) -> None:
        """A line with its step; the time of writing is no part of it."""
        self.file.write(json.dumps(line) + "\n")
        if self.writer:
            for name, value in line.items():
                if name != "step" and value is not None:
                    self.writer.add_scalar(name, value, line["step"])

    def sync(self) -> None:
        """Everything written so far to the disk: a checkpoint must not be ahead of its lines."""
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


class Progress:
    """A bar on a terminal, a line every ten seconds elsewhere; nothing on the other ranks.

    It shows figures that the step has on the host already, and so never waits for a device.
    """

    INTERVAL_S = 10.0

    def __init__(self, name: str, steps: int, start: int, shown: bool):
        self.name, self.steps, self.start, self.shown = name, steps, start, shown
        self.bar: Any = None
        self.task: Any = None
        self.began = self.told = time.monotonic()

    def __enter__(self) -> Progress:
        if self.shown and sys.stderr.isatty():
            from rich import console, progress

            self.bar = progress.Progress(
                progress.TextColumn("{task.description}"),
                progress.BarColumn(),
                progress.MofNCompleteColumn(),
                progress.TextColumn("{task.fields[figures]}"),
                progress.TimeRemainingColumn(),
                console=console.Console(stderr=True),
            )
            self.bar.start()
            self.task = self.bar.add_task(
                self.name, total=self.steps, completed=self.start, figures=""
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        if self.bar:
            self.bar.stop()

    def update(self, line: dict[str, Any]) -> None:
        """Show a step's line of metrics."""
        if not self.shown:
            return
        figures = f"loss {line['loss']:.3f}  {line['tokens_per_second']:,.0f} tokens/s"
        if self.bar:
            self.bar.update(self.task, completed=line["step"], figures=figures)
            return
        now = time.monotonic()
        if now - self.told >= self.INTERVAL_S:
            self.told = now
            left = (now - self.began) / (line["step"] - self.start) * (self.steps - line["step"])
            self._say(f"step {line['step']}/{self.steps}  {figures}  {left:.0f} s left")

    def evaluated(self, step: int, scores: dict[str, Any]) -> None:
        """Show an evaluation."""
        agreement = scores["eval_agreement"]
        shown = "" if agreement is None else f", agreement {agreement:.1%}"
        if self.shown:
            self._say(
                f"step {step}: held-out loss {scores['eval_loss']:.3f}, "
                f"accuracy {scores['eval_accuracy']:.1%}{shown}"
            )

    def _say(self, message: str) -> None:
        if self.bar:
            self.bar.console.print(f"{self.name}  {message}", highlight=False)
        else:
            print(f"{self.name}  {message}", file=sys.stderr, flush=True)
