"""The training loop: read this first.

`optimiser_step` is one step. `train` calls it once for each step, with checkpoints and evaluations
in between.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from pathlib import Path

from distilfast import models
from distilfast.config import Config
from distilfast.driver import engine, processes, results
from distilfast.driver.checkpoint import Checkpoints, Saved
from distilfast.driver.checks import (
    Setup,
    check,
    check_backend,
    check_shared,
    claim,
    identities,
    is_complete,
    locked,
    prepare,
)
from distilfast.driver.choices import settled
from distilfast.driver.dead_ranks import guard
from distilfast.driver.engine import Engine
from distilfast.driver.heldout import Evaluator
from distilfast.driver.metrics import Metrics, Progress
from distilfast.driver.micro_batch import Distillation, TeacherSide
from distilfast.driver.processes import Stop, World
from distilfast.driver.step import TrainingError, optimiser_step
from distilfast.machine import code_version


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
    world.together(lambda: check_backend(config, world.device))  # hosts may differ
    output = Path(config.output)
    if world.first(lambda: is_complete(output)):
        world.first(lambda: print(f"{output} is complete"))
        return True
    setup = prepare(config, world)
    with contextlib.ExitStack() as lock:
        world.first(lambda: lock.enter_context(locked(output)))
        inputs = world.first(lambda: identities(config, setup.batches.store))
        start = world.first(lambda: claim(config, output, inputs))
        world.together(lambda: check_shared(config, output))
        if start:
            world.first(lambda: print(f"{output} resumes from step {start}"))
        elif world.first(lambda: (output / "metrics.jsonl").is_file()):
            world.first(lambda: print(f"{output} has no checkpoint: it begins anew"))
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
    return f"the same command{how} resumes {config.output}"


# --- Training -------------------------------------------------------------------------------------


def train(config: Config, world: World, setup: Setup, output: Path, start: int, stop: Stop) -> int:
    """Train from step ``start`` to the last and write the results. Return the number of steps that
    are done: fewer than all if a signal stopped training. Then a checkpoint was written."""
    code = code_version() if world.rank == 0 else ""  # now, as a checkout may change meanwhile
    teacher = teacher_side(config, world, setup.teachers)
    module = Distillation(setup.student, config.loss, teacher)
    runner = Engine(module, config, world)
    folder, keep = output / "checkpoints", config.checkpoint.keep
    if start:
        runner.restore(Saved(folder, start))
    limit_s = config.rank_timeout_s
    checkpoints = Checkpoints(folder, world.rank, world.ranks, keep, start, limit_s)
    if config.checkpoint.every:
        checkpoints.reserve(runner.piece_bytes(), world.device.type == "cuda")

    share = config.batch.micro_sequences, config.evaluate.max_examples
    evaluator = Evaluator(setup.batches, world, *share, module.columns)
    scores = {}
    if setup.teachers[0].has_head:
        # For an ensemble, agreement and scores are those of its first teacher, shown by name.
        shown = "teacher" if len(setup.teachers) == 1 else f"teacher {setup.teachers[0].name}"
        scores[shown] = evaluator.teacher(teacher.predict).line()
    metrics = Metrics(output, start, config.tensorboard) if world.rank == 0 else None
    name, complete = f"{Path(config.output).name:>12}", False
    with (
        contextlib.closing(metrics) if metrics else contextlib.nullcontext(),
        Progress(name, setup.steps, start, shown=world.rank == 0) as progress,
    ):

        def evaluate(step: int) -> None:
            line = {"step": step, **evaluator.student(runner.predict).line()}
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
