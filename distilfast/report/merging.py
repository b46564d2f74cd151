"""Merges the reports of several runs: one table of models, shared plots, similar tables joined."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import yaml

from distilfast.report.content import Chart, ModelRow, Report, Sample, Table
from distilfast.report.numbers import counted, fixed
from distilfast.report.paired import claim, compared


def merge(reports: dict[str, Report]) -> Report:
    """Merge reports, given by the names of their runs. A single report is returned unchanged."""
    if len(reports) == 1:
        return next(iter(reports.values()))
    configs = {
        _of(run, name): text
        for run, report in reports.items()
        for name, text in _configs(run, report).items()
    }
    results = [
        [run, report.lead or report.title]
        for run, report in reports.items()
        if run not in {row.name for row in report.models}  # else that row is its result
    ]
    blocks = {
        _of(run, name): found
        for run, report in reports.items()
        for name, found in report.blocks.items()
    }
    return Report(
        title=f"{', '.join(reports)}: {counted(len(reports), 'run')} compared",
        lead=_lead(reports),
        models=_models(reports),
        curves={
            _of(run, name): lines
            for run, report in reports.items()
            for name, lines in report.curves.items()
        },
        samples=_samples(reports),
        facts=_facts(reports),
        config=configs,
        tables=[
            *compared(blocks),
            *([Table("Runs", ["run", "result"], results)] if results else []),
            *_what_differs(configs),
            *_merged(
                [(run, table) for run, report in reports.items() for table in report.tables],
                lambda table: (table.title, *table.columns),
                _table,
            ),
        ],
        charts=_merged(
            [(run, chart) for run, report in reports.items() for chart in report.charts],
            lambda chart: (chart.title, chart.unit, chart.zero),
            _chart,
        ),
        commands=list(dict.fromkeys(c for report in reports.values() for c in report.commands)),
        blocks=blocks,
    )


def _of(run: str, name: str) -> str:
    """Return the name that an item of a run has in a merged report."""
    return name if name == run else f"{run}: {name}"


def _lead(reports: dict[str, Report]) -> str:
    """Compare the students of two training runs, and say how sure that is."""
    rows = {run: row for run, report in reports.items() for row in report.models if row.name == run}
    if len(rows) != 2 or len(reports) != 2:
        return ""
    (ours, a), (theirs, b) = rows.items()
    verdict, evidence = claim(reports[ours].blocks.get(ours), reports[theirs].blocks.get(theirs))
    return (
        f"Held-out loss of {ours}: {fixed(a.eval_loss, 3)}, {verdict} the {fixed(b.eval_loss, 3)} "
        f"of {theirs}. {evidence}"
    )


def _models(reports: dict[str, Report]) -> list[ModelRow]:
    """Return all rows with their run's name.

    A row that is identical in several runs appears once, without a run's name.
    """
    rows = [(run, row) for run, report in reports.items() for row in report.models]
    count = Counter(row for _, row in rows)
    named = [row if count[row] > 1 else replace(row, name=_of(run, row.name)) for run, row in rows]
    return list(dict.fromkeys(named))


def _samples(reports: dict[str, Report]) -> list[Sample]:
    """Put the guesses of all runs for the same text side by side."""
    samples: dict[tuple[str, str | None], Sample] = {}
    for run, report in reports.items():
        for sample in report.samples:
            key = sample.text, sample.answer
            merged = samples.setdefault(key, Sample(sample.text, {}, sample.answer))
            merged.guesses.update({_of(run, name): g for name, g in sample.guesses.items()})
    return list(samples.values())


def _facts(reports: dict[str, Report]) -> dict[str, str]:
    """Return facts shared by all runs once, and the others with the run's name."""
    facts: dict[str, str] = {}
    for key in dict.fromkeys(key for report in reports.values() for key in report.facts):
        values = {run: report.facts.get(key) for run, report in reports.items()}
        if len(set(values.values())) == 1:
            facts[key] = str(values.popitem()[1])
        else:
            facts |= {f"{key}, {run}": v for run, v in values.items() if v is not None}
    return facts


Item = TypeVar("Item", Table, Chart)


def _merged(
    items: list[tuple[str, Item]],
    key: Callable[[Item], Hashable],
    join: Callable[[list[tuple[str, Item]]], Item],
) -> list[Item]:
    """Join items of several runs that have the same key. Others get the name of their run."""
    groups: dict[Hashable, list[tuple[str, Item]]] = {}
    for run, item in items:
        groups.setdefault(key(item), []).append((run, item))
    merged = []
    for group in groups.values():
        if len({run for run, _ in group}) > 1:
            merged.append(replace(join(group), caption=_captions(group)))
        else:
            merged += [replace(item, title=_of(run, item.title)) for run, item in group]
    return merged


def _captions(group: Sequence[tuple[str, Table | Chart]]) -> str:
    return " ".join(dict.fromkeys(item.caption for _, item in group if item.caption))


def _table(group: list[tuple[str, Table]]) -> Table:
    """Join the rows of all runs. Published rows, which the runs repeat, come last and once each."""
    own, published = [], {}
    for run, table in group:
        for i, (name, *cells) in enumerate(table.rows):
            if i in table.published:
                published[name, *cells] = [name, *cells]
            else:
                own.append([_of(run, name), *cells])
    rows = [*own, *published.values()]
    return replace(group[0][1], rows=rows, published=list(range(len(own), len(rows))))


def _chart(group: list[tuple[str, Chart]]) -> Chart:
    values = {_of(run, name): v for run, chart in group for name, v in chart.values.items()}
    return replace(group[0][1], values=values)


def _configs(run: str, report: Report) -> dict[str, str]:
    config = report.config
    return config if isinstance(config, dict) else {run: config} if config else {}


def flat_keys(text: str) -> dict[str, Any]:
    """Return a configuration's values by full key (section.key); empty if the text is none."""

    def flat(section: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for key, value in section.items():
            if isinstance(value, dict):
                yield from flat(value, f"{prefix}{key}.")
            else:
                yield f"{prefix}{key}", value

    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError:
        return {}
    return dict(flat(content, "")) if isinstance(content, dict) else {}


def _what_differs(configs: dict[str, str]) -> Iterator[Table]:
    """Yield a table of the keys in which the configurations differ, except `output`.

    `output` differs always.
    """
    runs = {run: flat_keys(text) for run, text in configs.items()}
    rows = []
    for key in dict.fromkeys(key for keys in runs.values() for key in keys if key != "output"):
        shown = {run: _shown(keys[key]) for run, keys in runs.items() if key in keys}
        if len(set(shown.values())) > 1:
            rows.append([key, *(shown.get(run, "") for run in runs)])
    if rows:
        yield Table("What differs", ["key", *runs], rows)


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
