"""Files and folders that appear whole or not at all.

What is written lies beside its place until it is whole, under the name NAME.tmp-PID.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


def beside(path: Path) -> Path:
    """Where this process writes what ``path`` is to become."""
    return path.with_name(f"{path.name}.tmp-{os.getpid()}")


@contextlib.contextmanager
def file(path: Path) -> Iterator[Path]:
    """A path to write to. Afterwards it is ``path``, or gone where writing failed; an earlier file
    stays until then. Missing folders are made."""
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
    """A new folder to fill. Afterwards it is ``path``, in place of an earlier one; or it is gone
    where something failed."""
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
