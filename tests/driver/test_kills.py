"""Runs that are killed, and gone on with: the same metrics and the same weights, bit for bit.

    PYTHONPATH=tests python tests/driver/test_kills.py --csv FILE    # the long version, a table

This file is also the program that is killed: at a marked point of a save, or some milliseconds
after a step has begun. Nothing launches the ranks but the test, so nobody cleans up after a kill.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import datetime
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import launches
import pytest
import torch
from conftest import ROOT, make_corpus, make_teacher
from families import make_causal
from safetensors.torch import load_file

from distilfast import train
from distilfast.config import Config
from distilfast.driver import checkpoint, checks, loop
from distilfast.driver.processes import free_port

pytestmark = pytest.mark.thorough

POINTS = ("begin", "writing", "written", "said")  # of every rank's save
POINTS_OF_FIRST = (*POINTS, "manifest", "renamed", "pruning")
TIMES = ("tokens_per_second",)
GRACE_S = 30  # in which a rank has to notice that another is dead


@dataclass(frozen=True)
class Kill:
    """kill -9 at the ``nth`` call of a point of a save; "moment": ``delay_ms`` after the ``nth``
    step of the launch has begun."""

    point: str
    nth: int
    victims: tuple[int, ...]  # ranks
    delay_ms: float = 0.0


def program(kill: dict[str, Any], arguments: Sequence[str]) -> int:
    """A run that is killed on the way."""
    calls = 0

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def mark(point: str) -> None:
        nonlocal calls
        calls += point == kill["point"]
        if calls == kill["nth"]:
            die()

    step = loop.optimiser_step

    def timed(*things: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == kill["nth"]:
            threading.Timer(kill["delay_ms"] / 1e3, die).start()
        return step(*things)

    if int(os.environ.get("RANK", "0")) in kill["victims"]:
        if kill["point"] == "moment":
            loop.optimiser_step = timed
        else:
            checkpoint.mark = mark
    return train.main(arguments)


# --- Killing and going on -------------------------------------------------------------------------


def launch(ranks: int, recipe: Sequence[str], kill: Kill | None = None) -> list[int]:
    """A launch of the run; the ranks' exit statuses."""
    kill = kill or Kill("never", 0, ())
    environment = launches.environment()
    if ranks > 1:
        port = str(free_port())
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(ranks)}
    command = [sys.executable, __file__, "--killed", json.dumps(vars(kill)), *recipe]
    processes = []
    with tempfile.TemporaryFile() as log:
        for rank in range(ranks):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
            processes.append(
                subprocess.Popen(command, env=environment | own, stdout=log, stderr=log)
            )
        try:
            patience = 300
            for process in (*(processes[v] for v in kill.victims), *processes):
                process.wait(timeout=patience)
                patience = GRACE_S if kill.victims else patience
        finally:
            for process in processes:
                process.kill()
                process.wait()
        statuses = [process.returncode for process in processes]
        log.seek(0)
        if not kill.victims:
            assert statuses == [0] * ranks, log.read()[-5000:].decode()
    for victim in kill.victims:
        assert statuses[victim] == -signal.SIGKILL, (kill, statuses)
    return statuses


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The whole lines of a run, without their times."""
    lines = []
    for text in (folder / "metrics.jsonl").read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):  # the last one of a killed run
            lines.append({k: v for k, v in json.loads(text).items() if k not in TIMES})
    return lines


def same_tensors(one: Path, other: Path) -> bool:
    a, b = load_file(one), load_file(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def same_checkpoint(straight: Path, killed: Path, step: int) -> bool:
    """Whether a killed run's checkpoint, and its metrics up to there, are the undisturbed run's."""
    if step == 0:
        return True
    paths = [folder / "checkpoints" / f"step-{step}" for folder in (straight, killed)]
    names = [sorted(p.name for p in path.glob("*.safetensors")) for path in paths]
    lines = [[x for x in metrics(folder) if x["step"] <= step] for folder in (straight, killed)]
    return (
        names[0] == names[1]
        and all(same_tensors(paths[0] / name, paths[1] / name) for name in names[0])
        and lines[0] == lines[1]
    )


def go_through(
    straight: Path, folder: Path, ranks: int, recipe: Sequence[str], kills: Sequence[Kill]
) -> list[dict[str, Any]]:
    """One run, killed as often as that and then let go on to its end: a row a kill.

    ``straight``: the same run, undisturbed, with all its checkpoints kept. What a kill has left is
    compared with it at once, the end at the last."""
    rows = []
    changes = [*recipe, f"--output={folder}", "--checkpoint.keep=2"]
    for kill in kills:
        began = time.monotonic()
        launch(ranks, changes, kill)
        written = max((line["step"] for line in metrics(folder) if "loss" in line), default=0)
        step = checkpoint.newest(folder / "checkpoints")
        moment = f"{kill.delay_ms:.0f} ms after step {kill.nth} began"
        rows.append(
            {
                "ranks": ranks,
                "at": moment if kill.point == "moment" else kill.point,
                "victims": " ".join(map(str, kill.victims)),
                "goes_on_from": step,
                "steps_lost": written - step,
                "same_bits": same_checkpoint(straight, folder, step),
                "seconds": round(time.monotonic() - began, 1),
            }
        )
    launch(ranks, changes)
    assert not list((folder / "checkpoints").glob("damaged-*"))
    assert not list(folder.rglob("*tmp*"))
    same_lines = metrics(folder) == metrics(straight)
    model = Path("model", "model.safetensors")
    same_end = same_lines and same_tensors(folder / model, straight / model)
    return [{**row, "same_end": same_end} for row in rows]


def recipe_of(folder: Path, steps: int, *changes: str) -> list[str]:
    """A run of steps with dropout that take milliseconds, with a checkpoint at every other. Among
    the changes may be another teacher."""
    teacher, corpus = make_teacher(folder / "teacher", 2), make_corpus(folder / "text.txt")
    config = folder / "recipe.yaml"
    config.write_text(
        f"""\
teacher: {teacher}
student: {{dropout: 0.1}}
data: {{source: {corpus}, prepared: {folder / "tokens"}, max_length: 24, heldout: 0.1}}
batch: {{sequences: 16, micro_sequences: 4}}
steps: {steps}
evaluate: {{every: 5}}
checkpoint: {{every: 2}}
tensorboard: false
"""
    )
    return ["--config", str(config), *changes]


def both(folder: Path, steps: int, kills: Sequence[Sequence[Kill]]) -> list[dict[str, Any]]:
    """One process in fp32 at stage 0 and two ranks in bf16 at stage 2: a row a kill."""
    rows = []
    layouts = ("--precision=fp32", "--zero.stage=0"), ("--precision=bf16", "--zero.stage=2")
    for ranks, (layout, some) in enumerate(zip(layouts, kills, strict=True), 1):
        recipe, straight = recipe_of(folder, steps, *layout), folder / f"straight-{ranks}"
        launch(ranks, [*recipe, f"--output={straight}", "--checkpoint.keep=1000"])
        rows += go_through(straight, folder / f"killed-{ranks}", ranks, recipe, some)
    return rows


def at_random(seed: int, *victims: int) -> Kill:
    draw = random.Random(seed)
    return Kill("moment", draw.randint(3, 6), victims, draw.uniform(0, 60))


def long_version() -> tuple[list[Kill], list[Kill]]:
    """Every point on every rank, in the second save of its launch, and moments."""

    def of(points: Sequence[str], rank: int) -> list[Kill]:
        # A save of a state this small has two writes, its header's and its data's.
        return [Kill(p, 4 if p == "writing" else 2, (rank,)) for p in points]

    return (
        [*of(POINTS_OF_FIRST, 0), at_random(0, 0), at_random(1, 0)],
        [
            *of(POINTS_OF_FIRST, 0),
            *of(POINTS, 1),
            *(at_random(2, 0), at_random(3, 1), at_random(4, 0, 1)),
        ],
    )


# --- The tests ------------------------------------------------------------------------------------


def assert_unharmed(rows: list[dict[str, Any]]) -> None:
    assert all(row["same_bits"] and row["same_end"] for row in rows), rows
    # A checkpoint may be lost while it is written, and what came after it.
    assert all(0 <= row["steps_lost"] <= 5 for row in rows), rows


def test_killed_runs_end_with_the_same_bits(tmp_path: Path) -> None:
    """Before the folder has its name, at a random moment, and one rank of two in its write."""
    kills = [Kill("manifest", 2, (0,)), at_random(0, 0)], [Kill("writing", 4, (1,))]
    assert_unharmed(both(tmp_path, 10, kills))


def test_killed_causal_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    """Packed, on two ranks at stage 3."""
    causal = make_causal(tmp_path / "gpt2", "gpt2")
    recipe = recipe_of(tmp_path, 8, f"--teacher={causal}", "--precision=fp32", "--zero.stage=3")
    recipe.append("--data.min_length=3")  # the ends of long texts share a sequence
    straight = tmp_path / "straight"
    launch(2, [*recipe, f"--output={straight}", "--checkpoint.keep=1000"])
    kills = [Kill("manifest", 2, (0,)), at_random(1, 1)]
    assert_unharmed(go_through(straight, tmp_path / "killed", 2, recipe, kills))


def test_run_killed_before_its_folder_was_its_own_starts_again(tmp_path: Path) -> None:
    (tmp_path / "tokens").mkdir()
    (tmp_path / "config.yaml.tmp-77").write_text("teach")
    checks.check_output(Config(steps=1, output=str(tmp_path)), tmp_path)


@pytest.mark.slow
def test_killed_runs_end_with_the_same_bits_at_length(tmp_path: Path) -> None:
    rows = both(tmp_path, 60, long_version())
    assert len(rows) >= 20
    assert_unharmed(rows)


def table(path: Path) -> None:
    """The long version's rows, with what they depend on."""
    commit = ["git", "rev-parse", "--short", "HEAD"]
    context = {
        "date": datetime.date.today().isoformat(),
        "commit": subprocess.check_output(commit, text=True, cwd=ROOT).strip(),
        "torch": torch.__version__,
    }
    with tempfile.TemporaryDirectory() as folder:
        rows = both(Path(folder), 60, long_version())
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["kill", *rows[0], *context], lineterminator="\n")
        writer.writeheader()
        writer.writerows({"kill": i, **row, **context} for i, row in enumerate(rows, 1))
    print(path.read_text())
    assert_unharmed(rows)


if __name__ == "__main__":
    if sys.argv[1] == "--killed":
        sys.exit(program(json.loads(sys.argv[2]), sys.argv[3:]))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--csv", type=Path, required=True)
    table(parser.parse_args().csv)
