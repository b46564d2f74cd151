"""`distilfast ablate`: rows, pairs of seeds, resumption, and what the rows share."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import WORDS, make_task, make_teacher

from distilfast import cli
from distilfast.config import ConfigError
from distilfast.studies import ablate
from distilfast.studies.figures import difference


@pytest.fixture
def arguments(recipe: list[str], tmp_path: Path) -> list[str]:
    """Three steps, two seeds, a task of 48 sentences."""
    data = make_task(tmp_path / "data" / "words").parent
    return [
        *("ablate", *recipe, "--set", "steps=3", "evaluate.every=0", "tensorboard=false"),
        *("--data", str(data), "--tasks", "words", "--seeds", "2", "--epochs", "1"),
        *("--max_length", "24", "--learning_rate", "1e-3", "--precision", "fp32"),
        *("--processes", "1", "--output", str(tmp_path / "ablation")),
    ]


def test_differences_and_p_are_those_worked_by_hand() -> None:
    """Differences 1, 2, 3: mean 2, standard deviation 1, t = 2 / (1 / sqrt 3) = 3.4641 on two
    degrees of freedom, for which p = 1 - t / sqrt(2 + t^2)."""
    found = difference([11.0, 12.0, 13.0], [10.0, 10.0, 10.0])
    t = 2 * math.sqrt(3)
    assert (found.mean, found.stdev) == (2.0, 1.0)
    assert found.p == pytest.approx(1 - t / math.sqrt(2 + t * t), abs=1e-12)


def test_seed_without_a_figure_does_not_count() -> None:
    found = difference([1.0, None, 3.0, 5.0], [0.0, 0.0, None, 2.0])
    assert (found.values, found.mean) == ([1.0, None, None, 3.0], 2.0)
    assert difference([None], [1.0]).cells(1) == ["", ""]


def test_p_is_left_out_where_a_test_has_nothing_to_go_by() -> None:
    assert difference([1.0], [0.0]).p is None
    assert difference([1.0, 1.0], [0.0, 0.0]).p is None


def test_rows_are_those_of_table_4_a_grid_or_ones_own() -> None:
    assert list(ablate.chosen_rows(None, None)) == [ablate.BASELINE, *ablate.TABLE_4]
    grid = ablate.chosen_rows(["loss.temperature=1,2", "loss.kd_weight=3,4"], None)
    assert list(grid) == [
        ablate.BASELINE,
        "loss.temperature=1 loss.kd_weight=3",
        "loss.temperature=1 loss.kd_weight=4",
        "loss.temperature=2 loss.kd_weight=3",
        "loss.temperature=2 loss.kd_weight=4",
    ]
    own = ablate.chosen_rows(None, [["labels", "loss.kd_weight=0", "loss.hidden_cos_weight=0"]])
    assert own["labels"] == ("loss.kd_weight=0", "loss.hidden_cos_weight=0")


@pytest.mark.parametrize(
    ("grid", "row", "said"),
    [
        (["loss.temperature"], None, "--grid: expected KEY=A,B"),
        (["loss.temperature=1,,2"], None, "each once"),
        (["seed=1,2"], None, "rows need not share, got 'seed=1'"),
        (["steps=1,2"], None, "got 'steps=1'"),
        (["loss.temperature=1,2", "loss.temperature=3"], None, "expected each key once a row"),
        (None, [["name"]], "--row: expected a new name and KEY=VALUE"),
        (None, [[ablate.BASELINE, "loss.kd_weight=0"]], "--row: expected a new name"),
        (None, [["name", "loss.kd_weight"]], "expected KEY=VALUE of a key"),
    ],
)
def test_rows_that_compare_nothing_are_refused(grid: Any, row: Any, said: str) -> None:
    with pytest.raises((ConfigError, Exception), match=said):
        ablate.chosen_rows(grid, row)


@pytest.mark.thorough
def test_rows_share_steps_data_and_seeds(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = ("--row", "labels", "loss.kd_weight=0", "loss.hidden_cos_weight=0")
    assert cli.main([*arguments, *rows]) == 0
    output = tmp_path / "ablation"
    configs = {
        (name, seed): yaml.safe_load(
            (output / "runs" / name / f"seed-{seed}" / "config.yaml").read_text()
        )
        for name in ("as-configured", "labels")
        for seed in (56, 57)
    }
    for seed in (56, 57):
        ours, theirs = configs["as-configured", seed], configs["labels", seed]
        differing = {k for k in ours if ours[k] != theirs[k]}
        assert differing == {"loss", "output"}
        assert {k for k in ours["loss"] if ours["loss"][k] != theirs["loss"][k]} == {
            "kd_weight",
            "hidden_cos_weight",
        }
        assert ours["seed"] == seed
    results = json.loads((output / "results.json").read_text())
    assert list(results) == [ablate.BASELINE, "labels"]
    for part in ("score", "eval_loss"):
        scores = [results[name][part]["scores"] for name in results]
        assert all(len(s) == 2 for s in scores)
        expected = [b - a for a, b in zip(*scores, strict=True)]
        assert results["labels"]["difference"][part]["values"] == pytest.approx(expected)
    losses = [
        json.loads((output / "runs" / name / "seed-56" / "summary.json").read_text())["scores"]
        for name in ("as-configured", "labels")
    ]
    assert results["labels"]["eval_loss"]["scores"][0] == losses[1]["student"]["eval_loss"]
    assert losses[0] != losses[1]
    printed = capsys.readouterr().out
    assert "| labels |" in printed
    assert (output / "report.html").is_file()
    # once more: nothing is left to do, and the figures are the same
    before = {p: p.stat().st_mtime_ns for p in (output / "scores").rglob("*.json")}
    assert cli.main([*arguments, *rows]) == 0
    assert {p: p.stat().st_mtime_ns for p in (output / "scores").rglob("*.json")} == before
    assert json.loads((output / "results.json").read_text()) == results


def test_what_cannot_be_fine_tuned_is_found_before_anything_is_trained(
    arguments: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    other = make_teacher(tmp_path / "other", words=WORDS[::-1])
    for changed, said in (
        (("--max_length", "65"), "--max_length: expected at most 64 ('as configured'), got 65"),
        (("--row", "deep", "student.layers=[9]"), "student.layers"),
        (
            ("--output", "/proc/nothing"),
            "--output: expected a folder that can be written",
        ),
        (("--set", "batch.sequences=null", "batch.tokens=9"), "batch.tokens: expected at least"),
        (("--row", "a b", "loss.kd_weight=0", "--row", "a-b", "loss.kd_weight=2"), "'a b'"),
        (("--row", "x", "evaluate={every: 2}"), "need not share, got 'evaluate={every: 2}'"),
        (("--row", "x", f"teacher={other}"), "--row: expected the tokenizer of the configuration"),
    ):
        assert cli.main([*arguments, *changed]) == 2
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1
        assert not (tmp_path / "ablation").exists()


def test_a_folder_of_other_settings_is_refused(
    arguments: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    rows = ("--row", "labels", "loss.kd_weight=0", "loss.hidden_cos_weight=0")
    monkeypatch.setattr(ablate, "train", stopped)
    assert cli.main([*arguments, *rows]) == 130
    capsys.readouterr()
    # Nothing is measured: another command may correct it. Then there is something to differ from.
    assert cli.main([*arguments, *rows, "--epochs", "2"]) == 130
    assert cli.main([*arguments, *rows]) == 130
    (tmp_path / "ablation" / "distilled").mkdir()
    (tmp_path / "ablation" / "distilled" / "seed-0.json").touch()
    capsys.readouterr()
    for changed, said in (
        (("--epochs", "2"), "differs in epochs (1, now 2)"),
        (("--set", "steps=4"), "differs in config"),
    ):
        assert cli.main([*arguments, *rows, *changed]) == 2
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1


def test_epochs_without_a_batch_leave_no_tokens(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    many = ["--set", "steps=null", "epochs=1", "data.prepared=null", "batch.sequences=512"]
    assert cli.main([*arguments, *many]) == 2
    assert "batch" in capsys.readouterr().err
    assert not (tmp_path / "ablation" / "text-tokens").exists()


@pytest.mark.parametrize(
    ("seen", "device", "visible"),
    [
        (None, "cuda:1", "1"),
        ("4,6", "cuda:1", "6"),
        ("GPU-a, GPU-b", "cuda:0", "GPU-a"),
        (None, "cpu", ""),
        ("4,6", "cpu", ""),
    ],
)
def test_run_sees_the_device_of_its_job_alone(
    seen: str | None, device: str, visible: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if seen is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", seen)
    assert ablate._visible(device) == visible
