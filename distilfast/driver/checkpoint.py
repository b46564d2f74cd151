"""Checkpoints: the state of a run by parameter name, in one format for every layout.

A checkpoint is a folder step-N. Each rank writes the fp32 weights and both moments of its part of
each parameter to its own safetensors file. manifest.json says which elements are in which file, and
has the size and SHA-256 of every file. So a run with another number of ranks, another ZeRO stage or
on another machine can read it, and nothing in it is executed.

A folder gets its name only when it is complete and on disk. The state is first copied in memory;
then a thread writes the copy while training continues.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import mmap
import os
import re
import shutil
import struct
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import safetensors
import torch
from torch import Tensor

from distilfast.errors import ConfigError

FORMAT = 1
MANIFEST = "manifest.json"
CHUNK_BYTES = 16 << 20  # bytes written and hashed at a time
POLL_S = 0.02


class CheckpointError(RuntimeError):
    """A checkpoint could not be written. Earlier ones are intact."""


@dataclass(frozen=True)
class Piece:
    """A rank's part of a parameter, as views of the state itself.

    ``tensors``: by kind ("weight", "exp_avg", "exp_avg_sq"), 1-D fp32 tensors of one length. They
    hold the elements of the flattened parameter from ``start`` on. A rank has at most one piece of
    a parameter.
    """

    name: str
    start: int
    tensors: Mapping[str, Tensor]

    @property
    def length(self) -> int:
        return len(self.tensors["weight"])


def mark(point: str) -> None:
    """Marks a point of a save where a kill must do no harm. Tests kill the process here."""


# --- Writing --------------------------------------------------------------------------------------


class Checkpoints:
    """Writes one rank's part of a run's checkpoints.

    `save` returns once the state is copied. The copy's memory is kept for the next save. A save
    waits until the one before it is on disk.
    """

    def __init__(
        self,
        folder: Path,
        rank: int,
        ranks: int,
        keep: int,
        start: int = 0,
        timeout_s: float = 300.0,
    ):
        self.folder, self.rank, self.ranks, self.keep = folder, rank, ranks, keep
        self.timeout_s = timeout_s  # of a rank whose part does not grow
        self.saved = start  # the step of the last save, which may still be being written
        self._copy: Tensor | None = None
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def reserve(self, n_bytes: int, pinned: bool) -> None:
        """Allocate the copy's memory in the background. New pages take longer than the copy itself,
        and the first save would have to wait for them."""
        self._thread = threading.Thread(target=self._make_copy, args=(n_bytes, pinned), daemon=True)
        self._thread.start()

    def _make_copy(self, n_bytes: int, pinned: bool) -> None:
        copy = torch.empty(n_bytes, dtype=torch.uint8, pin_memory=pinned)
        copy.numpy()[:: mmap.PAGESIZE] = 0  # the system provides a page at the first write to it
        self._copy = copy

    def save(self, step: int, pieces: Sequence[Piece]) -> None:
        """Save the state after ``step`` steps. Every rank must call this.

        Raises:
            CheckpointError: the previous save could not be written.
        """
        self.wait()
        self.saved = step
        header, data = self._snapshot(pieces)
        parts = {p.name: [p.start, p.start + p.length] for p in pieces}
        manifest = {"format": FORMAT, "step": step, "ranks": self.ranks}
        # A daemon: ending the program in the middle of a write does no more harm than a kill.
        self._thread = threading.Thread(
            target=self._write, args=(manifest, parts, header, data), daemon=True
        )
        self._thread.start()

    def check(self) -> None:
        """Raise a CheckpointError if a save is known to have failed. Does not wait."""
        if self._error:
            raise CheckpointError(f"step-{self.saved} could not be saved: {self._error}")

    def wait(self) -> None:
        """Wait until this rank's part of the last save is on disk; on rank 0, until all of it is.

        Raises:
            CheckpointError: the save could not be written.
        """
        if self._thread:
            self._thread.join()
            self._thread = None
        self.check()

    def _snapshot(self, pieces: Sequence[Piece]) -> tuple[bytes, Tensor]:
        """Make the header of a safetensors file, and its data as bytes: a copy of the tensors."""
        entries, end = {}, 0
        for piece in pieces:
            for kind in piece.tensors:
                begin, end = end, end + 4 * piece.length
                entry = {"dtype": "F32", "shape": [piece.length], "data_offsets": [begin, end]}
                entries[f"{kind}/{piece.name}"] = entry
        if self._copy is None or len(self._copy) < end:
            on_gpu = any(t.is_cuda for p in pieces for t in p.tensors.values())
            self._make_copy(end, on_gpu)
        assert self._copy is not None
        place = self._copy[:end].view(torch.float32)
        for tensor in (t for p in pieces for t in p.tensors.values()):
            place[: len(tensor)].copy_(tensor, non_blocking=True)
            place = place[len(tensor) :]
        if self._copy.is_pinned():
            torch.cuda.synchronize()
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return struct.pack("<Q", len(text)) + text, self._copy[:end]

    # --- In the thread: ranks communicate only through files --------------------------------------

    def _write(
        self, manifest: dict[str, Any], parts: dict[str, Any], header: bytes, data: Tensor
    ) -> None:
        scratch = self.folder / f"tmp-step-{manifest['step']}"
        try:
            self._write_part(scratch, parts, header, data)
            if self.rank == 0:
                self._publish(scratch, manifest)
        except Exception as error:
            self._error = error

    def _write_part(
        self, scratch: Path, parts: dict[str, Any], header: bytes, data: Tensor
    ) -> None:
        path = scratch / self._part(self.rank)
        said = scratch / f"rank-{self.rank}.json"
        try:
            mark("begin")
            scratch.mkdir(parents=True, exist_ok=True)
            entry = {**_write_hashed(path, header, data), "parts": parts}
            mark("written")
            _replace(said, json.dumps({path.name: entry}))
            mark("said")
        except Exception as error:
            reason = f"rank {self.rank}: {error}"
            # A full disk has room for the reason once the part is deleted.
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
                _replace(said, json.dumps({"error": reason}))
            raise OSError(reason) from error

    def _part(self, rank: int) -> str:
        return f"state-{rank:05d}-of-{self.ranks:05d}.safetensors"

    def _wait_for(self, said: Path, rank: int) -> None:
        """Wait for another rank's last word, ``said``, as long as its part grows."""
        part, size, since = said.with_name(self._part(rank)), -1, time.monotonic()
        while not said.exists():
            time.sleep(POLL_S)
            with contextlib.suppress(OSError):  # it has not begun
                before, size = size, part.stat().st_size
                since = since if size == before else time.monotonic()
            if time.monotonic() - since > self.timeout_s:
                raise OSError(
                    f"rank {rank} has written nothing of its part for {self.timeout_s:g} s "
                    "(rank_timeout_s)"
                )

    def _publish(self, scratch: Path, manifest: dict[str, Any]) -> None:
        """Wait for every rank's file, then give the folder its name."""
        files: dict[str, Any] = {}
        for rank in range(self.ranks):
            said = scratch / f"rank-{rank}.json"
            self._wait_for(said, rank)
            entry = json.loads(said.read_text())
            if "error" in entry:
                raise OSError(entry["error"])
            files |= entry
            said.unlink()
        manifest["files"] = files
        manifest["sha256"] = _digest(manifest)
        _replace(scratch / MANIFEST, json.dumps(manifest))
        mark("manifest")
        _sync(scratch)  # otherwise the new name could be on disk before the folder's content
        target = self.folder / f"step-{manifest['step']}"
        os.rename(scratch, target)
        mark("renamed")
        _sync(self.folder)
        for step in _steps(self.folder)[: -self.keep]:
            # Rename it before removing it: a half-removed checkpoint must not look damaged.
            doomed = self.folder / f"tmp-old-step-{step}"
            os.rename(self.folder / f"step-{step}", doomed)
            mark("pruning")
            shutil.rmtree(doomed)


def _write_hashed(path: Path, header: bytes, data: Tensor) -> dict[str, Any]:
    """Write header and data to disk. Return the file's size and hash."""
    digest, n_bytes = hashlib.sha256(), 0
    with path.open("wb") as file:
        for piece in (header, *map(_view, data.split(CHUNK_BYTES))):
            file.write(piece)
            digest.update(piece)
            n_bytes += len(piece)
            mark("writing")
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": n_bytes, "sha256": digest.hexdigest()}


def _view(data: Tensor) -> Any:
    return memoryview(cast(Any, data.numpy()))


def _replace(path: Path, text: str) -> None:
    """Write a file to disk so that it has either the whole text or its former content."""
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _digest(manifest: Mapping[str, Any]) -> str:
    """The hash of a manifest's content, without its own key sha256."""
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _steps(folder: Path) -> list[int]:
    """The steps of all checkpoints, sound or damaged, oldest first."""
    names = (re.fullmatch(r"step-([1-9][0-9]*)", p.name) for p in folder.glob("step-*"))
    return sorted(int(name[1]) for name in names if name)


# --- Reading --------------------------------------------------------------------------------------


def newest(folder: Path) -> int:
    """Return the step of the newest sound checkpoint, 0 if there is none. Newer damaged ones are
    renamed, with a warning. One rank calls this for all.

    Raises:
        ConfigError: all are damaged, or the newest has an unknown format.
    """
    step, damaged = find(folder)
    if damaged and not step:
        # Do not rename them: the next start would find no checkpoint and train from the beginning.
        raise ConfigError(
            f"resume: expected a sound checkpoint in {str(folder)!r}, got damaged ones only: "
            + ", ".join(f"step-{step} ({wrong})" for step, wrong in damaged.items())
            + "; to begin anew, remove the run's folder"
        )
    for one, wrong in damaged.items():
        path, aside = folder / f"step-{one}", folder / f"damaged-step-{one}"
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(path, aside)
        logging.getLogger("distilfast").warning(f"{path} is damaged ({wrong}): now {aside.name}")
    return step


def find(folder: Path, before: int | None = None) -> tuple[int, dict[int, str]]:
    """Find the newest sound checkpoint (before step ``before``). Changes nothing.

    Returns its step, 0 if there is none, and for each newer one, by step, what is wrong with it.
    """
    damaged: dict[int, str] = {}
    for step in reversed(_steps(folder)):
        if before is None or step < before:
            wrong = _what_is_wrong(folder / f"step-{step}", step)
            if wrong is None:
                return step, damaged
            damaged[step] = wrong
    return 0, damaged


def _what_is_wrong(path: Path, step: int) -> str | None:
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        found, digest = manifest.get("format"), manifest.get("sha256")
        if digest not in (None, _digest(manifest)):
            return f"{MANIFEST} was changed"
        if found != FORMAT:
            raise ConfigError(
                f"resume: expected a checkpoint of format {FORMAT}, got format {found} in "
                f"{str(path)!r}, of another version of distilfast"
            )
        if digest is None or manifest["step"] != step:
            return f"{MANIFEST} was changed"
        for name, entry in manifest["files"].items():
            n_bytes = (path / name).stat().st_size
            if n_bytes != entry["bytes"]:
                return f"{name} has {n_bytes} bytes of {entry['bytes']}"
            with (path / name).open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != entry["sha256"]:
                    return f"{name} was changed"
    except ConfigError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


class Saved:
    """Reads a checkpoint that `newest` or `find` has found sound.

    ``sizes``: the number of elements of each parameter, by name.

    Raises:
        ConfigError: elements are missing or duplicated.
    """

    def __init__(self, folder: Path, step: int):
        self.path, self.step = folder / f"step-{step}", step
        self.manifest: dict[str, Any] = json.loads((self.path / MANIFEST).read_text())
        self._files: dict[str, Any] = {}
        self._parts: dict[str, list[tuple[int, int, str]]] = {}
        for file, entry in self.manifest["files"].items():
            for name, (start, stop) in entry["parts"].items():
                self._parts.setdefault(name, []).append((start, stop, file))
        self.sizes: dict[str, int] = {}
        for name, parts in self._parts.items():
            for start, stop, _ in sorted(parts):
                end = self.sizes.get(name, 0)
                if start != end:
                    raise ConfigError(
                        f"resume: expected the elements of {name} once each in {str(self.path)!r}, "
                        f"got pieces that end at {end} and begin at {start}"
                    )
                self.sizes[name] = stop

    def read(self, name: str, kind: str, start: int, stop: int) -> Tensor:
        """Read elements ``start`` to ``stop`` of a flattened parameter's weight or moment, fp32.

        Raises:
            ConfigError: the checkpoint does not hold them.
        """
        if stop > self.sizes.get(name, 0):
            raise ConfigError(
                f"resume: expected elements {start} to {stop} of {name} in {str(self.path)!r}, "
                f"got {self.sizes.get(name, 0)} in all"
            )
        found = torch.empty(stop - start)
        for first, last, file in self._parts.get(name, []):
            a, b = max(first, start), min(last, stop)
            if a < b:
                piece = self._open(file).get_slice(f"{kind}/{name}")[a - first : b - first]
                found[a - start : b - start] = piece
        return found

    def _open(self, file: str) -> Any:
        if file not in self._files:
            self._files[file] = safetensors.safe_open(self.path / file, framework="pt")
        return self._files[file]
