"""Replay a step of a run, to find the micro-batch, example, part or weight that was not finite.

The replay starts from the newest checkpoint before the step. It runs in one process, for a run of
any layout. It draws the same dropout for the same micro-batches, and writes nothing.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from distilfast import data
from distilfast.config import Config, ZeroConfig
from distilfast.data import MicroBatch
from distilfast.driver import checkpoint, checks, choices, engine, processes
from distilfast.driver.checkpoint import Saved
from distilfast.driver.engine import Engine
from distilfast.driver.micro_batch import PARTS, Distillation, Normalizers, TeacherSide
from distilfast.driver.processes import Stop
from distilfast.driver.step import count, dropout_seed, optimiser_step
from distilfast.errors import ConfigError
from distilfast.report.numbers import counted
from distilfast.report.training_run import read_metrics


@dataclass(frozen=True)
class Found:
    """The parts and the gradient that some examples add to a step."""

    parts: dict[str, float]
    grad_norm: float
    not_finite: list[str]  # the weights whose gradient is not finite

    @property
    def finite(self) -> bool:
        return not self.not_finite and all(map(math.isfinite, self.parts.values()))

    def __str__(self) -> str:
        shown = [f"{part} {value:.6g}" for part, value in self.parts.items()]
        text = "  ".join([*shown, f"grad_norm {self.grad_norm:.6g}"])
        if self.not_finite:
            first, more = self.not_finite[0], len(self.not_finite) - 1
            text += f"  not finite: the gradient of {first}" + (f" and {more} more" if more else "")
        return text


def replay(config: Config, step: int, ranks: int | None = None) -> bool:
    """Recompute a step (1, 2, ...) and print its micro-batches. True: everything is finite.

    Args:
        ranks: the number of ranks of the run, on which only dropout depends. None: as many as saved
            the checkpoint, or 1.

    Raises:
        TrainingError: a step between the checkpoint and this one is not finite.
        ConfigError: there is no such step, or no run in config.output.
    """
    output = Path(config.output)
    if not (output / "config.yaml").is_file():
        raise ConfigError(f"output: expected the folder of a run, got {str(output)!r}")
    # One process partitions nothing, and resume never would refuse the run's folder.
    config = dataclasses.replace(config, zero=ZeroConfig(), resume="auto")
    config = choices.settled(config, world := processes.start())
    checks.check_output(config, output)
    checks.check_backend(config, world.device)
    setup = checks.prepare(config, world)
    if not 1 <= step <= setup.steps:
        raise ConfigError(f"--step: expected 1 to {setup.steps}, got {step}")
    dtype = engine.DTYPES[config.precision]
    teacher = TeacherSide(setup.teachers, config.loss, world.device, dtype)
    runner = Engine(Distillation(setup.student, config.loss, teacher), config, world)
    start, damaged = checkpoint.find(output / "checkpoints", before=step)
    for number, wrong in damaged.items():
        print(f"passed over: step-{number} is damaged ({wrong})")
    if start:
        saved = Saved(output / "checkpoints", start)
        ranks = ranks or saved.manifest["ranks"]
        runner.restore(saved)
    ranks = ranks or 1
    origin = f"the checkpoint after step {start}" if start else "the beginning"
    print(f"from {origin}, in the micro-batches of {counted(ranks, 'rank')}")
    if start < step - 1 and ranks > 1 and config.student.dropout != 0:
        print(f"the steps before {step} draw their dropout as on one rank, not as on {ranks}")
    for before in range(start, step - 1):
        line, _ = optimiser_step(config, world, setup, runner, teacher, before, Stop())
        assert line is not None  # no signal stops it
        print(f"step {before + 1}: loss {_shown(line['loss'])}")

    micro = config.batch.micro_sequences
    shares = [setup.batches.step(step - 1, rank, ranks, micro) for rank in range(ranks)]
    counts = torch.stack([count(config, world, share) for share in shares]).sum(0)
    pieces = Pieces(runner.deepspeed.module, teacher, Normalizers(*counts.float()))
    for rank, share in enumerate(shares):
        for i, (batch, part) in enumerate(zip(share, share.parts(), strict=True)):
            examples, epochs, _ = part
            torch.manual_seed(dropout_seed(config.seed, step - 1, i, rank))
            found = pieces.add(batch.to(world.device))
            print(f"rank {rank}, micro-batch {i + 1}, {counted(len(examples), 'example')}: {found}")
            if found.finite:
                continue
            for example, epoch in zip(examples.split(1), epochs.split(1), strict=True):
                (alone,) = data.Share(setup.batches, example, epoch, [1], torch.ones(1).long())
                found = pieces.take(alone.to(world.device))[0]
                if not found.finite:
                    tokens = setup.batches.store.tokens("train", example)
                    text = setup.tokenizer.decode(tokens.tolist())
                    print(f"    example {int(example)} alone: {found}\n        {text}")
    print(f"step {step}: {pieces.total()}")
    metrics = output / "metrics.jsonl"
    for line in read_metrics(metrics) if metrics.is_file() else ():
        if line["step"] == step and "loss" in line:
            shown = {key: line[key] for key in (*PARTS, "grad_norm") if key in line}
            print("recorded:", "  ".join(f"{k} {_shown(value)}" for k, value in shown.items()))
    return pieces.total().finite


def _shown(value: float | None) -> str:
    return "not defined" if value is None else f"{value:.6g}"


class Pieces:
    """Computes the micro-batches of a step one by one, and their sum."""

    def __init__(self, module: Distillation, teacher: TeacherSide, normalizers: Normalizers):
        self.module, self.teacher, self.normalizers = module, teacher, normalizers
        self.weights = {n: p for n, p in module.named_parameters() if p.requires_grad}
        self.parts = torch.zeros(len(PARTS), dtype=torch.float64)
        self.gradient = [torch.zeros_like(p, dtype=torch.float32) for p in self.weights.values()]

    def take(self, batch: MicroBatch) -> tuple[Found, Tensor, list[Tensor]]:
        """Compute a micro-batch. Return what was found, its parts and its gradient by weight."""
        config = self.module.config
        targets = self.teacher(batch) if config.needs_teacher else None
        # Call the module itself, not DeepSpeed, which would accumulate the gradients.
        loss, parts = self.module(batch, targets, self.normalizers)
        weights = list(self.weights.values())
        gradient = torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True)
        return self._found(parts, list(gradient)), parts, list(gradient)

    def add(self, batch: MicroBatch) -> Found:
        """`take` a micro-batch and add it to the total."""
        found, parts, gradient = self.take(batch)
        self.parts += parts.double().cpu()
        for total, share in zip(self.gradient, gradient, strict=True):
            total += share
        return found

    def total(self) -> Found:
        return self._found(self.parts, self.gradient)

    def _found(self, parts: Tensor, gradient: list[Tensor]) -> Found:
        pairs = zip(self.weights, gradient, strict=True)
        return Found(
            parts=dict(zip(PARTS, parts.tolist(), strict=True)),
            grad_norm=float(engine.total_norm([g.float() for g in gradient])),
            not_finite=[name for name, g in pairs if not g.isfinite().all()],
        )
