"""Set up and check a run before training. Each error is one line."""

from __future__ import annotations

import bisect
import contextlib
import fcntl
import json
import logging
import os
import shutil
import socket
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from distilfast import atomic, data, models
from distilfast import config as configs
from distilfast.config import Config
from distilfast.data.masking import Masker
from distilfast.driver import checkpoint
from distilfast.driver.choices import chosen_objective, chosen_precision, packing
from distilfast.driver.processes import World
from distilfast.errors import ConfigError, expect, shown, writable
from distilfast.losses import distillation_loss
from distilfast.report.numbers import counted
from distilfast.report.training_run import read_metrics

log = logging.getLogger("distilfast")
# Keys that may change when a run is resumed. Every other key affects the result.
FREE_KEYS = (
    "checkpoint.",
    "evaluate.every",
    "output",
    "rank_timeout_s",
    "resume",
    "tensorboard",
    "zero.",
    "batch.activation_checkpointing",
    "batch.micro_sequences",
    "data.packing",
    "data.prepared",
    "loss.backend",
)


@dataclass
class Setup:
    """The loaded and checked parts of a run."""

    teachers: list[models.Teacher]
    tokenizer: Any
    student: Any
    batches: data.Batches
    steps: int


def prepare(config: Config, world: World) -> Setup:
    """Load and check what `check` has not. Writes the tokens if they are missing, and nothing else.

    Raises:
        ConfigError: the first error that is found.
    """
    config = replace(config, objective=world.first(lambda: chosen_objective(config)))
    teachers, tokenizer, student = world.together(lambda: load_models(config))
    models.choose_attention(student, world.device, config.data.max_length)
    packed = world.together(lambda: packing(config, teachers, student))
    if world.device.type == "cpu" and config.precision == "bf16":
        models.use_fp32_sums(student)
    folder = config.token_folder
    world.first(lambda: data.prepare(config, tokenizer, folder))
    store = world.together(lambda: data.Store.open(folder))
    batches = make_batches(config, tokenizer, store, packed)
    return Setup(teachers, tokenizer, student, batches, count_steps(config, batches.epoch_size))


def check(config: Config, ranks: int, device: torch.device) -> None:
    """Check all that can be checked before models and tokens are there. Writes nothing.

    Raises:
        ConfigError: the first error that is found.
    """
    config.batch.check(ranks, config.data.max_length)
    check_backend(config, device)
    output = Path(config.output)
    for folder in (output, *(output / name for name in ("checkpoints", "model", "tensorboard"))):
        writable("output", folder)
    check_apart(config.student.model, output)
    chosen = replace(
        config,
        objective=chosen_objective(config),
        precision=chosen_precision(config, device),
    )
    check_output(chosen, output)


def check_backend(config: Config, device: torch.device) -> None:
    """Check that the losses can be computed on this machine, by computing one.

    Only this finds a missing compiler, or a cache for what it makes that cannot be written to.
    """
    name, probe = config.loss.backend, torch.zeros(1, 8, device=device, requires_grad=True)
    try:
        distillation_loss(probe, probe.detach(), backend=name)
    except Exception as error:  # a compiler may raise anything
        reason = " ".join(str(error).removeprefix("backend: ").split())
        raise ConfigError(
            f"loss.backend: expected one that works here, got {name!r}: {reason}"
        ) from error


def make_batches(
    config: Config, tokenizer: Any, store: data.Store, packed: bool = False
) -> data.Batches:
    """The batches of a run.

    Args:
        config: with its objective chosen.
        packed: whether a sequence may hold several examples.
    """
    if config.objective == "causal":
        pad, end = tokenizer.pad_token_id, tokenizer.eos_token_id
        return data.Batches(
            store, data.Shift(config.seed), end if pad is None else pad, config.batch, packed
        )
    special, mask_token = tokenizer.all_special_ids, tokenizer.mask_token_id
    masker = Masker.from_counts(store.counts, special, mask_token, config.masking, config.seed)
    return data.Batches(store, masker, tokenizer.pad_token_id, config.batch)


def load_models(config: Config) -> tuple[list[models.Teacher], Any, Any]:
    """Load the teachers, their tokenizer and the student, and check them."""
    objective = chosen_objective(config)
    teachers, tokenizer = models.load_teachers(config.teachers, objective)
    check_teachers(config, teachers)
    what = "student"
    if config.student.model is None:
        student = models.make_student(teachers[0].model, config.student, config.seed)
    else:
        what = f"student.model: {config.student.model!r}"
        student, has_head = models.load_student(config.student, tokenizer, config.seed, objective)
        check_student(config, teachers, student)
        if not has_head and os.environ.get("RANK", "0") == "0":
            log.warning(f"{what} has no masked-LM head: it begins with a new one")
    named = [(f"teacher {t.name!r}", t.model) for t in teachers]
    for name, model in [*named, (what, student)]:
        parts = models.check_head(name, model)
        if objective == "causal":
            models.check_causal(name, parts)
    if config.batch.activation_checkpointing:
        models.checkpoint_activations(student, "batch.activation_checkpointing")
    return teachers, tokenizer, student


def count_steps(config: Config, epoch_size: int) -> int:
    """The number of optimiser steps: as configured, or the whole steps in the epochs.

    ``epoch_size`` is in the unit of the batch.

    Raises:
        ConfigError: the epochs are smaller than the first step.
    """
    if config.steps:
        return config.steps
    total, unit = int((config.epochs or 0) * epoch_size), config.batch.unit
    expect(
        config.batch.before(1) <= total,
        f"batch.{unit if config.batch.warmup_from is None else 'warmup_from'}",
        f"at most {total} (epochs {config.epochs:g} of {epoch_size} {unit})",
        config.batch.before(1),
    )
    return bisect.bisect_right(range(total + 1), total, key=config.batch.before) - 1


def check_teachers(config: Config, teachers: Sequence[models.Teacher]) -> None:
    """Check that the teachers fit the losses and the data."""
    for teacher in teachers:
        _check_length(config, teacher.name, teacher.model)
        if config.loss.vocabulary and not teacher.has_head:
            raise ConfigError(
                f"teacher: {teacher.name!r} has no masked-LM head, which kd, logit_cos and mse "
                "need; train one first with those weights at 0, as configs/demo-teacher.yaml does"
            )
    scalings = [(t.parts.scale, t.parts.softcap) for t in teachers]
    if config.loss.vocabulary and len(set(scalings)) > 1:
        raise ConfigError(
            f"teacher: expected one (logit_scale, logit_softcap) in an ensemble, got {scalings}"
        )
    widths = {t.model.config.get_text_config().hidden_size for t in teachers}
    if config.loss.hidden_cos_weight and len(widths) > 1:
        raise ConfigError(
            f"loss.hidden_cos_weight: expected 0 with teachers of different widths, got {widths}"
        )


def check_student(config: Config, teachers: Sequence[models.Teacher], student: Any) -> None:
    """Check that a student that exists already fits the losses and the data."""
    name = config.student.model
    _check_length(config, str(name), student)
    width = student.config.get_text_config().hidden_size
    if config.loss.hidden_cos_weight:
        for teacher in teachers:
            other = teacher.model.config.get_text_config().hidden_size
            expect(
                width == other,
                "loss.hidden_cos_weight",
                f"0 with a student of width {width} ({name!r}) and a teacher of width {other} "
                f"({teacher.name!r})",
                config.loss.hidden_cos_weight,
            )


def _check_length(config: Config, name: str, model: Any) -> None:
    """Check that a model can read the longest text."""
    length, positions = config.data.max_length, models.most_positions(model)
    if positions is not None and length > positions:
        raise ConfigError(
            f"data.max_length: expected at most {positions}, the positions of {name!r}, got "
            f"{length}"
        )
    steady = models.longest_steady_text(model)
    if steady is not None and length > steady:
        raise ConfigError(
            f"data.max_length: expected at most {steady} with the sparse attention of {name!r}, "
            f"which it gives up for good at the first text of so few tokens, got {length}; set "
            "attention_type to original_full in its config.json"
        )


def check_apart(model: str | None, output: Path) -> None:
    """Check that a run does not write into the folder of the model that its student begins as."""
    folder = Path(model or "").expanduser().resolve()
    inside = output.resolve() in (folder, *folder.parents)
    if model is not None and folder.is_dir() and inside:
        raise ConfigError(
            f"output: expected a folder apart from the student's, got {str(output)!r} with "
            f"student.model {model!r}"
        )


def check_output(config: Config, output: Path) -> None:
    """Check that the folder is empty or holds this run."""
    if not output.is_dir() or _unclaimed(output.absolute(), config.token_folder.absolute()):
        return
    if config.resume == "never":
        raise ConfigError(
            f"output: expected an empty folder with resume never, got {str(output)!r}"
        )
    if not (output / "config.yaml").is_file():
        raise ConfigError(f"output: expected an empty folder or a run's, got {str(output)!r}")
    try:
        before = configs.parse(["--config", str(output / "config.yaml")])
    except ConfigError as error:
        raise ConfigError(f"output: {output / 'config.yaml'} is damaged: {error}") from error
    if before.objective == "auto":  # an older version's, which knew masked LMs alone
        before = replace(before, objective="masked")
    differing = _differing(asdict(before), asdict(config))
    free: tuple[str, ...] = FREE_KEYS
    if config.data.source is None:  # the tokens are used as they are
        free = (*free, "data.source")
    keys = [key for key in differing if not key.startswith(free)]
    if keys:
        hint = ""
        if {"steps", "epochs"} & set(keys):
            hint = "; the learning rate follows from the number of steps, so a run cannot be made "
            hint += "longer or shorter: choose another output"
        changes = [
            f"{key} ({shown(differing[key][0])}, now {shown(differing[key][1])})" for key in keys
        ]
        raise ConfigError(
            f"output: expected an empty folder or this run's, got {str(output)!r} of another run, "
            f"which differs in {', '.join(changes)}{hint}"
        )


def _unclaimed(folder: Path, tokens: Path) -> bool:
    """Whether a folder holds no more than what a run writes before config.yaml: its tokens and what
    it left half-written when it was killed."""
    return all(
        atomic.final(path) == tokens
        or (path.name != "config.yaml" and atomic.final(path) == folder / "config.yaml")
        or (path in tokens.parents and _unclaimed(path, tokens))
        for path in folder.iterdir()
    )


def _differing(a: dict[str, Any], b: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The keys whose values differ, each with both values."""
    found: dict[str, Any] = {}
    for key in a:
        if isinstance(a[key], dict) and isinstance(b[key], dict):
            found |= _differing(a[key], b[key], f"{prefix}{key}.")
        elif a[key] != b[key]:
            found[f"{prefix}{key}"] = a[key], b[key]
    return found


def is_complete(output: Path) -> bool:
    """Return whether the folder holds the results of a run.

    Raises:
        ConfigError: the run was complete, but its model is gone.
    """
    summary, model = output / "summary.json", output / "model"
    if summary.is_file() and not (model / "config.json").is_file():
        raise ConfigError(
            f"output: expected the model of a complete run in {str(model)!r}, got none; to make "
            f"it again, remove {str(summary)!r}"
        )
    return summary.is_file()


@contextlib.contextmanager
def locked(output: Path) -> Iterator[None]:
    """Let no other run use the folder, which is made if it is missing.

    The system frees it when the process ends, however it ends.

    Raises:
        ConfigError: another run uses it.
    """
    output.mkdir(parents=True, exist_ok=True)
    folder = os.open(output, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(folder)
        raise ConfigError(
            f"output: expected a folder of no other run, got {str(output)!r}, which one that is "
            "running uses"
        ) from None
    except OSError:  # a file system without locks, as some networks' are
        pass
    try:
        yield
    finally:
        os.close(folder)


def identities(config: Config, store: data.Store) -> dict[str, str]:
    """What a run reads, each with a hash of its contents (see `models.identity`)."""
    teachers = {
        f"teacher {teacher.name!r}": models.teacher_identity(teacher) for teacher in config.teachers
    }
    student = {}
    if (name := config.student.model) is not None:
        student[f"student {name!r}"] = models.student_identity(config.student)
    return {**teachers, **student, "the tokens": store.identity}


def claim(config: Config, output: Path, inputs: dict[str, str]) -> int:
    """Write config.yaml and inputs.json, remove half-written files of a killed run, and return the
    step to resume from.

    Args:
        inputs: as `identities` returns them.

    Raises:
        ConfigError: no checkpoint is sound, metrics.jsonl does not reach up to the newest, or the
            run began with other inputs.
    """
    checkpoints = output / "checkpoints"
    start = checkpoint.newest(checkpoints) if config.resume == "auto" else 0
    if start:
        _check_metrics(output / "metrics.jsonl", start)
        _check_inputs(output / "inputs.json", inputs)
    output.mkdir(parents=True, exist_ok=True)
    atomic.write(output / "config.yaml", configs.to_yaml(config))
    atomic.write(output / "inputs.json", json.dumps(inputs, indent=1) + "\n")
    temporary = [path for path in output.iterdir() if atomic.final(path) != path]
    for leftover in (*temporary, *output.glob("checkpoints/tmp-*")):
        if leftover.is_dir():
            shutil.rmtree(leftover)
        else:
            leftover.unlink()
    return start


def _check_metrics(path: Path, start: int) -> None:
    """Check that a run's metrics have its first evaluation, and each step up to ``start`` once."""
    try:
        lines = read_metrics(path)
        found = [line["step"] for line in lines if "loss" in line and line["step"] <= start]
        whole = found == list(range(1, start + 1)) and lines[0]["step"] == 0
        said = f"{counted(len(found), 'line')} of them"
    except (OSError, ValueError, LookupError, TypeError) as error:
        whole, said = False, f"{type(error).__name__} {error}"
    if not whole:
        raise ConfigError(
            f"resume: expected {str(path)!r} with step 0 and each of the {counted(start, 'step')} "
            f"up to the newest checkpoint, got {said}; to begin anew, remove the run's folder"
        )


def _check_inputs(path: Path, inputs: dict[str, str]) -> None:
    """Check that a run's inputs are those that it began with. Older runs did not record them."""
    if not path.is_file():
        return
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        other = [name for name, found in inputs.items() if before.get(name) != found]
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"output: {str(path)!r} is damaged: {error}") from error
    if other:
        raise ConfigError(
            f"resume: expected the contents that the run in {str(path.parent)!r} began with, got "
            f"others for {', '.join(other)}; a run on these needs an output of its own"
        )


def check_shared(config: Config, output: Path) -> None:
    """Check on every rank that it sees the first rank's folder, as all ranks save there.

    Raises:
        ConfigError: this rank sees another folder, or none.
    """
    try:
        shared = (output / "config.yaml").read_text(encoding="utf-8") == configs.to_yaml(config)
    except OSError:
        shared = False
    if not shared:
        raise ConfigError(
            f"output: expected a folder that all ranks share, got {str(output)!r} on "
            f"{socket.gethostname()}, which is not the first rank's"
        )
