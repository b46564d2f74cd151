"""The studies' flags, on top of argparse. Errors are one line, as everywhere in distilfast."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import torch

from distilfast import tasks
from distilfast.errors import ConfigError, did_you_mean
from distilfast.machine import best_precision
from distilfast.studies.jobs import Workers
from distilfast.tasks.fine_tuning import FineTuning

KINDS = {"int": "a whole number", "float": "a number"}


class Formatter(argparse.RawDescriptionHelpFormatter):
    """Appends the default to each help text that does not mention it."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        if action.default in (None, False, argparse.SUPPRESS, []) or "default" in text:
            return text
        return f"{text} (default: %(default)s)".strip()


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are ConfigErrors, "--rounds: expected ..., got ...".

    A custom `type` raises argparse.ArgumentTypeError("expected ..., got ...").
    """

    def __init__(self, prog: str, description: str | None):
        super().__init__(
            prog=prog,
            description=description,
            formatter_class=Formatter,
            allow_abbrev=False,
        )

    def add_argument(self, *names: Any, **settings: Any) -> argparse.Action:
        """argparse's own, but a flag of several values may be given several times."""
        if settings.get("nargs") == "+" and "action" not in settings and names[0][0] == "-":
            settings["action"] = "extend"
        return super().add_argument(*names, **settings)

    def parse_args(  # type: ignore[override]  # argparse has overloads
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> Any:
        """argparse's own. An unknown flag is named before a missing one, which may be its cause."""
        args = sys.argv[1:] if args is None else args
        known = self._option_string_actions
        for name in (argument.partition("=")[0] for argument in args):
            if name.startswith("--") and name not in known:
                raise ConfigError(f"{name}: unknown flag{did_you_mean(name, known)}")
        return super().parse_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        message = message.removeprefix("argument ")
        if found := re.fullmatch(r"(.+): invalid choice: (.*) \(choose from (.*)\)", message):
            known = found[3].replace("'", "")
            message = f"{found[1]}: expected one of {known}, got {found[2]}"
        elif found := re.fullmatch(r"(.+): invalid (\w+) value: (.*)", message, re.DOTALL):
            message = f"{found[1]}: expected {KINDS.get(found[2], found[2])}, got {found[3]}"
        elif found := re.fullmatch(
            r"the following arguments are required: (.*)|(.+): expected .*one argument", message
        ):
            message = f"{found[1] or found[2]}: expected a value, got none"
        elif found := re.fullmatch(r"unrecognized arguments: (.*)", message, re.DOTALL):
            message = f"expected the options that --help lists, got {found[1]!r}"
        raise ConfigError(message)


def positive(text: str) -> int:
    """The `type` of a flag that is a whole number >= 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1, got {text!r}")
    return int(text)


def names(key: str, text: str) -> list[str]:
    """Return the names in A,B,C. None may stand there twice."""
    found = [part.strip() for part in text.split(",")]
    if not all(found) or len(set(found)) < len(found):
        raise ConfigError(f"{key}: expected names apart by commas, each once, got {text!r}")
    return found


def add_task_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--data", default="glue", metavar="FOLDER|glue",
        help="a folder in GLUE's official layout; glue: from the hub")  # fmt: skip
    add("--tasks", default="all", metavar="all|A,B",
        help=f"all: the nine of GLUE; else any of {', '.join(tasks.TASKS)}, and your own: folders "
        "with train.tsv and dev.tsv")  # fmt: skip
    add("--output", required=True, metavar="FOLDER")


def add_tuning_options(parser: argparse.ArgumentParser) -> None:
    default = FineTuning()
    add = parser.add_argument
    add("--learning_rate", type=float, help=f"default {default.learning_rate:g}")
    add("--batch_size", type=positive, help=f"default {default.batch_size}")
    add("--epochs", type=positive, help="default 3; MRPC and WNLI 5, SQuAD 2")
    add("--max_length", type=positive, help="default 128 tokens; IMDb 512, SQuAD 384")
    add("--weight_decay", type=float, help=f"default {default.weight_decay:g}")
    add("--max_grad_norm", type=float, help=f"default {default.max_grad_norm:g}; 0: no clipping")
    add("--precision", choices=("auto", "bf16", "fp32"), default="auto",
        help="auto: bf16 if the device computes in it")  # fmt: skip
    add("--processes", type=positive,
        help="jobs at a time; default: one per GPU, or one for every four cores")  # fmt: skip
    add("--threads", type=positive,
        help="CPU threads of each job; default: OMP_NUM_THREADS, or this machine's cores divided "
        "by --processes")  # fmt: skip
    add("--device", choices=("cpu", "cuda"), help="default: CUDA devices if there are any")


def tuning(given: argparse.Namespace, workers: Workers) -> FineTuning:
    """Return the settings of the flags; those not given have their defaults."""
    known = {key: value for key, value in vars(given).items() if key in FineTuning.__annotations__}
    changed = {key: value for key, value in known.items() if value is not None}
    if changed["precision"] == "auto":
        changed["precision"] = best_precision(torch.device(workers.devices[0]))
    return FineTuning(**changed)
