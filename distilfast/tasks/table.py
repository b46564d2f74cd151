"""The tasks, a row each: columns, classes, what they are scored by."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

from torch import Tensor

from distilfast.tasks.metrics import METRICS


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
