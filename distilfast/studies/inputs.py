"""The inputs of a study: models, tasks and examples, each with a hash that identifies it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from distilfast import tasks
from distilfast.errors import ConfigError
from distilfast.models import has_words, identity, loading, vocabulary_size
from distilfast.sources import lookup
from distilfast.studies import flags
from distilfast.tasks import GLUE, Examples, Task, fine_tuning
from distilfast.tasks.fine_tuning import FineTuning


def named_models(key: str, given: Sequence[str]) -> dict[str, str]:
    """Return models by name from [NAME=]MODEL. Without NAME, the name is the model as given."""
    models: dict[str, str] = {}
    for entry in given:
        name, equals, source = entry.partition("=")
        name, source = (name, source) if equals and "/" not in name else (entry, entry)
        if not name or not source:
            raise ConfigError(f"{key}: expected MODEL or NAME=MODEL, got {entry!r}")
        if name in models:
            raise ConfigError(f"{key}: expected each name once, got {name!r} twice")
        models[name] = source
    return models


def chosen_tasks(given: str, data: str) -> list[Task]:
    wanted = list(GLUE) if given == "all" else flags.names("--tasks", given)
    found = [tasks.find(name, data) for name in wanted]
    if len({task.name for task in found}) < len(found):
        raise ConfigError(f"--tasks: expected each task once, got {given!r}")
    return found


@dataclass(frozen=True)
class Model:
    """A model to start from."""

    source: str  # what transformers loads it from
    identity: str  # a hash of its files, or its name and commit on the hub
    tokenizer: Any
    work: int  # the number of weights that take part in a token's forward
    fine_tuned: bool  # it has a task's head already


@dataclass(frozen=True)
class Inputs:
    """All inputs of the jobs, read and checked."""

    models: dict[str, Model]
    tasks: dict[str, Task]
    splits: dict[str, dict[str, Examples]]  # by task, then by set: train and development sets
    identities: dict[str, str]  # by task, a hash of its examples


def read_inputs(
    chosen: Sequence[Task], data: str, models: Mapping[str, str], settings: FineTuning
) -> Inputs:
    """Read and check every task and every model. This writes no file.

    Raises:
        ConfigError: the first thing found wrong.
    """
    splits = {task.name: tasks.read(task, data) for task in chosen}
    identities = {
        name: hashlib.sha256(json.dumps([vars(e) for e in found.values()]).encode()).hexdigest()
        for name, found in splits.items()
    }
    loaded = {
        name: open_model("--model", source, chosen, settings) for name, source in models.items()
    }
    for name, model in loaded.items():
        if model.fine_tuned:  # every task has to start from the pretrained model
            raise ConfigError(
                f"--model: expected a model before fine-tuning, got {name!r}, after it"
            )
    return Inputs(loaded, {task.name: task for task in chosen}, splits, identities)


def open_model(key: str, name: str, chosen: Sequence[Task], settings: FineTuning) -> Model:
    """Load a model to check that it can be fine-tuned on every task.

    Raises:
        ConfigError: it cannot be fine-tuned on one of them.
    """
    import transformers

    source = lookup.model_source(key, name)
    with loading(f"{key}: the tokenizer of {name!r}"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    fast = getattr(tokenizer, "is_fast", False) and has_words(tokenizer)
    if not fast or tokenizer.pad_token_id is None:
        raise ConfigError(f"{key}: expected a fast tokenizer with a padding token in {name!r}")
    length = max(settings.max_length or task.max_length for task in chosen)
    # One task for each shape of head.
    for task in {(task.kind, task.outputs): task for task in chosen}.values():
        model = fine_tuning.load(source, task, 0, length, key)
        rows, needed = len(model.get_input_embeddings().weight), vocabulary_size(tokenizer)
        if needed > rows:
            raise ConfigError(f"{key}: {name!r} has {rows} embeddings, its tokenizer {needed} ids")
        fine_tuning.check_padding(f"{key}: {name!r}", model, tokenizer)
    embedded = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    work = sum(p.numel() for p in model.parameters() if id(p) not in embedded)
    fine_tuned = fine_tuning.has_head(transformers.AutoConfig.from_pretrained(source))
    return Model(source, identity(source), tokenizer, work, fine_tuned)
