"""What a run decides for itself: its objective, its precision, and whether it packs."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from distilfast import config as configs
from distilfast import models
from distilfast.config import Config
from distilfast.driver.processes import World
from distilfast.errors import ConfigError, expect
from distilfast.machine import best_precision, multiplies_bf16

log = logging.getLogger("distilfast")


def settled(config: Config, world: World) -> Config:
    """The configuration with objective and precision chosen, the same on all ranks."""
    config = replace(config, objective=world.first(lambda: chosen_objective(config)))
    precision = world.first(lambda: chosen_precision(config, world.device))
    slow = world.device.type == "cpu" and precision == "bf16" and not multiplies_bf16()
    if slow and world.rank == 0:
        log.warning(
            "precision bf16: this CPU has no instructions for it, fp32 is many times faster"
        )
    return replace(config, precision=precision)


def chosen_precision(config: Config, device: torch.device) -> Literal["bf16", "fp32"]:
    """The precision; for `auto`, that of the run to be resumed, else the best for the device."""
    if config.precision != "auto":
        return config.precision
    before = _before(config)
    kept = before.precision if before else "auto"
    return kept if kept != "auto" else best_precision(device)


def chosen_objective(config: Config) -> Literal["masked", "causal"]:
    """The objective; for `auto`, that of the run to be resumed, else the (first) teacher's."""
    if config.objective != "auto":
        return config.objective
    before = _before(config)
    if before and before.objective != "auto":
        return before.objective
    try:
        return models.teacher_objective(config.teachers[0])
    except ConfigError:  # loading it will report the error
        return "masked"


def _before(config: Config) -> Config | None:
    """The configuration of the run to be resumed, if there is one that can be read."""
    file = Path(config.output) / "config.yaml"
    with contextlib.suppress(ConfigError, OSError):  # `check` will report the error
        if config.resume == "auto" and file.is_file():
            return configs.parse(["--config", str(file)])
    return None


def packing(config: Config, teachers: Sequence[models.Teacher], student: Any) -> bool:
    """Whether several examples share a sequence.

    Raises:
        ConfigError: they have to, and a model cannot be proven to keep them apart.
    """
    wanted = config.data.packing
    if config.objective != "causal":
        expect(wanted is not True, "data.packing", "auto or false for a masked LM", wanted)
        return False
    if wanted is False:
        return False
    parts = {f"teacher {t.name!r}": t.parts for t in teachers}
    parts["the student"] = models.take_apart(student, "student")
    failing = next((name for name, one in parts.items() if not models.packs(one)), None)
    if failing is None:
        return True
    kind = parts[failing].model.config.model_type
    why = f"{failing}, a {kind}, does not keep the examples of a sequence apart"
    expect(wanted == "auto", "data.packing", f"auto or false, as {why}", wanted)
    if os.environ.get("RANK", "0") == "0":
        log.warning(f"data.packing: an example a sequence, as {why}")
    return False
