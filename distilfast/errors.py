"""Errors in a user's input, each one line: the name, the expected value and the given one."""

from __future__ import annotations

import difflib
import math
import tempfile
from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any


class ConfigError(ValueError):
    """An error that the user can correct: one line, exit status 2, nothing written."""


def expect(ok: bool, key: str, expected: str, got: Any, hint: str = "") -> None:
    """Raise a ConfigError with key, expectation, value and hint unless ``ok``."""
    if not ok:
        raise ConfigError(f"{key}: expected {expected}, got {shown(got)}{hint}")


def shown(value: Any) -> str:
    """Format a value as one would write it in YAML, but strings in quotes and tuples as tuples."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list | tuple):
        inner = ", ".join(map(shown, value))
        return f"[{inner}]" if isinstance(value, list) else f"({inner})"
    if is_dataclass(value):
        value = {field.name: getattr(value, field.name) for field in fields(value)}
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {shown(inner)}' for key, inner in value.items())}}}"
    return repr(value)


def did_you_mean(given: str, known: Iterable[str], likeness: float = 0.6) -> str:
    """The hint "; did you mean X?" with the known name that is nearest, or nothing."""
    near = difflib.get_close_matches(given, list(known), n=1, cutoff=likeness)
    return f"; did you mean {near[0]}?" if near else ""


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
