"""The flags of a command: argparse, with errors as this project words them."""

from __future__ import annotations

import argparse
from typing import NoReturn

from distilfast.config import ConfigError


class Parser(argparse.ArgumentParser):
    """A parser whose errors are `ConfigError`s of one line."""

    def __init__(self, prog: str, description: str | None):
        super().__init__(prog=prog, description=description, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{self.prog}: {message.replace('argument ', '', 1)}")


def names(text: str) -> list[str]:
    """A,B,C as a list; none may be empty or twice."""
    found = [part.strip() for part in text.split(",")]
    if not all(found) or len(set(found)) < len(found):
        raise argparse.ArgumentTypeError(f"expected names apart by commas, each once, got {text!r}")
    return found


def positive(text: str) -> int:
    """A whole number from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1, got {text!r}")
    return int(text)
