"""The HTML report of a run: one self-contained page of tables, plots, samples and commands.

    from distilfast.report import ModelRow, Report, read_metrics, read_report, write_report

The page needs no network, no JavaScript and no second file. Its plots are inlined SVG whose
colours are variables of the page's style sheet, so that they follow its light and dark modes.
Importing this module is cheap: matplotlib and jinja2 are imported when a report is written.
"""

from __future__ import annotations

import io
import json
import math
import os
import re
import statistics
import types
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

__all__ = [
    "Chart",
    "Guess",
    "ModelRow",
    "Report",
    "Sample",
    "Table",
    "markdown",
    "read_metrics",
    "read_report",
    "write_report",
]


@dataclass(frozen=True)
class ModelRow:
    """One line of the table: a model, what it costs and how good it is on held-out text."""

    name: str
    parameters: int
    size_mib: float  # of the weights
    eval_loss: float  # cross entropy in nats at masked positions
    eval_accuracy: float  # share of masked tokens guessed first, 0 to 1
    eval_agreement: float | None  # share of first guesses that are the teacher's; None: a teacher
    train_time_s: float | None
    steps: int | None
    note: str = ""


@dataclass(frozen=True)
class Guess:
    """A token that a model puts in place of the mask, and its probability (0 to 1)."""

    token: str
    probability: float


@dataclass(frozen=True)
class Sample:
    """A text that holds [MASK], and what each model guesses there."""

    text: str
    guesses: dict[str, list[Guess]]  # model name -> guesses, best first
    answer: str | None = None


@dataclass(frozen=True)
class Table:
    """Rows of text under named columns."""

    title: str
    columns: list[str]  # the first heads the names of the rows
    rows: list[list[str]]  # text as it is shown; "" where nothing was measured
    caption: str = ""
    published: list[int] = field(default_factory=list)  # rows that are figures of others

    def __post_init__(self) -> None:
        """Raises ValueError for a row of another width and for a published row that is not there:
        figures under the wrong heading are worse than none."""
        for number, row in enumerate(self.rows, start=1):
            if len(row) != len(self.columns):
                expected = f"expected {len(self.columns)} cells, got {len(row)}"
                raise ValueError(f"table {self.title!r}, row {number}: {expected}")
        if not set(self.published) <= set(range(len(self.rows))):
            expected = f"expected indices below {len(self.rows)}, got {self.published}"
            raise ValueError(f"table {self.title!r}, published: {expected}")


@dataclass(frozen=True)
class Chart:
    """Values of several seeds side by side, a row a name: a dot a value, a bar at the median."""

    title: str
    unit: str
    values: dict[str, list[float]]  # row name -> a value a seed; one that is not finite is counted
    zero: bool = False  # they are differences: shown with their sign, and a line at 0
    caption: str = ""


@dataclass(frozen=True)
class Report:
    """Everything that the page shows; every string is text, never HTML."""

    title: str
    lead: str  # one sentence: what the figures say
    models: list[ModelRow] = field(default_factory=list)
    # run name -> the parsed lines of its metrics.jsonl
    curves: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    samples: list[Sample] = field(default_factory=list)
    facts: dict[str, str] = field(default_factory=dict)  # device, versions, date, commit, ...
    config: str | dict[str, str] = ""  # the YAML of the run, or of several by name
    tables: list[Table] = field(default_factory=list)
    charts: list[Chart] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)  # what makes the figures again


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read the lines of a metrics.jsonl, without a last line that was cut off while written.

    Raises ValueError, naming the file and the line number, for any other line that is not a JSON
    object. NaN and Infinity are accepted: they are what a run that diverged has to say.
    """
    complete, newline, tail = path.read_bytes().rpartition(b"\n")
    lines = []
    for number, raw in enumerate(complete.split(b"\n") if newline else [], start=1):
        if raw.strip():
            line = _json_object(raw)
            if line is None:
                shown = _short(raw.decode("utf-8", "replace"))
                raise ValueError(f"{path}, line {number}: expected a JSON object, got {shown!r}")
            lines.append(line)
    # Only a line without its newline can be half-written; it still counts where it is whole.
    last = _json_object(tail)
    return lines if last is None else [*lines, last]


def write_report(report: Report, path: Path) -> Path:
    """Write the report as one HTML file, and beside it as JSON for `read_report`; return the path.

    Each file appears whole or not at all, an earlier one stays until then, and the same report
    gives the same bytes. Missing folders are made.
    """
    page = _render(report).encode("utf-8", "replace")
    data = json.dumps(report, default=vars).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    _write_whole(path.with_suffix(".json"), data)
    _write_whole(path, page)
    return path


def read_report(path: Path) -> Report:
    """Read the JSON that `write_report` left beside a page.

    Raises ValueError, naming the file, the field, what was expected and what came.
    """
    try:
        report: Report = _typed(Report, json.loads(path.read_bytes()), "report")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return report


def markdown(table: Table) -> str:
    """A table for a terminal or a README."""
    rows = [
        [row[0] + " (published)" * (i in table.published), *row[1:]]
        for i, row in enumerate(table.rows)
    ]
    lines = [
        f"| {' | '.join(cell.replace('|', '/') for cell in row)} |"
        for row in (table.columns, ["---"] * len(table.columns), *rows)
    ]
    return "\n".join([f"**{table.title}.** {table.caption}", "", *lines])


def _typed(hint: Any, value: Any, where: str) -> Any:
    """A value of JSON as the annotation of a field has it."""
    kind, arguments = get_origin(hint), get_args(hint)
    if hint is Any or (kind is None and _fits(hint, value)):
        return value
    if is_dataclass(hint) and isinstance(value, dict):
        make: Any = hint
        hints, known = get_type_hints(hint), fields(hint)
        required = {f.name for f in known if (f.default, f.default_factory) == (MISSING, MISSING)}
        for key in required - value.keys():
            raise ValueError(f"{where}: expected {key}, which is missing")
        for key in value.keys() - hints.keys():
            raise ValueError(f"{where}: expected {', '.join(hints)}, got {_short(key)}")
        return make(**{k: _typed(hints[k], v, f"{where}.{k}") for k, v in value.items()})
    if kind is list and isinstance(value, list):
        return [_typed(arguments[0], v, f"{where}[{i}]") for i, v in enumerate(value)]
    if kind is dict and isinstance(value, dict):
        return {k: _typed(arguments[1], v, f"{where}[{k!r}]") for k, v in value.items()}
    if kind is types.UnionType:
        for option in arguments:
            if _fits(get_origin(option) or option, value):
                return _typed(option, value, where)
    name = str(hint) if kind is types.UnionType else (kind or hint).__name__
    expected = "an object" if is_dataclass(hint) else name
    raise ValueError(f"{where}: expected {expected}, got {_short(repr(value))}")


def _fits(kind: type, value: Any) -> bool:
    return type(value) is kind or (kind is float and type(value) is int)


def _short(text: str) -> str:
    return text[:60] + "..." if len(text) > 60 else text


def _write_whole(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _json_object(raw: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(raw)
    except ValueError:  # also a UnicodeDecodeError: a cut inside a character
        return None
    return value if isinstance(value, dict) else None


# ---- Numbers as text --------------------------------------------------------------------------


def _fixed(value: float | None, digits: int) -> str:
    if value is None:
        return "–"
    if math.isnan(value):
        return "NaN"
    text = "∞" if math.isinf(value) else f"{abs(value):,.{digits}f}"
    return f"−{text}" if value < 0 else text


def _percent(share: float | None) -> str:
    text = _fixed(None if share is None else 100 * share, 1)
    return f"{text} %" if share is not None and math.isfinite(share) else text


def _count(number: int) -> str:
    """22_700_000 -> "22.7 M"."""
    for unit, scale in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= 0.99995 * scale:  # what rounds to 1000.0 of a unit is 1.0 of the next
            return f"{number / scale:,.1f} {unit}"
    return str(number)


def _duration(seconds: float | None) -> str:
    """192 -> "3 min 12 s"; always at most two units."""
    if seconds is None or not math.isfinite(seconds):
        return _fixed(seconds, 0)
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    hours = round(seconds / 3600)
    return f"{hours // 24} d {hours % 24:02d} h"


# ---- Curves -----------------------------------------------------------------------------------

_MAX_POINTS = 400  # about as many as a plot of this size can show
_SMOOTHING = 50  # the window of the running mean is 1/50 of a run
_HELDOUT_TITLES = {
    "eval_loss": ("Held-out loss", "nats"),
    "eval_accuracy": ("Held-out accuracy", "share of masked tokens"),
}
_PART_TITLES = {
    "loss": ("Training loss", "weighted sum of its parts"),
    "kd": ("kd", "soft-target loss"),
    "ce": ("ce", "hard-label cross entropy, nats"),
    "hidden_cos": ("hidden_cos", "cosine loss of hidden states"),
}


@dataclass(frozen=True)
class _Curve:
    """One line of a plot; NaN is a gap."""

    run: str
    steps: list[float]
    values: list[float]


@dataclass(frozen=True)
class _Style:
    """How a run is drawn, in every plot and legend: a colour of the style sheet and a dash."""

    colour: int
    dash: str  # of the SVG, in user units; "" is a full line


def _number(value: object) -> float:
    """A float that can be drawn, else NaN; beyond 1e30 matplotlib's own arithmetic overflows."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e30:
        return math.nan
    return float(value)


def _curve(run: str, lines: Iterable[dict[str, Any]], key: str) -> _Curve | None:
    """The curve of one key, by step; None where nothing of it can be drawn."""
    # A run that was resumed may have logged a step twice; the later line is the one that counts.
    points = {_number(line.get("step")): _number(line[key]) for line in lines if key in line}
    steps = sorted(step for step in points if not math.isnan(step))
    values = [points[step] for step in steps]
    return None if all(math.isnan(value) for value in values) else _Curve(run, steps, values)


def _evenly(indices: Sequence[int]) -> list[int]:
    """At most _MAX_POINTS of the indices, the first and the last among them."""
    count = min(len(indices), _MAX_POINTS)
    return [indices[round(i * (len(indices) - 1) / max(count - 1, 1))] for i in range(count)]


def _thin(curve: _Curve, window: int = 1) -> _Curve:
    """About _MAX_POINTS of the curve's points, each the mean over a centred window.

    The window narrows towards the first point, so that the steep start of a run is not flattened,
    and is cut off at the last. A NaN stays a gap; in the window of another point it is left out.
    """
    finite = [i for i, value in enumerate(curve.values) if not math.isnan(value)]
    # Evenly over all, which shows where the gaps are, and over the finite, which may be but few.
    picked = sorted({*_evenly(range(len(curve.values))), *_evenly(finite)})

    def mean(i: int) -> float:
        half = min(window // 2, i)
        near = [v for v in curve.values[i - half : i + half + 1] if not math.isnan(v)]
        return curve.values[i] if math.isnan(curve.values[i]) else math.fsum(near) / len(near)

    return _Curve(curve.run, [curve.steps[i] for i in picked], [mean(i) for i in picked])


# Colours that stand for variables of the style sheet: drawn as these, then replaced by name.
_INK = {"#010000": "var(--muted)", "#020000": "var(--rule)"}
_SERIES = {f"#0000{i:02x}": f"var(--series-{i})" for i in range(1, 9)}


def _styles(runs: Iterable[str]) -> dict[str, _Style]:
    count = len(_SERIES)
    dashes = ("", "6 3", "2 2")
    return {
        run: _Style(i % count + 1, dashes[i // count % len(dashes)]) for i, run in enumerate(runs)
    }


def _plot(
    name: str,
    curves: Sequence[_Curve],
    styles: dict[str, _Style],
    *,
    references: Sequence[float] = (),
    percent: bool = False,
    log: bool = False,
) -> str:
    """An SVG element of the curves against step, with a dashed level for each reference.

    It holds no text but numbers and the word "step": names stand in the page's own legend, where
    they wrap, are escaped once and need no font that matplotlib knows.
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
                "svg.hashsalt": f"distilfast {name}",  # one a plot: ids are shared by the page
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
                marker="o" if len(curve.steps) <= 30 else "",  # alone, a point has no line
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
    """An SVG document of matplotlib's as an element of an HTML page that styles it."""
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


# ---- Charts -----------------------------------------------------------------------------------


def _forest(chart: Chart) -> dict[str, Any]:
    """What the template draws of a chart: places on the axis in percent of its width, and labels.

    Names stand in HTML beside the strips, and the strips are drawn in percent, so that neither is
    scaled: on a telephone dots and text are as large as elsewhere.
    """
    from matplotlib.ticker import MaxNLocator

    finite = {
        name: [v for v in map(_number, values) if not math.isnan(v)]
        for name, values in chart.values.items()
    }
    drawn = [v for values in finite.values() for v in values] + [0.0] * chart.zero or [0.0]
    margin = 0.05 * (max(drawn) - min(drawn) or abs(drawn[0]) or 1.0)
    low, high = min(drawn) - margin, max(drawn) + margin
    ticks = MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
    digits = max(0, 1 - math.floor(math.log10(ticks[1] - ticks[0])))  # of a tenth of a tick

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
        label = signed(_fixed(median, digits), median) if values else "–"
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


# ---- The page ---------------------------------------------------------------------------------


def _figures(table: Table) -> list[bool]:
    """Of each column, whether it holds numbers, which are set flush right, or text."""
    figure = re.compile(r"([-+−~<>≥≤ ]*(\d|NaN|∞|–).*)?", re.DOTALL)
    columns = zip(*table.rows, strict=True) if table.rows else [()] * len(table.columns)
    return [all(map(figure.fullmatch, column)) for column in columns]


def _best_students(models: Sequence[ModelRow]) -> set[str]:
    """Of two students or more, the names of those with the lowest held-out loss."""
    losses = {
        row.name: row.eval_loss
        for row in models
        if row.eval_agreement is not None and math.isfinite(row.eval_loss)
    }
    best = {name for name, loss in losses.items() if loss == min(losses.values())}
    return best if len(best) < len(losses) else set()


def _levels(report: Report) -> list[ModelRow]:
    """The teachers that have a figure to be drawn as a level in the held-out plots."""
    return [
        row
        for row in report.models
        if row.eval_agreement is None
        and not all(math.isnan(_number(getattr(row, key))) for key in _HELDOUT_TITLES)
    ]


def _panel(
    key: str, title: str, unit: str, curves: Sequence[_Curve], svg: str, has_gaps: bool
) -> dict[str, Any]:
    runs = [curve.run for curve in curves]
    label = f"{title} ({unit}) against step: {', '.join(runs)}"
    return dict(key=key, title=title, unit=unit, runs=runs, svg=svg, gaps=has_gaps, label=label)


def _heldout_panels(report: Report, styles: dict[str, _Style]) -> list[dict[str, Any]]:
    panels = []
    for key, (title, unit) in _HELDOUT_TITLES.items():
        whole = [_curve(run, lines, key) for run, lines in report.curves.items()]
        curves = [_thin(curve) for curve in whole if curve is not None]
        if curves:
            levels = [_number(getattr(row, key)) for row in _levels(report)]
            svg = _plot(
                key,
                curves,
                styles,
                references=[level for level in levels if not math.isnan(level)],
                percent=key == "eval_accuracy",
            )
            panels.append(_panel(key, title, unit, curves, svg, _has_gap(whole)))
    return panels


def _training_panels(report: Report, styles: dict[str, _Style]) -> list[dict[str, Any]]:
    panels = []
    for key, (title, unit) in _PART_TITLES.items():
        whole = [_curve(run, lines, key) for run, lines in report.curves.items()]
        curves = [
            _thin(curve, window=len(curve.steps) // _SMOOTHING)
            for curve in whole
            if curve is not None and any(curve.values)  # a part of weight 0 is logged as 0
        ]
        if curves:
            drawn = [v for curve in curves for v in curve.values if not math.isnan(v)]
            log = min(drawn) > 0 and max(drawn) > 8 * min(drawn)
            svg = _plot(key, curves, styles, log=log)
            unit = f"{unit}, log scale" if log else unit
            panels.append(_panel(key, title, unit, curves, svg, _has_gap(whole)))
    return panels


def _has_gap(curves: Iterable[_Curve | None]) -> bool:
    return any(math.isnan(v) for curve in curves if curve is not None for v in curve.values)


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
        count=_count,
        duration=_duration,
        fixed=_fixed,
        percent=_percent,
        width=lambda p: f"{100 * min(max(p, 0.0), 1.0):.1f}%" if math.isfinite(p) else "0%",
    )
    styles = _styles(report.curves)
    heldout = _heldout_panels(report, styles)
    training = _training_panels(report, styles)
    drawn = {run for panel in heldout + training for run in panel["runs"]}
    several = isinstance(report.config, dict)
    return environment.get_template("page.html.j2").render(
        report=report,
        configs=report.config if several else {"": report.config} if report.config else {},
        tables=[(table, _figures(table)) for table in report.tables],
        charts=[_forest(chart) for chart in report.charts],
        styles=styles,
        best=_best_students(report.models),
        levels=_levels(report),
        heldout=heldout,
        training=training,
        drawn=drawn,
        smoothing_percent=100 // _SMOOTHING,
        has_answers=any(sample.answer is not None for sample in report.samples),
    )
