"""The report page: what it shows, that it needs nothing else, and how metrics.jsonl is read."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from distilfast import report as report_module
from distilfast.loss_parts import LOGGED
from distilfast.report import (
    Blocks,
    Chart,
    Guess,
    ModelRow,
    Report,
    Sample,
    Table,
    numbers,
    plots,
    read_report,
    write_report,
)
from distilfast.report.training_run import read_metrics

NAN = math.nan


def metrics(steps: int, *, hidden: bool = True, kd: bool = True) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        line = {"step": step, "tokens": 2048 * step, "loss": 20 / step, "ce": 5.0 - step / 100}
        line["kd"] = 9 / step if kd else 0.0
        if hidden:
            line["hidden_cos"] = 1 / step
        lines.append(line)
        if step % 10 == 0:
            share = step / 200
            lines.append({"step": step, "eval_loss": 4 - share, "eval_accuracy": share})
    return lines


def student(name: str, loss: float | None, **changes: Any) -> ModelRow:
    row = ModelRow(name, 22_713_216, 86.64, loss, 0.5853, 0.7421, 192.0, 3000)
    return replace(row, **changes)


def full_report() -> Report:
    guesses = {
        "bert": [Guess("paris", 0.4168), Guess("lyon", 0.25)],
        "small": [Guess("rome", 0.375), Guess("paris", 0.125)],
    }
    return Report(
        title="Six layers",
        lead="The student is smaller.",
        models=[
            ModelRow("bert", 109_514_298, 417.8, 1.8714, 0.6412, None, None, None, "teacher"),
            student("small", 2.3123, note="every other layer"),
            student("smaller", 2.5),
        ],
        curves={"small": metrics(60), "smaller": metrics(40, hidden=False)},
        samples=[Sample("The capital of France is [MASK].", guesses, "paris")],
        facts={"Device": "2-core CPU", "Commit": "3f9c2d1"},
        config="steps: 3000\nloss: {temperature: 2.0}\n",
        tables=[
            Table(
                "GLUE",
                ["model", "RTE", "metric"],
                [["small", "59.3 ± 1.2", "accuracy"], ["other", "", ""], ["BERT", "69.3", ""]],
                "Medians of five seeds.",
                published=[2],
            )
        ],
        charts=[
            Chart("Without kd", "change", {"all": [0.0, 0.0], "none": [-3.0, -1.0, NAN]}, zero=True)
        ],
        commands=["distilfast train --config runs/small/config.yaml"],
    )


def blocks(more: float) -> Blocks:
    """Twelve blocks of ten tokens; ``more`` is added to all, and 1 and -1 in turn to its losses:
    the standard error of the mean is sqrt(12 / 11) / sqrt(12) = 0.30 a block, or 0.09 a token."""
    spread = [10 * (3 + more) + 3 * (-1) ** i * bool(more) for i in range(12)]
    return Blocks(40, [10] * 12, spread)


def empty_report(**changes: Any) -> Report:
    return replace(Report("Title", "", [], {}, [], {}, ""), **changes)


class Page(HTMLParser):
    """The page as a reader meets it: its elements, its ids and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.html = html
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.chunks: list[str] = []
        self.feed(html)
        self.close()
        self.text = " ".join("".join(self.chunks).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in {"meta", "link", "br", "wbr"}:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.chunks.append(data)

    def plots(self) -> dict[str, str]:
        """Each plot's heading, with its SVG element."""
        found = re.findall(r"<h3>(.*?) <small>.*?(<svg.*?</svg>)", self.html, flags=re.DOTALL)
        return dict(found)


def page(report: Report, folder: Path) -> Page:
    return Page(write_report(report, folder / "report.html").read_text(encoding="utf-8"))


# ---- What the page shows ----------------------------------------------------------------------


def test_page_shows_every_name_and_figure(tmp_path: Path) -> None:
    text = page(full_report(), tmp_path).text
    for shown in (
        *("Six layers", "The student is smaller.", "bert", "small", "smaller", "teacher"),
        *("109.5 M", "22.7 M", "417.8", "86.6", "1.871", "2.312", "64.1 %", "74.2 %"),
        *("3,000", "3 min 12 s", "every other layer", "The capital of France is [MASK]"),
        *("paris", "41.7 %", "rome", "12.5 %", "Device", "2-core CPU", "3f9c2d1"),
        *("GLUE", "RTE", "59.3 ± 1.2", "BERTpublished", "69.3", "Medians of five seeds."),
        *("Without kd change", "−2.0", "1 of 3 not finite"),
        *("distilfast train --config runs/small", "steps: 3000 loss: {temperature: 2.0}"),
    ):
        assert shown in text, shown


def test_page_captions_say_what_is_measured(tmp_path: Path) -> None:
    text = page(full_report(), tmp_path).text
    assert "cross entropy in nats at masked positions" in text
    assert "share of masked tokens guessed first" in text
    assert "share of masked positions where the model’s first guess is the teacher’s" in text
    assert "smoothed: each point is the mean over the 2 % of the run’s steps around it" in text


def test_page_needs_nothing_but_itself(tmp_path: Path) -> None:
    shown = page(full_report(), tmp_path)
    assert "http:" not in shown.html
    assert "https:" not in shown.html
    assert "@import" not in shown.html
    assert not re.search(r"url\((?!#)", shown.html)
    tags = {tag for tag, _ in shown.elements}
    assert not tags & {"script", "img", "iframe", "object", "embed", "base", "form"}
    for tag, attributes in shown.elements:
        for name in ("src", "srcset", "href", "xlink:href", "action", "data"):
            target = attributes.get(name) or "#"
            assert target.startswith("#") or target == "data:,", (tag, name, target)
    assert ("meta", "viewport") in [
        (tag, attributes.get("name")) for tag, attributes in shown.elements
    ]


def test_page_is_well_formed(tmp_path: Path) -> None:
    shown = page(full_report(), tmp_path)  # the parser checks that elements are closed in order
    assert shown.open == []
    ids = [attributes["id"] for _, attributes in shown.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert [tag for tag, _ in shown.elements].count("style") == 1  # no plot may style the page
    targets = re.findall(
        r'(?:href="#|url\(#|aria-labelledby="|aria-describedby=")([^")]+)', shown.html
    )
    assert targets
    assert set(targets) <= set(ids)


def test_page_escapes_every_string(tmp_path: Path) -> None:
    evil = "<script>alert('x')</script>&\"{{ 7 * 7 }}$_$"
    report = Report(
        title=evil,
        lead=evil,
        models=[student(evil, 2.0, note=evil), student("teacher" + evil, 1.0, eval_agreement=None)],
        curves={evil: metrics(20)},
        samples=[Sample(f"{evil} [MASK]", {evil: [Guess(evil, 0.5)]}, evil)],
        facts={evil: evil},
        config={evil: evil},
        tables=[Table(evil, [evil], [[evil]], evil)],
        charts=[Chart(evil, evil, {evil: [1.0]}, caption=evil)],
        commands=[evil],
    )
    shown = page(report, tmp_path)
    assert "script" not in {tag for tag, _ in shown.elements}
    assert "<script" not in shown.html
    # title (twice), lead, name and note, teacher, two legends and a level, a caption, a sample
    # with its model, token and answer, four in a table and in a chart, a command, a fact, the
    # configuration and its name
    assert shown.text.count(evil) >= 25
    assert any(
        attributes.get("aria-label", "").endswith(evil)  # type: ignore[union-attr]
        for _, attributes in shown.elements
    )


def test_page_marks_the_word_that_was_hidden(tmp_path: Path) -> None:
    report = full_report()
    assert page(report, tmp_path).text.count("paris ✓") == 2
    without = replace(report, samples=[replace(report.samples[0], answer=None)])
    assert "✓" not in page(without, tmp_path).text


@pytest.mark.parametrize(
    ("models", "best"),
    [
        ([student("a", 2.5), student("b", 2.25)], "b"),
        ([student("a", NAN), student("b", 2.25), student("c", 2.5)], "b"),
        ([student("t", 1.0, eval_agreement=None), student("a", 2.5), student("b", 2.75)], "a"),
        ([student("a", 2.5, eval_agreement=NAN), student("b", 2.75)], "a"),
        ([student("t", 1.0, eval_agreement=None), student("a", 2.5)], None),  # nothing to beat
        ([student("a", 2.5), student("b", NAN)], None),
        ([student("a", 2.5), student("b", 2.5)], None),
        ([student("a", math.inf), student("b", NAN), student("c", None)], None),
        ([student("a", 2.5, eval_loss=None), student("b", 2.75), student("c", 2.5)], "c"),
        ([student("a", 2.5, eval_agreement=None, teacher=False), student("b", 2.75)], "a"),
    ],
)
def test_best_student_is_the_lowest_finite_loss_of_several(
    models: list[ModelRow], best: str | None, tmp_path: Path
) -> None:
    html = page(empty_report(models=models), tmp_path).html
    rows = re.findall(r'<tr role="row" class="best">\s*<th[^>]*>(\w+)', html)
    assert rows == ([best] if best else [])
    assert ("lowest held-out loss" in html) == (best is not None)


@pytest.mark.parametrize(("lower_by", "best"), [(0.3, ["a"]), (0.1, [])])
def test_no_student_is_best_that_another_cannot_be_told_from(
    lower_by: float, best: list[str], tmp_path: Path
) -> None:
    report = empty_report(
        models=[student("a", 2.5), student("b", 2.5 + lower_by)],
        blocks={"a": blocks(0.0), "b": blocks(lower_by)},
    )
    html = page(report, tmp_path).html
    assert re.findall(r'<tr role="row" class="best">\s*<th[^>]*>(\w+)', html) == best


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (999, "999"), (1000, "1.0 k"), (66_049, "66.0 k"), (999_949, "999.9 k"),
     (999_950, "1.0 M"), (22_713_216, "22.7 M"), (109_514_298, "109.5 M"),
     (1_336_000_000, "1.3 B")],
)  # fmt: skip
def test_count_has_one_decimal_of_its_unit(number: int, text: str) -> None:
    assert numbers.count(number) == text


@pytest.mark.parametrize(
    ("number", "noun", "text"),
    [(1, "task", "1 task"), (0, "task", "0 tasks"), (1234, "step", "1,234 steps"),
     (2, "process", "2 processes"), (2, "micro-batch", "2 micro-batches"),
     (1.0, "epoch", "1 epoch"), (2.5, "epoch", "2.5 epochs")],
)  # fmt: skip
def test_counted_nouns_agree_with_their_number(number: float, noun: str, text: str) -> None:
    assert numbers.counted(number, noun) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "–"), (NAN, "NaN"), (0.0, "0.0 s"), (4.24, "4.2 s"), (9.96, "10 s"), (59.4, "59 s"),
     (59.6, "1 min 00 s"), (192.0, "3 min 12 s"), (3599.6, "1 h 00 min"), (11_042.0, "3 h 04 min"),
     (86_399.0, "1 d 00 h"), (273_600.0, "3 d 04 h")],
)  # fmt: skip
def test_duration_has_two_units_at_most(seconds: float | None, text: str) -> None:
    assert numbers.duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (NAN, "NaN"), (math.inf, "∞"), (-math.inf, "−∞"), (-1.5, "−1.500"),
     (1234.5678, "1,234.568")],
)  # fmt: skip
def test_fixed_shows_what_is_not_a_number(value: float | None, text: str) -> None:
    assert numbers.fixed(value, 3) == text


# ---- Plots ------------------------------------------------------------------------------------


def drawn_lines(svg: str) -> dict[str, int]:
    """The series colours of a plot, each with the number of points of its line."""
    found = re.findall(r'<path d="([^"]*)"[^>]*stroke: var\(--series-(\d)\)', svg)
    return {series: len(re.findall("[ML]", path)) for path, series in found}


def test_plots_draw_each_run_that_has_the_figure(tmp_path: Path) -> None:
    plots = page(full_report(), tmp_path).plots()
    assert {title: drawn_lines(svg) for title, svg in plots.items()} == {
        "Held-out loss": {"1": 6, "2": 4},
        "Held-out accuracy": {"1": 6, "2": 4},
        "Training loss": {"1": 60, "2": 40},
        "kd": {"1": 60, "2": 40},
        "ce": {"1": 60, "2": 40},
        "hidden_cos": {"1": 60},
    }


def test_every_part_that_a_run_logs_has_a_curve(tmp_path: Path) -> None:
    lines = [{"step": step, **dict.fromkeys(LOGGED, 1 / step)} for step in range(1, 9)]
    drawn = page(replace(full_report(), curves={"a": lines}), tmp_path).plots()
    assert list(drawn) == [title for title, _ in LOGGED.values()]


def test_plots_keep_text_as_text_and_follow_the_colour_scheme(tmp_path: Path) -> None:
    for svg in page(full_report(), tmp_path).plots().values():
        assert re.search(r"<text[^>]*>step</text>", svg)
        assert "var(--muted)" in svg
        assert "var(--rule)" in svg
        assert re.findall(r"#[0-9a-f]{6}\b", svg) == []


@pytest.mark.parametrize(
    ("curves", "titles"),
    [
        ({}, []),
        ({"a": []}, []),
        ({"a": [{"step": 1}]}, []),
        ({"a": [{"step": 50, "eval_loss": 3.0}]}, ["Held-out loss"]),
        ({"a": [{"step": 0, "loss": 3.0}], "b": []}, ["Training loss"]),
        ({"a": metrics(9, hidden=False, kd=False)}, ["Training loss", "ce"]),
        ({"a": [{"step": 1, "loss": NAN}, {"step": 2, "loss": math.inf}]}, []),
        ({"a": [{"step": 1, "loss": None}, {"loss": 2.0}, {"step": "2", "loss": 2.0}]}, []),
        ({"a": [{"step": 1, "loss": 10**400}, {"step": 2, "loss": 1e308}]}, []),
    ],
)
def test_plots_leave_out_what_is_missing(
    curves: dict[str, list[dict[str, Any]]], titles: list[str], tmp_path: Path
) -> None:
    shown = page(empty_report(curves=curves), tmp_path)
    assert list(shown.plots()) == titles
    assert ("Learning curves" in shown.text) == any("Held-out" in title for title in titles)


def test_legends_name_only_the_runs_that_are_drawn(tmp_path: Path) -> None:
    curves = {"idle": [], "held": [{"step": 1, "eval_loss": 2.0}], "trained": metrics(5)}
    html = page(empty_report(curves=curves), tmp_path).html
    legends = re.findall(r'<ul class="legend">(.*?)</ul>', html, flags=re.DOTALL)
    names = [re.findall(r"</svg>(\w+)</li>", legend) for legend in legends]
    assert names == [["held"], ["trained"]]


def test_plots_show_values_that_are_not_finite_as_gaps(tmp_path: Path) -> None:
    lines = metrics(90)
    for line in lines[30:40]:
        line.update(dict.fromkeys(line.keys() & {"loss", "eval_loss"}, NAN))
    shown = page(empty_report(curves={"a": lines}), tmp_path)
    loss = re.search(r'<path d="([^"]*)"[^>]*var\(--series-1\)', shown.plots()["Training loss"])
    assert loss is not None
    assert loss[1].count("M") == 2
    assert "nan" not in shown.html.lower()
    assert "A value that was not finite is a gap." in shown.text
    assert "gap" not in page(empty_report(curves={"a": metrics(90)}), tmp_path).text


def test_plots_show_the_teacher_as_a_level(tmp_path: Path) -> None:
    report = full_report()
    with_level = page(report, tmp_path)
    dashed = r"stroke-dasharray: [^\"]*stroke: var\(--muted\)"
    assert len(re.findall(dashed, with_level.plots()["Held-out loss"])) == 1
    assert "The dashed line is the level of bert." in with_level.text
    blind = replace(report.models[0], eval_loss=NAN, eval_accuracy=NAN)
    without = page(replace(report, models=[blind, *report.models[1:]]), tmp_path)
    assert not re.findall(dashed, without.plots()["Held-out loss"])
    assert "dashed" not in without.text


def test_plots_name_a_teacher_once_that_is_a_run_as_well(tmp_path: Path) -> None:
    report = full_report()
    shown = page(replace(report, curves={"bert": metrics(60), **report.curves}), tmp_path)
    (legend, _) = re.findall(r'<ul class="legend">(.*?)</ul>', shown.html, flags=re.DOTALL)
    assert re.findall(r"</svg>(\w+)</li>", legend) == ["bert", "small", "smaller"]
    assert "dashed" not in shown.text


@pytest.mark.parametrize(
    ("values", "levels", "window", "note"),
    [
        # What the first quarter passes through does not set the axis; a twentieth is margin.
        ([10.0, 9.0, 3.0, 2.5, 2.0], [], (1.95, 3.05), "Early values, up to 10, are beyond"),
        ([10.0, 9.0, 3.0, 2.5, 2.0], [1.0], (0.9, 3.1), "Early values, up to 10, are beyond"),
        ([0.0, 0.1, 3.0, 2.5, 2.0], [], (1.95, 3.05), "Early values, down to 0, are beyond"),
        ([3.5, 3.4, 3.0, 2.5, 2.0], [], None, ""),  # the whole fits
        ([2.2, 3.0, 3.0, 2.5, 9.0], [], None, ""),  # a run that ends high is not cut
        ([10.0, NAN, 3.0, NAN, 2.0], [], (1.95, 3.05), "Early values, up to 10, are beyond"),
        ([NAN], [], None, ""),
    ],
)
def test_axis_shows_where_the_runs_end(
    values: list[float],
    levels: list[float],
    window: tuple[float, float] | None,
    note: str,
    tmp_path: Path,
) -> None:
    steps = [0.0, 20.0, 30.0, 60.0, 90.0][: len(values)]
    found = plots.window_of([plots.Curve("a", steps, values)], levels)
    assert found == (None if window is None else pytest.approx(window))
    lines = [{"step": s, "eval_loss": v} for s, v in zip(steps, values, strict=True)]
    teacher = [student("t", level, teacher=True) for level in levels]
    shown = page(empty_report(curves={"a": lines}, models=teacher), tmp_path)
    assert note in shown.text
    assert ("beyond the axis" in shown.text) == bool(note)


def test_plots_stay_small_for_a_long_run(tmp_path: Path) -> None:
    lines = [{"step": step, "loss": 5.0 + step % 7} for step in range(100_000)]
    svg = page(empty_report(curves={"a": lines}), tmp_path).plots()["Training loss"]
    assert 50 < drawn_lines(svg)["1"] <= 400  # matplotlib merges points that it can't tell apart


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("ratio", [1.001, 2.0, 9.0, 100.0, 1e5, 1e12])
def test_plots_label_their_axis_at_every_scale(scale: float, ratio: float, tmp_path: Path) -> None:
    lines = [{"step": step, "loss": scale * ratio ** (step / 5)} for step in range(6)]
    shown = page(empty_report(curves={"a": lines}), tmp_path)
    svg = shown.plots()["Training loss"]
    labels = re.findall(r"<text[^>]*text-anchor: end[^>]*>([^<]*)</text>", svg)
    levels = [float(label.replace(",", "")) for label in labels]
    assert 2 <= len(set(levels)) <= 10
    assert scale / 10 <= max(levels) <= 10 * scale * ratio  # no common factor is hidden elsewhere
    assert ("log scale" in shown.text) == (ratio > 8)


@pytest.mark.parametrize("key", ["loss", "eval_loss"])
def test_plots_show_a_few_finite_values_among_many_that_are_not(key: str, tmp_path: Path) -> None:
    lines = [{"step": s, key: 2.0 if 501 <= s <= 503 else NAN} for s in range(1, 5001)]
    (svg,) = page(empty_report(curves={"a": lines}), tmp_path).plots().values()
    assert drawn_lines(svg) == {"1": 3}


def test_plots_take_more_runs_than_colours(tmp_path: Path) -> None:
    curves = {f"run {i}": [{"step": 1, "loss": 1.0 + i}, {"step": 2, "loss": i}] for i in range(20)}
    shown = page(empty_report(curves=curves), tmp_path)
    swatches = re.findall(r'<path d="M1 4H23" ([^/]*)/>', shown.html)
    assert len(swatches) == len(set(swatches)) == 20


def test_curve_takes_the_later_line_of_a_step_that_was_repeated() -> None:
    lines = [{"step": 2, "loss": 9.0}, {"step": 1, "loss": 5.0}, {"step": 2, "loss": 4.0}]
    curve = plots.curve_of("a", lines, "loss")
    assert curve is not None
    assert (curve.steps, curve.values) == ([1.0, 2.0], [5.0, 4.0])


def test_smoothing_is_the_mean_of_a_centred_window() -> None:
    curve = plots.Curve("a", [1, 2, 3, 4, 5, 6], [8.0, 2.0, 5.0, NAN, 1.0, 3.0])
    smooth = plots.thin(curve, window=3).values
    assert smooth[:3] == [8.0, 5.0, 3.5]  # the first is kept; the NaN is left out of the third
    assert math.isnan(smooth[3])
    assert smooth[4:] == [2.0, 2.0]


# ---- Tables and charts ------------------------------------------------------------------------


def test_tables_mark_the_figures_of_others(tmp_path: Path) -> None:
    html = page(full_report(), tmp_path).html
    rows = re.findall(r"<tr( class=\"published\")?><th scope=\"row\">(\w+)(<span)?", html)
    assert [(name, bool(a), bool(b)) for a, name, b in rows] == [
        ("small", False, False),
        ("other", False, False),
        ("BERT", True, True),
    ]


def test_tables_set_figures_right_and_text_left(tmp_path: Path) -> None:
    cells = ["1.2", "-3", "−3.1 %", "NaN", "–", "", "~ 4", "+0.3 ± 0.1", "12 ms"]
    table = Table("", ["a", "b", "c"], [["row", cell, "a 1"] for cell in cells])
    html = page(empty_report(tables=[table]), tmp_path).html
    assert re.findall(r'<td( class="text")?>', html) == ["", ' class="text"'] * len(cells)


def test_tables_show_a_dash_where_nothing_was_measured(tmp_path: Path) -> None:
    table = Table("", ["a", "b"], [["row", ""]])
    assert "<td>–</td>" in page(empty_report(tables=[table]), tmp_path).html


@pytest.mark.parametrize(
    ("rows", "published", "message"),
    [
        ([["a", "1"], ["b"]], [], "table 't', row 2: expected 2 cells, got 1"),
        ([["a", "1"]], [1], r"table 't', published: expected indices below 1, got \[1\]"),
        ([["a", "1"]], [-1], r"table 't', published: expected indices below 1, got \[-1\]"),
    ],
)
def test_tables_refuse_rows_that_do_not_fit(
    rows: list[list[str]], published: list[int], message: str
) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        Table("t", ["model", "score"], rows, published=published)


def test_charts_place_dots_and_medians_on_one_axis() -> None:
    drawn = plots.forest(Chart("", "", {"a": [0.0, 1.0, 10.0], "b": [5.0, NAN]}))
    a, b = drawn["rows"]
    # 0 to 10 and a margin of a twentieth on either side: 0 is at 0.5 / 11
    assert a["dots"] == ["4.55%", "13.64%", "95.45%"]
    assert (a["median"], a["label"], a["note"]) == ("13.64%", "1.0", "")
    assert (b["dots"], b["median"], b["label"]) == (["50.00%"], "50.00%", "5.0")
    assert b["note"] == "1 of 2 not finite"
    places = [(label, place) for place, label, _ in drawn["ticks"]]
    assert places == [("0", "4.55%"), ("5", "50.00%"), ("10", "95.45%")]
    assert drawn["zero"] is None


def test_charts_of_differences_show_signs_and_zero() -> None:
    drawn = plots.forest(Chart("", "", {"a": [2.0, 4.0], "b": [1.0]}, zero=True))
    assert drawn["zero"] == "4.55%"  # though no value is there
    assert [row["label"] for row in drawn["rows"]] == ["+3.0", "+1.0"]
    below = plots.forest(Chart("", "", {"a": [-2.0, -4.0]}, zero=True))
    assert below["rows"][0]["label"] == "−3.0"
    assert [label for _, label, _ in below["ticks"]] == ["−4", "−2", "0"]


@pytest.mark.parametrize("values", [[], [None, NAN, math.inf], [10**400]])
def test_charts_without_a_finite_value_have_no_dot(values: list[float | None]) -> None:
    (row,) = plots.forest(Chart("", "", {"a": values}))["rows"]
    assert (row["dots"], row["median"], row["label"]) == ([], None, "–")


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e9])
@pytest.mark.parametrize("offset", [0.0, 1.0, -1000.0])
def test_charts_label_medians_finer_than_their_ticks(scale: float, offset: float) -> None:
    values = {"a": [scale * (offset + 0.12)], "b": [scale * (offset + 0.47)]}
    drawn = plots.forest(Chart("", "", values))
    a, b = (float(row["label"].replace("−", "-").replace(",", "")) for row in drawn["rows"])
    assert b - a == pytest.approx(0.35 * scale, rel=0.06)
    assert 2 <= len({label for _, label, _ in drawn["ticks"]}) <= 6


# ---- The file ---------------------------------------------------------------------------------


def test_report_is_deterministic(tmp_path: Path) -> None:
    first = write_report(full_report(), tmp_path / "a.html").read_bytes()
    # another process: neither ids drawn by chance nor hash order may show
    code = (
        "import sys; from pathlib import Path\n"
        f"sys.path[:0] = {[p for p in sys.path if p]!r} + [{str(Path(__file__).parent)!r}]\n"
        "from test_report import full_report, write_report\n"
        f"write_report(full_report(), Path({str(tmp_path / 'b.html')!r}))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
    assert (tmp_path / "b.html").read_bytes() == first


def test_report_does_not_depend_on_the_settings_of_matplotlib(tmp_path: Path) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    plain = write_report(full_report(), tmp_path / "a.html").read_bytes()
    with matplotlib.rc_context({"axes.facecolor": "red", "font.size": 40, "lines.marker": "x"}):
        assert write_report(full_report(), tmp_path / "b.html").read_bytes() == plain
        assert matplotlib.rcParams["font.size"] == 40


def test_report_makes_its_folder_and_returns_the_path(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "one" / "report.html"
    assert write_report(empty_report(), path) == path
    assert {file.name for file in path.parent.iterdir()} == {"report.html", "report.json"}


@pytest.mark.parametrize("broken", ["render", "write", "replace"])
def test_report_that_fails_leaves_the_earlier_one(
    broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_report(full_report(), tmp_path / "report.html")
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}

    def write_half(self: Path, data: bytes) -> int:
        with open(self, "wb") as file:
            file.write(data[: len(data) // 2])
        raise OSError("disk full")

    def fail(*arguments: object) -> None:
        raise OSError("disk full")

    report = full_report()
    if broken == "render":
        report = replace(report, samples=[None])  # type: ignore[list-item]
    elif broken == "write":
        monkeypatch.setattr(Path, "write_bytes", write_half)
    else:
        monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(Exception):  # noqa: B017 - whatever it is, the file must survive it
        write_report(replace(report, title="Another"), path)
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_report_takes_text_that_is_not_valid_unicode(tmp_path: Path) -> None:
    sample = Sample("日本 [MASK]", {"模型": [Guess("\ud800", 0.5), Guess("é", NAN)]})
    report = empty_report(samples=[sample], curves={"模型 $x_1$": metrics(5)})
    text = page(report, tmp_path).text
    assert "日本 [MASK]" in text
    assert "模型 $x_1$" in text
    assert "é NaN" in text


def test_read_report_returns_what_was_written(tmp_path: Path) -> None:
    report = replace(
        full_report(),
        samples=[Sample("日本 [MASK]", {"模型": [Guess("\ud800", NAN), Guess("é", 1)]})],
        config={"a": "steps: 1\n", "b": ""},
    )
    path = write_report(report, tmp_path / "a.html").with_suffix(".json")
    again = read_report(path)
    assert repr(again) == repr(report)  # NaN differs from itself
    before = path.read_bytes()
    assert write_report(again, tmp_path / "a.html").with_suffix(".json").read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"title": None}, "report.title: expected str, got None"),
        ({"models": {}}, "report.models: expected list, got {}"),
        ({"models": [[]]}, "report.models[0]: expected an object, got []"),
        ({"models": [{"name": "a"}]}, "report.models[0]: expected "),
        ({"curves": {"a": [3]}}, "report.curves['a'][0]: expected dict, got 3"),
        ({"facts": {"a": 3}}, "report.facts['a']: expected str, got 3"),
        ({"config": 3}, "report.config: expected str | dict[str, str], got 3"),
        ({"config": {"a": 3}}, "report.config['a']: expected str, got 3"),
        ({"charts": [{"title": "", "unit": "", "values": {"a": ["2"]}}]}, "float | None, got '2'"),
        ({"charts": [{"title": "", "unit": "", "values": {"a": [True]}}]}, "| None, got True"),
        ({"tables": [{"title": "t", "columns": ["a"], "rows": [["b", "c"]]}]},
         "table 't', row 1: expected 1 cell, got 2"),
        ({"surprise": 1}, "report: expected title, lead, models, "),
        ({"title": "x" * 99, "lead": 10**99}, "report.lead: expected str, got 1000"),
    ],
)  # fmt: skip
def test_read_report_names_file_and_field(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = write_report(empty_report(), tmp_path / "a.html").with_suffix(".json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        read_report(path)
    assert str(raised.value).startswith(f"{path}: ")
    assert len(str(raised.value)) < len(str(path)) + 200


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b'{"title": "a"}'])
def test_read_report_refuses_what_is_no_report(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))}: "):
        read_report(path)


def test_import_is_cheap() -> None:
    code = (
        "import sys, types\n"
        "package = types.ModuleType('distilfast')\n"  # without what distilfast itself imports
        f"package.__path__ = [{str(Path(report_module.__file__).parent.parent)!r}]\n"
        "sys.modules['distilfast'] = package\n"
        "import distilfast.report\n"
        "print([m for m in ('matplotlib', 'jinja2', 'numpy', 'torch') if m in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert ran.stdout.strip() == "[]"


# ---- metrics.jsonl ----------------------------------------------------------------------------


def test_read_metrics_returns_every_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = metrics(20)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_metrics(path) == lines


@pytest.mark.parametrize(
    ("content", "steps"),
    [
        (b"", []),
        (b'{"step": 1}\n', [1]),
        (b'{"step": 1}\n{"step": 2', [1]),
        (b'{"step": 1}\n{"step": 2}', [1, 2]),  # whole, only its newline is missing
        (b'{"step": 1}\n{"name": "\xc3', [1]),  # cut inside a character
        (b'{"ste', []),
        (b'{"step": 1}\r\n{"step": 2}\r\n', [1, 2]),
        (b'{"step": 1}\n\n{"step": 2}\n\n', [1, 2]),
    ],
)
def test_read_metrics_ignores_only_a_half_written_last_line(
    content: bytes, steps: list[int], tmp_path: Path
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(content)
    assert [line["step"] for line in read_metrics(path)] == steps


@pytest.mark.parametrize("bad", [b'{"step": 2', b"[2]", b"2", b"null", b"\xff\xfe"])
@pytest.mark.parametrize("end", [b"\n", b'\n{"step": 3}\n', b'\n{"step": 3'])
def test_read_metrics_names_file_and_line_of_a_bad_line(
    bad: bytes, end: bytes, tmp_path: Path
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + bad + end)
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))}, line 2: expected a JSON obj"):
        read_metrics(path)


def test_read_metrics_keeps_values_that_are_not_finite(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": NaN, "grad_norm": Infinity}\n')
    (line,) = read_metrics(path)
    assert math.isnan(line["loss"])
    assert line["grad_norm"] == math.inf
