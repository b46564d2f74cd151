"""The command `distilfast` and its subcommands, each a row of COMMANDS."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NamedTuple

from distilfast._version import __version__
from distilfast.errors import ConfigError, did_you_mean
from distilfast.progress import log_to_stderr


class Command(NamedTuple):
    module: str  # imported when the command is called
    function: str  # (arguments) -> exit status
    help: str
    keeps: bool = False  # whether a stopped command resumes where it stopped
    flags: tuple[str, ...] | None = None  # all that it takes, if it has no parser of its own


COMMANDS = {
    "train": Command(
        "train",
        "main",
        "distil in one process (many: `deepspeed distilfast/train.py`); bare: the demo's recipe",
    ),
    "prepare": Command("driver.commands", "prepare", "tokenise data.source into data.prepared"),
    "check": Command(
        "driver.commands", "check", "validate a configuration and print what a run would do"
    ),
    "recipes": Command(
        "driver.commands", "recipes", "list the configurations that come with distilfast", flags=()
    ),
    "replay": Command(
        "driver.commands",
        "replay",
        "compute --step N of a run again, micro-batch by micro-batch, to find what was not finite",
    ),
    "glue": Command(
        "studies.glue", "main", "fine-tune models on GLUE's tasks, over several seeds", True
    ),
    "finetune": Command(
        "studies.finetune",
        "main",
        "distil on a task, from its labels and the soft targets of one or more teachers",
        True,
    ),
    "ablate": Command(
        "studies.ablate",
        "main",
        "train a configuration with parts left out or changed, over several seeds",
        True,
    ),
    "compare": Command(
        "studies.compare", "main", "measure parameters, latency, throughput and memory of models"
    ),
    "report": Command("studies.pages", "main", "write one page that compares runs: RUN [RUN ...]"),
    "demo": Command(
        "demo",
        "command",
        "run the demo: real teacher and text, three runs, a report [--full]",
        flags=("--full",),
    ),
}


def usage() -> str:
    width = max(map(len, COMMANDS))
    rows = "\n".join(f"  {name:<{width}}  {c.help}" for name, c in COMMANDS.items())
    return (
        "usage: distilfast COMMAND [--config FILE] [--key.sub value ...]\n"
        "       distilfast --version\n\n"
        f"{rows}\n\n`distilfast train --help` lists every key."
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status (2: the arguments or inputs are wrong)."""
    name, *rest = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name in ("--help", "-h"):
        print(usage())
        return 0
    if name == "--version":
        print(f"distilfast {__version__}")
        return 0
    if name not in COMMANDS:
        known, hint = ", ".join(COMMANDS), did_you_mean(name, [*COMMANDS, "--help", "--version"])
        print(f"distilfast: expected a command ({known}), got {name!r}{hint}", file=sys.stderr)
        return 2
    command = COMMANDS[name]
    if command.flags is not None and {"--help", "-h"} & set(rest):
        print(f"usage: distilfast {name}{''.join(f' [{x}]' for x in command.flags)}")
        print(f"\n{command.help.partition(' [')[0]}")
        return 0
    log_to_stderr()
    try:
        if command.flags is not None:
            _check_flags(name, command.flags, rest)
        run = getattr(import_module(f"distilfast.{command.module}"), command.function)
        return int(run(rest))
    except ConfigError as error:
        print(f"distilfast: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        kept = "; what is done is kept: the same command resumes" if command.keeps else ""
        print(f"distilfast: stopped{kept}", file=sys.stderr)
        return 130


def _check_flags(name: str, flags: Sequence[str], arguments: Sequence[str]) -> None:
    for argument in arguments:
        if argument not in flags:
            expected = " or ".join(["nothing", *flags])
            raise ConfigError(f"{name}: expected {expected}, got {argument!r}")


def script() -> None:
    """`main` as a program of its own."""
    # SIGTERM becomes an exception, so that a command can end the processes that it has started.
    # `train` installs its own handler.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    status = main()
    if "distilfast.driver.processes" in sys.modules:
        sys.modules["distilfast.driver.processes"].finish()
    sys.exit(status)


if __name__ == "__main__":
    script()
