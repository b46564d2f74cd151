"""The processes of a run: how they start, communicate, are stopped and end."""

from __future__ import annotations

import contextlib
import datetime
import functools
import logging
import math
import os
import signal
import socket
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from distilfast.driver import optimizers
from distilfast.errors import ConfigError
from distilfast.machine import cpu_name
from distilfast.report.numbers import counted

Result = TypeVar("Result")


@dataclass(frozen=True)
class World:
    """The processes of a run. Its methods are collective: all ranks must make the same calls."""

    rank: int
    ranks: int
    device: torch.device
    patient: Any = None  # a process group for waits of hours, such as for tokenising

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all ranks, in place."""
        if self.ranks > 1:
            torch.distributed.all_reduce(values)
        return values

    def count(self, flags: Sequence[bool]) -> list[int]:
        """For each flag, the number of ranks where it is set. Waits for hours if a rank takes so
        long."""
        counts = torch.tensor(flags, dtype=torch.int64)
        if self.ranks > 1:
            torch.distributed.all_reduce(counts, group=self.patient)
        return [int(count) for count in counts]

    def gather(self, said: Any) -> list[Any]:
        """The objects of all ranks, in the order of the ranks."""
        everyone: list[Any] = [said] * self.ranks
        if self.ranks > 1:
            torch.distributed.all_gather_object(everyone, said, group=self.patient)
        return everyone

    def first(self, work: Callable[[], Result]) -> Result:
        """Do ``work`` on the first rank while the others wait. All ranks return its result or raise
        its error, so none goes its own way and leaves the others waiting."""
        return self._agree(work if self.rank == 0 else None)

    def together(self, work: Callable[[], Result]) -> Result:
        """Do ``work``, which must not communicate, on every rank. If one fails, all ranks raise."""
        return self._agree(work)

    def _agree(self, work: Callable[[], Result] | None) -> Result:
        result, failure = None, None
        try:
            result = work() if work else None
        except Exception as error:
            if self.ranks == 1:
                raise
            failure = error
        if self.ranks == 1:
            return cast(Result, result)
        is_first = work is not None and self.rank == 0
        said = (result if is_first and failure is None else None, failure)
        everyone = self.gather(_portable(said))
        for _, other in everyone:
            if other is not None:
                raise failure or other
        return cast(Result, everyone[0][0] if work is None else result)


def _portable(said: tuple[Any, Exception | None]) -> tuple[Any, Exception | None]:
    """Reduce a result and an error to what can be sent: a plain value, and an error of a type that
    every rank can unpickle."""
    result, failure = said
    plain = result if isinstance(result, (bool, int, float, str, type(None))) else None
    if failure is None or isinstance(failure, ConfigError):
        return plain, failure
    return plain, RuntimeError(f"{type(failure).__name__}: {failure}")


def start() -> World:
    """Join the processes of `deepspeed` or torchrun, or run alone. May be called again."""
    deepspeed = import_deepspeed()
    # DeepSpeed calls these at least once a step. Each time, torch warns that they were renamed.
    renamed = r".*torch\.distributed\.(all_gather_into_tensor|reduce_scatter_tensor).* deprecated"
    warnings.filterwarnings("ignore", message=renamed, category=FutureWarning)
    if not torch.distributed.is_initialized():
        local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1")))
        if "OMP_NUM_THREADS" not in os.environ and local_ranks > 1:
            torch.set_num_threads(max(1, torch.get_num_threads() // local_ranks))
        # Keep DeepSpeed from compiling operators: its shared-memory collectives alone would take
        # most of a minute in the first run. Set this before DeepSpeed looks for operators, which
        # calls the linker.
        deepspeed.ops.__compatible_ops__ = {}
        with alone():
            deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    device = own_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    return World(rank, ranks, device, _patient_group() if ranks > 1 else None)


def own_device() -> torch.device:
    """The device of this process."""
    if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu":
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


@functools.cache
def _patient_group() -> Any:
    return torch.distributed.new_group(backend="gloo", timeout=datetime.timedelta(days=2))


def finish() -> None:
    """Leave together. A rank that leaves early can bring down another that still talks to it."""
    if torch.distributed.is_initialized():
        if torch.distributed.get_world_size() > 1:
            torch.distributed.barrier()
        torch.distributed.destroy_process_group()


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Set a launcher's environment variables if there is no launcher, and remove them afterwards.
    A program started from here would otherwise take itself for a part of this run."""
    ours = {}
    if "WORLD_SIZE" not in os.environ:
        ours = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        ours["MASTER_PORT"] = str(free_port())
    os.environ.update(ours)
    try:
        yield
    finally:
        for name in ours:
            del os.environ[name]


def import_deepspeed() -> Any:
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its imports warn, but not about our code
        import deepspeed
        from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS
    if optimizers.Lamb not in ZERO_SUPPORTED_OPTIMIZERS:  # DeepSpeed compares exact types
        ZERO_SUPPORTED_OPTIMIZERS.append(optimizers.Lamb)
    deepspeed.utils.logger.setLevel(logging.WARNING)
    return deepspeed


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def describe(world: World) -> Sequence[str]:
    """The device and torch's version, for reports."""
    name = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else cpu_name()
    unit, threads = "GPU", ""
    if world.device.type != "cuda":
        unit, threads = "process", f" of {counted(torch.get_num_threads(), 'thread')}"
    return [f"{name}, {counted(world.ranks, unit)}{threads}", f"torch {torch.__version__}"]


ECHO_S = 1.0  # torchrun answers a Ctrl-C, which its ranks have got too, by a SIGINT to each


class Stop:
    """Inside, SIGTERM and SIGINT request a stop at the next point where all ranks can stop. Another
    SIGINT, later than ECHO_S, interrupts at once."""

    def __init__(self) -> None:
        self.requested = self.interrupted = False  # by any of them; by SIGINT
        self.since = math.inf

    def __enter__(self) -> Stop:
        self.before = {s: signal.signal(s, self.request) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def request(self, number: int, _: object) -> None:
        now, by_hand = time.monotonic(), number == signal.SIGINT
        if by_hand and now - self.since > ECHO_S:
            raise KeyboardInterrupt
        self.since = min(self.since, now)
        self.requested, self.interrupted = True, self.interrupted or by_hand
