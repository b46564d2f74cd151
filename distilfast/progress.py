"""Progress as a bar on a terminal and as lines elsewhere; and the program's log messages."""

from __future__ import annotations

import logging
import sys
import time
from types import TracebackType
from typing import Any, Self


def log_to_stderr() -> None:
    """Print the library's warnings, and messages about downloads of assets, to stderr."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("distilfast: %(message)s"))
    logging.getLogger("distilfast").handlers[:] = [handler]
    logging.getLogger("distilfast.sources.assets").setLevel(logging.INFO)


class Bar:
    """Progress and remaining time: a bar on a terminal, a line every ten seconds elsewhere."""

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
        """Report that ``done`` of the total is done."""
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
        """Print a line of its own."""
        if not self.shown:
            return
        if self.bar:
            self.bar.console.print(f"{self.name}  {message}", highlight=False)
        else:
            print(f"{self.name}  {message}", file=sys.stderr, flush=True)
