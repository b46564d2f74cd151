"""Draws curves and charts as SVG."""

from __future__ import annotations

import io
import math
import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from distilfast.loss_parts import LOGGED
from distilfast.report.content import Chart, ModelRow, Report
from distilfast.report.numbers import fixed

_MAX_POINTS = 400  # about the most points that a plot of this size can show
EARLY = 0.25  # the share of a run whose values may lie beyond the axis
SQUEEZE = 2.0  # they may if the rest would else have less than half of it
SMOOTHING = 50  # the window of the running mean is 1/50 of a run
HELDOUT_TITLES = {
    "eval_loss": ("Held-out loss", "nats"),
    "eval_accuracy": ("Held-out accuracy", "share of tokens"),
    "eval_kl": ("Held-out KL to the teacher", "nats"),
}


@dataclass(frozen=True)
class Curve:
    """One line of a plot; NaN is a gap."""

    run: str
    steps: list[float]
    values: list[float]


@dataclass(frozen=True)
class Style:
    """The look of a run in all plots and legends: a colour of the style sheet and a dash."""

    colour: int
    dash: str  # the SVG's stroke-dasharray, in user units; "" is a solid line


def number(value: object) -> float:
    """Return a float that can be drawn, else NaN: beyond 1e30 matplotlib's arithmetic overflows."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e30:
        return math.nan
    return float(value)


def curve_of(run: str, lines: Iterable[dict[str, Any]], key: str) -> Curve | None:
    """Return the curve of one key against step; None if there is nothing to draw."""
    # A resumed run may have logged a step twice; the later line counts.
    points = {number(line.get("step")): number(line[key]) for line in lines if key in line}
    steps = sorted(step for step in points if not math.isnan(step))
    values = [points[step] for step in steps]
    return None if all(math.isnan(value) for value in values) else Curve(run, steps, values)


def _evenly(indices: Sequence[int]) -> list[int]:
    """Pick at most _MAX_POINTS evenly spaced indices, including the first and the last."""
    count = min(len(indices), _MAX_POINTS)
    return [indices[round(i * (len(indices) - 1) / max(count - 1, 1))] for i in range(count)]


def thin(curve: Curve, window: int = 1) -> Curve:
    """Pick about _MAX_POINTS of the curve's points; each becomes the mean of a centred window.

    The window narrows towards the first point, so that the steep start of a run is not flattened.
    At the last point it is cut off. A NaN stays a gap, and does not count in another point's mean.
    """
    finite = [i for i, value in enumerate(curve.values) if not math.isnan(value)]
    # Pick evenly from all points, which shows the gaps, and from the finite ones, which may be few.
    picked = sorted({*_evenly(range(len(curve.values))), *_evenly(finite)})

    def mean(i: int) -> float:
        half = min(window // 2, i)
        near = [v for v in curve.values[i - half : i + half + 1] if not math.isnan(v)]
        return curve.values[i] if math.isnan(curve.values[i]) else math.fsum(near) / len(near)

    return Curve(curve.run, [curve.steps[i] for i in picked], [mean(i) for i in picked])


# Placeholder colours: drawn by matplotlib, then replaced by variables of the style sheet.
_INK = {"#010000": "var(--muted)", "#020000": "var(--rule)"}
_SERIES = {f"#0000{i:02x}": f"var(--series-{i})" for i in range(1, 9)}


def styles_of(runs: Iterable[str]) -> dict[str, Style]:
    count = len(_SERIES)
    dashes = ("", "6 3", "2 2")
    return {
        run: Style(i % count + 1, dashes[i // count % len(dashes)]) for i, run in enumerate(runs)
    }


def _plot(
    name: str,
    curves: Sequence[Curve],
    styles: dict[str, Style],
    *,
    references: Sequence[float] = (),
    window: tuple[float, float] | None = None,
    percent: bool = False,
    log: bool = False,
) -> str:
    """Draw the curves against step as an SVG element, with a dashed level for each reference.

    ``window`` is the range of the axis; None: all values.
    Its only text is numbers and the word "step". Names stand in the page's own legend: there they
    wrap, are escaped once, and need no font that matplotlib knows.
    """
    import matplotlib
    from matplotlib import ticker
    from matplotlib.figure import Figure

    muted, rule = _INK
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # the user's matplotlibrc must not show in the page
        matplotlib.rcParams.update(
            {
                "svg.fonttype": "none",
                "svg.hashsalt": f"distilfast {name}",  # unique per plot: ids share the page
                "font.size": 12.5,
                "axes.edgecolor": rule,
                "axes.linewidth": 1.0,
                "axes.spines.left": False,
                "axes.spines.right": False,
                "axes.spines.top": False,
                "axes.grid": True,
                "axes.grid.axis": "y",
                "axes.axisbelow": True,
                "axes.labelcolor": muted,
                "axes.labelsize": 12.5,
                "grid.color": rule,
                "grid.linewidth": 1.0,
                "xtick.color": rule,
                "xtick.labelcolor": muted,
                "ytick.labelcolor": muted,
                "ytick.major.size": 0,
                "ytick.minor.size": 0,
                "lines.solid_capstyle": "round",
            }
        )
        figure = Figure(figsize=(440 / 72, 264 / 72), layout="constrained")
        axes = figure.add_subplot()
        for level in references:
            axes.axhline(level, color=muted, linewidth=1.4, dashes=(4, 3))
        for curve in curves:
            style = styles[curve.run]
            dash = tuple(float(length) / 2 for length in style.dash.split())
            axes.plot(
                curve.steps,
                curve.values,
                color=list(_SERIES)[style.colour - 1],
                linewidth=2.0,
                linestyle=(0, dash) if dash else "-",
                marker="o" if len(curve.steps) <= 30 else "",  # a single point has no line
                markersize=4.5,
                markeredgewidth=0,
            )
        end = max(max(curve.steps) for curve in curves) or 1.0
        axes.set_xlim(-0.015 * end, 1.015 * end)
        if log:
            axes.set_yscale("log")
            bottom, top = axes.get_ylim()
            subs = (1.0, 2.0, 5.0) if top < 1e3 * bottom else (1.0,)
            axes.yaxis.set_major_locator(ticker.LogLocator(subs=subs))
            axes.yaxis.set_minor_locator(ticker.NullLocator())
        else:
            if window:
                axes.set_ylim(*window)
            axes.yaxis.set_major_locator(ticker.MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        axes.yaxis.set_major_formatter(
            ticker.PercentFormatter(1.0, symbol=" %")
            if percent
            else ticker.FuncFormatter(lambda value, _: f"{value:,.6g}")
        )
        axes.xaxis.set_major_locator(ticker.MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
        axes.xaxis.set_major_formatter(ticker.StrMethodFormatter("{x:,.0f}"))
        axes.set_xlabel("step")
        buffer = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    return _inline(buffer.getvalue())


def _inline(document: str) -> str:
    """Turn matplotlib's SVG document into an element of an HTML page that styles it."""
    view_box = re.search(r'viewBox="[^"]*"', document)
    assert view_box is not None
    body = document[document.index(">", view_box.end()) + 1 :]
    body = re.sub(r"<style\b.*?</style>", "", body, flags=re.DOTALL)  # it would style the page
    referenced = set(re.findall(r'(?:url\(|href=")#([^)"]+)', body))
    body = re.sub(r' id="([^"]*)"', lambda match: match[0] if match[1] in referenced else "", body)
    body = re.sub(r"font(?:-family)?: [^;\"]*;? ?", "", body)
    for drawn, variable in {**_INK, **_SERIES}.items():
        body = body.replace(drawn, variable)
    return f"<svg {view_box[0]}>{body.strip()}"


def forest(chart: Chart) -> dict[str, Any]:
    """Return the template's variables for a chart: places in percent of the axis, and labels.

    Names are HTML beside the strips, and places are in percent, so nothing has to be scaled: dots
    and text have the same size on a telephone as elsewhere.
    """
    from matplotlib.ticker import MaxNLocator

    finite = {
        name: [v for v in map(number, values) if not math.isnan(v)]
        for name, values in chart.values.items()
    }
    drawn = [v for values in finite.values() for v in values] + [0.0] * chart.zero or [0.0]
    margin = 0.05 * (max(drawn) - min(drawn) or abs(drawn[0]) or 1.0)
    low, high = min(drawn) - margin, max(drawn) + margin
    ticks = MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
    digits = max(0, 1 - math.floor(math.log10(ticks[1] - ticks[0])))  # enough for a tenth of a tick

    def share(value: float) -> float:
        return (value - low) / (high - low)

    def place(value: float) -> str:
        return f"{100 * share(value):.2f}%"

    def signed(text: str, value: float) -> str:
        return f"+{text}" if chart.zero and value > 0 else text.replace("-", "−")

    def anchor(value: float) -> str:
        return "start" if share(value) < 0.08 else "end" if share(value) > 0.92 else "middle"

    rows = []
    for name, values in finite.items():
        median = statistics.median(values) if values else math.nan
        lost = len(chart.values[name]) - len(values)
        note = f"{lost} of {len(chart.values[name])} not finite" if lost else ""
        label = signed(fixed(median, digits), median) if values else "–"
        middle = place(median) if values else None
        dots = [place(value) for value in values]
        rows.append(dict(name=name, note=note, dots=dots, median=middle, label=label))
    return dict(
        title=chart.title,
        unit=chart.unit,
        caption=chart.caption,
        rows=rows,
        ticks=[(place(t), signed(f"{t:,.6g}", t), anchor(t)) for t in ticks if low <= t <= high],
        zero=place(0.0) if chart.zero else None,
    )


def window_of(curves: Sequence[Curve], levels: Sequence[float]) -> tuple[float, float] | None:
    """Return the range of the axis that shows where the runs end and how they differ there.

    It holds the levels and all but the first quarter of each run. None if that fills most of the
    axis anyway. A student that begins with random weights falls by several nats within a few steps,
    and next to that the difference between two students could not be seen.
    """
    finite = [
        (step, value, curve.steps[-1])
        for curve in curves
        for step, value in zip(curve.steps, curve.values, strict=True)
        if not math.isnan(value)
    ]
    values = [*(value for _, value, _ in finite), *levels]
    later = [*(value for step, value, last in finite if step >= last * EARLY), *levels]
    if not later or max(values) - min(values) <= SQUEEZE * (max(later) - min(later)):
        return None
    margin = 0.05 * (max(later) - min(later)) or 0.05 * (max(values) - min(values))
    low, high = min(later) - margin, max(later) + margin
    return max(low, min(values) - margin), min(high, max(values) + margin)


def _cut(curves: Sequence[Curve], window: tuple[float, float] | None, percent: bool) -> str:
    """Say what lies outside the axis."""
    if window is None:
        return ""
    values = [value for curve in curves for value in curve.values if not math.isnan(value)]
    low, high = (f"{100 * x:.3g} %" if percent else f"{x:,.3g}" for x in (min(values), max(values)))
    cut = [f"down to {low}"] if min(values) < window[0] else []
    cut += [f"up to {high}"] if max(values) > window[1] else []
    return f"Early values, {' and '.join(cut)}, are beyond the axis."


def _panel(
    key: str,
    title: str,
    unit: str,
    curves: Sequence[Curve],
    svg: str,
    has_gaps: bool,
    note: str = "",
) -> dict[str, Any]:
    runs = [curve.run for curve in curves]
    label = f"{title} ({unit}) against step: {', '.join(runs)}"
    named = dict(key=key, title=title, unit=unit, label=label, note=note)
    return dict(**named, runs=runs, svg=svg, gaps=has_gaps)


def levels_of(report: Report) -> list[ModelRow]:
    """Return the teachers whose figures are drawn as levels in the held-out plots: those that no
    curve shows."""
    return [
        row
        for row in report.models
        if row.is_teacher
        and row.name not in report.curves
        and not all(math.isnan(number(getattr(row, key))) for key in HELDOUT_TITLES)
    ]


def heldout_panels(report: Report, styles: dict[str, Style]) -> list[dict[str, Any]]:
    panels = []
    for key, (title, unit) in HELDOUT_TITLES.items():
        whole = [curve_of(run, lines, key) for run, lines in report.curves.items()]
        curves = [thin(curve) for curve in whole if curve is not None]
        if curves:
            levels = [number(getattr(row, key)) for row in levels_of(report)]
            levels = [level for level in levels if not math.isnan(level)]
            percent, window = key == "eval_accuracy", window_of(curves, levels)
            svg = _plot(key, curves, styles, references=levels, window=window, percent=percent)
            note = _cut(curves, window, percent)
            panels.append(_panel(key, title, unit, curves, svg, _has_gap(whole), note))
    return panels


def training_panels(report: Report, styles: dict[str, Style]) -> list[dict[str, Any]]:
    panels = []
    for key, (title, unit) in LOGGED.items():
        whole = [curve_of(run, lines, key) for run, lines in report.curves.items()]
        curves = [
            thin(curve, window=len(curve.steps) // SMOOTHING)
            for curve in whole
            if curve is not None and any(curve.values)  # a part of weight 0 is logged as 0
        ]
        if curves:
            drawn = [v for curve in curves for v in curve.values if not math.isnan(v)]
            log = min(drawn) > 0 and max(drawn) > 8 * min(drawn)
            window = None if log else window_of(curves, [])
            svg = _plot(key, curves, styles, window=window, log=log)
            unit, note = f"{unit}, log scale" if log else unit, _cut(curves, window, False)
            panels.append(_panel(key, title, unit, curves, svg, _has_gap(whole), note))
    return panels


def _has_gap(curves: Iterable[Curve | None]) -> bool:
    return any(math.isnan(v) for curve in curves if curve is not None for v in curve.values)
