"""The demo: what distillation gains, with a real encoder and real text.

It makes three runs of the driver. `teacher` trains a masked-LM head on a six-layer encoder.
`distilled` trains a three-layer student from it with the triple loss. `undistilled` trains the same
student on the same batches, for the same number of steps, with the labels alone. `report.html`
shows them side by side.

    make demo            minutes
    make demo FULL=1     the figures of docs/benchmarks.md
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from distilfast import __version__, models
from distilfast.config import RECIPES, Config, parse, to_yaml
from distilfast.driver import loop
from distilfast.driver.heldout import samples
from distilfast.report import Report, Sample, markdown, models_table, write_report
from distilfast.report.merging import merge
from distilfast.report.training_run import read_training

RECIPE, FIRST_RECIPE = RECIPES / "demo.yaml", RECIPES / "demo-teacher.yaml"
# With --full: the optimiser steps of the teacher and of each student, in place of the recipes'.
FULL = (900, 500)
ORIGIN = {
    "teacher": "sentence-transformers/all-MiniLM-L6-v2 with a masked-LM head",
    "text": "articles of the English Wikipedia",
}
CONTEXT = (
    "Undistilled is the same student after as many steps on the same batches, without a teacher."
)
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
    root = Path("runs") / ("demo-full" if full else "demo")
    teacher = f"--teacher={root / 'teacher' / 'model'}"
    runs = {}
    for name, recipe, steps, changes in (
        ("teacher", FIRST_RECIPE, FULL[0], ()),
        ("distilled", RECIPE, FULL[1], (teacher,)),
        ("undistilled", RECIPE, FULL[1], (teacher, *UNDISTILLED)),
    ):
        arguments = ["--config", str(recipe), f"--output={root / name}"]
        arguments += [f"--data.prepared={root / 'tokens'}", *changes]
        runs[name] = parse([*arguments, *([f"--steps={steps}"] if full else [])])
        if not loop.run(runs[name]):
            return None
    report = compare(**runs)
    path = write_report(report, root / "report.html")
    print(f"\n{markdown(models_table(report.models))}\n\n{report.lead}")
    print(f"\nmodel:  {root / 'distilled' / 'model'}\nreport: {path}")
    print(f"in {time.monotonic() - began:.0f} s")
    return path


def compare(teacher: Config, distilled: Config, undistilled: Config) -> Report:
    """The report that compares the students, made from the files of the runs.

    The teacher's own curve, which begins with an untrained head, is on its own page.
    """
    configs = {"teacher": teacher, "distilled": distilled, "undistilled": undistilled}
    folders = {name: Path(config.output) for name, config in configs.items()}
    first, *students = (read_training(folder, name) for name, folder in folders.items())
    report = merge(dict(zip(("distilled", "undistilled"), students, strict=True)))
    trained = first.models[-1]
    return replace(
        report,
        title=f"distilfast {__version__}: a student with and without its teacher",
        lead=f"{report.lead} {CONTEXT}",
        models=[
            replace(row, steps=trained.steps, train_time_s=trained.train_time_s)
            if row.name == "teacher"
            else row
            for row in report.models
        ],
        samples=guesses(folders, distilled),
        facts={**report.facts, **ORIGIN},
        config={name: to_yaml(config) for name, config in configs.items()},
        commands=[*first.commands, *report.commands],
    )


def guesses(folders: dict[str, Path], student: Config) -> list[Sample]:
    """The guesses of the runs' models, and of the student before training."""
    import transformers

    loaded = {
        name: models.load_weights("AutoModelForMaskedLM", f / "model", str(f / "model"))[0]
        for name, f in folders.items()
    }
    before = models.make_student(loaded["teacher"], student.student, student.seed)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders["teacher"] / "model")
    return samples({**loaded, "student before training": before}, tokenizer, SENTENCES)
