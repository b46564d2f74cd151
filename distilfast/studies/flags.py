"""Flags of the applications, by argparse, with errors that read as everywhere else: one line."""

from __future__ import annotations

import argparse
import re
from typing import NoReturn

from distilfast.errors import ConfigError

KINDS = {"int": "a whole number", "float": "a number"}


class Formatter(argparse.RawDescriptionHelpFormatter):
    """Names the defaults where the help does not."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        if action.default in (None, False, argparse.SUPPRESS) or "default" in text:
            return text
        return f"{text} (default: %(default)s)".strip()


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are ConfigErrors, "--rounds: expected ..., got ...".

    A `type` of one's own raises argparse.ArgumentTypeError("expected ..., got ...").
    """

    def __init__(self, prog: str, description: str | None):
        super().__init__(
            prog=prog,
            description=description,
            formatter_class=Formatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        message = message.removeprefix("argument ")
        if found := re.fullmatch(r"(.+): invalid choice: (.*) \(choose from (.*)\)", message):
            known = found[3].replace("'", "")
            message = f"{found[1]}: expected one of {known}, got {found[2]}"
        elif found := re.fullmatch(r"(.+): invalid (\w+) value: (.*)", message, re.DOTALL):
            message = f"{found[1]}: expected {KINDS.get(found[2], found[2])}, got {found[3]}"
        elif found := re.fullmatch(r"the following arguments are required: (.*)", message):
            message = f"{found[1]}: expected a value, got none"
        elif found := re.fullmatch(r"(.+): (expected (?:one|at least one) argument)", message):
            message = f"{found[1]}: {found[2]}, got none"
        elif found := re.fullmatch(r"unrecognized arguments: (.*)", message, re.DOTALL):
            message = f"expected the options that --help lists, got {found[1]!r}"
        raise ConfigError(message)


def positive(text: str) -> int:
    """The `type` of a count."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1, got {text!r}")
    return int(text)


def names(key: str, text: str) -> list[str]:
    """The names in A,B,C, each once."""
    found = [part.strip() for part in text.split(",")]
    if not all(found) or len(set(found)) < len(found):
        raise ConfigError(f"{key}: expected names apart by commas, each once, got {text!r}")
    return found
