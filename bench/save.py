"""For how long does a checkpoint stop the training, and when is it on disk?

    python bench/save.py [--saves 5] [--folder /where/checkpoints/go]

The state is that of DistilBERT-base's shape with random weights and AdamW's moments, 0.8 GB. It is
saved by one process in fp32 at ZeRO 0, and by two ranks in bf16 at ZeRO 2, which hold half each.
For two ranks the worse figure is shown.

The pause is the time that `save` takes in the thread that trains. The first pause is shown
separately, because its memory is new. A loop of matrix products shows how much the writing thread
slows down the training. Limit: a pause of 0.5 s. Appends to bench/results/save.csv.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from kit import measure
from torch import Tensor, nn

from distilfast import config
from distilfast.driver import checkpoint, engine, processes
from distilfast.driver.checkpoint import Checkpoints, Saved

CSV = Path(__file__).parent / "results" / "save.csv"
LIMIT_MS = 500.0
CASES = {1: ("fp32", 0), 2: ("bf16", 2)}  # precision and stage, by the number of ranks


class Student(nn.Module):
    """The weights of one, with a gradient that costs next to nothing."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.student = transformers.DistilBertForMaskedLM(transformers.DistilBertConfig())

    def forward(self) -> Tensor:
        return torch.stack([p.float().sum() for p in self.student.parameters()]).sum() * 1e-3


def make(world: processes.World) -> engine.Engine:
    precision, stage = CASES[world.ranks]
    return engine.Engine(
        Student(),
        config.Config(steps=9, precision=precision, zero=config.ZeroConfig(stage=stage)),
        world,
    )


def step(runner: engine.Engine) -> None:
    runner.backward(runner())
    runner.step(1e-4)


def products(until: Any) -> float:
    """Matrix products a second in this thread, until that says so."""
    a, n, began = torch.ones(768, 768), 0, time.perf_counter()
    while not until():
        a @ a
        n += 1
    return n / (time.perf_counter() - began)


def for_seconds(seconds: float) -> Any:
    end = time.perf_counter() + seconds
    return lambda: time.perf_counter() > end


def measured(world: processes.World, folder: Path, saves: int) -> dict[str, Any]:
    """This rank's figures."""
    runner = make(world)
    checkpoints = Checkpoints(folder, world.rank, world.ranks, 1)
    began = time.perf_counter()
    checkpoints.reserve(runner.piece_bytes(), world.device.type == "cuda")
    checkpoints.wait()  # in a run the first steps are taken meanwhile
    reserve_s = time.perf_counter() - began
    step(runner)
    pauses, until_on_disk, slowdowns = [], [], []
    for number in range(1, saves + 2):
        alone = products(for_seconds(1.0))
        world.first(lambda: None)
        began = time.perf_counter()
        checkpoints.save(number, runner.pieces())
        pauses.append((time.perf_counter() - began) * 1e3)
        beside = products(lambda: not checkpoints._thread.is_alive())
        checkpoints.wait()
        world.first(lambda: None)
        until_on_disk.append(time.perf_counter() - began)
        slowdowns.append(alone / beside)
        step(runner)
    began = time.perf_counter()
    found = world.first(lambda: checkpoint.newest(folder))
    newest_s = time.perf_counter() - began
    path = folder / f"step-{found}"
    n_bytes = sum(file.stat().st_size for file in path.iterdir())
    fresh = make(world)
    began = time.perf_counter()
    fresh.restore(Saved(folder, found))
    restore_s = time.perf_counter() - began
    later = until_on_disk[1:]
    return {
        "reserve_s": reserve_s,
        "first_pause_ms": pauses[0],
        "pause_ms": statistics.median(pauses[1:]),
        "worst_pause_ms": max(pauses[1:]),
        "on_disk_s": statistics.median(later),
        "mb_per_s": n_bytes / statistics.median(later) / 1e6,
        "newest_s": newest_s,
        "restore_s": restore_s,
        "products_slower": statistics.median(slowdowns[1:]),
        "mb": n_bytes / 1e6,
    }


def rank(folder: Path, saves: int) -> None:
    """One of the ranks; the first one appends the worst rank's figures."""
    load = os.getloadavg()[0]
    world = processes.start()
    figures = measured(world, folder, saves)
    everyone: list[dict[str, Any]] = [figures]
    if world.ranks > 1:
        everyone = [{}] * world.ranks
        torch.distributed.all_gather_object(everyone, figures)
    lowest = ("mb_per_s",)
    worst = {k: (min if k in lowest else max)(each[k] for each in everyone) for k in figures}
    if world.rank == 0:
        precision, stage = CASES[world.ranks]
        row = {
            **measure.environment(world.device),
            "load_before": f"{load:.1f}",
            "ranks": world.ranks,
            "precision": precision,
            "stage": stage,
            "saves": saves,
            **{key: f"{value:.4g}" for key, value in worst.items()},
        }
        measure.append_csv(CSV, [row])
        print(", ".join(f"{key} {row[key]}" for key in ("ranks", "load_before", *worst)))
    processes.finish()
    sys.exit(max(worst["first_pause_ms"], worst["worst_pause_ms"]) > LIMIT_MS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--saves", type=int, default=5, help="saves after the first one")
    parser.add_argument("--folder", type=Path, help="default: the folder for temporary files")
    options = parser.parse_args()
    if "RANK" in os.environ:
        rank(options.folder, options.saves)
    statuses = []
    for ranks in CASES:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder, socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(s.getsockname()[1])}
            s.close()
            command = [sys.executable, __file__, "--folder", folder, "--saves", str(options.saves)]
            processes = [
                subprocess.Popen(
                    command,
                    env={**os.environ, **address, "WORLD_SIZE": str(ranks)}
                    | {"RANK": str(r), "LOCAL_RANK": str(r)},
                )
                for r in range(ranks)
            ]
            statuses += [process.wait() for process in processes]
    sys.exit(max(statuses))


if __name__ == "__main__":
    main()
