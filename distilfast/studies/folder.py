"""A study's output folder: which command it belongs to, and the tokens its processes share."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distilfast import tasks
from distilfast.errors import ConfigError, writable
from distilfast.models import fingerprint
from distilfast.progress import Bar
from distilfast.studies import jobs
from distilfast.tasks import Encoded, Examples, Task
from distilfast.tasks.fine_tuning import FineTuning

# Tokens and logits carry hashes of what they were made from, or are made anew.
DERIVED = ("tokens", "text-tokens", "logits")


def claim(
    output: Path, what: Mapping[str, Any], models: Mapping[str, str], data: Mapping[str, str]
) -> None:
    """Mark the folder as this command's: settings.json records all that decides its figures.

    Raises:
        ConfigError: the folder cannot be written to, or holds something else, or figures of other
            settings. Nothing is written then.
    """
    writable("--output", output)
    file = output / "settings.json"
    wanted = {**what, "models": dict(models), "data": dict(data)}
    if output.exists() and any(output.iterdir()):
        if not file.is_file():
            raise ConfigError(
                f"--output: expected a new folder, got {str(output)!r} of something else"
            )
        try:
            before = json.loads(file.read_text(encoding="utf-8"))
            if before["command"] != what["command"]:
                raise ConfigError(
                    f"--output: expected a new folder or one of `distilfast {what['command']}`, "
                    f"got {str(output)!r} of `distilfast {before['command']}`"
                )
            kept = {key: before[key] for key in wanted}
            if _holds_figures(output):
                for part in ("models", "data"):
                    kept[part] = {**wanted[part], **before[part]}
                    wanted[part] = {**before[part], **wanted[part]}
            else:  # a command that ended at its input binds no other: this one may correct it
                kept = wanted
        except ConfigError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"{file}: expected the settings of `distilfast {what['command']}`, got a damaged "
                f"file ({error!r})"
            ) from error
        differing = [
            *(f"{k} ({kept[k]!r}, now {wanted[k]!r})" for k in what if kept[k] != wanted[k]),
            *(f"the files of {k}" for part in ("models", "data") for k in wanted[part]
              if kept[part][k] != wanted[part][k]),
        ]  # fmt: skip
        if differing:
            raise ConfigError(
                f"--output: expected a new folder or figures of the same settings, got "
                f"{str(output)!r}, which differs in {', '.join(differing)}"
            )
    folders: dict[str, str] = {}
    for name in wanted["models"]:
        if (other := folders.setdefault(slug(name), name)) != name:
            raise ConfigError(
                f"--output: expected names that differ as folders, got {other!r} and {name!r}, "
                f"both {slug(name)!r} there"
            )
    jobs.write_json(file, wanted)


def _holds_figures(output: Path) -> bool:
    """Return whether a study has left a result, or a run that has taken a step."""
    places = (p for p in output.iterdir() if p.name not in ("settings.json", *DERIVED))
    return any(p.suffix == ".json" or any(p.rglob("*.json*")) for p in places)


def slug(name: str) -> str:
    """Turn a model's name into the name of a folder."""
    return re.sub(r"[^\w.=-]+", "-", name.strip("./")) or "model"


class TokenStore:
    """A task's tokens on disk, made once for each tokenizer and read by all processes."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.made: dict[str, tuple[dict[str, str], int]] = {}

    def files(
        self, splits: Mapping[str, Examples], task: Task, tokenizer: Any, settings: FineTuning
    ) -> tuple[dict[str, str], int]:
        """Return the file of each set, and the number of tokens of the first set."""
        from safetensors.torch import save_file

        key = f"{task.name}-{fingerprint(tokenizer)[:16]}"
        if key not in self.made:
            self.folder.mkdir(parents=True, exist_ok=True)
            files, tokens = {}, []
            for split, examples in splits.items():
                encode = tasks.encode_windows if task.spans else tasks.encode
                length = settings.max_length or task.max_length
                with Bar(f"tokens of {task.name}, {split}", len(examples.texts)) as bar:
                    made = encode(examples, tokenizer, length, bar.update)
                files[split] = str(self.folder / f"{key}-{split}.safetensors")
                save_file(made.tensors(), files[split])
                tokens.append(int(made.offsets[-1]))
            self.made[key] = files, tokens[0]
        return self.made[key]

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def read_tokens(file: str) -> Encoded:
    from safetensors.torch import load_file

    return tasks.encoded(load_file(file))
