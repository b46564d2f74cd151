"""Files and folders that appear whole or not at all.

Until it is whole, a new file or folder lies beside its final place under the name NAME.tmp-PID.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path


def beside(path: Path) -> Path:
    """The temporary path, for this process, of something that will become ``path``."""
    return path.with_name(f"{path.name}.tmp-{os.getpid()}")


def final(path: Path) -> Path:
    """What ``path`` would become, if it is a temporary path of any process; else ``path``."""
    made = re.fullmatch(r"(.+)\.tmp-\d+", path.name, re.DOTALL)
    return path.with_name(made[1]) if made else path


@contextlib.contextmanager
def file(path: Path) -> Iterator[Path]:
    """Give a temporary path to write to, and rename it to ``path`` afterwards. If writing fails,
    the temporary file is removed and an earlier ``path`` stays. Missing folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = beside(path)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write(path: Path, content: str | bytes) -> None:
    """Write a file, text as UTF-8."""
    with file(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def folder(path: Path) -> Iterator[Path]:
    """Give a new temporary folder to fill. Afterwards it replaces ``path``. If filling it fails,
    it is removed and ``path`` stays."""
    temporary = beside(path)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        shutil.rmtree(path, ignore_errors=True)
        os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
