"""The figures of a study: medians and spread over seeds, differences seed by seed, tables."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distilfast.machine import code_version
from distilfast.report import Table
from distilfast.studies.jobs import Result
from distilfast.tasks import GLUE, Task

# Sanh et al. 2019. First the two scores of table 1 (with and without WNLI), then the rest of table
# 1 (medians of 5 seeds on the development sets), then table 2 by column.
PUBLISHED: dict[str, tuple[tuple[float, float] | None, tuple[float, ...], dict[str, float]]] = {
    "ELMo": ((68.7, 70.2), (44.1, 68.6, 76.6, 71.1, 86.2, 53.4, 91.5, 70.4, 56.3), {}),
    "BERT-base": (
        (79.5, 82.75),
        (56.3, 86.7, 88.6, 91.8, 89.6, 69.3, 92.7, 89.0, 53.5),
        {"IMDb": 93.46, "SQuAD": 88.5, "SQuAD EM": 81.2},
    ),
    "DistilBERT": (
        (77.0, 79.6),
        (51.3, 82.2, 87.5, 89.2, 88.5, 59.9, 91.3, 86.9, 56.3),
        {"IMDb": 92.82, "SQuAD": 85.8, "SQuAD EM": 77.7},
    ),
    "DistilBERT, distilled again": (None, (), {"SQuAD": 86.9, "SQuAD EM": 79.1}),
}
MNLI_NOTE = (
    "* The published MNLI of BERT-base, 86.7, does not give its published score of 79.5; 84.7 does."
)


def summary(task: Task, found: Sequence[Result]) -> dict[str, Any]:
    """Return a model's figures on a task, with a score for each seed, x 100."""
    entry: dict[str, Any] = {"metric": task.metric, **over_seeds([r["score"] for r in found])}
    names = [m for m in found[0]["metrics"][task.dev[0]] if m != "score"]
    if len(names) > 1:
        for name in names:
            entry[name] = over_seeds([r["metrics"][task.dev[0]][name] for r in found])
    for other in task.dev[1:]:
        both = [[r["metrics"][split]["score"] for split in (task.dev[0], other)] for r in found]
        entry[other] = over_seeds([pair[1] for pair in both])
        entry[f"mean of {task.dev[0]} and {other}"] = over_seeds([sum(p) / 2 for p in both])
    entry["train_time_s"] = statistics.median(r["train_time_s"] for r in found)
    entry["settings"] = found[0]["settings"]
    return entry


def over_seeds(scores: Sequence[float | None]) -> dict[str, Any]:
    """Return scores, median and standard deviation.

    An undefined score is None, and does not count in median and standard deviation.
    """
    defined = [s for s in scores if s is not None and math.isfinite(s)]
    shown = [s if s in defined else None for s in scores]
    median = statistics.median(defined) if defined else None
    return {"scores": shown, "median": median, "stdev": _stdev(defined)}


def mean(values: Sequence[float | None]) -> float | None:
    """Return the mean of those that are defined; None if there are none."""
    defined = [value for value in values if value is not None]
    return statistics.fmean(defined) if defined else None


def _stdev(scores: Sequence[float]) -> float | None:
    return statistics.stdev(scores) if len(scores) > 1 else None


def median_score(found: Sequence[Result]) -> float:
    return statistics.median(r["score"] for r in found)


def macro(medians: Mapping[str, float], with_wnli: bool = True) -> float:
    """Return the mean over the tasks; NaN if there are none."""
    counted = [score for task, score in medians.items() if with_wnli or task != "WNLI"]
    return statistics.fmean(counted) if counted else float("nan")


def table(
    results: Mapping[str, Mapping[str, Any]], chosen: Sequence[Task], title: str, n_seeds: int
) -> Table:
    """Tabulate medians, standard deviations, both macro scores and the published rows.

    With several models, the last column is the score relative to the first model's.
    """
    known = [task.name for task in chosen]
    split_wnli = "WNLI" in known and len(known) > 1
    several = len(known) > 1
    heads = ["score"] * several + ["without WNLI"] * split_wnli
    first = next(iter(results), "")
    exact_match = [task.name for task in chosen if task.spans]
    shown = [*known, *(f"{task} EM" for task in exact_match)]
    columns = ["model", *heads, *shown, *([f"of {short(first)}"] if len(results) > 1 else [])]
    rows = []
    for name, found in results.items():
        medians = {task: found[task]["median"] for task in known}
        cells = [f"{macro(medians):.1f}"] * several
        cells += [f"{macro(medians, False):.1f}"] * split_wnli
        figures = [found[task] for task in known] + [found[task]["EM"] for task in exact_match]
        cells += [with_spread(figure["median"], figure["stdev"]) for figure in figures]
        if len(results) > 1:
            whole = macro({task: results[first][task]["median"] for task in known})
            cells.append(f"{macro(medians) / whole:.1%}" if whole else "")
        rows.append([short(name), *cells])
    published = published_rows(known, shown, several, split_wnli)
    rows += [[*row, *([""] if len(results) > 1 else [])] for row in published]
    notes = [
        f"Medians of {n_seeds} seeds on the development sets, ± standard deviation, times 100."
        if n_seeds > 1
        else "One seed, on the development sets, times 100.",
        "; ".join(f"{task.name}: {task.metric}" for task in chosen) + ".",
    ]
    if several:
        both = ", with and without WNLI." if split_wnli else "."
        notes.append(f"Score is the mean of the tasks shown{both}")
    if published:
        notes.append("Published: Sanh et al. 2019, on the official development sets.")
    if "MNLI" in known:
        notes.append(MNLI_NOTE)
    ours = len(rows) - len(published)
    return Table(title, columns, rows, " ".join(notes), list(range(ours, len(rows))))


def published_rows(
    known: Sequence[str], shown: Sequence[str], several: bool, split_wnli: bool
) -> list[list[str]]:
    """Return rows for the models that have a published figure for one of the tasks.

    Args:
        known: the tasks.
        shown: the columns of the tasks' figures.
    """
    rows = []
    for name, (scores, by_task, others) in PUBLISHED.items():
        figures = {**dict(zip(GLUE, by_task, strict=False)), **others}
        medians = {task: figures[task] for task in known if task in figures}
        if not medians:
            continue
        complete = set(medians) == set(known)
        whole = macro(medians) if complete else None
        without = macro(medians, False) if complete else None
        if scores and set(known) == set(GLUE):
            whole, without = scores  # published scores; they may differ from the tasks' mean
        heads = [whole] * several + [without] * split_wnli
        cells = ["" if value is None else f"{value:.1f}" for value in heads]
        for column in shown:
            mark = "*" if (name, column) == ("BERT-base", "MNLI") else ""
            cells.append(f"{figures[column]}{mark}" if column in figures else "")
        rows.append([name, *cells])
    return rows


def facts(what: Mapping[str, Any]) -> dict[str, str]:
    """Return what a page says of how it was made: a study's settings, and the code."""
    known = {key: str(value) for key, value in what.items() if value is not None}
    return {**known, "code": code_version()}


def with_spread(median: float | None, stdev: float | None) -> str:
    if median is None:
        return ""
    return f"{median:.1f}" if stdev is None else f"{median:.1f} ± {stdev:.1f}"


def short(name: str) -> str:
    """Shorten a model's name for tables: runs/X/model becomes the run's name."""
    path = Path(name)
    return path.parent.name if path.name == "model" and path.parent.name else path.name


@dataclass(frozen=True)
class Difference:
    """The difference of one row from another, with a value for each seed: None if one of the two
    is not defined. Such a seed does not count in the figures."""

    values: list[float | None]

    @property
    def defined(self) -> list[float]:
        return [value for value in self.values if value is not None]

    @property
    def mean(self) -> float | None:
        return mean(self.values)

    @property
    def stdev(self) -> float | None:
        """The sample's standard deviation; None for a single seed."""
        return _stdev(self.defined)

    @property
    def p(self) -> float | None:
        """The p of a two-sided paired t-test; None for a single seed or equal differences."""
        from scipy import stats

        if not self.stdev:
            return None
        return float(stats.ttest_1samp(self.defined, 0.0).pvalue)

    def cells(self, digits: int) -> list[str]:
        """Format mean ± standard deviation, and p, for a table."""
        if self.mean is None:
            return ["", ""]
        spread = "" if self.stdev is None else f" ± {self.stdev:.{digits}f}"
        p = "" if self.p is None else "< 0.001" if self.p < 0.001 else f"{self.p:.3f}"
        return [f"{self.mean:+.{digits}f}{spread}", p]


def difference(ours: Sequence[float | None], baseline: Sequence[float | None]) -> Difference:
    """Return the differences, paired by seed."""
    pairs = zip(ours, baseline, strict=True)
    return Difference([None if a is None or b is None else a - b for a, b in pairs])
