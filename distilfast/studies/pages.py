"""The pages of runs, made from the files that they left.

    distilfast report RUN [NAME=RUN ...] [--output FILE]

A run is the folder of any command. Several become one page: their models in one table, their
curves in one plot, tables and charts of one title merged, and what differs between their
configurations.
"""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import yaml

from distilfast.config import ConfigError, expect
from distilfast.report import (
    Chart,
    ModelRow,
    Report,
    Sample,
    Table,
    read_metrics,
    read_report,
    write_report,
)
from distilfast.studies.flags import Parser

COMMAND = "distilfast report"


def main(arguments: Sequence[str]) -> int:
    """The command line; returns the exit status.

    Raises:
        ConfigError: in one line, whatever was wrong.
    """
    parser = Parser(prog=COMMAND, description="One page that compares runs.")
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="folder of a run, or NAME=FOLDER to name it"
    )
    parser.add_argument(
        "--output",
        default="runs-report.html",
        metavar="FILE",
        help="the page, with its JSON beside it (default: %(default)s)",
    )
    given = parser.parse_args(list(arguments))
    folders = [_named(run) for run in given.runs]
    for name, count in Counter(name for name, _ in folders).items():
        if count > 1:
            raise ConfigError(f"RUN: expected names that differ, got {name!r} twice; try NAME=RUN")
    output = Path(given.output)
    _check_output(output)
    report = merge({name: read_run(folder, name) for name, folder in folders})
    again = shlex.join([*COMMAND.split(), *arguments])
    try:
        write_report(replace(report, commands=[*report.commands, again]), output)
    except OSError as error:
        raise ConfigError(f"--output: expected a file that can be written, got {error}") from error
    print(output)
    return 0


def _named(run: str) -> tuple[str, Path]:
    name, equals, folder = run.partition("=")
    if not equals or Path(run).is_dir():  # a folder may have the sign in its name
        name, folder = Path(run).resolve().name, run
    expect(bool(name), "RUN", "a name before =", run)
    expect(Path(folder).is_dir(), "RUN", "a folder", folder)
    return name, Path(folder)


def _check_output(output: Path) -> None:
    """That nothing but an earlier page of this command is overwritten, nor its JSON."""
    expect(output.suffix == ".html", "--output", "a file named *.html", str(output))
    data = output.with_suffix(".json")
    if output.exists() or data.exists():
        try:
            ours = read_report(data).commands[-1:]
        except (OSError, ValueError):
            ours = []
        expected = f"a new file, or a page of `{COMMAND}`"
        expect(bool(ours) and ours[0].startswith(COMMAND), "--output", expected, str(output))


# --- One run --------------------------------------------------------------------------------------


def read_run(folder: Path, name: str) -> Report:
    """The report of a run: of training from its own files, finished or not; else report.json.

    Raises:
        ConfigError: there is neither, or one of the files is damaged.
    """
    try:
        if (folder / "metrics.jsonl").is_file():
            return _read_training(folder, name)
        if (folder / "report.json").is_file():
            return read_report(folder / "report.json")
    except (OSError, ValueError) as error:
        raise ConfigError(f"RUN: {' '.join(str(error).split())}") from error
    raise ConfigError(
        f"RUN: expected a folder with metrics.jsonl or report.json, got {str(folder)!r}"
    )


def _read_training(folder: Path, name: str) -> Report:
    config = (folder / "config.yaml").read_text(encoding="utf-8")
    if not _keys(config):
        raise ValueError(f"{folder / 'config.yaml'}: expected a mapping of keys in YAML")
    lines = read_metrics(folder / "metrics.jsonl")
    path = folder / "summary.json"
    try:
        summary = json.loads(path.read_bytes()) if path.is_file() else None
        return training_report(folder, config, lines, summary, name)
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise ValueError(f"{path}: expected the summary of a run, got {error!r}") from error


def training_report(
    output: Path,
    config: str,
    lines: list[dict[str, Any]],
    summary: dict[str, Any] | None,
    name: str | None = None,
) -> Report:
    """The report of `distilfast train`.

    Args:
        output: the run's folder.
        config: the YAML of its configuration.
        lines: of its metrics.
        summary: what summary.json holds; None: the run is not finished.
        name: of the run and its student; None: the folder's.
    """
    name = name or output.name
    report = Report(name, "", [], {name: lines}, [], {}, config, commands=[train_command(output)])
    if summary is None:
        steps = [line["step"] for line in lines if isinstance(line.get("step"), int)]
        return replace(report, lead=f"Not finished: {max(steps, default=0):,} steps so far.")
    last = summary["scores"]["student"]
    return replace(
        report,
        title=f"{name}: {summary['parameters'] / 1e6:.1f} M parameters",
        lead=f"Held-out loss {last['eval_loss']:.3f}, accuracy {last['eval_accuracy']:.1%} after "
        f"{summary['steps']:,} steps.",
        models=list(_rows(name, summary)),
        facts={"device": summary["device"], "tokens": f"{summary['tokens']:,}"},
    )


def train_command(output: Path) -> str:
    """What makes a run again, or goes on with it."""
    return shlex.join(["distilfast", "train", "--config", str(output / "config.yaml")])


def _rows(name: str, summary: dict[str, Any]) -> Iterator[ModelRow]:
    for model, scores in summary["scores"].items():
        teacher, trained = model.startswith("teacher"), model == "student"
        parameters = summary.get("teacher_parameters") if teacher else summary["parameters"]
        if parameters is not None:  # else a summary from before teachers were counted
            yield ModelRow(
                name=name if trained else model,
                parameters=parameters,
                size_mib=parameters * 4 / 2**20,
                train_time_s=summary["seconds"] if trained else None,
                steps=summary["steps"] if trained else None,
                **scores,
            )


# --- Several runs ---------------------------------------------------------------------------------


def merge(reports: dict[str, Report]) -> Report:
    """One report of several, by the names of the runs; of one, that report."""
    if len(reports) == 1:
        return next(iter(reports.values()))
    configs = {
        _of(run, name): text
        for run, report in reports.items()
        for name, text in _configs(run, report).items()
    }
    results = [[run, report.lead or report.title] for run, report in reports.items()]
    return Report(
        title=f"{', '.join(reports)}: {len(reports)} runs compared",
        lead="",
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
            Table("Runs", ["run", "result"], results),
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
    )


def _of(run: str, name: str) -> str:
    """What something of a run is called among the others'."""
    return name if name == run else f"{run}: {name}"


def _models(reports: dict[str, Report]) -> list[ModelRow]:
    """Every row under its run's name; once, and without, where several runs have the very same."""
    rows = [(run, row) for run, report in reports.items() for row in report.models]
    count = Counter(row for _, row in rows)
    named = [row if count[row] > 1 else replace(row, name=_of(run, row.name)) for run, row in rows]
    return list(dict.fromkeys(named))


def _samples(reports: dict[str, Report]) -> list[Sample]:
    """The guesses of all runs at the same text side by side."""
    samples: dict[tuple[str, str | None], Sample] = {}
    for run, report in reports.items():
        for sample in report.samples:
            key = sample.text, sample.answer
            merged = samples.setdefault(key, Sample(sample.text, {}, sample.answer))
            merged.guesses.update({_of(run, name): g for name, g in sample.guesses.items()})
    return list(samples.values())


def _facts(reports: dict[str, Report]) -> dict[str, str]:
    """Once what holds for all runs, and the rest with the run's name."""
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
    """Items of one key and several runs joined; those of a single run under its name."""
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
    """The rows of all, then those of others, which the runs repeat, once each."""
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


# --- Configurations -------------------------------------------------------------------------------


def _configs(run: str, report: Report) -> dict[str, str]:
    config = report.config
    return config if isinstance(config, dict) else {run: config} if config else {}


def _keys(text: str) -> dict[str, Any]:
    """The keys of a configuration, those of a section with its name; empty: it is not one."""

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
    """The keys that several configurations have, with different values; but for where the output
    goes, which always differs."""
    runs = {run: _keys(text) for run, text in configs.items()}
    rows = []
    for key in dict.fromkeys(key for keys in runs.values() for key in keys if key != "output"):
        shown = {run: _shown(keys[key]) for run, keys in runs.items() if key in keys}
        if len(set(shown.values())) > 1:
            rows.append([key, *(shown.get(run, "") for run in runs)])
    if rows:
        yield Table("What differs", ["key", *runs], rows)


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
