"""Errors in a user's input, each one line: the name, the expected value and the given one."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any


class ConfigError(ValueError):
    """An error that the user can correct: one line, exit status 2, nothing written."""


def expect(ok: bool, key: str, expected: str, got: Any) -> None:
    """Raise a ConfigError with key, expectation and value unless ``ok``."""
    if not ok:
        raise ConfigError(f"{key}: expected {expected}, got {got!r}")


def positive(key: str, value: float) -> None:
    """Raise a ConfigError unless ``value`` is a finite number > 0."""
    expect(math.isfinite(value) and value > 0, key, "a number > 0", value)


def not_negative(key: str, value: float) -> None:
    """Raise a ConfigError unless ``value`` is a finite number >= 0."""
    expect(math.isfinite(value) and value >= 0, key, "a number >= 0", value)


def fraction(key: str, value: float) -> None:
    expect(0 <= value < 1, key, "a number from 0 up to, not including, 1", value)


def writable(key: str, folder: Path) -> None:
    """Raise a ConfigError unless ``folder`` can be written to, or made if it is missing.

    It makes a file there that has no name and is gone at once. Permissions alone do not tell: a
    file system may be read-only, or refuse what they allow.
    """
    try:
        there = next(p for p in (folder, *folder.parents) if p.exists() or p.is_symlink())
        if not there.is_dir():
            raise ConfigError(f"{key}: expected a folder, got the file {str(there)!r}")
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise ConfigError(
            f"{key}: expected a folder that can be written to, got {str(folder)!r}: "
            f"{error.strerror or error}"
        ) from error


def shortened(text: str) -> str:
    return text[:60] + "..." if len(text) > 60 else text
