"""Jobs: a file each, written whole; processes and what becomes of them.

The processes import this module: nothing heavy at its top.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing import queues
from pathlib import Path
from typing import Any

import pytest

from distilfast.config import ConfigError
from distilfast.studies import jobs
from distilfast.studies.jobs import Job, Workers

INLINE = Workers(("cpu",), 1)
TWO = Workers(("cpu", "meta"), 1)  # two names of devices, which the jobs here only tell
START_S, LATE_S = 300.0, 60.0  # for processes that share a core


def compute(n: int, log: str, *, device: str, tell: Callable[[float], None]) -> dict[str, Any]:
    """Leaves a line in a file of its own, and waits for the first job of another process."""
    import torch

    Path(log, f"{n}-{time.monotonic_ns()}").write_text(f"{os.getpid()} {device}")
    tell(0.5)
    drawn = torch.rand(8, generator=torch.Generator().manual_seed(n))
    while device != "cpu-alone" and n < 2 and len({who for who, _ in ran(log)}) < 2:
        time.sleep(0.02)
    return {"n": n, "sum": float((drawn @ drawn).sum()), "threads": torch.get_num_threads()}


def ran(log: str | Path) -> list[tuple[int, str]]:
    """Process and device of every job that has begun."""
    found = [file.read_text().split() for file in Path(log).iterdir()]
    return [(int(line[0]), line[1]) for line in found if line]


def refuse(*, device: str, tell: Any) -> dict[str, Any]:
    raise ConfigError("--model: expected\nnothing")


def die(*, device: str, tell: Any) -> dict[str, Any]:
    os._exit(9)


def talk(*, device: str, tell: Callable[[float], None]) -> dict[str, Any]:
    """More messages than a pipe holds."""
    for i in range(50_000):
        tell(i / 50_000)
    return {"told": 50_000}


def last(log: str, *, device: str, tell: Callable[[float], None]) -> dict[str, Any]:
    """Works on without telling."""
    Path(log, str(os.getpid())).touch()
    time.sleep(3 * LATE_S)
    return {}


def first(log: str, *, device: str, tell: Any) -> dict[str, Any]:
    """Leaves its process with nothing to do, once the other one has begun."""
    Path(log, str(os.getpid())).touch()
    while len(list(Path(log).iterdir())) < 2:
        time.sleep(0.05)
    return {}


@pytest.fixture
def log(tmp_path: Path) -> Path:
    folder = tmp_path / "log"
    folder.mkdir()
    return folder


def work(count: int, log: Path) -> list[Job]:
    return [Job(f"sums/{n}/seed-0", 1 + n, compute, (n, str(log))) for n in range(count)]


ALONE = Workers(("cpu-alone",), 1)


def test_results_are_files_and_what_is_done_is_not_done_again(tmp_path: Path, log: Path) -> None:
    out = tmp_path / "out"
    results = jobs.run(work(3, log), out, ALONE, "sums")
    assert len(ran(log)) == 3
    files = sorted(str(f.relative_to(out)) for f in out.rglob("*") if f.is_file())
    assert files == [f"sums/{n}/seed-0.json" for n in range(3)]
    assert json.loads((out / "sums/1/seed-0.json").read_text()) == results["sums/1/seed-0"]
    assert jobs.run(work(3, log), out, ALONE, "sums") == results
    assert len(ran(log)) == 3
    (out / "sums/1/seed-0.json").unlink()
    assert jobs.run(work(4, log), out, ALONE, "sums") == {
        **results,
        "sums/3/seed-0": json.loads((out / "sums/3/seed-0.json").read_text()),
    }
    assert len(ran(log)) == 5


@pytest.mark.thorough
def test_processes_give_what_one_gives_each_on_its_device(tmp_path: Path, log: Path) -> None:
    alone = tmp_path / "alone"
    alone.mkdir()
    expected = jobs.run(work(5, alone), tmp_path / "one", ALONE, "sums")
    assert jobs.run(work(5, log), tmp_path / "two", TWO, "sums") == expected
    for name in expected:
        one, two = (tmp_path / folder / f"{name}.json" for folder in ("one", "two"))
        assert one.read_bytes() == two.read_bytes()
    places = dict(ran(log))
    assert sorted(places.values()) == ["cpu", "meta"]  # a process a device
    assert os.getpid() not in places


@pytest.mark.parametrize("text", ["{", "", "[]", "7", "\xff"])
def test_damaged_file_is_named(text: str, tmp_path: Path, log: Path) -> None:
    file = tmp_path / "sums" / "1" / "seed-0.json"
    file.parent.mkdir(parents=True)
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError) as caught:
        jobs.run(work(3, log), tmp_path, ALONE, "sums")
    assert str(caught.value).startswith(f"{file}: expected ")
    assert "\n" not in str(caught.value)
    assert not ran(log)


@pytest.mark.thorough
@pytest.mark.parametrize("workers", [ALONE, TWO], ids=["inline", "processes"])
def test_what_is_done_before_an_error_is_kept(workers: Workers, tmp_path: Path, log: Path) -> None:
    """The dearest job begins first."""
    some = [*work(3, log), Job("refused", 0.1, refuse)]
    with pytest.raises(ConfigError, match="--model: expected\nnothing"):
        jobs.run(some, tmp_path / "out", workers, "sums")
    assert len(ran(log)) == 3
    kept = sorted((tmp_path / "out").rglob("*.json"))
    assert len(kept) >= (3 if workers is ALONE else 1)
    assert not [f for f in (tmp_path / "out").rglob("*") if f.is_file() and f not in kept]


@pytest.mark.thorough
def test_process_that_dies_is_said_in_one_line(tmp_path: Path, log: Path) -> None:
    done = Job("done", 1, compute, (5, str(log)))
    jobs.run([done], tmp_path, ALONE, "sums")
    with pytest.raises(ConfigError) as caught:
        jobs.run([done, Job("dies", 1, die), Job("dies too", 1, die)], tmp_path, TWO, "sums")
    assert "--processes has died" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert sorted(f.name for f in tmp_path.rglob("*.json")) == ["done.json"]


@pytest.mark.thorough
def test_progress_that_nobody_has_read_keeps_no_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing(_: Any) -> None:
        raise queue.Empty

    monkeypatch.setattr(queues.Queue, "get_nowait", nothing)
    results = jobs.run([Job("a", 1, talk), Job("b", 1, talk)], tmp_path, TWO, "talk")
    assert results == {"a": {"told": 50_000}, "b": {"told": 50_000}}


@pytest.mark.thorough
def test_processes_go_with_their_parent(tmp_path: Path, log: Path) -> None:
    """Killed, so that it cannot tell them: one has nothing to do, one does not tell."""
    code = (
        "import test_jobs as t; from pathlib import Path\n"
        "if __name__ == '__main__':\n"
        f"    log = {str(log)!r}\n"
        "    some = [t.Job('first', 2, t.first, (log,)), t.Job('last', 1, t.last, (log,))]\n"
        f"    t.jobs.run(some, Path({str(tmp_path)!r}, 'out'), t.TWO, 'jobs')\n"
    )
    script = tmp_path / "script.py"
    script.write_text(code)
    paths = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    parent = subprocess.Popen(
        [sys.executable, str(script)], env={**os.environ, "PYTHONPATH": paths}
    )
    try:
        wait_until(lambda: len(list(log.iterdir())) == 2, START_S)
    finally:
        parent.kill()
        parent.wait()
    processes = [int(file.name) for file in log.iterdir()]
    try:
        wait_until(lambda: not any(alive(process) for process in processes), LATE_S)
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)


def wait_until(happens: Callable[[], bool], within_s: float) -> None:
    until = time.monotonic() + within_s
    while not happens():
        assert time.monotonic() < until
        time.sleep(0.05)


def alive(process: int) -> bool:
    """A zombie is not: whoever adopted it has not looked yet."""
    try:
        status = Path(f"/proc/{process}/stat").read_text()
    except FileNotFoundError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


def test_file_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        jobs.write_json(tmp_path / "x.json", {"a": object()})
    assert list(tmp_path.iterdir()) == []


def test_file_is_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "x.json"
    jobs.write_json(file, {"a": 1})

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(jobs.os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        jobs.write_json(file, {"a": 2})
    assert json.loads(file.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [file]


def test_workers_share_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(jobs.torch.cuda, "device_count", lambda: 0)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert Workers.of(None) == Workers(("cpu", "cpu"), 4)
    assert Workers.of(8) == Workers(("cpu",) * 8, 1)
    assert Workers.of(16) == Workers(("cpu",) * 16, 1)
    assert Workers.of(1) == Workers(("cpu",), 8)
    assert Workers.of(2, threads=3) == Workers(("cpu", "cpu"), 3)
    for said, threads in (("2", 2), ("2,1", 2), ("", 4), ("all", 4)):
        monkeypatch.setenv("OMP_NUM_THREADS", said)
        assert Workers.of(2) == Workers(("cpu", "cpu"), threads)
    assert Workers.of(2, threads=3).threads == 3
    monkeypatch.delenv("OMP_NUM_THREADS")
    with pytest.raises(ConfigError, match="--device: expected cpu"):
        Workers.of(None, "cuda")
    monkeypatch.setattr(jobs.torch.cuda, "device_count", lambda: 2)
    assert Workers.of(None) == Workers(("cuda:0", "cuda:1"), 4)
    assert Workers.of(3, "cuda").devices == ("cuda:0", "cuda:1", "cuda:0")
    assert Workers.of(2, "cpu").devices == ("cpu", "cpu")
