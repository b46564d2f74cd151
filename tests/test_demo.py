"""The demo's own pieces; `make demo` itself takes minutes and is run before a release."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import make_teacher

from distilfast import config as configs
from distilfast import demo, train
from distilfast.driver import loop
from distilfast.report import Blocks, read_report
from distilfast.report.paired import claim
from distilfast.sources import lookup


@pytest.fixture
def small(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Path:
    """The demo with a tiny encoder and corpus in place of the real ones."""
    words = "paris is the of france in he was born london and new york".split()
    encoder = make_teacher(tmp_path / "encoder", words=[*words, ".", "river", "city"])
    text = tmp_path / "text.jsonl"
    lines = [json.dumps({"text": " ".join(words[i:] + words + words[:i])}) for i in range(40)]
    text.write_text("\n".join(lines))
    assets = {"asset:all-MiniLM-L6-v2": lambda: encoder, "asset:wikipedia-sample": lambda: text}
    monkeypatch.setattr(lookup, "ASSETS", assets)
    monkeypatch.setattr(demo, "FULL", (3, 3))
    monkeypatch.chdir(tmp_path)
    parse = configs.parse

    def shorter(arguments: list[str], **keywords: Any) -> configs.Config:
        steps = [] if any("--steps" in a for a in arguments) else ["--steps=2"]
        given = [*arguments, *steps, "--data.max_length=32", "--batch.sequences=8"]
        return parse([*given, "--batch.micro_sequences=8"], **keywords)

    monkeypatch.setattr(demo, "parse", shorter)
    return tmp_path


def test_demo_compares_three_runs(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = demo.main()
    out = capsys.readouterr().out
    assert path == Path("runs/demo/report.html")
    assert f"report: {path}" in out
    html = path.read_text(encoding="utf-8")
    summaries = {
        name: json.loads((small / "runs/demo" / name / "summary.json").read_text())
        for name in ("distilled", "undistilled")
    }
    for name, summary in summaries.items():
        loss = summary["scores"]["student"]["eval_loss"]
        assert f"{loss:.3f}" in html, name
        assert f"| {name} |" in out
    assert "student before training" in out
    report = read_report(path.with_suffix(".json"))
    ours, theirs = (Blocks(**summary["heldout"]) for summary in summaries.values())
    assert claim(ours, theirs)[1] in report.lead
    assert report.facts["loss, undistilled"] == "1 x masked-LM cross entropy"
    assert list(report.config) == ["teacher", "distilled", "undistilled"]
    teacher = report.models[0]
    assert (teacher.name, teacher.steps, teacher.is_teacher) == ("teacher", 2, True)
    untrained = {s["scores"]["untrained student"]["eval_loss"] for s in summaries.values()}
    assert len(untrained) == 1, "both students start from the same weights"


@pytest.mark.thorough
def test_demo_has_nothing_to_do_the_second_time(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    demo.main()
    monkeypatch.setattr(loop, "train", None)
    demo.main()


@pytest.mark.parametrize("arguments", [[], ["--local_rank=0"]], ids=["alone", "deepspeed"])
def test_bare_train_runs_the_demos_recipe_and_says_so(
    arguments: list[str], small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main(arguments) == 0
    assert f"no arguments: the demo's recipe, {demo.RECIPE}\n" in capsys.readouterr().out
    assert (small / "runs/demo/teacher/model/config.json").is_file()
    assert (small / "runs/demo/distilled/model/config.json").is_file()
    assert not (small / "runs/demo/undistilled").exists()


@pytest.mark.thorough
def test_full_demo_is_a_run_of_its_own(small: Path) -> None:
    assert demo.main(full=True) == Path("runs/demo-full/report.html")
    summary = json.loads((small / "runs/demo-full/distilled/summary.json").read_text())
    assert summary["steps"] == 3
