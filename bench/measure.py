"""The kit that the benches share: time, memory, bandwidth, the machine, tables and the CSV.

    python bench/measure.py [--device cuda]     # the machine and its copy bandwidth

Times on shared machines drift by more than contestants differ, so `interleave` measures all in
rounds, a call of each in turn, and what is reported is a median with its 20 and 80 percentiles.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import ctypes
import datetime
import gc
import importlib.metadata
import math
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

import distilfast

ROOT = Path(__file__).resolve().parent.parent
MIB = 1 << 20
FEWEST_ROUNDS, MOST_ROUNDS = 5, 100
# On a GPU every call is queued behind reads of this many bytes. They take longer than the host
# needs to queue the call, so launches do not show in its time (a contestant that waits for the
# device still pays for it), and they leave a cache that holds nothing of the inputs and has nothing
# to write back.
LEAD_BYTES, LEADS = 512 * MIB, 8


class Spread(NamedTuple):
    """What a list of times comes to."""

    median: float
    p20: float
    p80: float

    @staticmethod
    def of(samples: Sequence[float]) -> Spread:
        if len(samples) < 2:
            return Spread(samples[0], samples[0], samples[0])
        fifths = statistics.quantiles(samples, n=5, method="inclusive")
        return Spread(statistics.median(samples), fifths[0], fifths[3])


# --- Time -----------------------------------------------------------------------------------------


class Stopwatch:
    """Milliseconds of one call on a device, until its last kernel has ended."""

    def __init__(self, device: torch.device):
        cuda = device.type == "cuda"
        self.lead = torch.ones(LEAD_BYTES // 4, device=device) if cuda else None

    def ms(self, call: Callable[[], Any]) -> float:
        if self.lead is None:
            began = time.perf_counter()
            result = call()  # given back after the clock has stopped
            elapsed = time.perf_counter() - began
            del result
            return elapsed * 1e3
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(LEADS):
            self.lead.sum()
        start.record()
        call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end))


def interleave(
    calls: Mapping[str, Callable[[int], Any]],
    stopwatch: Stopwatch,
    seconds: float,
    before: Callable[[str, int], None] = lambda name, turn: None,
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Time every call in rounds, for about so many seconds.

    Each round begins with another contestant, so that nobody always follows the same neighbour.
    ``call(turn)`` and the untimed ``before(name, turn)`` get a number that grows with every call:
    modulo the number of copies it says which copy of the inputs to use.

    Returns:
        The samples in ms by name, and the reason by name of those that failed on the way.
    """
    samples: dict[str, list[float]] = {name: [] for name in calls}
    failures: dict[str, str] = {}
    names, turn, began = list(calls), 0, time.perf_counter()
    for number in range(MOST_ROUNDS):
        if number >= FEWEST_ROUNDS and time.perf_counter() - began > seconds:
            break
        first = number % max(len(names), 1)
        for name in names[first:] + names[:first]:
            if name in failures:
                continue
            turn += 1
            try:
                before(name, turn)
                samples[name].append(stopwatch.ms(lambda n=name, t=turn: calls[n](t)))
            except Exception as error:
                failures[name] = reason(error)
    return samples, failures


def reason(error: Exception) -> str:
    """An exception in one line; what it held on to is given back."""
    text = f"{type(error).__name__}: {error}".strip().splitlines()[0]
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        text = "out of memory"
    error.__traceback__ = None
    gc.collect()
    with contextlib.suppress(RuntimeError):  # after an illegal access CUDA refuses everything
        torch.cuda.empty_cache()
    return text if len(text) <= 160 else f"{text[:157]}..."


# --- Memory ---------------------------------------------------------------------------------------


def peak_mib(call: Callable[[], Any], device: torch.device) -> float | None:
    """The memory that a call needs above what is there before it.

    On a GPU what the allocator handed out. On a CPU the process's resident set, whose high-water
    mark Linux lets one reset; None where there is no such thing.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / MIB
    try:
        # What earlier calls left in the heap would be used again and not be seen.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = _resident_kib("VmRSS")
    except (OSError, AttributeError, KeyError):
        return None
    call()
    return max(0, _resident_kib("VmHWM") - before) / 1024


def _resident_kib(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(dict(line.split(":", 1) for line in lines)[key].split()[0])


def free_bytes(device: torch.device) -> int:
    """Memory that new tensors can take."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info(device)[0])
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def cache_bytes(device: torch.device) -> int:
    """The last-level cache; 32 MiB where the system does not say."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    found = [path.read_text().strip() for path in sizes]
    kib = [int(size[:-1]) for size in found if size.endswith("K") and size[:-1].isdigit()]
    return max(kib, default=32 * 1024) * 1024


def rotation(copy_bytes: int, device: torch.device) -> int:
    """How many copies of the inputs to take in turn, so that no cache holds what is read next: more
    than four caches full, unless that is more than a quarter of the free memory."""
    wanted = 4 * cache_bytes(device) // copy_bytes + 1
    return max(1, min(wanted, free_bytes(device) // 4 // copy_bytes))


# --- Where and with what --------------------------------------------------------------------------


def environment(device: torch.device) -> dict[str, str]:
    """What the figures depend on, as the first columns of a CSV."""
    commit = _git("rev-parse", "--short", "HEAD")
    # A bench that appends to its results does not make the code another.
    changed = _git("status", "--porcelain", "--", ".", ":!bench/results")
    tree = "unknown" if changed is None else "changed" if changed else "clean"
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "commit": commit or "unknown",
        "tree": tree,
        "device": device_name(device),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version("triton") or "none",
        "distilfast": distilfast.__version__,
    }


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(
            line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")
        )
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads"


def version(package: str) -> str:
    """The installed version of a distribution, "" where there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


# --- Tables ---------------------------------------------------------------------------------------


def check_csv(path: Path, columns: Sequence[str]) -> None:
    """Raises a ValueError where the file exists and has other columns: figures under a wrong
    heading are worse than none."""
    if path.exists():
        with path.open(newline="", encoding="utf-8") as file:
            header = next(csv.reader(file), [])
        if header != list(columns):
            raise ValueError(f"{path}: expected the columns {', '.join(columns)}, got {header}")


def append_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Add rows to a CSV with these columns; what stands in it stays."""
    columns = list(rows[0])
    check_csv(path, columns)
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=columns, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)


def markdown(rows: Sequence[Mapping[str, str]]) -> str:
    """Rows as an aligned table that is Markdown too."""
    columns = list(rows[0])
    cells = [columns, *([row[c].replace("|", "/") for c in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "| "
        + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        + " |"
        for line in cells
    ]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def figure(value: float | None, digits: int = 3) -> str:
    """A number to so many significant digits, without exponent where it can be read without."""
    if value is None:
        return ""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    if not 1e-3 <= abs(value) < 1e7:
        return f"{value:.1e}"
    return f"{value:,.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(parser.parse_args().device)
    for key, value in environment(device).items():
        print(f"{key:12} {value}")
    size = min(16 * cache_bytes(device), free_bytes(device) // 4)
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    samples, _ = interleave({"copy": lambda turn: target.copy_(source)}, Stopwatch(device), 2.0)
    spread = Spread.of(samples["copy"])
    print(f"{'copy':12} {figure(2 * size / spread.median / 1e6)} GB/s ({size // MIB} MiB)")


if __name__ == "__main__":
    main()
