"""What a run tells while it goes on: metrics.jsonl, TensorBoard, the progress bar."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

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


class Bar:
    """How far something is and how long it will take: a bar on a terminal, a line every ten seconds
    elsewhere."""

    INTERVAL_S = 10.0

    def __init__(
        self, name: str, total: float, start: float = 0, shown: bool = True, unit: str = "%"
    ):
        self.name, self.total, self.start, self.shown, self.unit = name, total, start, shown, unit
        self.bar: Any = None
        self.task: Any = None
        self.began = self.told = time.monotonic()

    def __enter__(self) -> Self:
        if self.shown and sys.stderr.isatty():
            from rich import console, progress

            self.bar = progress.Progress(
                progress.TextColumn("{task.description}"),
                progress.BarColumn(),
                progress.TaskProgressColumn()
                if self.unit == "%"
                else progress.MofNCompleteColumn(),
                progress.TextColumn("{task.fields[figures]}"),
                progress.TimeRemainingColumn(),
                console=console.Console(stderr=True),
            )
            self.bar.start()
            self.task = self.bar.add_task(
                self.name, total=self.total, completed=self.start, figures=""
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

    def update(self, done: float, figures: str = "") -> None:
        """So much of the total is done."""
        if not self.shown:
            return
        if self.bar:
            self.bar.update(self.task, completed=done, figures=figures)
            return
        now = time.monotonic()
        if now - self.told >= self.INTERVAL_S and done > self.start:
            self.told = now
            left = (now - self.began) / (done - self.start) * (self.total - done)
            share = f"{done / self.total:.0%}" if self.unit == "%" else f"{done}/{self.total}"
            self.say(f"{self.unit.removeprefix('%')} {share}  {figures}  {left:.0f} s left".strip())

    def say(self, message: str) -> None:
        """A line of its own."""
        if not self.shown:
            return
        if self.bar:
            self.bar.console.print(f"{self.name}  {message}", highlight=False)
        else:
            print(f"{self.name}  {message}", file=sys.stderr, flush=True)


class Progress(Bar):
    """The driver's, of the first rank alone.

    It shows figures that the step has on the host already, and so never waits for a device.
    """

    def __init__(self, name: str, steps: int, start: int, shown: bool):
        super().__init__(name, steps, start, shown, unit="step")

    def step(self, line: dict[str, Any]) -> None:
        """Show a step's line of metrics."""
        figures = f"loss {line['loss']:.3f}  {line['tokens_per_second']:,.0f} tokens/s"
        self.update(line["step"], figures)

    def evaluated(self, step: int, scores: dict[str, Any]) -> None:
        """Show an evaluation."""
        agreement = scores["eval_agreement"]
        shown = "" if agreement is None else f", agreement {agreement:.1%}"
        self.say(
            f"step {step}: held-out loss {scores['eval_loss']:.3f}, "
            f"accuracy {scores['eval_accuracy']:.1%}{shown}"
        )
