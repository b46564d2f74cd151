"""The tasks, one entry each: columns, classes, metrics."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

from torch import Tensor

from distilfast.tasks.metrics import METRICS


@dataclass(frozen=True)
class Task:
    """A task whose examples are one or two texts.

    Its kind is "classes" (texts are classified), "number" (texts are given a number) or "spans"
    (the second text holds the answer to the first).

    Args:
        name: the name of the official folder.
        texts: the columns of the one or two texts, in the official files.
        label: the column of the label.
        classes: the labels, in the order of their numbers; () for the other kinds.
        spans: the label is a span of the second text. The files are in SQuAD's format.
        metrics: names in METRICS; the score is their mean. For spans, the name of the score.
        columns: the columns of official files that have no header line.
        dev: the files of the development sets; the score is that of the first.
        hub, hub_texts: the data set and its configuration on the hub, and its text columns if they
            have other names there. On the hub labels are numbers, and -1 means no label.
        hub_splits: the hub's names of the training set and of the development sets.
        epochs: the epochs of fine-tuning.
        max_length: tokens, special tokens included.
        lenient: leave out lines with missing fields, which the official files contain.
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
        """The outputs of the head: a logit for each class, one number, or for spans the two logits
        of a token, start and end."""
        return 2 if self.spans else len(self.classes) or 1

    @property
    def metric(self) -> str:
        """The score's name in words."""
        return (
            self.metrics[0] if len(self.metrics) == 1 else "mean of " + " and ".join(self.metrics)
        )

    def score(self, labels: Tensor, logits: Tensor) -> dict[str, float]:
        """Return the metrics and their mean, "score", each x 100. For spans see `score`.

        Args:
            labels: (n,) classes or numbers.
            logits: (n, outputs).

        If all predictions are the same, a correlation is not defined: the metric is NaN, and counts
        as 0 in the score. Matthews' correlation is 0 then.
        """
        predictions = logits.argmax(-1) if self.classes else logits[:, 0]
        # float64: in float32, scipy loses the correlation of predictions that are close together.
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
# Epochs and lengths are those of BERT (Devlin et al. 2019, section 4.2 and its code), as
# DistilBERT's paper gives none. Learning rate and batch are those of the other tasks.
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
