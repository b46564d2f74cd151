"""The kit that the benches share: time, memory, bandwidth, the machine, tables and the CSV.

    cd bench && python -m kit.measure [--device cuda]     # the machine and its copy bandwidth

Times on shared machines drift by more than contestants differ. So `interleave` measures all of them
in rounds, a call of each in turn, and reports a median with the 20th and 80th percentile.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import ctypes
import datetime
import gc
import importlib.metadata
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

import distilfast
from distilfast.losses.scratch import Scratch

ROOT = Path(__file__).resolve().parents[2]
MIB = 1 << 20
FEWEST_ROUNDS, MOST_ROUNDS = 5, 100
# On a GPU every call is queued behind LEADS reads of LEAD_BYTES. While the device reads, the host
# queues the call, so launches do not show in its time. (A contestant that waits for the device
# still pays for it.) The reads also leave a cache that holds nothing of the inputs and has nothing
# to write back.
#
# How many: 512 MiB take 0.11 ms at the 4.8 TB/s of an H200's data sheet, longer on a slower memory.
# If the host takes 0.01 ms to queue a kernel, 16 reads hide 16 x (0.11 - 0.01) = 1.6 ms of it, or
# 160 launches; if it takes 0.03 ms, they hide 16 x (0.11 - 0.03) = 1.3 ms, or 43 launches. 8 reads
# would hide half. bench/device/smoke.py measures the host's time of a call, and
# Stopwatch.exposed counts the calls whose launches were not hidden.
LEAD_BYTES, LEADS = 512 * MIB, 16


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
    """Milliseconds of one call on a device, until its last kernel has ended.

    ``exposed`` counts the calls on a GPU whose time includes launches: the device had begun with
    the call before the host had queued all of it.
    """

    def __init__(self, device: torch.device):
        self.exposed = 0
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
        self.exposed += start.query()
        end.synchronize()
        return float(start.elapsed_time(end))


def interleave(
    calls: Mapping[str, Callable[[int], Any]],
    stopwatch: Stopwatch,
    seconds: float,
    before: Callable[[str, int], None] = lambda name, turn: None,
    fewest: int = FEWEST_ROUNDS,
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Time every call in rounds, for about so many seconds and at least ``fewest`` rounds.

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
        if number >= fewest and time.perf_counter() - began > seconds:
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


def time_columns(samples: Sequence[float]) -> dict[str, Any]:
    """The columns that every bench has for a time."""
    spread = Spread.of(samples)
    return {
        "time_ms": spread.median,
        "time_ms_p20": spread.p20,
        "time_ms_p80": spread.p80,
        "rounds": len(samples),
    }


def attempt_each(
    names: Iterable[str], rows: Mapping[str, dict[str, Any]], ends: float, attempt: Callable
) -> None:
    """``attempt(name)`` for each: what it returns goes into the row, a failure as one line, and
    after ``ends`` (of time.perf_counter) nothing more is begun."""
    for name in names:
        if time.perf_counter() > ends:
            rows[name]["status"] = "skipped: out of time (--seconds)"
            continue
        print(f"  {name} ...", end="", flush=True, file=sys.stderr)
        began = time.perf_counter()
        try:
            rows[name].update(attempt(name))
        except Exception as error:
            rows[name]["status"] = f"failed: {reason(error)}"
        print(f" {time.perf_counter() - began:.1f} s", end="", file=sys.stderr)
    print(file=sys.stderr)


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
        # What earlier calls left in the heap, or in our own scratch, would be used again and not be
        # seen.
        Scratch.release()
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


# --- Errors ---------------------------------------------------------------------------------------


def worst(found: torch.Tensor, right: torch.Tensor) -> float:
    """The largest error of a row, as a share of the row's largest entry; NaN counts as infinite."""
    limits = torch.finfo(found.dtype)
    subnormal = limits.tiny * limits.eps
    error = ((found.double() - right).abs().amax(-1) - subnormal).clamp_min(0)
    error = error.masked_fill(error.isnan(), torch.inf)
    return float((error / right.abs().amax(-1).clamp_min(limits.tiny)).max())


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


def skipped(rows: Sequence[Mapping[str, Any]]) -> str:
    """Who was skipped, by reason, as a list."""
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if row["status"].startswith("skipped: "):
            why = row["status"].removeprefix("skipped: ")
            reasons.setdefault(why, []).append(row["contestant"])
    lines = [f"- {'; '.join(names)}: {why}" for why, names in reasons.items()]
    return "\n".join(["Skipped:", *lines]) if lines else ""


def write_json(target: str, environment: Mapping[str, str], rows: Sequence[Mapping]) -> None:
    """The rows of a run to a file, or as "-" to the standard output."""
    plain = [{key: _finite(value) for key, value in row.items()} for row in rows]
    text = json.dumps({"environment": environment, "rows": plain}, indent=1)
    if target == "-":
        print(text)
        return
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    Path(target).write_text(text + "\n", encoding="utf-8")


def _finite(value: Any) -> Any:
    """JSON has no infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def plot(
    source: Path,
    target: Path,
    column: str,
    title: str,
    panel_of: Callable[[dict[str, str]], str],
    place_of: Callable[[dict[str, str]], tuple[Hashable, ...]],
) -> None:
    """The latest run in a CSV: a column by contestant, a panel a loss, a place on x a case."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with source.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    rows = [row for row in rows if row["date"] == rows[-1]["date"] and row[column]]
    if not rows:
        print(f"{source}: nothing was timed in its latest run", file=sys.stderr)
        return
    names = list(dict.fromkeys(row["contestant"] for row in rows))
    panels = list(dict.fromkeys(panel_of(row) for row in rows))
    across = min(2, len(panels))
    down = -(-len(panels) // across)
    canvas, axes = pyplot.subplots(
        down, across, figsize=(8 * across, 1 + 4 * down), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    handles = {}
    for axis, panel in zip(axes.flat, panels, strict=False):
        found = [row for row in rows if panel_of(row) == panel]
        places = sorted({place_of(row) for row in found})
        for number, name in enumerate(names):
            mine = [row for row in found if row["contestant"] == name]
            if mine:
                x = [places.index(place_of(row)) for row in mine]
                points = sorted(zip(x, (float(row[column]) for row in mine), strict=True))
                agrees = all(row["agreement"] in ("ok", "") for row in mine)
                style = {"marker": "o" if agrees else "x", "color": f"C{number % 10}"}
                dashes = "-" if number < 10 else "--"
                handles[name], *_ = axis.plot(*zip(*points, strict=True), dashes, **style)
        ticks = ["\n".join(f"{part:,}" for part in place) for place in places]
        axis.set_xticks(range(len(places)), ticks, fontsize=7)
        axis.set_yscale("log")
        axis.axhline(1, color="grey", linewidth=0.8)
        axis.set_title(panel, fontsize=10)
    canvas.legend(handles.values(), handles, loc="outside lower center", ncols=4, fontsize=8)
    machine = f"{rows[0]['device']}, torch {rows[0]['torch']}"
    canvas.suptitle(
        f"{machine}: {title} (x: does not agree with the reference)", fontsize=10, wrap=True
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    canvas.savefig(target, dpi=120)
    pyplot.close(canvas)


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
