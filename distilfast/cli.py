"""The command `distilfast` and its subcommands."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from distilfast.config import RECIPES, BatchConfig, ConfigError, parse

USAGE = """\
usage: distilfast COMMAND [--config FILE] [--key.sub value ...]

  train     distil (as `deepspeed distilfast/train.py`, in one process)
  prepare   make data.prepared from data.source
  check     validate a configuration and print what a run would do
  recipes   list the configurations that come with distilfast
  replay    --step N of a run again, micro-batch by micro-batch: where was it not finite?
  glue      fine-tune models on GLUE's tasks, over several seeds, and tabulate
  finetune  distil on a task: soft targets of one teacher or several, and labels
  ablate    a configuration with parts left out or changed, over several seeds
  compare   parameters, latency, throughput and memory of models
  report    RUN [RUN ...]: one page that compares runs
  demo      a real teacher, real text, three runs and a report [--full]

`distilfast train --help` lists every key."""


# Commands with flags of their own: each module's main(arguments) gives the exit status.
APPLICATIONS = {
    "glue": "distilfast.studies.glue",
    "finetune": "distilfast.studies.finetune",
    "ablate": "distilfast.studies.ablate",
    "compare": "distilfast.studies.compare",
    "report": "distilfast.studies.pages",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit status (2: something in the arguments or inputs)."""
    name, *rest = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name in ("--help", "-h"):
        print(USAGE)
        return 0
    if name == "train":
        from distilfast import train

        return train.main(rest)
    commands = {"prepare": prepare, "check": check, "recipes": recipes}
    commands |= {"demo": demo, "replay": replay}
    if name in APPLICATIONS:
        commands[name] = import_module(APPLICATIONS[name]).main
    if name not in commands:
        known = ", ".join(("train", *commands, *APPLICATIONS))
        print(f"distilfast: expected a command ({known}), got {name!r}", file=sys.stderr)
        return 2
    from distilfast.driver.metrics import log_to_stderr

    log_to_stderr()
    try:
        return commands[name](rest)
    except ConfigError as error:
        print(f"distilfast: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        kept = "; what is done is kept" if name in ("glue", "finetune", "ablate") else ""
        print(f"distilfast: stopped{kept}", file=sys.stderr)
        return 130


def script() -> None:
    """`main` as a program of its own."""
    # An exception, so that a command ends the processes that it has started. `train` has its own.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    status = main()
    if "distilfast.driver.engine" in sys.modules:
        sys.modules["distilfast.driver.engine"].finish()
    sys.exit(status)


def prepare(arguments: Sequence[str]) -> int:
    """Tokenise and count."""
    config = parse(arguments, prog="distilfast prepare")
    from distilfast import data
    from distilfast.driver import checks

    _, tokenizer, _ = checks.load_models(config)
    store = data.prepare(config, tokenizer, config.token_folder)
    print(f"{config.token_folder}: {describe_store(store)}")
    return 0


def check(arguments: Sequence[str]) -> int:
    """Everything that `train` checks, and what it would do. Writes nothing."""
    config = parse(arguments, prog="distilfast check")
    from distilfast import data, models
    from distilfast.driver import checks

    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    config.batch.check(ranks, config.data.max_length)
    checks.check_output(config, Path(config.output))
    teachers, tokenizer, student = checks.load_models(config)
    for teacher in teachers:
        print(f"teacher:  {teacher.name}, {_millions(teacher.model)}")
    kind = type(student).__name__
    layers = models.layers_of(
        config.student, getattr(teachers[0].model.config, models.family(teachers[0].model).n_layers)
    )
    print(f"student:  {kind}, {_millions(student)}, teacher's layers {layers}")
    folder = config.token_folder
    if (folder / "store.json").is_file():
        store = data.prepare(config, tokenizer, folder)
        print(f"data:     {folder}: {describe_store(store)}")
        epoch_size = int(store.sizes(config.batch).sum())
        steps = checks.count_steps(config, epoch_size)
        print(f"steps:    {steps:,} = {config.batch.before(steps) / epoch_size:.2f} epochs")
    else:
        data.check(config, folder)
        print(f"data:     {', '.join(s.name for s in config.sources)}, to be tokenised to {folder}")
        print(f"steps:    {config.steps or f'{config.epochs:g} epochs'}")
    print(f"batch:    {describe_batch(config.batch, ranks)}, {config.precision}")
    print(f"output:   {config.output}")
    return 0


def recipes(arguments: Sequence[str]) -> int:
    """List the configs with their first comment."""
    for path in sorted(RECIPES.glob("*.yaml")):
        comment = path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
        print(f"{path}\n    {comment}")
    return 0


def demo(arguments: Sequence[str]) -> int:
    """The demo."""
    unknown = [a for a in arguments if a != "--full"]
    if unknown:
        raise ConfigError(f"demo: expected nothing or --full, got {unknown[0]!r}")
    from distilfast import demo

    return 0 if demo.main(full="--full" in arguments) else 1


def replay(arguments: Sequence[str]) -> int:
    """A step of a run again. Exit status 1 where something in it is not finite."""
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
    config = parse(others, prog="distilfast replay --step N [--ranks R]")
    from distilfast import train
    from distilfast.driver.replay import replay

    try:
        return 0 if replay(config, step, ranks) else 1
    except train.TrainingError as error:
        print(f"distilfast: {error}", file=sys.stderr)
        return 1


def describe_batch(batch: BatchConfig, ranks: int) -> str:
    rising = accumulation = ""
    if batch.warmup_from is not None:
        rising = f" (from {batch.warmup_from} in {batch.warmup_steps} steps)"
    if batch.tokens is None:
        accumulation = f" {-(-batch.size // (batch.micro_sequences * ranks))}"
    return (
        f"{batch.size} {batch.unit}{rising} = {ranks} ranks x{accumulation} micro-batches of at "
        f"most {batch.micro_sequences} sequences"
    )


def describe_store(store: object) -> str:
    from distilfast.data import Store

    assert isinstance(store, Store)
    tokens = {split: int(store.lengths(split).sum()) for split in ("train", "heldout")}
    return (
        f"{len(store.train):,} examples of {tokens['train']:,} tokens, "
        f"{len(store.heldout):,} of {tokens['heldout']:,} held out"
    )


def _millions(model: object) -> str:
    from torch import nn

    assert isinstance(model, nn.Module)
    return f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters"
