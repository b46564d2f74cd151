"""The driver's commands beside `train`: prepare, check, recipes and replay."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from distilfast import data, models
from distilfast.config import RECIPES, BatchConfig, Config, parse
from distilfast.data import Store
from distilfast.driver import checks, choices, processes
from distilfast.driver import replay as replaying
from distilfast.driver.step import TrainingError
from distilfast.errors import ConfigError
from distilfast.report.numbers import counted


def prepare(arguments: Sequence[str]) -> int:
    """Make the store, and print what was read, what became of it, and the store's size."""
    config = parse(arguments, prog="distilfast prepare")
    config = replace(config, objective=choices.chosen_objective(config))

    _, tokenizer, _ = checks.load_models(config)
    store = data.prepare(config, tokenizer, config.token_folder)
    print_store(config, store)
    return 0


def check(arguments: Sequence[str]) -> int:
    """Check everything that `train` checks, and print what it would do. Writes nothing."""
    config = parse(arguments, prog="distilfast check")
    config = replace(config, objective=choices.chosen_objective(config))

    ranks, device = int(os.environ.get("WORLD_SIZE", "1")), processes.own_device()
    checks.check(config, ranks, device)
    teachers, tokenizer, student = checks.load_models(config)
    for teacher in teachers:
        print(f"teacher:  {teacher.name}, {_millions(teacher.model)}")
    kind = type(student).__name__
    origin = config.student.origin
    if origin is None:
        origin = f"teacher's layers {models.kept_layers(teachers[0].model, config.student)}"
    print(f"student:  {kind}, {_millions(student)}, {origin}")
    folder = config.token_folder
    if (folder / "store.json").is_file():
        store = data.prepare(config, tokenizer, folder)
        print_store(config, store)
        epoch_size = checks.make_batches(config, tokenizer, store).epoch_size
        steps = checks.count_steps(config, epoch_size)
        print(f"steps:    {steps:,} = {config.batch.before(steps) / epoch_size:.2f} epochs")
    else:
        print_sources(data.check(config, folder))
        print(f"tokens:   {folder}, to be made")
        print(f"steps:    {config.steps or counted(config.epochs or 0, 'epoch')}")
    precision = choices.chosen_precision(config, device)
    print(f"batch:    {describe_batch(config.batch, ranks)}, {precision}")
    if config.objective == "causal":
        models.choose_attention(student, device, config.data.max_length)
        packed = choices.packing(config, teachers, student)
        print(f"packing:  {'several examples' if packed else 'one example'} a sequence")
    print(f"output:   {config.output}")
    return 0


def recipes(arguments: Sequence[str]) -> int:
    """List the recipes by name, each with its first comment."""
    for path in sorted(RECIPES.glob("*.yaml")):
        comment = path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
        print(f"{path.stem}\n    {comment}")
    print(f"\nAs in: distilfast check --config demo. Their files are in {RECIPES}.")
    return 0


def replay(arguments: Sequence[str]) -> int:
    """Replay a step of a run. Exit status 1 if something in it is not finite."""
    prog = "distilfast replay --step N [--ranks R]"
    if {"--help", "-h"} & set(arguments):
        parse(["--help"], prog=prog)
    numbers: dict[str, int | None] = {"--step": None, "--ranks": None}
    others = []
    rest = iter(arguments)
    for argument in rest:
        name, equals, value = argument.partition("=")
        if name in numbers:
            value = value if equals else next(rest, "")
            if not value.isdigit() or int(value) < 1:
                raise ConfigError(f"{name}: expected a number from 1, got {value!r}")
            numbers[name] = int(value)
        else:
            others.append(argument)
    step, ranks = numbers.values()
    if step is None:
        raise ConfigError("--step: expected the number of a step, got none")
    config = parse(others, prog=prog)
    try:
        return 0 if replaying.replay(config, step, ranks) else 1
    except TrainingError as error:
        print(f"distilfast: {error}", file=sys.stderr)
        return 1


def describe_batch(batch: BatchConfig, ranks: int) -> str:
    size = counted(batch.size, batch.unit.removesuffix("s"))
    rising, parts = "", "micro-batches"
    if batch.warmup_from is not None:
        rising = f" (from {batch.warmup_from} in {counted(batch.warmup_steps, 'step')})"
    if batch.tokens is None:
        parts = counted(-(-batch.size // (batch.micro_sequences * ranks)), "micro-batch")
    return (
        f"{size}{rising} = {counted(ranks, 'rank')} x {parts} of at most "
        f"{counted(batch.micro_sequences, 'sequence')}"
    )


def print_sources(sources: Sequence[data.Source]) -> None:
    """Print which files are read, and which are not."""
    for source in sources:
        print(f"source:   {source.spec.name}" + (f": {source.files}" if source.files else ""))


def print_store(config: Config, store: Store) -> None:
    """Print what the store is made from, what became of the texts, and its size."""
    print_sources(data.locate(config, missing_ok=True))
    if "texts" in store.record:  # not in an old one
        print(f"data:     {data.describe_texts(store.record['texts'], store.record)}")
    for name, split in (("train", "train"), ("held out", "heldout")):
        lengths = store.lengths(split)
        print(f"{name + ':':9} {counted(len(lengths), 'example')}, {int(lengths.sum()):,} tokens")
    print(f"tokens:   {config.token_folder}")


def _millions(model: nn.Module) -> str:
    return f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters"
