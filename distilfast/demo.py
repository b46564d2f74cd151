"""The demo: what distillation gains, with a real encoder and real text.

It makes three runs of the driver. `teacher` trains a masked-LM head on a six-layer encoder.
`distilled` trains a three-layer student from it with the triple loss. `undistilled` trains the same
student on the same batches, for the same number of steps, with the labels alone. `report.html`
shows the three side by side.

    make demo            minutes
    make demo FULL=1     the figures of docs/benchmarks.md
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from distilfast import __version__, models
from distilfast import config as configs
from distilfast.config import RECIPES, Config, parse
from distilfast.driver import loop
from distilfast.driver.heldout import fill
from distilfast.driver.metrics import read_metrics
from distilfast.report import Guess, ModelRow, Report, Sample, write_report
from distilfast.report.training_run import train_command

RECIPE, FIRST_RECIPE = RECIPES / "demo.yaml", RECIPES / "demo-teacher.yaml"
# With --full: the optimiser steps of the teacher and of each student, in place of the recipes'.
FULL = (900, 500)
UNDISTILLED = ("--loss.kd_weight=0", "--loss.hidden_cos_weight=0", "--loss.ce_weight=1")
SENTENCES = (
    "Paris is the [MASK] of France.",
    "He was born in London and [MASK] in New York.",
    "The war [MASK] in 1945.",
    "Water is made of hydrogen and [MASK].",
    "The book was [MASK] by a famous author.",
    "The city has a [MASK] of two million people.",
    "She won the Nobel [MASK] in physics.",
    "The river flows into the [MASK].",
)


def distil() -> None:
    """Run the demo's recipe: train the teacher's head if it is missing, then the student."""
    first = parse(["--config", str(FIRST_RECIPE)])
    if (Path(first.output) / "model").exists() or loop.run(first):
        loop.run(parse(["--config", str(RECIPE)]))


def command(arguments: Sequence[str]) -> int:
    """`distilfast demo [--full]`; returns the exit status."""
    return 0 if main(full="--full" in arguments) else 1


def main(full: bool = False) -> Path | None:
    """Make all three runs and the report, and return its path. None: stopped by a signal."""
    began = time.monotonic()
    name = "demo-full" if full else "demo"
    root = Path("runs") / name
    teacher_steps, student_steps = ([f"--steps={n}"] for n in FULL) if full else ([], [])
    teacher = parse(
        [
            *("--config", str(FIRST_RECIPE)),
            f"--output={root / 'teacher'}",
            f"--data.prepared={root / 'tokens'}",
            *teacher_steps,
        ]
    )
    if not loop.run(teacher):
        return None
    runs = {}
    for run, changes in (("distilled", ()), ("undistilled", UNDISTILLED)):
        runs[run] = parse(
            [
                *("--config", str(RECIPE)),
                *changes,
                f"--teacher={root / 'teacher' / 'model'}",
                f"--data.prepared={root / 'tokens'}",
                f"--output={root / run}",
                *student_steps,
            ]
        )
        if not loop.run(runs[run]):
            return None
    path = write_report(compare(teacher, runs), root / "report.html")
    print(f"\nmodel:  {root / 'distilled' / 'model'}\nreport: {path}")
    print(f"in {time.monotonic() - began:.0f} s")
    return path


def compare(teacher: Config, runs: dict[str, Config]) -> Report:
    """The report that compares the runs, made from their output files."""
    everything = {"teacher": teacher, **runs}
    summaries = {name: _summary(config) for name, config in runs.items()}
    teacher_summary, distilled = _summary(teacher), summaries["distilled"]
    share = runs["distilled"].data.heldout
    size = {"teacher": teacher_summary["parameters"], "student": distilled["parameters"]}
    rows = [
        _row("teacher", distilled["scores"]["teacher"], size["teacher"], teacher_summary),
        *(_row(name, s["scores"]["student"], size["student"], s) for name, s in summaries.items()),
        _row("untrained", distilled["scores"]["untrained student"], size["student"], None),
    ]
    print("\n" + table(rows))
    # All are defined: the demo's text is long enough.
    losses = {row.name: row.eval_loss for row in rows if row.eval_loss is not None}
    ours, theirs = losses["distilled"], losses["undistilled"]
    verdict = "lower than" if ours < theirs else "not lower than"
    return Report(
        title=(
            f"distilfast {__version__}: {teacher_summary['student_layers']} layers to "
            f"{distilled['student_layers']}"
        ),
        lead=(
            f"Held-out loss of the distilled student: {ours:.3f}, {verdict} the {theirs:.3f} of "
            f"the same student trained for as many steps without a teacher."
        ),
        models=rows,
        curves={
            name: read_metrics(Path(config.output) / "metrics.jsonl")
            for name, config in everything.items()
        },
        samples=_samples(teacher, runs),
        facts={
            "device": distilled["device"],
            "teacher": "sentence-transformers/all-MiniLM-L6-v2 with a masked-LM head",
            "text": f"articles of the English Wikipedia, {share:.0%} of them held out",
            "seed": str(runs["distilled"].seed),
        },
        config={name: configs.to_yaml(config) for name, config in everything.items()},
        commands=[train_command(Path(config.output)) for config in everything.values()],
    )


def table(rows: Sequence[ModelRow]) -> str:
    """The report's table for a terminal, in Markdown."""
    lines = [
        "| model | parameters | held-out loss | accuracy | agrees with teacher | steps | time |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        loss, accuracy, agreement = (
            "" if value is None else format(value, form)
            for value, form in (
                (row.eval_loss, ".3f"),
                (row.eval_accuracy, ".1%"),
                (row.eval_agreement, ".1%"),
            )
        )
        seconds = "" if row.train_time_s is None else f"{row.train_time_s:.0f} s"
        lines.append(
            f"| {row.name} | {row.parameters / 1e6:.1f} M | {loss} | {accuracy} | {agreement} | "
            f"{row.steps or ''} | {seconds} |"
        )
    return "\n".join(lines)


def _summary(config: Config) -> dict[str, Any]:
    text = (Path(config.output) / "summary.json").read_text(encoding="utf-8")
    summary: dict[str, Any] = json.loads(text)
    return summary


def _row(
    name: str, scores: dict[str, Any], parameters: int, summary: dict[str, Any] | None
) -> ModelRow:
    return ModelRow(
        name=name,
        parameters=parameters,
        size_mib=parameters * 4 / 2**20,
        train_time_s=None if summary is None else summary["seconds"],
        steps=None if summary is None else summary["steps"],
        **scores,
    )


def _samples(teacher: Config, runs: dict[str, Config]) -> list[Sample]:
    import transformers

    load = transformers.AutoModelForMaskedLM.from_pretrained
    folders = {"teacher": teacher, **runs}
    loaded = {n: load(Path(c.output) / "model", dtype=torch.float32) for n, c in folders.items()}
    config = runs["distilled"]
    loaded["untrained"] = models.make_student(loaded["teacher"], config.student, config.seed)
    tokenizer = transformers.AutoTokenizer.from_pretrained(Path(teacher.output) / "model")
    guesses = {name: fill(model.eval(), tokenizer, SENTENCES) for name, model in loaded.items()}
    return [
        Sample(text, {name: [Guess(*guess) for guess in g[i]] for name, g in guesses.items()})
        for i, text in enumerate(SENTENCES)
    ]
