"""The files of a local source: which ones are read, in which order, and what they hold.

What `find` lists is read, compared and told; nothing else looks for files. A name is only ever a
name: no character of it stands for others.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from distilfast import atomic
from distilfast.errors import ConfigError

KINDS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}


@dataclass(frozen=True)
class Files:
    """What a file or folder holds for us."""

    root: Path
    taken: list[Path]  # in the order of their names
    left: dict[str, int]  # how many of which type are not read

    def digests(self) -> dict[str, str]:
        """The SHA-256 of each file that is read, by its name below the root; about 1 GB/s a core.

        Raises:
            ConfigError: a file cannot be read.
        """
        folder = self.root if self.root.is_dir() else self.root.parent
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            found = list(pool.map(_digest, self.taken))
        return {str(p.relative_to(folder)): x for p, x in zip(self.taken, found, strict=True)}

    def __str__(self) -> str:
        taken = Counter(_type(p) for p in self.taken)
        left = f"; not read: {_listed(self.left)}" if self.left else ""
        return f"{_listed(taken)}{left}"


def kind(file: Path) -> str | None:
    """How a file is read: text, json, parquet or csv; None: not at all."""
    return KINDS.get(file.suffix.lower())


def find(root: Path, without: Sequence[Path] = ()) -> Files:
    """List the files of a source: ``root`` itself, or those of a known type in and below it.

    Links are followed. Hidden files and folders are left out, and so are the folders ``without``
    below the root: what a run writes is no text of its source.

    Raises:
        ConfigError: no file has a known type, a link leads nowhere, a file is a pipe or a device,
            or a folder cannot be read.
    """
    left: Counter[str] = Counter()
    own = {Path(os.path.realpath(path)) for path in without}
    try:
        found = list(_below(root, own, frozenset(), left)) if root.is_dir() else [root]
    except OSError as error:
        raise _unreadable(root, error) from error
    taken = [path for path in found if kind(path)]
    left.update(_type(path) for path in found if not kind(path))
    if not taken:
        got = f", which has {_listed(left)}" if root.is_dir() and left else ""
        raise ConfigError(
            f"data.source: expected files of type {', '.join(KINDS)}, got {str(root)!r}{got}"
        )
    for path in taken:
        if not os.path.isfile(path):
            got = "the pipe or device" if os.path.exists(path) else "the broken link"
            raise ConfigError(f"data.source: expected a file, got {got} {str(path)!r}")
    return Files(root, taken, dict(sorted(left.items())))


def _below(
    folder: Path, own: set[Path], above: frozenset[str], left: Counter[str]
) -> Iterator[Path]:
    """The files in and below a folder; ``above`` are the real folders on the way to it."""
    real = os.path.realpath(folder)
    if real in above:  # a link to a folder that it lies in
        return
    with os.scandir(folder) as entries:
        found = sorted(entries, key=lambda entry: entry.name)
    for entry in found:
        path = Path(entry.path)
        if entry.is_dir():
            if atomic.final(Path(os.path.realpath(path))) in own:
                continue
            if entry.name.startswith("."):
                left["hidden"] += 1
            else:
                yield from _below(path, own, above | {real}, left)
        elif entry.name.startswith("."):
            left["hidden"] += 1
        elif entry.is_file() or entry.is_symlink():
            yield path
        else:
            left["no file"] += 1  # a socket, a pipe


def _type(path: Path) -> str:
    return path.suffix or "without a type"


def _listed(counts: dict[str, int]) -> str:
    shown = ((name if name.isprintable() else repr(name), n) for name, n in sorted(counts.items()))
    return ", ".join(f"{n:,} {name}" for name, n in shown)


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> ConfigError:
    return ConfigError(
        f"data.source: expected files that can be read, got {str(error.filename or path)!r}: "
        f"{error.strerror or error}"
    )
