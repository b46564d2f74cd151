"""Runs jobs over processes and devices, keeps their results, and shows the time left.

A job is a module's function whose result JSON can hold. The result is written, whole, to
FOLDER/NAME.json. A job whose file exists is not run again.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent import futures
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from distilfast import atomic
from distilfast.errors import ConfigError
from distilfast.progress import Bar

Result = dict[str, Any]
Tell = Callable[[float], None]  # called with the share done, 0 to 1


@dataclass(frozen=True)
class Job:
    """Work that is done once.

    Args:
        name: unique; the path of its file below the folder, without .json.
        work: its cost, in a unit that all jobs share; for the time left.
        run: called with the arguments, ``device`` and ``tell``.
        arguments: must be picklable.
        marks: entries of its result that identify a file as this job's.
    """

    name: str
    work: float
    run: Callable[..., Result]
    arguments: tuple[Any, ...] = ()
    marks: Result = field(default_factory=dict)


@dataclass(frozen=True)
class Workers:
    """The processes in which jobs run. Each runs one job at a time.

    Args:
        devices: the device of each process.
        threads: CPU threads of each process.
    """

    devices: tuple[str, ...]
    threads: int

    @property
    def facts(self) -> dict[str, Any]:
        """Facts on which the bits of a result depend."""
        kind = self.devices[0].partition(":")[0]
        return {"device": kind, "threads": self.threads if kind == "cpu" else None}

    @classmethod
    def of(
        cls, processes: int | None, device: str | None = None, threads: int | None = None
    ) -> Workers:
        """Choose workers for this machine.

        On GPUs: one process for each. Else: ``processes``, or one for every four cores. Each has
        ``threads``, or as many as OMP_NUM_THREADS says; or they share the cores.
        """
        n_devices = torch.cuda.device_count() if device in (None, "cuda") else 0
        if device == "cuda" and not n_devices:
            raise ConfigError("--device: expected cpu, as no CUDA device is there, got 'cuda'")
        cores = os.cpu_count() or 1
        if hasattr(os, "sched_getaffinity"):  # count only the cores that this process may use
            cores = len(os.sched_getaffinity(0))
        count = processes or n_devices or max(1, cores // 4)
        kinds = [f"cuda:{i}" for i in range(n_devices)] or ["cpu"]
        # OpenMP's own form may be a list, one number a level of nesting.
        said = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
        if threads is None and said.isdecimal() and int(said):
            threads = int(said)
        devices = tuple(kinds[i % len(kinds)] for i in range(count))
        return cls(devices, threads or max(1, cores // count))


def run(jobs: Sequence[Job], folder: Path, workers: Workers, title: str) -> dict[str, Result]:
    """Run the jobs; return all results by name, including those of earlier runs.

    Raises:
        ConfigError: a job raised it, or a process has died. Results of finished jobs are kept.
    """
    results = {job.name: done for job in jobs if (done := _read(folder, job)) is not None}
    left = [job for job in jobs if job.name not in results]
    if not left:
        return results
    with Bar(title, sum(job.work for job in left)) as bar:
        tally = _Tally(bar, left, len(jobs))
        if len(workers.devices) == 1 or len(left) == 1:
            torch.set_num_threads(workers.threads)
            for job in left:
                result = _run(job, workers.devices[0], tally.of(job))
                results[job.name] = _write(folder, job, result)
                tally.finished(job)
        else:
            for job, result in _spread(left, workers, tally):
                results[job.name] = _write(folder, job, result)
                tally.finished(job)
    return results


class _Tally:
    """Counts how much of the work is done."""

    def __init__(self, bar: Bar, left: Sequence[Job], total: int):
        self.bar, self.shares = bar, {job.name: 0.0 for job in left}
        self.work = {job.name: job.work for job in left}
        self.total, self.before = total, total - len(left)

    def of(self, job: Job) -> Tell:
        return lambda share: self.told(job.name, share)

    def told(self, name: str, share: float) -> None:
        self.shares[name] = share
        done = sum(share * self.work[job] for job, share in self.shares.items())
        finished = self.before + sum(share == 1 for share in self.shares.values())
        self.bar.update(done, f"{finished} of {self.total} done, at {name}")

    def finished(self, job: Job) -> None:
        self.told(job.name, 1.0)


def _spread(
    jobs: Sequence[Job], workers: Workers, tally: _Tally
) -> Any:  # an iterator of (job, result)
    """Run the jobs in processes, the most expensive first; yield them as they finish."""
    context = multiprocessing.get_context("spawn")
    devices, shares = context.Queue(), context.Queue()
    for device in workers.devices:
        devices.put(device)
    count = min(len(workers.devices), len(jobs))
    arguments = (devices, shares, workers.threads)
    pool = futures.ProcessPoolExecutor(count, context, _start, arguments)
    try:
        by_work = sorted(jobs, key=lambda job: -job.work)
        waiting = {pool.submit(_call, job): job for job in by_work}
        while waiting:
            done, _ = futures.wait(waiting, timeout=0.5, return_when=futures.FIRST_COMPLETED)
            while True:
                try:
                    tally.told(*shares.get_nowait())
                except queue.Empty:
                    break
            # Results first, so that they are kept when an error is raised.
            for future in sorted(done, key=lambda f: f.exception() is not None):
                yield waiting.pop(future), future.result()
    except BrokenProcessPool as error:
        raise ConfigError(
            "a process of --processes has died, probably for want of memory; what is done is kept: "
            "try again with fewer"
        ) from error
    except BaseException:
        for process in list((pool._processes or {}).values()):
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _start(devices: Any, shares: Any, threads: int) -> None:
    """Set up a process before its first job."""
    global _device, _shares
    _device, _shares = devices.get(), shares
    shares.cancel_join_thread()  # do not wait at exit for a parent that reads no more
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles it
    # Raise an exception, so that a job ends the processes that it has started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    torch.set_num_threads(threads)
    threading.Thread(target=_follow_parent, daemon=True).start()


def _follow_parent() -> None:
    """End when the parent is killed, during or between jobs, as nothing waits for a result."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)


def _call(job: Job) -> Result:
    def tell(share: float) -> None:
        if share < 1:
            _shares.put((job.name, share))

    try:
        return _run(job, _device, tell)
    except SystemExit:  # the pool would treat it as a result
        os._exit(1)


def _run(job: Job, device: str, tell: Tell) -> Result:
    """Run one job. Errors that a user can fix become a ConfigError that names the job."""
    try:
        return job.run(*job.arguments, device=device, tell=tell)
    except FloatingPointError as error:
        raise ConfigError(f"{job.name}: {error}; try a lower --learning_rate") from error
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"{job.name}: {device} is out of memory; try a smaller --batch_size or --max_length, "
            "or fewer --processes"
        ) from error


_device: str
_shares: Any


def _path(folder: Path, job: Job) -> Path:
    return folder / f"{job.name}.json"


def _read(folder: Path, job: Job) -> Result | None:
    path = _path(folder, job)
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(
            f"{path}: expected JSON, got {error}; remove it to run it again"
        ) from error
    if not isinstance(found, dict) or not found.items() >= job.marks.items():
        raise ConfigError(
            f"{path}: expected the result of this run's {job.name}, got another; remove it to run "
            "it again"
        )
    return found


def _write(folder: Path, job: Job, result: Result) -> Result:
    write_json(_path(folder, job), result)
    return result


def write_json(path: Path, content: Any) -> None:
    """Write a file so that it appears whole or not at all."""
    atomic.write(path, json.dumps(_defined(content), indent=1, allow_nan=False) + "\n")


def _defined(content: Any) -> Any:
    """Replace numbers that are not finite by null: JSON cannot hold them."""
    if isinstance(content, dict):
        return {key: _defined(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_defined(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
