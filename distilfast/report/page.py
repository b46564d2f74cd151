"""Writes the page, one self-contained HTML file, and the same content as JSON beside it."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

from distilfast import atomic
from distilfast.report.content import Report, Table
from distilfast.report.numbers import count, duration, fixed, percent
from distilfast.report.paired import paired
from distilfast.report.plots import (
    SMOOTHING,
    forest,
    heldout_panels,
    levels_of,
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


def _best_students(report: Report) -> set[str]:
    """Return the students with the lowest held-out loss, if there are at least two students and no
    other is known to be not distinguishable from them."""
    losses = {
        row.name: row.eval_loss
        for row in report.models
        if not row.is_teacher and row.eval_loss is not None and math.isfinite(row.eval_loss)
    }
    best = {name for name, loss in losses.items() if loss == min(losses.values())}
    others = losses.keys() - best
    pairs = [paired(report.blocks.get(a), report.blocks.get(b)) for a in others for b in best]
    return best if others and all(p is None or p.verdict == "higher than" for p in pairs) else set()


def _render(report: Report) -> str:
    import jinja2
    from markupsafe import Markup, escape

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(
        # A key of a configuration breaks after its dots and underscores, not within a word.
        breakable=lambda text: Markup(re.sub(r"([._])(?=\w)", r"\1<wbr>", str(escape(text)))),
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
        best=_best_students(report),
        causal=any(row.eval_kl is not None for row in report.models),
        levels=levels_of(report),
        heldout=heldout,
        training=training,
        drawn=drawn,
        smoothing_percent=100 // SMOOTHING,
        has_answers=any(sample.answer is not None for sample in report.samples),
    )
