"""The commands as users run them: `distilfast ...` and `python distilfast/train.py ...`."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

from distilfast import __version__, cli

SCRIPT = str(ROOT / "distilfast" / "train.py")
COMMAND = str(Path(sys.executable).parent / "distilfast")
RECIPES = sorted((ROOT / "configs").glob("*.yaml"))


def contents(folder: Path) -> dict[str, tuple[int, bytes] | None]:
    """Everything in a folder, by path, with the time of its last change."""
    paths = sorted(folder.rglob("*"))
    return {
        str(p.relative_to(folder)): None if p.is_dir() else (p.stat().st_mtime_ns, p.read_bytes())
        for p in paths
    }


def run(command: list[str], folder: Path, **environment: str) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of a process of its own."""
    wanted = {"OMP_NUM_THREADS": "1", **environment}
    inherited = {k: v for k, v in os.environ.items() if k not in ("WORLD_SIZE", "RANK")}
    done = subprocess.run(
        command,
        cwd=folder,
        env={k: v for k, v in {**inherited, **wanted}.items() if v},
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.returncode, done.stdout, done.stderr


# --- Errors, in a process of their own ------------------------------------------------------------


def test_script_refuses_in_one_line_from_another_folder(recipe: list[str], tmp_path: Path) -> None:
    before = contents(tmp_path)
    command = [sys.executable, SCRIPT, "--config", "recipe.yaml", "--loss.temperature=0"]
    assert run(command, tmp_path) == (
        *(2, ""),
        "distilfast: loss.temperature: expected a number > 0, got 0.0\n",
    )
    assert contents(tmp_path) == before


@pytest.mark.thorough
def test_script_refuses_bad_text_in_one_line(recipe: list[str], tmp_path: Path) -> None:
    """The libraries that read it have much to say of their own."""
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{"text": \n', encoding="utf-8")
    before = contents(tmp_path)
    given = [*recipe, f"--data.source={tmp_path}/broken.jsonl"]
    status, out, err = run([sys.executable, "distilfast/train.py", *given], ROOT)
    assert (status, out) == (2, ""), err
    assert err.startswith(f"distilfast: data.source: '{tmp_path}/broken.jsonl'")
    assert err.count("\n") == 1, err
    assert contents(tmp_path) == before


@pytest.mark.thorough
def test_command_refuses_a_hub_name_without_network_in_one_line(
    recipe: list[str], tmp_path: Path
) -> None:
    before = contents(tmp_path)
    nobody = {"HF_ENDPOINT": "http://127.0.0.1:9", "no_proxy": "127.0.0.1"}
    command = [COMMAND, "train", *recipe, "--teacher=no-such-user/no-such-model"]
    status, out, err = run(command, tmp_path, HF_HUB_OFFLINE="", HF_DATASETS_OFFLINE="", **nobody)
    assert (status, out) == (2, ""), err
    assert err.startswith("distilfast: teacher: expected a folder or a name")
    assert err.count("\n") == 1, err
    assert contents(tmp_path) == before


def test_make_refuses_another_python_and_leaves_nothing(tmp_path: Path) -> None:
    old = tmp_path / "python3.10"
    old.write_text("#!/bin/sh\n[ $1 = -V ] && echo Python 3.10.12\n", encoding="utf-8")
    old.chmod(0o755)
    venv = tmp_path / "venv"
    not_in_make = {"MAKELEVEL": "", "MAKEFLAGS": ""}
    status, out, err = run(
        ["make", f"{venv}/demo", f"PYTHON={old}", f"VENV={venv}"], ROOT, **not_in_make
    )
    assert (status, out) == (2, "")
    assert err.startswith("make: expected Python 3.11 to 3.13, got Python 3.10.12; ")
    assert not venv.exists()


# --- The commands ---------------------------------------------------------------------------------


def test_command_without_arguments_lists_the_commands(capsys: Any) -> None:
    for arguments in ([], ["--help"], ["-h"]):
        assert cli.main(arguments) == 0
        out, err = capsys.readouterr()
        assert err == ""
        for name in ("train", "prepare", "check", "recipes", "demo"):
            assert f"\n  {name} " in out


def test_unknown_command_is_refused_in_one_line(capsys: Any) -> None:
    assert cli.main(["trian"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.endswith("got 'trian'; did you mean train?\n")
    assert err.count("\n") == 1


def test_module_is_the_command_and_tells_its_version(tmp_path: Path) -> None:
    said = 0, f"distilfast {__version__}\n", ""
    assert run([sys.executable, "-m", "distilfast", "--version"], tmp_path) == said


def test_flags_of_a_command_without_a_parser_are_checked(
    capsys: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for command, flags in (("demo", "nothing or --full"), ("recipes", "nothing")):
        assert cli.main([command, "--fulll"]) == 2
        said = f"distilfast: {command}: expected {flags}, got '--fulll'\n"
        assert capsys.readouterr() == ("", said)
    assert list(tmp_path.iterdir()) == []


def test_recipes_lists_every_file_of_configs(capsys: Any) -> None:
    assert cli.main(["recipes"]) == 0
    out = capsys.readouterr().out
    assert RECIPES
    for path in RECIPES:
        comment = path.read_text(encoding="utf-8").splitlines()[0]
        assert re.fullmatch(r"# .+\.", comment), f"{path.name}: no sentence says what it is"
        assert f"{path.stem}\n    {comment.removeprefix('# ')}\n" in out


def test_check_prints_the_plan_and_writes_nothing(
    recipe: list[str], teacher: Path, corpus: Path, tmp_path: Path, capsys: Any
) -> None:
    before = contents(tmp_path)
    assert cli.main(["check", *recipe, "--student.layers=[0,3]"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    for word in (
        *(str(teacher), "DistilBert", "[0, 3]", str(corpus), str(tmp_path / "tokens")),
        *("10", "16 sequences = 1 rank x 4 micro-batches of at most 4", "fp32"),
        str(tmp_path / "run"),
    ):
        assert word in out
    assert contents(tmp_path) == before


def test_check_counts_the_ranks_of_a_launcher(
    recipe: list[str], capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(["check", *recipe]) == 0
    assert "2 ranks x 2 micro-batches of at most 4" in capsys.readouterr().out


def test_prepare_makes_the_tokens_once(recipe: list[str], tmp_path: Path, capsys: Any) -> None:
    assert cli.main(["prepare", *recipe]) == 0
    first, made = capsys.readouterr().out, contents(tmp_path / "tokens")
    for word in (
        f"{Path(recipe[1]).parent / 'tokens'}\n",
        ": 1 .txt\n",
        "\ndata:     120 texts: 120 used",
    ):
        assert word in first
    assert {"store.json", "counts.npy", "train", "heldout"} <= set(made)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["recipe.yaml", "tokens"]

    assert cli.main(["prepare", *recipe]) == 0
    assert capsys.readouterr().out == first
    assert contents(tmp_path / "tokens") == made

    # What has been prepared is in the plan, and needs its source no longer.
    assert cli.main(["check", *recipe, "--data.source=null"]) == 0
    assert first.partition("data: ")[2] in capsys.readouterr().out
    assert contents(tmp_path / "tokens") == made


def test_prepare_puts_the_tokens_into_the_output_by_default(
    recipe: list[str], tmp_path: Path
) -> None:
    assert cli.main(["prepare", *recipe, "--data.prepared=null"]) == 0
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["tokens"]


def test_check_gives_epochs_as_steps(recipe: list[str], capsys: Any) -> None:
    """Whole steps, rounded down: 108 examples twice are 13 steps of 16."""
    assert cli.main(["prepare", *recipe]) == 0
    capsys.readouterr()
    assert cli.main(["check", *recipe, "--steps=null", "--epochs=2"]) == 0
    out = capsys.readouterr().out
    examples = int(out.partition("train: ")[2].split()[0])
    assert f"steps:    {2 * examples // 16}" in out


@pytest.mark.parametrize("name", ["prepare", "check"])
def test_command_refuses_in_one_line(
    name: str, recipe: list[str], tmp_path: Path, capsys: Any
) -> None:
    before = contents(tmp_path)
    for wrong, expected in (
        ("--loss.temprature=3", "did you mean loss.temperature?"),
        (f"--data.source={tmp_path}/nothing.txt", "data.source: expected an existing file"),
        (f"--teacher={tmp_path}/nothing", "teacher: expected an existing file"),
    ):
        assert cli.main([name, *recipe, wrong]) == 2
        err = capsys.readouterr().err
        assert expected in err
        assert err.count("\n") == 1
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", ["train", "prepare", "check", "recipes", "replay", "demo"])
def test_command_has_help(name: str, capsys: Any) -> None:
    with contextlib.suppress(SystemExit):
        assert cli.main([name, "--help"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert re.match(rf"usage: distilfast {name}\s", out)
