"""Makes the report of a training run from its files."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from distilfast.loss_parts import NOTHING_MASKED
from distilfast.report.content import ModelRow, Report


def training_report(
    output: Path,
    config: str,
    lines: list[dict[str, Any]],
    summary: dict[str, Any] | None,
    name: str | None = None,
) -> Report:
    """Return the report of `distilfast train`.

    Args:
        output: the run's folder.
        config: the YAML of its configuration.
        lines: the parsed lines of its metrics.
        summary: the content of summary.json; None: the run is not finished.
        name: the name of the run and its student; None: the folder's name.
    """
    name = name or output.name
    report = Report(name, "", [], {name: lines}, [], {}, config, commands=[train_command(output)])
    if summary is None:
        steps = [line["step"] for line in lines if isinstance(line.get("step"), int)]
        return replace(report, lead=f"Not finished: {max(steps, default=0):,} steps so far.")
    last, taken = summary["scores"]["student"], f"{summary['steps']:,} steps"
    lead = f"{taken}; {NOTHING_MASKED}."
    if last["eval_loss"] is not None:
        figures = f"{last['eval_loss']:.3f}, accuracy {last['eval_accuracy']:.1%}"
        lead = f"Held-out loss {figures} after {taken}."
    return replace(
        report,
        title=f"{name}: {summary['parameters'] / 1e6:.1f} M parameters",
        lead=lead,
        models=list(_rows(name, summary)),
        facts={"device": summary["device"], "tokens": f"{summary['tokens']:,}"},
    )


def train_command(output: Path) -> str:
    """Return the command that repeats or resumes a run."""
    return shlex.join(["distilfast", "train", "--config", str(output / "config.yaml")])


def _rows(name: str, summary: dict[str, Any]) -> Iterator[ModelRow]:
    for model, scores in summary["scores"].items():
        teacher, trained = model.startswith("teacher"), model == "student"
        parameters = summary.get("teacher_parameters") if teacher else summary["parameters"]
        if parameters is not None:  # old summaries do not count the teachers' parameters
            yield ModelRow(
                name=name if trained else model,
                parameters=parameters,
                size_mib=parameters * 4 / 2**20,
                train_time_s=summary["seconds"] if trained else None,
                steps=summary["steps"] if trained else None,
                **scores,
            )
