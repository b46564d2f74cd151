"""Reads a task's examples from its files or from the hub."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distilfast.errors import ConfigError, did_you_mean, shortened
from distilfast.sources import lookup
from distilfast.tasks import squad
from distilfast.tasks.catalogue import IMDB, SENTENCES, TASKS, Task

log = logging.getLogger("distilfast.tasks")
IGNORE_INDEX = -100  # the label of an example that has none
HUBS = ("glue", "hub")  # values of --data that mean the hub
FEW = 20  # in fewer lines of one's own task every label may be another one
SHARED = 0.1  # the share of a development set that may be trained on without a warning


def find(name: str, data: str, key: str = "--tasks") -> Task:
    """Return the task of this name, or the user's own task in the folder of this name.

    Upper and lower case, and the hyphen of a known task's name, make no difference.

    Raises:
        ConfigError: there is neither.
    """
    plain = {_plain(known): task for known, task in TASKS.items()}
    if task := plain.get(_plain(name)):
        return task
    known = ", ".join(TASKS)
    folder = None if data in HUBS else lookup.local_path("--data", data)
    if folder is None and data not in HUBS:
        raise ConfigError(f"--data: expected a folder or {' or '.join(HUBS)}, got {data!r}")
    one_folder = Path(name).name == name not in ("", "..")  # not "a/b": it also names outputs
    if folder is None or not one_folder or not (folder / name / "train.tsv").is_file():
        raise ConfigError(
            f"{key}: expected one of {known}, or the folder of one's own task with train.tsv and "
            f"dev.tsv in --data, got {name!r} and {data!r}{_meant(name, data, folder)}"
        )
    return _own_task(name, folder / name / "train.tsv")


def _meant(name: str, data: str, folder: Path | None) -> str:
    """A hint where a task is not found."""
    if folder is None:
        there = Path(data).is_dir()
        return f"; ./{data} is the folder, {data} the hub" if there else did_you_mean(name, TASKS)
    if (folder / Path(name).name / "train.csv").is_file():
        return "; train.csv is there, but its fields should stand apart by tabs, in a train.tsv"
    return did_you_mean(name, [*TASKS, *(p.name for p in folder.glob("*") if p.is_dir())])


def _plain(name: str) -> str:
    return name.lower().replace("-", "")


def _own_task(name: str, file: Path) -> Task:
    """Return the user's task. Its columns and classes are those of its training file."""
    header = next(iter(_lines(file)), [])
    texts = SENTENCES if "sentence1" in header else ("sentence",)
    task = Task(name, texts, classes=("",))
    labels = [label for *_, label in _rows(file, task)]
    found = set(labels)
    if len(labels) >= FEW < 2 * len(found) > len(labels):
        raise ConfigError(
            f"{file}: expected labels that repeat, got {len(found)} in {len(labels)} lines, such "
            f"as {shortened(labels[0])!r}"
        )
    classes = tuple(
        sorted(found, key=lambda label: (len(label), label) if label.isdecimal() else (0, label))
    )
    if len(classes) < 2:
        raise ConfigError(f"{file}: expected at least two labels, got {', '.join(classes)!r} alone")
    _check_classes(file, classes)
    return Task(name, texts, classes=classes)


def _check_classes(file: Path, classes: Sequence[str]) -> None:
    """Raise a ConfigError if labels are not classes, or one class is written in several ways."""
    numbers = [value for label in classes if (value := _number(label)) is not None]
    if len(numbers) == len(classes):
        for label, value in zip(classes, numbers, strict=True):
            if value % 1:  # also where it is not finite
                raise ConfigError(
                    f"{file}: expected labels that are classes, got the number {label!r}"
                )
    known: dict[Any, str] = {}
    for label in classes:
        number = _number(label)
        key = label.strip().casefold() if number is None or number % 1 else number
        if (other := known.setdefault(key, label)) != label:
            raise ConfigError(
                f"{file}: expected one spelling of each label, got {other!r} and {label!r}"
            )


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


@dataclass(frozen=True)
class Examples:
    """Texts and labels of a training or development set."""

    texts: list[tuple[str, ...]]
    # Numbers of classes, or IGNORE_INDEX for no label. For spans: a list of the gold answers
    # (squad.Answer) of each example.
    labels: list[Any]


def read(task: Task, data: str) -> dict[str, Examples]:
    """Return the examples of a task by set: train first, then the development sets.

    Args:
        data: a folder in the official layout (TASK/train.tsv, ...), or "glue" or "hub". For IMDb
            the folder itself may hold train/pos, for SQuAD train-v1.1.json.

    Raises:
        ConfigError: a folder, column or field is missing; a label is outside the task (the error
            names its line, or the question's id); a set is empty.
    """
    folder = None if data in HUBS else lookup.local_path("--data", data)
    if data not in HUBS and (folder is None or not folder.is_dir()):
        raise ConfigError(f"--data: expected a folder or {' or '.join(HUBS)}, got {data!r}")
    splits = ("train", *task.dev)
    if folder is None:
        loaded = _from_hub(task)
    elif task is IMDB and (folder / "train" / "pos").is_dir():
        loaded = {split: _imdb_folder(folder / split) for split in splits}
    elif task.spans and (folder / "train-v1.1.json").is_file():
        loaded = {split: _squad_file(folder, split) for split in splits}
    else:
        place = folder / task.name
        if not place.is_dir():
            there = ", ".join(sorted(p.name for p in folder.iterdir() if p.is_dir())) or "nothing"
            raise ConfigError(
                f"--data: expected the folder {task.name} in {str(folder)!r}, which has {there}"
            )
        if task.spans:
            loaded = {split: _squad_file(place, split) for split in splits}
        else:
            loaded = {split: _read_file(place / f"{split}.tsv", task) for split in splits}
    for split, examples in loaded.items():
        if not examples.texts:
            raise ConfigError(f"--data: expected examples in {task.name}'s {split}, got none")
    seen = set(loaded["train"].texts)
    for split in task.dev:
        texts = loaded[split].texts
        if (twice := sum(text in seen for text in texts)) > SHARED * len(texts):
            log.warning(
                "%s: %d of the %d examples of %s are trained on too, so its score flatters",
                task.name, twice, len(texts), split,
            )  # fmt: skip
    return loaded


def read_texts(file: Path, task: Task) -> Examples:
    """Read unlabelled texts for a task from a .tsv with a header line.

    Its columns are those of the task, or `sentence`, or `sentence1` and `sentence2`.
    """
    header = _header("--transfer", file)
    texts = task.texts
    if not set(texts) <= set(header):
        texts = SENTENCES if len(texts) == 2 else ("sentence",)
    rows = _texts("--transfer", file, texts)
    return Examples(rows, [[] if task.spans else IGNORE_INDEX] * len(rows))


def read_sentences(key: str, file: Path) -> list[tuple[str, ...]]:
    """Read `sentence`, or `sentence1` and `sentence2`, from a .tsv with a header line.

    Args:
        key: the flag that named the file, for errors about the whole file.
    """
    header = _header(key, file)
    pair = "sentence" not in header and set(SENTENCES) & set(header)
    return _texts(key, file, SENTENCES if pair else ("sentence",))


def _header(key: str, file: Path) -> list[str]:
    if not file.is_file():
        raise ConfigError(f"{key}: expected a file, got {str(file)!r}")
    return next(iter(_lines(file)), [])


def _texts(key: str, file: Path, columns: tuple[str, ...]) -> list[tuple[str, ...]]:
    rows = _rows(file, Task("", columns, label=columns[0]))
    if not rows:
        raise ConfigError(f"{key}: expected texts in {str(file)!r}, got none")
    return [row[:-1] for row in rows]


def _read_file(file: Path, task: Task) -> Examples:
    rows = _rows(file, task)
    return Examples([row[:-1] for row in rows], [float(row[-1]) for row in rows])


def _lines(file: Path) -> list[list[str]]:
    """Return the fields of every line. Quotes are literal."""
    lines = _text(file).split("\n")
    if lines[-1] == "":
        lines.pop()
    return [line.removesuffix("\r").split("\t") for line in lines]


def _comma(fields: Sequence[str]) -> str:
    """A hint, if the fields of a line stand apart by commas."""
    alone = len(fields) == 1 and "," in fields[0]
    return "; the line seems to be comma-separated, and its fields stand apart by tabs" * alone


def _text(file: Path) -> str:
    try:
        return file.read_bytes().decode("utf-8-sig")  # read_text would break lines at a lone \r
    except FileNotFoundError:
        other = file.with_suffix(".csv")
        hint = f"; {other.name} is there, but its fields should stand apart by tabs, in a .tsv"
        raise ConfigError(
            f"--data: expected the file {str(file)!r}, which is missing{hint * other.is_file()}"
        ) from None
    except OSError as error:
        raise ConfigError(
            f"--data: expected the file {str(file)!r}, got {error.strerror}"
        ) from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{file}: expected UTF-8, got {error.reason} at byte {error.start}"
        ) from None


def _rows(file: Path, task: Task) -> list[tuple[Any, ...]]:
    """Return (text, label) or (text, text, label) for each line, with the label as a number."""
    lines = _lines(file)
    header = task.columns or next(iter(lines), [])
    first = 0 if task.columns else 1
    wanted = (*task.texts, task.label)
    if any(header.count(name) != 1 for name in wanted):
        got = ", ".join(header).replace("\r", "\\r")
        old = "; its lines end with \\r alone, and should end with \\n" * ("\\r" in got)
        raise ConfigError(
            f"{file}: expected the columns {', '.join(dict.fromkeys(wanted))}, got "
            f"{shortened(got) or 'none'}{old}{_comma(header)}"
        )
    places = [header.index(name) for name in wanted]
    rows, short = [], 0
    for number, fields in enumerate(lines[first:], start=first + 1):
        if len(fields) != len(header):
            if task.lenient and len(fields) < len(header):
                short += 1
                continue
            raise ConfigError(
                f"{file}, line {number}: expected {len(header)} fields, got {len(fields)}"
                f"{_comma(fields)}"
            )
        if fields == header:
            raise ConfigError(
                f"{file}, line {number}: expected an example, got the header line again"
            )
        *texts, label = (fields[place] for place in places)
        rows.append((*texts, _label(task, label, f"{file}, line {number}")))
    if short:
        log.warning("%s: %d lines have too few fields and are left out", file, short)
    return rows


def _label(task: Task, label: str, where: str) -> Any:
    if task.label in task.texts:  # unlabelled texts
        return label
    if task.classes == ("",):  # the caller collects the classes from the labels
        if not label:
            raise ConfigError(f"{where}: expected a label, got none")
        return label
    if task.classes:
        if label not in task.classes:
            raise ConfigError(
                f"{where}: expected a label of {shortened(', '.join(task.classes))}, got "
                f"{shortened(label)!r}"
            )
        return task.classes.index(label)
    try:
        value = float(label)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ConfigError(f"{where}: expected a number, got {label!r}")
    return value


def _imdb_folder(folder: Path) -> Examples:
    """Read the layout of aclImdb: neg/*.txt and pos/*.txt."""
    texts: list[tuple[str, ...]] = []
    labels: list[float] = []
    for label, name in enumerate(IMDB.classes):
        files = sorted((folder / name).glob("*.txt"))
        if not files:
            raise ConfigError(f"--data: expected files *.txt in {str(folder / name)!r}, got none")
        for file in files:
            texts.append((_text(file).replace("<br />", "\n"),))
            labels.append(label)
    return Examples(texts, labels)


def _squad_file(folder: Path, split: str) -> Examples:
    return Examples(*squad.read(folder / f"{split}-v1.1.json"))


def _from_hub(task: Task) -> dict[str, Examples]:
    import datasets
    import huggingface_hub

    if task.hub is None:
        raise ConfigError(f"--data: expected a folder for the task {task.name}, got the hub")
    name, part = task.hub
    lookup.require_hub("--data", name, repo_type="dataset")
    datasets.config.HF_HUB_OFFLINE = huggingface_hub.constants.HF_HUB_OFFLINE
    try:
        loaded = datasets.load_dataset(name, part)
        found = {}
        for split, hub_split in zip(("train", *task.dev), task.hub_splits, strict=True):
            rows = loaded[hub_split]
            if not task.spans:
                rows = rows.filter(lambda row: row["label"] != -1)
            columns = [rows[column] for column in task.hub_texts or task.texts]
            labels = (
                [squad.of_hub(row, f"{name}, {hub_split}") for row in rows]
                if task.spans
                else [float(label) for label in rows["label"]]
            )
            found[split] = Examples(list(zip(*columns, strict=True)), labels)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        message = " ".join(str(error).split())
        raise ConfigError(f"--data: {name!r} cannot be loaded: {message}") from error
    return found
