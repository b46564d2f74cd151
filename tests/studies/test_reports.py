"""`distilfast report`: what it reads of a run, how runs become one page, what it refuses."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from distilfast import __version__, cli, machine
from distilfast.report import (
    Blocks,
    Chart,
    Guess,
    ModelRow,
    Report,
    Sample,
    Table,
    markdown,
    models_table,
    read_report,
    write_report,
)
from distilfast.report.merging import merge
from distilfast.report.paired import Paired, claim, paired
from distilfast.studies.pages import read_run

SCORES = {"eval_loss": 4.0, "eval_accuracy": 0.25, "eval_agreement": 0.5}
SUMMARY = {
    "teacher": ["bert"],
    "teacher_parameters": 2_000_000,
    "parameters": 1_000_000,
    "student_layers": 3,
    "steps": 2,
    "tokens": 4096,
    "seconds": 60.0,
    "device": "a CPU",
    "scores": {
        "teacher": {**SCORES, "eval_agreement": None},
        "untrained student": {**SCORES, "eval_loss": 9.0},
        "student": SCORES,
    },
}


def blocks(above: float) -> dict[str, Any]:
    """Twelve blocks of ten tokens, their losses higher by ``above`` in the mean."""
    spread = [10 * (3 + above) + (3.0 * (-1) ** i if above else 0.0) for i in range(12)]
    return {"examples": 40, "tokens": [10] * 12, "losses": spread}


LINES = [
    {"step": 0, **SCORES},
    {"step": 1, "loss": 3.0},
    {"step": 2, "loss": float("nan")},
    {"step": 2, **SCORES},
]


def training_run(
    folder: Path, *, temperature: float = 2.0, summary: dict[str, Any] | None = SUMMARY
) -> Path:
    folder.mkdir(parents=True)
    config = f"loss:\n  temperature: {temperature}\nseed: 56\noutput: {folder.name}\n"
    (folder / "config.yaml").write_text(config)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    if summary:
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def row(
    name: str, parameters: int, loss: float, agreement: float | None, teacher: bool = False
) -> ModelRow:
    size = parameters * 4 / 2**20
    return ModelRow(name, parameters, size, loss, 0.25, agreement, None, None, teacher=teacher)


def glue_report(*scores: float, columns: str = "model CoLA", title: str = "GLUE") -> Report:
    rows = [["student", *map(str, scores)], ["BERT", "56.3"]]
    return Report(
        title="Four tasks",
        lead=f"CoLA {scores[0]}.",
        models=[],
        curves={},
        samples=[Sample("a [MASK]", {"student": [Guess(str(scores[0]), 0.5)]})],
        facts={"device": "a CPU", "seeds": str(len(scores))},
        config="seeds: 5\n",
        tables=[Table(title, columns.split(), rows, "Medians.", published=[1])],
        charts=[Chart("CoLA", "Matthews", {"student": list(scores)}, caption="Seeds.")],
        commands=["distilfast glue"],
    )


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


# ---- One run ----------------------------------------------------------------------------------


def test_a_finished_training_run_is_read_from_its_files(tmp_path: Path) -> None:
    report = read_run(training_run(Path("runs/small")), "small")
    assert report.title == "small: 1.0 M parameters"
    assert report.lead == "Held-out loss 4.000, accuracy 25.0 % after 2 steps."
    assert report.models == [
        row("teacher", 2_000_000, 4.0, None, teacher=True),
        row("student before training", 1_000_000, 9.0, 0.5),
        replace(row("small", 1_000_000, 4.0, 0.5), train_time_s=60.0, steps=2),
    ]
    assert repr(report.curves) == repr({"small": LINES})
    assert report.facts == {
        "teacher": "bert",
        "trained on": "4,096 tokens in 2 steps",
        "seed": "56",
        "device": "a CPU",
    }
    assert report.blocks == {}
    assert report.commands == ["distilfast train --config runs/small/config.yaml"]
    assert str(report.config).startswith("loss:\n  temperature: 2.0\n")


def test_a_runs_own_page_is_what_its_files_say(recipe: list[str]) -> None:
    assert cli.main(["train", *recipe, "--steps=2", "--output=own"]) == 0
    own = read_report(Path("own/report.json"))
    assert own == read_run(Path("own"), "own")
    assert [row.name for row in own.models] == ["teacher", "student before training", "own"]
    assert own.models[0].parameters > own.models[2].parameters > 0
    assert len(own.curves["own"]) == 4


def test_a_summary_from_before_teachers_were_counted_has_no_row_of_one() -> None:
    summary = {k: v for k, v in SUMMARY.items() if k != "teacher_parameters"}
    report = read_run(training_run(Path("old"), summary=summary), "old")
    assert [row.name for row in report.models] == ["student before training", "old"]


def test_a_run_says_what_it_was_made_of_and_measured_on() -> None:
    summary = {**SUMMARY, "code": "distilfast 1 at 0123", "heldout": blocks(0.0)}
    folder = training_run(Path("new"), summary=summary)
    with (folder / "config.yaml").open("a") as file:
        file.write("loss: {temperature: 3.0, divergence: jsd, kd_weight: 5.0, ce_weight: 0.5}\n")
    facts = read_run(folder, "new").facts
    assert facts["loss"] == "5 x JSD at T = 3, 0.5 x masked-LM cross entropy"
    assert facts["evaluated on"] == "40 held-out examples with 120 masked tokens"
    assert facts["code"] == "distilfast 1 at 0123"


def test_code_is_named_by_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "__file__", str(tmp_path / "distilfast" / "machine.py"))
    plain = machine.code_version()
    assert plain == f"distilfast {__version__}"
    git = "git -c user.name=a -c user.email=a@b -c commit.gpgsign=false"
    for command in ("init -q", "commit -q --allow-empty -m one"):
        subprocess.run([*git.split(), *command.split()], cwd=tmp_path, check=True)
    head = subprocess.check_output("git rev-parse HEAD".split(), cwd=tmp_path, text=True)
    assert machine.code_version() == f"{plain} at {head[:12]}"
    (tmp_path / ".git" / "HEAD").unlink()  # a damaged checkout is no reason to fail
    assert machine.code_version() == plain


def test_scores_that_are_not_defined_are_no_figures() -> None:
    nothing = dict.fromkeys(SCORES)
    found = {"examples": 3, "tokens": [0, 0, 0], "losses": [0.0, 0.0, 0.0]}
    summary = {**SUMMARY, "scores": {"student": nothing}, "heldout": found}
    runs = {name: read_run(training_run(Path(name), summary=summary), name) for name in "ab"}
    assert runs["a"].lead == "2 steps; no held-out token was masked, so nothing was measured."
    page = merge(runs)
    write_report(page, Path("page.html"))
    assert page.tables == []
    assert markdown(models_table(page.models)).splitlines()[2:] == [
        f"| {name} | – | – | – | 1.0 M | 3.8 | 2 | 1 min 00 s |" for name in "ab"
    ]


def test_a_run_that_is_not_finished_has_its_curves() -> None:
    folder = training_run(Path("half"), summary=None)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')  # killed while it wrote
    report = read_run(folder, "half")
    assert (report.title, report.lead) == ("half", "Not finished: 2 steps so far.")
    assert repr(report.curves) == repr({"half": LINES})
    assert report.models == []


def test_a_run_of_another_command_is_its_report(tmp_path: Path) -> None:
    write_report(glue_report(50.0), tmp_path / "glue" / "report.html")
    assert read_run(tmp_path / "glue", "any") == glue_report(50.0)


def test_one_run_is_its_own_page(capsys: Any) -> None:
    training_run(Path("runs/small"))
    assert cli.main(["report", "runs/small"]) == 0
    assert capsys.readouterr() == ("runs-report.html\n", "")
    page = read_report(Path("runs-report.json"))
    assert page.title == "small: 1.0 M parameters"
    assert page.commands == [
        "distilfast train --config runs/small/config.yaml",
        "distilfast report runs/small",
    ]
    assert "Held-out loss" in Path("runs-report.html").read_text()


# ---- Several runs -----------------------------------------------------------------------------


def test_training_runs_share_a_table_and_a_plot() -> None:
    student = {**SCORES, "eval_loss": 3.5}
    better = {**SUMMARY, "scores": {**SUMMARY["scores"], "student": student}}  # type: ignore[dict-item]
    page = merge(
        {
            "a": read_run(training_run(Path("a")), "a"),
            "warm": read_run(training_run(Path("b"), temperature=4.0, summary=better), "warm"),
        }
    )
    # What is the same in both is there once.
    names = [(row.name, row.eval_loss) for row in page.models]
    assert names == [("teacher", 4.0), ("student before training", 9.0), ("a", 4.0), ("warm", 3.5)]
    assert list(page.curves) == ["a", "warm"]
    assert page.facts["seed"] == "56"
    assert page.tables == [
        Table("What differs", ["key", "a", "warm"], [["loss.temperature", "2.0", "4.0"]])
    ]
    assert list(page.config) == ["a", "warm"]
    assert page.commands == [f"distilfast train --config {f}/config.yaml" for f in "ab"]


@pytest.mark.parametrize(
    ("above", "cells"),
    [
        (0.3, ["+0.300 ± 0.090", "higher than a"]),
        (0.1, ["+0.100 ± 0.090", "not distinguishable from a"]),
    ],
)
def test_losses_are_compared_on_the_same_examples(above: float, cells: list[str]) -> None:
    """The standard error by hand: the blocks' differences are 10 x above, 3 more and 3 less in
    turn, so it is 3 sqrt(12 / 11) / sqrt(12) for a block of 10 tokens."""
    reports = {
        name: read_run(training_run(Path(name), summary={**SUMMARY, "heldout": found}), name)
        for name, found in (("a", blocks(0.0)), ("b", blocks(above)))
    }
    page = merge(reports)
    table = page.tables[0]
    assert table.rows == [["b", *cells]]
    assert "the same 40 held-out examples with 120 masked tokens" in table.caption
    verdict = cells[1].removesuffix(" a").replace("higher", "lower")
    ours, theirs = reports["a"].blocks["a"], reports["b"].blocks["b"]
    assert f"Held-out loss of a: 4.000, {verdict} the 4.000 of b. " in page.lead
    assert claim(ours, None)[0] == claim(ours, replace(theirs, tokens=[9] * 12))[0] == "beside"
    few = [Blocks(9, x.tokens[:9], x.losses[:9]) for x in (ours, theirs)]
    assert claim(*few)[0] == "not distinguishable from"
    assert paired(ours, ours) == Paired(0.0, 0.0)


def test_rows_that_differ_are_told_apart_by_their_runs() -> None:
    other = json.loads(json.dumps(SUMMARY))
    other["scores"]["teacher"]["eval_loss"] = 3.0
    runs = {"a": training_run(Path("a")), "b": training_run(Path("b"), summary=other)}
    page = merge({name: read_run(folder, name) for name, folder in runs.items()})
    names = [row.name for row in page.models]
    assert names == ["a: teacher", "student before training", "a", "b: teacher", "b"]


def test_tables_of_one_title_and_columns_become_one() -> None:
    page = merge({"a": glue_report(50.0), "b": glue_report(51.0)})
    table = page.tables[-1]
    assert (table.title, table.columns, table.caption) == ("GLUE", ["model", "CoLA"], "Medians.")
    assert table.rows == [["a: student", "50.0"], ["b: student", "51.0"], ["BERT", "56.3"]]
    assert table.published == [2]


@pytest.mark.parametrize("changes", [{"columns": "model RTE"}, {"title": "SuperGLUE"}])
def test_tables_that_differ_stay_apart_under_their_runs(changes: dict[str, Any]) -> None:
    page = merge({"a": glue_report(50.0), "b": glue_report(51.0, **changes)})
    title = changes.get("title", "GLUE")
    assert [table.title for table in page.tables] == ["Runs", "a: GLUE", f"b: {title}"]
    assert page.tables[1].rows == glue_report(50.0).tables[0].rows


def test_charts_of_one_title_and_unit_become_one() -> None:
    a, b = glue_report(50.0, columns="model CoLA"), glue_report(51.0)
    (chart,) = merge({"a": a, "b": b}).charts
    assert chart == Chart(
        "CoLA", "Matthews", {"a: student": [50.0], "b: student": [51.0]}, caption="Seeds."
    )
    b = replace(b, charts=[replace(b.charts[0], zero=True)])
    assert [c.title for c in merge({"a": a, "b": b}).charts] == ["a: CoLA", "b: CoLA"]


def test_samples_of_one_text_stand_side_by_side() -> None:
    (sample,) = merge({"a": glue_report(50.0), "b": glue_report(51.0)}).samples
    assert sample.guesses == {
        "a: student": [Guess("50.0", 0.5)],
        "b: student": [Guess("51.0", 0.5)],
    }


def test_facts_that_differ_name_their_runs() -> None:
    facts = [{"device": "a CPU", "seeds": "1"}, {"device": "a CPU", "seeds": "5", "date": "today"}]
    reports = {n: replace(glue_report(1.0), facts=f) for n, f in zip("ab", facts, strict=True)}
    assert merge(reports).facts == {
        "device": "a CPU", "seeds, a": "1", "seeds, b": "5", "date, b": "today"
    }  # fmt: skip


def test_configurations_are_compared_by_the_keys_they_share() -> None:
    texts = ["steps: 1\na: {b: null, c: [1]}\n", "steps: 1\na: {b: x, d: 2}\n", "no: [yaml", "text"]
    reports = {n: replace(glue_report(1.0), config=t) for n, t in zip("abcd", texts, strict=True)}
    differs = merge(reports).tables[1]
    assert differs.rows == [["a.b", "null", "x", "", ""]]


def test_a_compared_page_can_be_compared_again(tmp_path: Path) -> None:
    page = merge({"a": glue_report(50.0), "b": glue_report(51.0)})
    again = merge({"both": page, "c": glue_report(52.0)})
    assert list(again.config) == ["both: a", "both: b", "c"]
    assert "both: a: student" in dict.fromkeys(row[0] for t in again.tables for row in t.rows)


# ---- The command ------------------------------------------------------------------------------


def test_names_are_the_folders_or_as_given(capsys: Any) -> None:
    training_run(Path("x/small"))
    training_run(Path("odd=name"))
    training_run(Path("y/small"))
    assert cli.main(["report", "x/small/", "odd=name", "late=y/small", "--output=d/p.html"]) == 0
    assert capsys.readouterr() == ("d/p.html\n", "")
    assert list(read_report(Path("d/p.json")).curves) == ["small", "odd=name", "late"]


def test_an_earlier_page_of_the_command_is_replaced(capsys: Any) -> None:
    training_run(Path("a"))
    training_run(Path("b"))
    assert cli.main(["report", "a"]) == 0
    assert cli.main(["report", "a", "b"]) == 0
    assert list(read_report(Path("runs-report.json")).curves) == ["a", "b"]


def spoil(path: str, content: str) -> None:
    Path(path).write_text(content)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "RUN"),
        ("nowhere", "RUN: expected a folder, got 'nowhere'"),
        ("new=nowhere", "RUN: expected a folder, got 'nowhere'"),
        ("=run", "RUN: expected a name before =, got '=run'"),
        ("run/config.yaml", "RUN: expected a folder, got 'run/config.yaml'"),
        ("empty", "RUN: expected a folder with metrics.jsonl or report.json, got 'empty'"),
        ("run copy/run", "RUN: expected names that differ, got 'run' twice; try NAME=RUN"),
        ("metrics", "RUN: metrics/metrics.jsonl, line 2: expected a JSON object, got 'oops'"),
        ("config", "RUN: config/config.yaml: expected a mapping of keys in YAML"),
        ("config-less", "RUN: [Errno 2] No such file or directory: 'config-less/config.yaml'"),
        ("summary", "RUN: summary/summary.json: expected the summary of a run, got "),
        ("list", "RUN: list/summary.json: expected the summary of a run, got "),
        ("report", "RUN: report/report.json: Expecting value: line 1 column 1 (char 0)"),
        ("run --output page", "--output: expected a file named *.html, got 'page'"),
        ("run --output mine.html", "--output: expected a new file, or a page of `distilfast"),
        ("run --output data.html", "--output: expected a new file, or a page of `distilfast"),
        ("run --output own/report.html", "--output: expected a new file, or a page of `dist"),
        ("run --output mine.html/x.html", "--output: expected a folder, got the file 'mine.html'"),
        ("run --outptu x.html", "--outptu: unknown flag; did you mean --output?"),
    ],
)
def test_whatever_is_wrong_is_said_in_one_line(
    arguments: str, message: str, tmp_path: Path, capsys: Any
) -> None:
    run = training_run(Path("run"))
    for name in ("copy/run", "metrics", "config", "config-less", "summary", "list"):
        shutil.copytree(run, name)
    for name in ("empty", "report", "own"):
        Path(name).mkdir()
    spoil("metrics/metrics.jsonl", '{"step": 1}\noops\n{"step": 3}\n')
    spoil("config/config.yaml", "a: [1,\n")
    Path("config-less/config.yaml").unlink()
    spoil("summary/summary.json", '{"scores": {}}')
    spoil("list/summary.json", "[]")
    spoil("report/report.json", "")
    spoil("mine.html", "my own page")
    spoil("data.json", "{}")
    write_report(glue_report(50.0), Path("own/report.html"))

    def contents() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    before = contents()
    assert cli.main(["report", *arguments.split()]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("distilfast: ")
    assert message in err
    assert err.count("\n") == 1
    assert contents() == before
