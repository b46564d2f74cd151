"""Writes the page, one self-contained HTML file, and the same content as JSON beside it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path

from distilfast import atomic
from distilfast.report.content import ModelRow, Report, Table
from distilfast.report.numbers import count, duration, fixed, percent
from distilfast.report.plots import (
    SMOOTHING,
    forest,
    heldout_panels,
    levels_of,
    number,
    styles_of,
    training_panels,
)


def write_report(report: Report, path: Path) -> Path:
    """Write the report as one HTML file, and as JSON beside it for `read_report`; return the path.

    Each file appears whole or not at all; until then an earlier one stays. The same report gives
    the same bytes. Missing folders are created.
    """
    page = _render(report).encode("utf-8", "replace")
    data = json.dumps(report, default=vars).encode()
    atomic.write(path.with_suffix(".json"), data)
    atomic.write(path, page)
    return path


def _figures(table: Table) -> list[bool]:
    """Return for each column whether it holds numbers. Numbers are set flush right."""
    figure = re.compile(r"([-+−~<>≥≤ ]*(\d|NaN|∞|–).*)?", re.DOTALL)
    columns = zip(*table.rows, strict=True) if table.rows else [()] * len(table.columns)
    return [all(map(figure.fullmatch, column)) for column in columns]


def _best_students(models: Sequence[ModelRow]) -> set[str]:
    """Return the students with the lowest held-out loss, if there are at least two students."""
    losses = {
        row.name: loss
        for row in models
        if row.eval_agreement is not None and math.isfinite(loss := number(row.eval_loss))
    }
    best = {name for name, loss in losses.items() if loss == min(losses.values())}
    return best if len(best) < len(losses) else set()


def _render(report: Report) -> str:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(
        count=count,
        duration=duration,
        fixed=fixed,
        percent=percent,
        width=lambda p: f"{100 * min(max(p, 0.0), 1.0):.1f}%" if math.isfinite(p) else "0%",
    )
    styles = styles_of(report.curves)
    heldout = heldout_panels(report, styles)
    training = training_panels(report, styles)
    drawn = {run for panel in heldout + training for run in panel["runs"]}
    several = isinstance(report.config, dict)
    return environment.get_template("page.html.j2").render(
        report=report,
        configs=report.config if several else {"": report.config} if report.config else {},
        tables=[(table, _figures(table)) for table in report.tables],
        charts=[forest(chart) for chart in report.charts],
        styles=styles,
        best=_best_students(report.models),
        levels=levels_of(report),
        heldout=heldout,
        training=training,
        drawn=drawn,
        smoothing_percent=100 // SMOOTHING,
        has_answers=any(sample.answer is not None for sample in report.samples),
    )
