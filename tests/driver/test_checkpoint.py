"""Checkpoints without training: made-up pieces, several ranks as objects of one process."""

from __future__ import annotations

import errno
import json
import logging
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from distilfast.config import Config, ConfigError, ZeroConfig
from distilfast.driver import checkpoint, engine, processes
from distilfast.driver.checkpoint import CheckpointError, Checkpoints, Piece, Saved, newest

KINDS = ("weight", "exp_avg", "exp_avg_sq")
State = dict[str, dict[str, Tensor]]  # by parameter, by kind: 1-D


def made_up(sizes: dict[str, int], seed: int = 0) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: {kind: torch.randn(size, generator=generator) for kind in KINDS}
        for name, size in sizes.items()
    }


def pieces(state: State, rank: int, ranks: int) -> list[Piece]:
    """A rank's share, in even cuts."""
    found = []
    for name, tensors in state.items():
        size = len(tensors["weight"])
        start, stop = size * rank // ranks, size * (rank + 1) // ranks
        found.append(Piece(name, start, {kind: t[start:stop] for kind, t in tensors.items()}))
    return found


def write(folder: Path, state: State, step: int, ranks: int = 1, keep: int = 3) -> Path:
    """A checkpoint of all the ranks; its folder."""
    everyone = [Checkpoints(folder, rank, ranks, keep) for rank in range(ranks)]
    for rank, each in enumerate(everyone):
        each.save(step, pieces(state, rank, ranks))
    for each in everyone:
        each.wait()
    return folder / f"step-{step}"


def assert_holds(folder: Path, step: int, state: State) -> None:
    saved = Saved(folder, step)
    assert saved.sizes == {name: len(tensors["weight"]) for name, tensors in state.items()}
    for name, tensors in state.items():
        for kind, tensor in tensors.items():
            assert torch.equal(saved.read(name, kind, 0, len(tensor)), tensor)


# --- What is written is read ----------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_any_cut_is_read_back_in_any_other(data: st.DataObject) -> None:
    """Ranks without any piece, empty pieces, parameters of a single element and files in which
    nothing is aligned are among them."""
    ranks = data.draw(st.integers(1, 4))
    sizes = data.draw(
        st.dictionaries(st.text(min_size=1, max_size=5), st.integers(1, 50), min_size=1, max_size=5)
    )
    state = made_up(sizes)
    shares: list[list[Piece]] = [[] for _ in range(ranks)]
    for name, size in sizes.items():
        owners = data.draw(st.permutations(range(ranks)))[: data.draw(st.integers(1, ranks))]
        inner = st.lists(
            st.integers(0, size), min_size=len(owners) - 1, max_size=len(owners) - 1
        ).map(sorted)
        cuts = [0, *data.draw(inner), size]
        for owner, start, stop in zip(owners, cuts[:-1], cuts[1:], strict=True):
            tensors = {kind: t[start:stop] for kind, t in state[name].items()}
            shares[owner].append(Piece(name, start, tensors))
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        everyone = [Checkpoints(folder, rank, ranks, 1) for rank in range(ranks)]
        for each, share in zip(everyone, shares, strict=True):
            each.save(7, share)
        for each in everyone:
            each.wait()
        assert newest(folder) == 7
        assert_holds(folder, 7, state)
        saved = Saved(folder, 7)
        for name, size in sizes.items():
            start = data.draw(st.integers(0, size))
            stop = data.draw(st.integers(start, size))
            for kind in KINDS:
                assert torch.equal(
                    saved.read(name, kind, start, stop), state[name][kind][start:stop]
                )


def test_safetensors_alone_reads_the_files(tmp_path: Path) -> None:
    state = made_up({"a.weight": 10, "b": 1})
    path = write(tmp_path, state, 2, ranks=2)
    for rank in range(2):
        file = path / f"state-{rank:05d}-of-00002.safetensors"
        with safetensors.safe_open(file, framework="pt") as opened:
            wanted = {p.name: p.tensors for p in pieces(state, rank, 2)}
            assert set(opened.keys()) == {f"{k}/{n}" for n in wanted for k in KINDS}
            for key in set(opened.keys()):
                kind, name = key.split("/")
                assert torch.equal(opened.get_tensor(key), wanted[name][kind])
    assert {p.name for p in path.iterdir()} == {
        "manifest.json",
        "state-00000-of-00002.safetensors",
        "state-00001-of-00002.safetensors",
    }


def test_what_is_not_held_is_refused(tmp_path: Path) -> None:
    write(tmp_path, made_up({"a": 10}), 2)
    saved = Saved(tmp_path, 2)
    with pytest.raises(
        ConfigError, match=r"resume: expected elements 5 to 11 of a .* got 10 in all"
    ):
        saved.read("a", "weight", 5, 11)
    with pytest.raises(ConfigError, match=r"of b .* got 0 in all"):
        saved.read("b", "weight", 0, 1)


@pytest.mark.parametrize(("start", "end"), [(6, 5), (4, 5)], ids=["missing", "twice"])
def test_pieces_that_do_not_join_are_refused(tmp_path: Path, start: int, end: int) -> None:
    everyone = [Checkpoints(tmp_path, rank, 2, 1) for rank in range(2)]
    for each, (first, last) in zip(everyone, ((0, end), (start, 10)), strict=True):
        each.save(2, [Piece("a", first, {"weight": torch.zeros(last - first)})])
    for each in everyone:
        each.wait()
    with pytest.raises(ConfigError, match=f"of a once each .* end at {end} and begin at {start}"):
        Saved(tmp_path, 2)


@pytest.mark.parametrize("size", [2, 4], ids=["less", "more"])
def test_state_of_another_student_is_refused(tmp_path: Path, size: int) -> None:
    """Of a teacher that was exchanged in its folder, say. More of a parameter is not cut either."""
    options = Config(steps=1, precision="fp32", zero=ZeroConfig(stage=0))
    runner = engine.Engine(torch.nn.Linear(4, 3), options, processes.start())
    state = made_up({"weight": 12, "bias": 3})
    write(tmp_path, state, 2)
    runner.restore(Saved(tmp_path, 2))
    assert torch.equal(runner.weights()["bias"], state["bias"]["weight"])
    write(tmp_path, made_up({"weight": 12, "bias": size}), 4)
    with pytest.raises(ConfigError, match=r"expected the parameters .* got others: bias$"):
        runner.restore(Saved(tmp_path, 4))


# --- Saving ---------------------------------------------------------------------------------------


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Nothing is written before this is set."""
    event = threading.Event()
    monkeypatch.setattr(
        checkpoint, "mark", lambda point: event.wait() if point == "begin" else None
    )
    yield event
    event.set()


def test_save_does_not_see_what_happens_afterwards(tmp_path: Path, gate: threading.Event) -> None:
    """Also not in its second copy, whose memory is the first one's."""
    checkpoints = Checkpoints(tmp_path, 0, 1, 3)
    for step in (1, 2):
        state, gone = made_up({"a": 1000, "b": 3}, step), made_up({"a": 1000, "b": 3}, step)
        gate.clear()
        checkpoints.save(step, pieces(gone, 0, 1))
        for tensors in gone.values():
            for tensor in tensors.values():
                tensor.fill_(-1.0)
        assert not (tmp_path / f"step-{step}").exists()
        gate.set()
        checkpoints.wait()
        assert_holds(tmp_path, step, state)


def test_reserved_memory_is_that_of_the_copy(tmp_path: Path) -> None:
    state = made_up({"a": 1000, "b": 3})
    checkpoints = Checkpoints(tmp_path, 0, 1, 3)
    checkpoints.reserve(1003 * 12, pinned=False)
    checkpoints.wait()
    place = checkpoints._copy.data_ptr()
    for step in (1, 2):
        checkpoints.save(step, pieces(state, 0, 1))
        assert checkpoints._copy.data_ptr() == place
    checkpoints.wait()
    assert_holds(tmp_path, 2, state)


def test_save_waits_for_the_one_before(tmp_path: Path, gate: threading.Event) -> None:
    state = made_up({"a": 100})
    checkpoints = Checkpoints(tmp_path, 0, 1, 3)
    checkpoints.save(1, pieces(state, 0, 1))
    threading.Timer(0.2, gate.set).start()
    checkpoints.save(2, pieces(state, 0, 1))
    assert (tmp_path / "step-1").exists()
    checkpoints.wait()
    assert_holds(tmp_path, 2, state)


def test_newest_are_kept(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, 0, 1, 2)
    for step in (2, 9, 10, 100):
        checkpoints.save(step, pieces(made_up({"a": 5}, step), 0, 1))
    checkpoints.wait()
    assert {p.name for p in tmp_path.iterdir()} == {"step-10", "step-100"}
    assert_holds(tmp_path, 10, made_up({"a": 5}, 10))


def test_name_is_given_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a checkpoint consists of has been handed to the disk, the folder's entries too."""
    said: list[str] = []
    fsync, rename = os.fsync, os.rename

    def record_fsync(descriptor: int) -> None:
        said.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def record_rename(source: Path, target: Path) -> None:
        said.append(f"-> {target.name}")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "rename", record_rename)
    write(tmp_path, made_up({"a": 5}), 2)
    assert said == [
        "state-00000-of-00001.safetensors",
        "rank-0.tmp",
        "manifest.tmp",
        "tmp-step-2",
        "-> step-2",
        tmp_path.name,
    ]


# --- Damage ---------------------------------------------------------------------------------------


def data_file(path: Path) -> Path:
    return path / "state-00001-of-00002.safetensors"


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 4
    path.write_bytes(content)


def change_manifest(path: Path, key: str, value: Any) -> None:
    """As another program would: its hash is right again."""
    manifest = json.loads((path / "manifest.json").read_text())
    manifest[key] = value
    manifest["sha256"] = checkpoint._digest(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))


def cut(path: Path, size: int) -> None:
    with path.open("r+b") as file:
        file.truncate(size)


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "data": (lambda p: flip(data_file(p), -3), "state-00001-of-00002.safetensors was changed"),
    "header": (lambda p: flip(data_file(p), 11), "state-00001-of-00002.safetensors was changed"),
    "header's length": (lambda p: flip(data_file(p), 0), "safetensors was changed"),
    "truncated": (lambda p: cut(data_file(p), 300), r"safetensors has 300 bytes of \d+"),
    "empty": (lambda p: cut(data_file(p), 0), r"safetensors has 0 bytes of \d+"),
    "longer": (lambda p: cut(data_file(p), 5000), r"safetensors has 5000 bytes of \d+"),
    "missing": (lambda p: data_file(p).unlink(), "FileNotFoundError.*state-00001"),
    "a folder": (
        lambda p: (data_file(p).unlink(), data_file(p).mkdir()),
        r"state-00001.*\d+ bytes of|IsADirectoryError",
    ),
    "manifest empty": (lambda p: cut(p / "manifest.json", 0), "JSONDecodeError"),
    "manifest cut": (lambda p: cut(p / "manifest.json", 200), "JSONDecodeError"),
    "manifest no JSON": (lambda p: (p / "manifest.json").write_bytes(b"\xff\x00"), "Unicode"),
    "manifest a list": (lambda p: (p / "manifest.json").write_text("[1]"), "AttributeError"),
    "manifest deleted": (lambda p: (p / "manifest.json").unlink(), "FileNotFoundError.*manifest"),
    "manifest without hash": (
        lambda p: (p / "manifest.json").write_text('{"format": 1, "step": 4, "files": {}}'),
        "manifest.json was changed",
    ),
    "another step's": (lambda p: change_manifest(p, "step", 2), "manifest.json was changed"),
    "everything deleted": (lambda p: [f.unlink() for f in p.iterdir()], "FileNotFoundError"),
    "a file": (lambda p: (shutil.rmtree(p), p.write_text("x")), "NotADirectoryError"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damaged_checkpoint_is_set_aside_for_the_one_before(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    damage, reason = DAMAGES[kind]
    state = made_up({"a": 100, "b": 3})
    for step in (2, 4):
        write(tmp_path, state, step, ranks=2)
    damage(tmp_path / "step-4")
    assert newest(tmp_path) == 2
    assert {p.name for p in tmp_path.iterdir()} == {"step-2", "damaged-step-4"}
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert f"{tmp_path / 'step-4'} is damaged (" in record.message
    assert re.search(reason, record.message)
    assert_holds(tmp_path, 2, state)
    caplog.clear()
    assert newest(tmp_path) == 2
    assert not caplog.records


def test_every_byte_counts(tmp_path: Path) -> None:
    """Whichever is flipped, of the manifest or of the data: never another state in silence."""
    path = write(tmp_path, made_up({"a": 4}), 2)
    for file in path.iterdir():
        content = file.read_bytes()
        for position in range(len(content)):
            for bit in (0, 5):
                damaged = bytearray(content)
                damaged[position] ^= 1 << bit
                file.write_bytes(damaged)
                with pytest.raises(ConfigError, match="damaged ones only"):
                    newest(tmp_path)
        file.write_bytes(content)
    assert newest(tmp_path) == 2


def test_where_all_are_damaged_nothing_begins_anew(tmp_path: Path) -> None:
    """Nor at the next start: they are still there."""
    for step in (2, 4):
        flip(data_file(write(tmp_path, made_up({"a": 9}), step, ranks=2)), -1)
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"damaged ones only: step-4 \(.*\), step-2 \(.*\);"):
            newest(tmp_path)


@pytest.mark.parametrize("older", [False, True])
def test_unknown_format_is_refused(tmp_path: Path, older: bool) -> None:
    """That of a later version, and that of the versions before there was a hash of the manifest."""
    write(tmp_path, made_up({"a": 9}), 2)
    path = write(tmp_path, made_up({"a": 9}), 4)
    change_manifest(path, "format", 2)
    if older:
        (path / "manifest.json").write_text('{"step": 4, "files": {}}')
    wanted = f"expected a checkpoint of format 1, got format {None if older else 2}"
    with pytest.raises(ConfigError, match=wanted):
        newest(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"step-2", "step-4"}


def test_junk_is_no_checkpoint(tmp_path: Path) -> None:
    assert newest(tmp_path / "nothing") == 0
    for name in (
        "step-",
        "step-x",
        "step-07",
        "step-²",
        "step-٣",
        "step--1",
        "tmp-step-9",
        "other",
    ):
        (tmp_path / name).mkdir()
    assert newest(tmp_path) == 0
    path = write(tmp_path, made_up({"a": 9}), 2)
    (path / "notes.txt").write_text("mine")
    assert newest(tmp_path) == 2
    assert_holds(tmp_path, 2, made_up({"a": 9}))


# --- Writes that fail -----------------------------------------------------------------------------


@pytest.mark.parametrize("culprit", [0, 1])
def test_full_disk_on_one_rank_is_told_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, culprit: int
) -> None:
    state = made_up({"a": 100})
    everyone = [Checkpoints(tmp_path, rank, 2, 3) for rank in range(2)]

    def save(step: int) -> None:
        for rank, each in enumerate(everyone):
            each.save(step, pieces(state, rank, 2))

    save(2)
    real = checkpoint._write_hashed

    def full(path: Path, *arguments: Any) -> Any:
        if f"state-{culprit:05d}" in path.name:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(path, *arguments)

    everyone[0].wait()
    monkeypatch.setattr(checkpoint, "_write_hashed", full)
    save(4)
    with pytest.raises(
        CheckpointError, match=f"step-4 could not be saved: rank {culprit}: .*No space left"
    ):
        everyone[0].wait()
    if culprit == 1:
        with pytest.raises(CheckpointError, match=r"rank 1: .*No space left"):
            everyone[1].wait()
    else:
        everyone[1].wait()
    for each in everyone[: culprit + 1]:
        with pytest.raises(CheckpointError):
            each.check()
    if culprit == 0:
        everyone[1].check()
    with pytest.raises(CheckpointError, match="step-4"):
        everyone[0].save(6, pieces(state, 0, 2))
    assert {p.name for p in tmp_path.iterdir()} == {"step-2", "tmp-step-4"}
    assert not list(tmp_path.glob(f"tmp-step-4/state-{culprit:05d}*"))
    assert newest(tmp_path) == 2


@pytest.mark.parametrize("grows", [False, True])
def test_rank_that_writes_nothing_is_named_after_the_timeout(tmp_path: Path, grows: bool) -> None:
    """A part that takes long but grows is waited for."""
    first = Checkpoints(tmp_path, 0, 2, 3, timeout_s=0.5)
    first.save(2, pieces(made_up({"a": 9}), 0, 2))
    if not grows:
        with pytest.raises(CheckpointError, match=r"step-2 could .* rank 1 .* for 0\.5 s"):
            first.wait()
        return
    scratch = tmp_path / "tmp-step-2"
    for size in range(1, 6):
        time.sleep(0.2)
        scratch.mkdir(exist_ok=True)
        (scratch / "state-00001-of-00002.safetensors").write_bytes(b"x" * size)
    (scratch / "rank-1.json").write_text("{}")
    first.wait()
    assert (tmp_path / "step-2").is_dir()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts a disk that is full")
@pytest.mark.parametrize("ranks", [1, 2])
def test_disk_that_is_really_full(tmp_path: Path, ranks: int) -> None:
    """The ranks fill it together; which of them is told of it first is open."""
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("no right to mount, root or not")
    try:
        write(tmp_path, made_up({"a": 3000}), 2, ranks)
        everyone = [Checkpoints(tmp_path, rank, ranks, 3) for rank in range(ranks)]
        for rank, each in enumerate(everyone):
            each.save(4, pieces(made_up({"a": 150_000}), rank, ranks))
        with pytest.raises(CheckpointError, match=r"rank \d: .*No space left"):
            everyone[0].wait()
        assert {p.name for p in tmp_path.iterdir()} == {"step-2", "tmp-step-4"}
        assert newest(tmp_path) == 2
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from distilfast.driver import checkpoint

def mark(point):
    if point == sys.argv[2]:
        os.kill(os.getpid(), signal.SIGKILL)

checkpoints = checkpoint.Checkpoints(Path(sys.argv[1]), 0, 1, 1)
checkpoints.save(2, [checkpoint.Piece("a", 0, {"weight": torch.ones(9)})])
checkpoints.wait()
checkpoint.mark = mark
checkpoints.save(4, [checkpoint.Piece("a", 0, {"weight": torch.ones(9)})])
checkpoints.wait()
"""


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("point", "left"),
    [
        ("writing", {"step-2", "tmp-step-4"}),
        ("manifest", {"step-2", "tmp-step-4"}),
        ("renamed", {"step-2", "step-4"}),
        ("pruning", {"step-4", "tmp-old-step-2"}),
    ],
)
def test_killed_write_leaves_a_sound_checkpoint(tmp_path: Path, point: str, left: set[str]) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), point])
    assert done.returncode == -signal.SIGKILL
    assert {p.name for p in tmp_path.iterdir()} == left
    assert newest(tmp_path) == (4 if "step-4" in left else 2)


# --- Nothing is executed --------------------------------------------------------------------------


class Malice:
    def __reduce__(self) -> Any:
        return os._exit, (1,)


def test_no_pickle_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = made_up({"a": 9})
    path = write(tmp_path, state, 2)

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a pickle is loaded")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr(torch, "load", refuse)
    assert newest(tmp_path) == 2
    assert_holds(tmp_path, 2, state)
    # With a manifest that vouches for it.
    evil = path / "state-00000-of-00001.safetensors"
    torch.save(Malice(), evil)
    manifest = json.loads((path / "manifest.json").read_text())
    entry = checkpoint._write_hashed(evil, evil.read_bytes(), torch.empty(0, dtype=torch.uint8))
    manifest["files"][evil.name] |= entry
    change_manifest(path, "files", manifest["files"])
    assert newest(tmp_path) == 2
    with pytest.raises(safetensors.SafetensorError):
        Saved(tmp_path, 2).read("a", "weight", 0, 9)
