"""One optimiser step: count, add up the micro-batches' gradients, check, and update the weights."""

from __future__ import annotations

import contextlib
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distilfast import data
from distilfast.config import Config
from distilfast.data.masking import philox
from distilfast.driver import optimizers
from distilfast.driver.checks import Setup
from distilfast.driver.engine import Engine
from distilfast.driver.micro_batch import PARTS, Normalizers, TeacherSide
from distilfast.driver.processes import Stop, World
from distilfast.loss_parts import AGREEMENT, LOSSES


class TrainingError(RuntimeError):
    """Training cannot continue. The weights are those after the last whole step."""


def optimiser_step(
    config: Config,
    world: World,
    setup: Setup,
    runner: Engine,
    teacher: TeacherSide,
    step: int,
    stop: Stop,
) -> tuple[dict[str, Any] | None, bool]:
    """Take one step. Return its line of metrics, and whether any rank was told to stop.

    The line is None if the step was given up on the way; then nothing has changed.

    Rows and tokens are counted before the first forward. Each loss is divided by the count of the
    whole step, so the gradient does not depend on how the step is split.

    Raises:
        TrainingError: a loss or the gradient is not finite. No weight was changed.
    """
    began = time.perf_counter()
    share = setup.batches.step(step, world.rank, world.ranks, config.batch.micro_sequences)
    counts = count(config, world, share)
    normalizers = Normalizers(*counts.float())
    parts = [torch.zeros(len(PARTS), device=world.device)]
    on_device = data.on_device(share, world.device)
    with contextlib.closing(data.prefetch(on_device)) as micro_batches:
        for i, batch in enumerate(micro_batches):
            # Not at stages 2 and 3, where the other ranks wait for this one in every backward.
            if stop.requested and runner.stage < 2:
                break
            torch.manual_seed(dropout_seed(config.seed, step, i, world.rank))
            targets = teacher(batch) if config.loss.needs_teacher else None
            loss, shares = runner(batch, targets, normalizers)
            runner.backward(loss)
            parts.append(shares)

    stopping, given_up = world.count([stop.requested, len(parts) <= len(share)])
    if given_up:
        return None, True
    sums = world.sum(torch.stack(parts).double().sum(0))
    # The step waits for the device only here, and for the gradient norm below.
    *values, rows, labelled, tokens = torch.cat([sums, counts]).tolist()
    totals = dict(zip(PARTS, values, strict=True))
    if not math.isfinite(totals["loss"]):
        wrong = ", ".join(f"{k} is {v}" for k, v in totals.items() if not math.isfinite(v))
        raise _not_finite(config, step, f"{wrong} ({_where(world, share, parts[1:])})")
    rate = optimizers.learning_rate(config.optimizer, step, setup.steps)
    norm = runner.step(rate)
    if not math.isfinite(norm):
        raise _not_finite(config, step, f"grad_norm is {norm} (the losses are finite)")
    line = {
        "step": step + 1,
        "tokens": int(tokens),
        **_logged(config, totals, {"rows": rows, "labelled": labelled, "tokens": tokens}),
        "grad_norm": norm,
        "learning_rate": rate,
        "tokens_per_second": tokens / (time.perf_counter() - began),
    }
    return line, stopping > 0


def count(config: Config, world: World, share: data.Share) -> Tensor:
    """Count the whole step: rows of the vocabulary losses, labels, tokens; (3,) int64."""
    tokens, labelled = share.count()
    all_rows = config.loss.all_rows and not share.batches.objective.shifted
    rows = tokens if all_rows else labelled
    (counts,) = data.copy_to(world.device, [torch.tensor([rows, labelled, tokens])])
    return world.sum(counts)


SHOWN = 16  # most examples of one rank that an error lists


def _where(world: World, share: data.Share, parts: list[Tensor]) -> str:
    """Name the ranks and examples of the micro-batches whose parts are not finite."""
    mine: list[int] = []
    for (examples, *_), shares in zip(share.parts(), parts, strict=True):
        if not shares.isfinite().all():
            mine += examples.tolist()
    found = []
    for rank, examples in enumerate(world.gather(mine)):
        if examples:
            more = f" and {len(examples) - SHOWN} more" if len(examples) > SHOWN else ""
            found.append(f"rank {rank}: examples {', '.join(map(str, examples[:SHOWN]))}{more}")
    return "; ".join(found)


def _not_finite(config: Config, step: int, what: str) -> TrainingError:
    recipe = Path(config.output) / "config.yaml"
    return TrainingError(
        f"step {step + 1}: {what}; no weight was changed; "
        f"`distilfast replay --step {step + 1} --config {recipe}` takes the step apart"
    )


def _logged(
    config: Config, totals: dict[str, float], counts: dict[str, float]
) -> dict[str, float | None]:
    """The parts that are computed, as they are logged. A mean over no rows is not defined: None.
    So is a loss of such parts alone."""
    used = [part for part in LOSSES if getattr(config.loss, part.weight)]
    parts = {part.name: totals[part.name] if counts[part.rows] else None for part in used}
    loss = None if set(parts.values()) == {None} else totals["loss"]
    if "kd" in parts:
        parts[AGREEMENT] = totals[AGREEMENT] if counts["rows"] else None
    return {"loss": loss, **parts}


def dropout_seed(seed: int, step: int, micro_batch: int, rank: int) -> int:
    """The seed of a micro-batch's dropout. Only dropout draws depend on how a batch is split."""
    high, low, *_ = philox(seed, step, torch.tensor(rank), torch.tensor(micro_batch))
    return int(high) << 31 | int(low)
