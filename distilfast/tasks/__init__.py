"""Tasks to fine-tune on: GLUE, IMDb, SQuAD, one's own; their files, metrics and tokens.

A task is one row in TASKS: its columns, its classes, what it is scored by. The protocol is that of
Sanh et al. 2019 (DistilBERT) for GLUE (Wang et al. 2019): docs/evaluation.md.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import statistics
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distilfast.config import ConfigError
from distilfast.sources import lookup as names
from distilfast.tasks import squad

log = logging.getLogger("distilfast.tasks")

IGNORE_INDEX = -100  # the label of an example that has none
CHUNK = 10_000  # examples that are tokenised at a time: the tokenizer's own lists are large
PAD_TO = 8  # the width of a batch is a multiple of it


# --- Metrics: shares from 0 to 1, correlations from -1 to 1 ---------------------------------------


def _accuracy(labels: np.ndarray, predictions: np.ndarray) -> float:
    from sklearn.metrics import accuracy_score

    return float(accuracy_score(labels, predictions))


def _f1(labels: np.ndarray, predictions: np.ndarray) -> float:
    """Of class 1; 0 where neither labels nor predictions hold it."""
    from sklearn.metrics import f1_score

    return float(f1_score(labels, predictions, zero_division=0))


def _matthews(labels: np.ndarray, predictions: np.ndarray) -> float:
    """0 where the labels or the predictions are all the same."""
    from sklearn.metrics import matthews_corrcoef

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "A single label was found", UserWarning)
        return float(matthews_corrcoef(labels, predictions))


def _correlation(name: str) -> Callable[[np.ndarray, np.ndarray], float]:
    def correlation(labels: np.ndarray, predictions: np.ndarray) -> float:
        """NaN where the labels or the predictions are all the same."""
        from scipy import stats

        if len(labels) < 2:  # scipy raises, where it gives NaN for two equal ones
            return math.nan
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", stats.ConstantInputWarning)
            warnings.simplefilter("ignore", stats.NearConstantInputWarning)
            return float(getattr(stats, name)(labels, predictions).statistic)

    return correlation


METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "accuracy": _accuracy,
    "F1": _f1,
    "Matthews": _matthews,
    "Pearson": _correlation("pearsonr"),
    "Spearman": _correlation("spearmanr"),
}


# --- The tasks ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """A task of one or two texts an example, which are classified ("classes"), given a number
    ("number"), or of which the second holds the answer to the first ("spans").

    Args:
        name: as in the official folder.
        texts: the columns of the one or two texts, in the official files.
        label: the column of the label.
        classes: the labels, in the order of their numbers; () for the other kinds.
        spans: the label is a span of the second text. The files are SQuAD's.
        metrics: names in METRICS; the score is their mean. For spans, what the score is called.
        columns: of official files without a header line.
        dev: the files of the development sets; the first one counts.
        hub, hub_texts: the data set and its configuration on the hub, and its text columns, where
            they have other names. There, labels are numbers and -1 is none.
        hub_splits: the hub's names of train and of the development sets.
        epochs: of fine-tuning.
        max_length: tokens, the special ones included.
        lenient: lines with fields missing, which the official files hold, are left out.
    """

    name: str
    texts: tuple[str, ...]
    label: str = "label"
    classes: tuple[str, ...] = ("0", "1")
    spans: bool = False
    metrics: tuple[str, ...] = ("accuracy",)
    columns: tuple[str, ...] | None = None
    dev: tuple[str, ...] = ("dev",)
    hub: tuple[str, str | None] | None = None
    hub_texts: tuple[str, ...] | None = None
    hub_splits: tuple[str, ...] = ("train", "validation")
    epochs: int = 3
    max_length: int = 128
    lenient: bool = False

    @property
    def kind(self) -> str:
        return "spans" if self.spans else "classes" if self.classes else "number"

    @property
    def outputs(self) -> int:
        """Of the head: a logit a class, or one number; a token's start and end logit."""
        return 2 if self.spans else len(self.classes) or 1

    @property
    def metric(self) -> str:
        """What the score is, in words."""
        return (
            self.metrics[0] if len(self.metrics) == 1 else "mean of " + " and ".join(self.metrics)
        )

    def score(self, labels: Tensor, logits: Tensor) -> dict[str, float]:
        """The metrics and their mean, "score", each x 100.

        Args:
            labels: (n,) classes or numbers.
            logits: (n, outputs).

        A correlation that is not defined, as all predictions are the same, is NaN here and counts
        as 0 in the score, as Matthews' is 0 there. Of spans: `score`.
        """
        predictions = logits.argmax(-1) if self.classes else logits[:, 0]
        # float64, as predictions close together lose their correlation in scipy's float32
        pair = labels.double().cpu().numpy(), predictions.double().cpu().numpy()
        found = {name: 100 * METRICS[name](*pair) for name in self.metrics}
        counted = [0.0 if math.isnan(value) else value for value in found.values()]
        return {**found, "score": statistics.fmean(counted)}


ENTAILMENT = ("entailment", "not_entailment")
SENTENCES = ("sentence1", "sentence2")
GLUE_HUB = "nyu-mll/glue"
GLUE = {
    task.name: task
    for task in (
        Task(
            "CoLA",
            ("sentence",),
            metrics=("Matthews",),
            columns=("source", "label", "star", "sentence"),
            hub=(GLUE_HUB, "cola"),
        ),
        Task(
            "MNLI",
            SENTENCES,
            label="gold_label",
            classes=("entailment", "neutral", "contradiction"),
            dev=("dev_matched", "dev_mismatched"),
            hub=(GLUE_HUB, "mnli"),
            hub_texts=("premise", "hypothesis"),
            hub_splits=("train", "validation_matched", "validation_mismatched"),
        ),
        Task(
            "MRPC",
            ("#1 String", "#2 String"),
            label="Quality",
            metrics=("accuracy", "F1"),
            hub=(GLUE_HUB, "mrpc"),
            hub_texts=SENTENCES,
            epochs=5,
        ),
        Task(
            "QNLI",
            ("question", "sentence"),
            classes=ENTAILMENT,
            hub=(GLUE_HUB, "qnli"),
        ),
        Task(
            "QQP",
            ("question1", "question2"),
            label="is_duplicate",
            metrics=("accuracy", "F1"),
            hub=(GLUE_HUB, "qqp"),
            lenient=True,
        ),
        Task("RTE", SENTENCES, classes=ENTAILMENT, hub=(GLUE_HUB, "rte")),
        Task("SST-2", ("sentence",), hub=(GLUE_HUB, "sst2")),
        Task(
            "STS-B",
            SENTENCES,
            label="score",
            classes=(),
            metrics=("Pearson", "Spearman"),
            hub=(GLUE_HUB, "stsb"),
        ),
        Task("WNLI", SENTENCES, hub=(GLUE_HUB, "wnli"), epochs=5),
    )
}
IMDB = Task(
    "IMDb",
    ("text",),
    classes=("neg", "pos"),
    dev=("test",),
    hub=("stanfordnlp/imdb", None),
    hub_splits=("train", "test"),
    max_length=512,
)
# Epochs and lengths are BERT's (Devlin et al. 2019, section 4.2 and its code). DistilBERT's paper
# gives none; the learning rate and the batch are those of the other tasks.
SQUAD = Task(
    "SQuAD",
    ("question", "context"),
    label="answers",
    classes=(),
    spans=True,
    metrics=("F1",),
    hub=("rajpurkar/squad", None),
    epochs=2,
    max_length=384,
)
TASKS = {**GLUE, "IMDb": IMDB, "SQuAD": SQUAD}


def find(name: str, data: str, key: str = "--tasks") -> Task:
    """The task of a name, in any case and with or without its hyphen, or the user's own of that
    folder.

    Raises:
        ConfigError: neither.
    """
    plain = {_plain(known): task for known, task in TASKS.items()}
    if task := plain.get(_plain(name)):
        return task
    known = ", ".join(TASKS)
    folder = None if data in HUBS else names.local_path("--data", data)
    if folder is None and data not in HUBS:
        raise ConfigError(f"--data: expected a folder or {' or '.join(HUBS)}, got {data!r}")
    one_folder = Path(name).name == name not in ("", "..")  # nor "a/b": it names outputs too
    if folder is None or not one_folder or not (folder / name / "train.tsv").is_file():
        raise ConfigError(
            f"{key}: expected one of {known}, or the folder of one's own task with train.tsv and "
            f"dev.tsv in --data, got {name!r} and {data!r}"
        )
    return _own_task(name, folder / name / "train.tsv")


def _plain(name: str) -> str:
    return name.lower().replace("-", "")


def _own_task(name: str, file: Path) -> Task:
    """A task whose columns and classes are those of its training file."""
    header = next(iter(_lines(file)), [])
    texts = SENTENCES if "sentence1" in header else ("sentence",)
    task = Task(name, texts, classes=("",))
    found = {label for *_, label in _rows(file, task)}
    classes = tuple(
        sorted(found, key=lambda label: (len(label), label) if label.isdecimal() else (0, label))
    )
    if len(classes) < 2:
        raise ConfigError(f"{file}: expected at least two labels, got {', '.join(classes)!r} alone")
    return Task(name, texts, classes=classes)


# --- Reading --------------------------------------------------------------------------------------

HUBS = ("glue", "hub")  # what --data says for the hub


@dataclass(frozen=True)
class Examples:
    """Texts and labels, of one split."""

    texts: list[tuple[str, ...]]
    # Classes as numbers; IGNORE_INDEX: none. For spans the gold answers of each: squad.Answer.
    labels: list[Any]


def read(task: Task, data: str) -> dict[str, Examples]:
    """The splits of a task: train first, then the development sets.

    Args:
        data: a folder in the official layout (TASK/train.tsv, ...), or "glue" or "hub". That of
            IMDb may hold train/pos, that of SQuAD train-v1.1.json itself.

    Raises:
        ConfigError: a folder, column or field that is missing, a label outside the task (with the
            number of its line, or the question's id), an empty split.
    """
    folder = None if data in HUBS else names.local_path("--data", data)
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
    return loaded


def read_texts(file: Path, task: Task) -> Examples:
    """Unlabelled texts for a task, of a .tsv with its columns, or `sentence` or `sentence1`,
    `sentence2`, under a header line."""
    if not file.is_file():
        raise ConfigError(f"--transfer: expected a file, got {str(file)!r}")
    texts = task.texts
    if not set(texts) <= set(next(iter(_lines(file)), [])):
        texts = SENTENCES[: len(texts)] if len(texts) == 2 else ("sentence",)
    rows = _rows(file, Task(task.name, texts, label=texts[0]))
    if not rows:
        raise ConfigError(f"--transfer: expected texts in {str(file)!r}, got none")
    return Examples([row[:-1] for row in rows], [[] if task.spans else IGNORE_INDEX] * len(rows))


def _read_file(file: Path, task: Task) -> Examples:
    rows = _rows(file, task)
    return Examples([row[:-1] for row in rows], [float(row[-1]) for row in rows])


def _lines(file: Path) -> list[list[str]]:
    """The fields of every line; quotes are literal."""
    lines = _text(file).split("\n")
    if lines[-1] == "":
        lines.pop()
    return [line.removesuffix("\r").split("\t") for line in lines]


def _text(file: Path) -> str:
    try:
        return file.read_bytes().decode("utf-8-sig")  # read_text would end a line at a lone \r
    except FileNotFoundError:
        raise ConfigError(f"--data: expected the file {str(file)!r}, which is missing") from None
    except OSError as error:
        raise ConfigError(
            f"--data: expected the file {str(file)!r}, got {error.strerror}"
        ) from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{file}: expected UTF-8, got {error.reason} at byte {error.start}"
        ) from None


def _rows(file: Path, task: Task) -> list[tuple[Any, ...]]:
    """(text, label) or (text, text, label) of each line, the label as its number."""
    lines = _lines(file)
    header = task.columns or next(iter(lines), [])
    first = 0 if task.columns else 1
    wanted = (*task.texts, task.label)
    missing = [name for name in wanted if name not in header]
    if missing:
        raise ConfigError(
            f"{file}: expected the columns {', '.join(dict.fromkeys(wanted))}, got "
            f"{', '.join(header) or 'none'}"
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
            )
        *texts, label = (fields[place] for place in places)
        rows.append((*texts, _label(task, label, f"{file}, line {number}")))
    if short:
        log.warning("%s: %d lines have too few fields and are left out", file, short)
    return rows


def _label(task: Task, label: str, where: str) -> Any:
    if task.label in task.texts:  # none at all
        return label
    if task.classes == ("",):  # to be collected
        if not label:
            raise ConfigError(f"{where}: expected a label, got none")
        return label
    if task.classes:
        if label not in task.classes:
            raise ConfigError(
                f"{where}: expected a label of {', '.join(task.classes)}, got {label!r}"
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
    """aclImdb's layout: neg/*.txt and pos/*.txt."""
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
    names.require_hub("--data", name, repo_type="dataset")
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


# --- Tokens ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Encoded:
    """A split as tokens, one example after the other.

    input_ids, token_type_ids: (tokens,) int32. offsets: (n + 1,) int64, where each begins.
    labels: (n,) float32; the class' number, or IGNORE_INDEX.
    """

    input_ids: Tensor
    token_type_ids: Tensor
    offsets: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def lengths(self) -> Tensor:
        """(n,) tokens of each example."""
        return self.offsets.diff()

    def batch(self, rows: Tensor, pad_token: int) -> dict[str, Tensor]:
        """The inputs of a model for some examples, (B, L) each, L a multiple of PAD_TO."""
        real, places = self._places(rows)
        return {
            "input_ids": _padded(self.input_ids[places].long(), real, pad_token),
            "attention_mask": real.long(),
            "token_type_ids": _padded(self.token_type_ids[places].long(), real, 0),
        }

    def _places(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """(B, L) bool: where a batch holds a token; and which, the number of each."""
        lengths = self.offsets[rows + 1] - self.offsets[rows]
        column = torch.arange(-(-int(lengths.max()) // PAD_TO) * PAD_TO)
        real = column < lengths[:, None]
        return real, (self.offsets[rows][:, None] + column)[real]

    def empty_logits(self, outputs: int) -> Tensor:
        """For those of all examples, as `take` and `put` know them: (n, outputs) fp32."""
        return torch.zeros(len(self), outputs)

    def take(self, logits: Tensor, rows: Tensor) -> Tensor:
        """The logits of a batch, (B, outputs)."""
        return logits[rows]

    def put(self, logits: Tensor, rows: Tensor, batch: Tensor) -> None:
        """Store the logits of a batch."""
        logits[rows] = batch

    def __add__(self, other: Encoded) -> Encoded:
        """The examples of both."""
        return Encoded(
            torch.cat([self.input_ids, other.input_ids]),
            torch.cat([self.token_type_ids, other.token_type_ids]),
            torch.cat([self.offsets, other.offsets[1:] + self.offsets[-1]]),
            torch.cat([self.labels, other.labels]),
        )

    def tensors(self) -> dict[str, Tensor]:
        """By name, as they are saved."""
        return dict(vars(self))


@dataclass(frozen=True)
class Windows(Encoded):
    """Windows of questions and contexts; each is an example, and its tokens are the classes.

    labels: (n, 2), the positions of the answer's first and last token.
    questions: (n,) int32, the number of each window's question.
    chars: (tokens, 2) int32: where in the context each begins and ends; -1: not in it.
    source: uint8, JSON: the context and the texts of the gold answers of each question.

    Logits of all are one (tokens, 2) tensor, of a batch (B, 2, L) with -inf at the padding: two
    rows a window.
    """

    questions: Tensor
    chars: Tensor
    source: Tensor

    def empty_logits(self, outputs: int) -> Tensor:
        return torch.zeros(len(self.input_ids), outputs)

    def take(self, logits: Tensor, rows: Tensor) -> Tensor:
        real, places = self._places(rows)
        return _padded(logits[places], real, -math.inf).transpose(1, 2)

    def put(self, logits: Tensor, rows: Tensor, batch: Tensor) -> None:
        real, places = self._places(rows)
        logits[places] = batch.transpose(1, 2)[real]

    def answers(self, logits: Tensor) -> list[str]:
        """The text that answers each question.

        Args:
            logits: (tokens, 2).
        """
        bounds, chars = self.offsets.tolist(), self.chars.numpy()
        start, end = logits.float().numpy().T
        spans = (
            squad.best_span(start[a:b], end[a:b], chars[a:b]) for a, b in itertools.pairwise(bounds)
        )
        contexts = [context for context, _ in self._source()]
        return squad.answers(contexts, zip(self.questions.tolist(), spans, strict=True))

    def gold(self) -> list[list[str]]:
        """The texts of the gold answers of each question."""
        return [answers for _, answers in self._source()]

    def _source(self) -> list[tuple[str, list[str]]]:
        return json.loads(self.source.numpy().tobytes())

    def __add__(self, other: Encoded) -> Windows:
        """The windows of both."""
        assert isinstance(other, Windows)
        source = self._source()
        return Windows(
            **vars(super().__add__(other)),
            questions=torch.cat([self.questions, other.questions + len(source)]),
            chars=torch.cat([self.chars, other.chars]),
            source=_packed([*source, *other._source()]),
        )


def _padded(values: Tensor, real: Tensor, fill: float) -> Tensor:
    """(B, L, ...) with the values where there is a token."""
    made = values.new_full((*real.shape, *values.shape[1:]), fill)
    made[real] = values
    return made


def _packed(content: Any) -> Tensor:
    """JSON as bytes: a file of tensors holds nothing else."""
    return torch.frombuffer(bytearray(json.dumps(content).encode()), dtype=torch.uint8)


def encoded(tensors: dict[str, Tensor]) -> Encoded:
    """A split of its tensors by name."""
    return (Windows if "chars" in tensors else Encoded)(**tensors)


def predictions(task: Task, examples: Encoded, logits: Tensor) -> np.ndarray:
    """What a model says: (n,) classes or numbers, or the answer's text of each question.

    Args:
        logits: of all examples.
    """
    if isinstance(examples, Windows):
        return np.array(examples.answers(logits), dtype=object)
    return (logits.argmax(-1) if task.classes else logits[:, 0]).numpy()


def score(task: Task, examples: Encoded, logits: Tensor) -> dict[str, float]:
    """The metrics of a model and its "score", each x 100.

    Args:
        logits: of all examples.
    """
    if isinstance(examples, Windows):
        found = squad.score(examples.answers(logits), examples.gold())
        return {**found, "score": found["F1"]}
    return task.score(examples.labels, logits)


def encode_windows(
    examples: Examples,
    tokenizer: Any,
    max_length: int,
    tell: Callable[[int], None] = lambda done: None,
) -> Windows:
    """Questions and contexts as windows of at most ``max_length`` tokens."""
    made = []
    for window in squad.windows(examples.texts, tokenizer, max_length):
        made.append(window)
        tell(window.question)
    labels = [
        squad.positions(window.chars, answers[0]) if answers else (IGNORE_INDEX, IGNORE_INDEX)
        for window in made
        for answers in [examples.labels[window.question]]
    ]
    gold = [[text for text, _ in answers] for answers in examples.labels]
    contexts = [context for _, context in examples.texts]
    return Windows(
        torch.from_numpy(np.concatenate([window.input_ids for window in made])),
        torch.from_numpy(np.concatenate([window.token_type_ids for window in made])),
        torch.tensor([0, *(len(window.input_ids) for window in made)]).cumsum(0),
        torch.tensor(labels, dtype=torch.float32),
        torch.tensor([window.question for window in made], dtype=torch.int32),
        torch.from_numpy(np.concatenate([window.chars for window in made])),
        _packed(list(zip(contexts, gold, strict=True))),
    )


def encode(
    examples: Examples,
    tokenizer: Any,
    max_length: int,
    tell: Callable[[int], None] = lambda done: None,
) -> Encoded:
    """Tokens of texts; of a pair that is too long, the longer text is cut.

    Args:
        tell: is called with the number of examples that are done.
    """
    ids: list[np.ndarray] = []
    types: list[np.ndarray] = []
    for begin in range(0, len(examples.texts), CHUNK):
        columns = map(list, zip(*examples.texts[begin : begin + CHUNK], strict=True))
        # Types are asked for, as a store is shared by models whose tokenizers differ in that alone.
        made = tokenizer(
            *columns, truncation=True, max_length=max_length, return_token_type_ids=True
        )
        ids += (np.asarray(row, np.int32) for row in made["input_ids"])
        types += (np.asarray(row, np.int32) for row in made["token_type_ids"])
        tell(len(ids))
    return Encoded(
        torch.from_numpy(np.concatenate(ids)),
        torch.from_numpy(np.concatenate(types)),
        torch.tensor([0, *map(len, ids)]).cumsum(0),
        torch.tensor(examples.labels, dtype=torch.float32),
    )


def order(lengths: Tensor, batch_size: int, generator: torch.Generator) -> Sequence[Tensor]:
    """An epoch's batches: all examples in a random order, neighbours in length together.

    Of every 50 batches' worth of shuffled examples those of like length share a batch, and the
    batches are shuffled again. Only one batch of an epoch may be smaller.
    """
    shuffled = torch.randperm(len(lengths), generator=generator)
    batches: list[Tensor] = []
    for pool in shuffled.split(50 * batch_size):
        batches += pool[lengths[pool].argsort(stable=True)].split(batch_size)
    return [batches[i] for i in torch.randperm(len(batches), generator=generator)]
