"""The training loop: read this first.

`optimiser_step` is one step. `train` calls it once for each step, with checkpoints and evaluations
in between.
"""

from __future__ import annotations

import contextlib
import logging
import math
import signal
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distilfast import data, models
from distilfast.config import Config
from distilfast.data.masking import philox
from distilfast.driver import engine, optimizers, processes, results
from distilfast.driver.checkpoint import Checkpoints, Saved
from distilfast.driver.checks import Setup, check, check_shared, claim, prepare, settled
from distilfast.driver.engine import Engine
from distilfast.driver.heldout import Evaluator
from distilfast.driver.metrics import Metrics, Progress
from distilfast.driver.processes import World
from distilfast.driver.step import PARTS, Distillation, Normalizers, TeacherSide
from distilfast.driver.watch import guard
from distilfast.loss_parts import AGREEMENT, LOSSES
from distilfast.machine import code_version


class TrainingError(RuntimeError):
    """Training cannot continue. The weights are those after the last whole step."""


class Interrupted(KeyboardInterrupt):
    """SIGINT (Ctrl-C) has stopped a run on all ranks, and its state is saved."""


def run(config: Config) -> bool:
    """Train as configured, or resume a stopped run. False: stopped by SIGTERM.

    Raises:
        Interrupted: stopped by SIGINT.
    """
    world, stop = processes.start(), Stop()
    with guard(world.patient, config.rank_timeout_s, advice(config)):
        complete = distil(config, world, stop)
    if not complete and stop.interrupted:
        raise Interrupted
    return complete


def distil(config: Config, world: World, stop: Stop) -> bool:
    """`run`, once the processes are connected. False: stopped by a signal."""
    config = settled(config, world)
    world.first(lambda: check(config, world.ranks, world.device))
    setup = prepare(config, world)
    output = Path(config.output)
    if world.first(lambda: (output / "summary.json").is_file()):
        world.first(lambda: print(f"{output} is complete"))
        return True
    start = world.first(lambda: claim(config, output))
    world.together(lambda: check_shared(config, output))
    if start:
        world.first(lambda: print(f"{output} goes on from step {start}"))
    with stop:
        done = train(config, world, setup, output, start, stop)
    if done == setup.steps:
        return True
    stop.interrupted = world.count([stop.interrupted])[0] > 0  # all ranks end alike
    world.first(lambda: print(f"stopped after step {done} of {setup.steps}; {advice(config)}"))
    return False


def advice(config: Config) -> str:
    """Tell the user how to resume."""
    how = "" if config.resume == "auto" else " with resume auto"
    return f"the same command{how} goes on from {config.output}"


# --- Training -------------------------------------------------------------------------------------


def train(config: Config, world: World, setup: Setup, output: Path, start: int, stop: Stop) -> int:
    """Train from step ``start`` to the last and write the results. Return the number of steps that
    are done: fewer than all if a signal stopped training. Then a checkpoint was written."""
    code = code_version() if world.rank == 0 else ""  # now, as a checkout may change meanwhile
    teacher = teacher_side(config, world, setup.teachers)
    runner = Engine(Distillation(setup.student, config.loss, teacher), config, world)
    folder, keep = output / "checkpoints", config.checkpoint.keep
    if start:
        runner.restore(Saved(folder, start))
    limit_s = config.rank_timeout_s
    checkpoints = Checkpoints(folder, world.rank, world.ranks, keep, start, limit_s)
    if config.checkpoint.every:
        checkpoints.reserve(runner.piece_bytes(), world.device.type == "cuda")

    evaluator = Evaluator(
        setup.batches, world, config.batch.micro_sequences, config.evaluate.max_examples
    )
    scores = {}
    if setup.teachers[0].has_head:
        # For an ensemble, agreement and scores are those of its first teacher, shown by name.
        shown = "teacher" if len(setup.teachers) == 1 else f"teacher {setup.teachers[0].name}"
        scores[shown] = asdict(evaluator.teacher(teacher.predict))
    metrics = Metrics(output, start, config.tensorboard) if world.rank == 0 else None
    name, complete = f"{Path(config.output).name:>12}", False
    with (
        contextlib.closing(metrics) if metrics else contextlib.nullcontext(),
        Progress(name, setup.steps, start, shown=world.rank == 0) as progress,
    ):

        def evaluate(step: int) -> None:
            line = {"step": step, **asdict(evaluator.student(runner.predict))}
            progress.evaluated(step, line)
            if metrics:
                metrics.write(line)

        if start == 0:
            evaluate(0)

        def save(step: int) -> None:
            if step == checkpoints.saved:  # nothing is new since the start or the last save
                return
            if metrics:
                metrics.sync()
            checkpoints.save(step, runner.pieces())

        for step in range(start, setup.steps):
            try:
                line, stopping = optimiser_step(config, world, setup, runner, teacher, step, stop)
            except TrainingError:
                try:
                    save(step)  # for `distilfast replay`
                    world.together(checkpoints.wait)
                except RuntimeError as failure:  # only a warning: the first error is raised
                    logging.getLogger("distilfast").warning(failure)
                raise
            if line is None:
                save(step)
                break
            if metrics:
                metrics.tokens += line["tokens"]
                metrics.write({**line, "tokens": metrics.tokens})
                progress.step(line)
            done, last = step + 1, step + 1 == setup.steps
            if last or (config.evaluate.every and done % config.evaluate.every == 0):
                evaluate(done)
            due = config.checkpoint.every and done % config.checkpoint.every == 0
            if not last and (due or stopping):
                save(done)
            if not last and stopping:
                break
            checkpoints.check()
        else:
            complete = True
        world.together(checkpoints.wait)
    if not complete:
        return checkpoints.saved

    weights = {k.removeprefix("student."): v for k, v in runner.weights().items()}
    if metrics:
        record = {"code": code, "heldout": evaluator.record()}
        results.write(config, world, setup, output, scores, metrics.lines(), weights, record)
    world.first(lambda: None)  # no rank leaves before the results are written
    return setup.steps


def teacher_side(config: Config, world: World, teachers: Sequence[models.Teacher]) -> TeacherSide:
    """The teacher side, whole on every rank or partitioned over the ranks."""
    things = teachers, config.loss, world.device, engine.DTYPES[config.precision]
    if not config.zero.shard_teacher:
        return TeacherSide(*things)
    return TeacherSide(*things, lambda module: engine.shard(module, config, world))


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
    *values, rows, masked, tokens = torch.cat([sums, counts]).tolist()
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
        **_logged(config, totals, {"rows": rows, "masked": masked, "tokens": tokens}),
        "grad_norm": norm,
        "learning_rate": rate,
        "tokens_per_second": tokens / (time.perf_counter() - began),
    }
    return line, stopping > 0


def count(config: Config, world: World, share: data.Share) -> Tensor:
    """Count the whole step: rows of the vocabulary losses, masked tokens, tokens; (3,) int64."""
    tokens, masked = share.counts()
    rows = tokens if config.loss.all_rows else masked
    (counts,) = data.copy_to(world.device, [torch.tensor([rows, masked, tokens])])
    return world.sum(counts)


SHOWN = 16  # most examples of one rank that an error lists


def _where(world: World, share: data.Share, parts: list[Tensor]) -> str:
    """Name the ranks and examples of the micro-batches whose parts are not finite."""
    mine: list[int] = []
    for (examples, _), shares in zip(share.parts(), parts, strict=True):
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
