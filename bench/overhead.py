"""What does the driver cost, compared with a plain PyTorch loop that does the same?

    python bench/overhead.py [--steps 20] [--micro_sequences 16] [--accumulation 1 4]

Both sides have the same student, teacher, batches, losses, clipping and AdamW, in fp32 and in bf16
with fp32 masters and fp32 accumulation. They run in one process, a step each in turn, so that a
noisy machine affects both alike. The figure is the ratio of their medians. Appends to
bench/results/overhead.csv.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from distilfast import models
from distilfast.config import Config, parse
from distilfast.driver import checks, engine, optimizers, processes
from distilfast.driver.metrics import Metrics
from distilfast.driver.micro_batch import Distillation, Normalizers, TeacherSide, vocabulary_rows
from distilfast.driver.processes import Stop
from distilfast.driver.step import optimiser_step
from distilfast.sources import assets

WARMUP = 3  # steps that are not counted
RESULTS = Path(__file__).parent / "results" / "overhead.csv"


class PlainLoop:
    """The step as one would write it by hand."""

    def __init__(self, config: Config, setup: checks.Setup, teacher: TeacherSide):
        self.config, self.setup, self.teacher = config, setup, teacher
        dtype = engine.DTYPES[config.precision]
        self.module = Distillation(setup.student.to(dtype), config.loss, teacher)
        self.weights = [p for p in self.module.parameters() if p.requires_grad]
        self.masters = self.weights
        if dtype != torch.float32:
            self.masters = [p.detach().float() for p in self.weights]
        options = config.optimizer
        self.optimizer = torch.optim.AdamW(
            self.masters,
            lr=options.learning_rate,
            betas=options.betas,
            eps=options.epsilon,
            weight_decay=0.0,
            fused=True,
        )

    def step(self, number: int) -> float:
        """One optimiser step; its loss."""
        share = self.setup.batches.step(number, 0, 1, self.config.batch.micro_sequences)
        micro = list(share)
        counted = [
            [len(vocabulary_rows(b, self.config.loss)), len(b.labelled), len(b.tokens)]
            for b in micro
        ]
        normalizers = Normalizers(*torch.tensor(counted).sum(0).float())
        parts = torch.zeros(6)
        for batch in micro:
            loss, values = self.module(batch, self.teacher(batch), normalizers)
            loss.backward()
            parts += values
            if self.masters is not self.weights:
                for master, weight in zip(self.masters, self.weights, strict=True):
                    gradient = weight.grad.float()
                    master.grad = gradient if master.grad is None else master.grad.add_(gradient)
                    weight.grad = None
        torch.nn.utils.clip_grad_norm_(self.masters, self.config.optimizer.max_grad_norm)
        rate = optimizers.learning_rate(self.config.optimizer, number, self.setup.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.masters is not self.weights:
            with torch.no_grad():
                for master, weight in zip(self.masters, self.weights, strict=True):
                    weight.copy_(master)
        return parts.tolist()[0]


class DriverLoop:
    """The driver's own step, with its metrics."""

    def __init__(self, config: Config, setup: checks.Setup, teacher: TeacherSide, folder: Path):
        self.config, self.setup, self.teacher = config, setup, teacher
        self.world, self.stop = processes.start(), Stop()
        module = Distillation(setup.student, config.loss, teacher)
        self.runner = engine.Engine(module, config, self.world)
        self.metrics = Metrics(folder, 0, tensorboard=True)

    def step(self, number: int) -> float:
        """One optimiser step; its loss."""
        line, _ = optimiser_step(
            self.config, self.world, self.setup, self.runner, self.teacher, number, self.stop
        )
        self.metrics.write(line)
        return float(line["loss"])


def measure(config: Config, steps: int, folder: Path) -> dict[str, float]:
    """Medians in ms, and the largest relative difference of the two losses."""
    world, dtype = processes.start(), engine.DTYPES[config.precision]

    def made() -> tuple[Config, checks.Setup, TeacherSide]:
        setup = checks.prepare(config, world)
        return config, setup, TeacherSide(setup.teachers, config.loss, world.device, dtype)

    loops = (DriverLoop(*made(), folder), PlainLoop(*made()))
    times: tuple[list[float], list[float]] = ([], [])
    worst = 0.0
    for number in range(steps + WARMUP):
        losses = [0.0, 0.0]
        for side in (0, 1) if number % 2 else (1, 0):
            began = time.perf_counter()
            losses[side] = loops[side].step(number)
            if number >= WARMUP:
                times[side].append((time.perf_counter() - began) * 1e3)
        worst = max(worst, abs(losses[0] - losses[1]) / abs(losses[1]))
    loops[0].metrics.close()
    ratios = [a / b for a, b in zip(*times, strict=True)]
    return {
        "driver_ms": statistics.median(times[0]),
        "plain_ms": statistics.median(times[1]),
        "ratio": statistics.median(ratios),
        "ratio_20": statistics.quantiles(ratios, n=5)[0],
        "ratio_80": statistics.quantiles(ratios, n=5)[3],
        "loss_difference": worst,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--micro_sequences", type=int, default=16)
    parser.add_argument("--accumulation", type=int, nargs="+", default=[1, 4])
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = assets.minilm()
        encoder, _ = models.load_weights(
            "AutoModelForMaskedLM", source, str(source), fresh_head=True
        )
        encoder.save_pretrained(folder / "teacher")
        transformers.AutoTokenizer.from_pretrained(source).save_pretrained(folder / "teacher")
        for precision in ("fp32", "bf16"):
            for accumulation in options.accumulation:
                config = parse(
                    [
                        f"--teacher={folder / 'teacher'}",
                        "--student.dropout=0",
                        "--data.source=asset:wikipedia-sample",
                        f"--data.prepared={folder / 'tokens'}",
                        "--data.max_length=128",
                        "--loss.kd_rows=masked",
                        f"--batch.micro_sequences={options.micro_sequences}",
                        f"--batch.sequences={options.micro_sequences * accumulation}",
                        f"--steps={options.steps + WARMUP}",
                        f"--precision={precision}",
                        f"--output={folder / 'run'}",
                    ]
                )
                found = measure(config, options.steps, folder)
                row = {"precision": precision, "accumulation": accumulation, **found}
                print(
                    "  ".join(
                        f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}"
                        for k, v in row.items()
                    )
                )
                rows.append(row)
    append(rows, options)


def append(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """To the CSV, with what the figures depend on."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=RESULTS.parent
    ).stdout.strip()
    context = {
        "date": datetime.date.today().isoformat(),
        "commit": commit,
        "device": processes.describe(processes.start())[0],
        "torch": torch.__version__,
        "python": ".".join(map(str, sys.version_info[:3])),
        "steps": options.steps,
        "micro_sequences": options.micro_sequences,
    }
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    new = not RESULTS.exists()
    with RESULTS.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=[*context, *rows[0]])
        if new:
            writer.writeheader()
        writer.writerows({**context, **row} for row in rows)
    print(f"appended to {RESULTS}")


if __name__ == "__main__":
    main()
