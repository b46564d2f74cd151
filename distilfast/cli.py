"""The command `distilfast` and its subcommands, each a row of COMMANDS."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NamedTuple

from distilfast.errors import ConfigError
from distilfast.progress import log_to_stderr


class Command(NamedTuple):
    module: str  # imported when the command is called
    function: str  # (arguments) -> exit status
    help: str
    keeps: bool = False  # whether a stopped command goes on where it was


COMMANDS = {
    "train": Command(
        "train", "main", "distil (as `deepspeed distilfast/train.py`, in one process)"
    ),
    "prepare": Command("driver.commands", "prepare", "make data.prepared from data.source"),
    "check": Command(
        "driver.commands", "check", "validate a configuration and print what a run would do"
    ),
    "recipes": Command(
        "driver.commands", "recipes", "list the configurations that come with distilfast"
    ),
    "replay": Command(
        "driver.commands",
        "replay",
        "--step N of a run again, micro-batch by micro-batch: where was it not finite?",
    ),
    "glue": Command(
        "studies.glue", "main", "fine-tune models on GLUE's tasks, over several seeds", True
    ),
    "finetune": Command(
        "studies.finetune",
        "main",
        "distil on a task: soft targets of one teacher or several, and labels",
        True,
    ),
    "ablate": Command(
        "studies.ablate",
        "main",
        "a configuration with parts left out or changed, over several seeds",
        True,
    ),
    "compare": Command(
        "studies.compare", "main", "parameters, latency, throughput and memory of models"
    ),
    "report": Command("studies.pages", "main", "RUN [RUN ...]: one page that compares runs"),
    "demo": Command("demo", "command", "a real teacher, real text, three runs, a report [--full]"),
}


def usage() -> str:
    width = max(map(len, COMMANDS))
    rows = "\n".join(f"  {name:<{width}}  {c.help}" for name, c in COMMANDS.items())
    return (
        "usage: distilfast COMMAND [--config FILE] [--key.sub value ...]\n\n"
        f"{rows}\n\n`distilfast train --help` lists every key."
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit status (2: something in the arguments or inputs)."""
    name, *rest = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name in ("--help", "-h"):
        print(usage())
        return 0
    if name not in COMMANDS:
        known = ", ".join(COMMANDS)
        print(f"distilfast: expected a command ({known}), got {name!r}", file=sys.stderr)
        return 2
    command = COMMANDS[name]
    log_to_stderr()
    run = getattr(import_module(f"distilfast.{command.module}"), command.function)
    try:
        return int(run(rest))
    except ConfigError as error:
        print(f"distilfast: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        kept = "; what is done is kept" if command.keeps else ""
        print(f"distilfast: stopped{kept}", file=sys.stderr)
        return 130


def script() -> None:
    """`main` as a program of its own."""
    # An exception, so that a command ends the processes that it has started. `train` has its own.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    status = main()
    if "distilfast.driver.processes" in sys.modules:
        sys.modules["distilfast.driver.processes"].finish()
    sys.exit(status)
