"""A rank that dies, stops or fails alone ends the others, which name it.

The watch between processes that do nothing else; then the driver without a launcher, where nobody
else cleans up.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from distilfast import config as configs
from distilfast.driver import dead_ranks, processes
from distilfast.driver.processes import free_port

TRAIN = str(ROOT / "distilfast" / "train.py")
ADVICE = "the same command resumes runs/x"
TIMEOUT_S = 2.0
LATE_S = 10.0  # for processes that share a core


# --- The watch ------------------------------------------------------------------------------------


def stop_for(seconds: float) -> None:
    subprocess.Popen(["sh", "-c", f"sleep {seconds}; kill -CONT {os.getpid()}"])
    os.kill(os.getpid(), signal.SIGSTOP)


def rank_of(rank: int, ranks: int, port: int, folder: Path, deeds: dict[int, str]) -> None:
    """A rank that does its deed, or waits for the others."""
    os.dup2(os.open(folder / f"rank-{rank}", os.O_WRONLY | os.O_CREAT), 2)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.distributed.init_process_group("gloo", rank=rank, world_size=ranks)
    dead_ranks.GRACE_S = 1.0
    deed = deeds.get(rank, "wait")
    if deed == "stranger":
        connect = socket.create_connection

        def noisily(address: tuple[str, int], timeout: float) -> socket.socket:
            noise = connect(address)
            noise.sendall(b"GET / HTTP/1.1\r\n\r\n")
            assert noise.recv(1) == b""
            return connect(address, timeout)

        dead_ranks.socket.create_connection = noisily
    with dead_ranks.guard(None, TIMEOUT_S, ADVICE):
        torch.distributed.barrier()
        (folder / f"began-{rank}").touch()
        match deed:
            case "die":
                os.kill(os.getpid(), signal.SIGKILL)
            case "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            case "stop shortly":
                stop_for(TIMEOUT_S / 2)
            case "stop for long":
                stop_for(2 * TIMEOUT_S)
            case "raise":
                raise OSError(28, "No space\nleft on device", "somewhere")
            case "raise, and be told to end":
                threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
                raise OSError("brought down")
            case "work":
                time.sleep(1.5 * TIMEOUT_S)
        torch.distributed.barrier()


Ended = dict[int, tuple[int | None, str]]


def together(ranks: int, folder: Path, **deeds: str) -> Ended:
    """Exit status (None: has not ended) and stderr of each of ``ranks`` processes."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["distilfast.driver.dead_ranks"])
    arguments = (ranks, free_port(), folder, {int(k[1:]): v for k, v in deeds.items()})
    processes = [context.Process(target=rank_of, args=(r, *arguments)) for r in range(ranks)]
    for process in processes:
        process.start()
    try:
        until = time.monotonic() + 60
        while not all((folder / f"began-{r}").exists() for r in range(ranks)):
            assert time.monotonic() < until, "a rank has not begun within a minute"
            time.sleep(0.05)
        until = time.monotonic() + 4 * TIMEOUT_S + LATE_S
        staying = {int(k[1:]) for k, v in deeds.items() if v == "stop"}
        for rank in set(range(ranks)) - staying:
            processes[rank].join(until - time.monotonic())
        status = [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.join()
    return {r: (status[r], (folder / f"rank-{r}").read_text()) for r in range(ranks)}


def line(what: str) -> str:
    name = rf"\({re.escape(socket.gethostname())}, pid \d+\)"
    what = re.sub(r"rank \d", lambda found: f"{found[0]} {name}", what)
    return rf"distilfast: {what}; the run stops; {ADVICE}\n"


def assert_ended(ended: Ended, ranks: Sequence[int], what: str) -> None:
    for rank in ranks:
        status, said = ended[rank]
        assert status == 1, (rank, ended)
        assert re.fullmatch(line(what), said), (rank, said)


@pytest.mark.thorough
def test_ranks_that_leave_say_nothing(tmp_path: Path) -> None:
    """Though one is busy for longer than the timeout, one is stopped for less, and a stranger
    knocks."""
    ended = together(3, tmp_path, r0="stop shortly", r1="work", r2="stranger")
    assert ended == {r: (0, "") for r in range(3)}


@pytest.mark.parametrize("dead", [0, 1])
def test_dead_rank_is_named(tmp_path: Path, dead: int) -> None:
    """The others wait in a collective, whose own error is not what they end with."""
    ended = together(3, tmp_path, **{f"r{dead}": "die"})
    assert ended[dead] == (-signal.SIGKILL, "")
    assert_ended(ended, [r for r in range(3) if r != dead], f"rank {dead} died")


def test_two_dead_ranks_are_named_together(tmp_path: Path) -> None:
    ended = together(4, tmp_path, r1="die", r3="die")
    assert_ended(ended, [0, 2], "rank 1, rank 3 died")


def test_what_a_death_brings_down_is_not_blamed(tmp_path: Path) -> None:
    """Nor does a launcher's SIGTERM come before the line."""
    ended = together(3, tmp_path, r0="raise, and be told to end", r1="die", r2="work")
    assert_ended(ended, [0, 2], "rank 1 died")


@pytest.mark.thorough
@pytest.mark.parametrize("stopped", [(0,), (1, 2)], ids=str)
def test_stopped_rank_is_named_after_the_timeout(tmp_path: Path, stopped: tuple[int, ...]) -> None:
    ended = together(4, tmp_path, **{f"r{rank}": "stop" for rank in stopped})
    names = ", ".join(f"rank {rank}" for rank in stopped)
    others = [r for r in range(4) if r not in stopped]
    assert_ended(ended, others, f"nothing was heard of {names} for 2 s")
    assert all(ended[rank][0] is None for rank in stopped)


@pytest.mark.thorough
@pytest.mark.parametrize("stopped", [0, 1])
def test_stopped_rank_that_wakes_up_ends_too(tmp_path: Path, stopped: int) -> None:
    ended = together(2, tmp_path, **{f"r{stopped}": "stop for long"})
    assert_ended(ended, [0, 1], f"nothing was heard of rank {stopped} for 2 s")


@pytest.mark.parametrize("failing", [0, 1])
def test_rank_that_fails_alone_is_named_with_its_reason(tmp_path: Path, failing: int) -> None:
    ended = together(3, tmp_path, **{f"r{failing}": "raise"})
    reason = r"OSError: \[Errno 28\] No space left on device: 'somewhere'"
    assert_ended(ended, [r for r in range(3) if r != failing], f"rank {failing} failed: {reason}")
    status, said = ended[failing]
    assert status == 1
    assert "Traceback" in said
    assert "distilfast: " not in said


def test_ranks_that_all_fail_leave_with_their_own_errors(tmp_path: Path) -> None:
    ended = together(3, tmp_path, r0="raise", r1="raise", r2="raise")
    for status, said in ended.values():
        assert status == 1
        assert "No space" in said
        assert "distilfast: " not in said


def test_one_process_has_no_watch() -> None:
    world = processes.start()
    with dead_ranks.guard(world.patient, TIMEOUT_S, ADVICE):
        assert not [t for t in threading.enumerate() if t.name.startswith("watch")]


@pytest.mark.parametrize("wrong", ["4.9", "-1", "1e6"])
def test_timeout_has_bounds(recipe: list[str], wrong: str) -> None:
    with pytest.raises(configs.ConfigError, match="rank_timeout_s: expected 5 to 86,400 seconds"):
        configs.parse([*recipe, f"--rank_timeout_s={wrong}"])


# --- The driver -----------------------------------------------------------------------------------


@contextlib.contextmanager
def launched(
    ranks: int, recipe: list[str], folder: Path, *changes: str
) -> Iterator[list[subprocess.Popen[str]]]:
    """The driver's processes without a launcher."""
    shared = {"WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    processes = [
        subprocess.Popen(
            [sys.executable, TRAIN, *recipe, f"--output={folder}", *changes],
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                **{k: str(v) for k, v in {"RANK": rank, "LOCAL_RANK": rank, **shared}.items()},
            },
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


@pytest.mark.thorough
def test_driver_leaves_silently(recipe: list[str], tmp_path: Path) -> None:
    with launched(2, recipe, tmp_path / "run") as processes:
        said = [process.communicate(timeout=120)[1] for process in processes]
        assert [process.returncode for process in processes] == [0, 0], said
    assert said[1] == ""
    assert "the run stops" not in said[0]


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("ranks", "missed", "number"),
    [(2, 0, signal.SIGKILL), (2, 1, signal.SIGSTOP), (3, 2, signal.SIGKILL)],
    ids=["rank 0 killed", "rank 1 stopped", "rank 2 of 3 killed"],
)
def test_driver_names_the_rank_that_is_gone(
    recipe: list[str], tmp_path: Path, ranks: int, missed: int, number: int
) -> None:
    batch = ("--batch.sequences=12", "--batch.micro_sequences=2")
    changes = ("--steps=100000", "--rank_timeout_s=6", "--evaluate.every=0", *batch)
    folder = tmp_path / "run"
    with launched(ranks, recipe, folder, *changes) as processes:
        metrics = folder / "metrics.jsonl"
        until = time.monotonic() + 120
        while not metrics.exists() or len(metrics.read_text().splitlines()) < 4:
            assert time.monotonic() < until, "no step within two minutes"
            assert all(process.poll() is None for process in processes)
            time.sleep(0.2)
        processes[missed].send_signal(number)
        sent = time.monotonic()
        others = processes[:missed] + processes[missed + 1 :]
        # As a launcher does: they would stop at the end of a step which never ends.
        for process in others:
            process.send_signal(signal.SIGTERM)
        for process in others:
            _, said = process.communicate(timeout=6 + LATE_S)
            assert process.returncode == 1, said
            last = said.splitlines()[-1]
            assert f"rank {missed} ({socket.gethostname()}, pid {processes[missed].pid})" in last
            assert last.endswith(f"; the run stops; the same command resumes {folder}")
            assert "Traceback" not in said
        assert time.monotonic() - sent < 6 + LATE_S
