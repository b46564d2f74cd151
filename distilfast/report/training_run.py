"""Makes the report of a training run from its files."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from distilfast.errors import shortened
from distilfast.loss_parts import NOTHING_MASKED, weighted_sum
from distilfast.report.content import Blocks, ModelRow, Report
from distilfast.report.merging import flat_keys
from distilfast.report.numbers import count, counted, fixed, percent, perplexity
from distilfast.report.paired import held_out

SHOWN = {"untrained student": "student before training"}  # names of summary.json, where others show


def read_training(folder: Path, name: str) -> Report:
    """Make the report of a run from its folder; the run may be unfinished.

    Raises:
        OSError: a file cannot be read.
        ValueError: a file is damaged; the error names it.
    """
    config = (folder / "config.yaml").read_text(encoding="utf-8")
    if not flat_keys(config):
        raise ValueError(f"{folder / 'config.yaml'}: expected a mapping of keys in YAML")
    lines = read_metrics(folder / "metrics.jsonl")
    path = folder / "summary.json"
    try:
        summary = json.loads(path.read_bytes()) if path.is_file() else None
        return training_report(folder, config, lines, summary, name)
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise ValueError(f"{path}: expected the summary of a run, got {error!r}") from error


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read the lines of a metrics.jsonl, except a half-written last line.

    Raises ValueError, with the file and the line number, for any other line that is not a JSON
    object. NaN and Infinity are accepted, as a run that diverged writes them.
    """
    complete, newline, tail = path.read_bytes().rpartition(b"\n")
    lines = []
    for number, raw in enumerate(complete.split(b"\n") if newline else [], start=1):
        if raw.strip():
            line = _json_object(raw)
            if line is None:
                shown = shortened(raw.decode("utf-8", "replace"))
                raise ValueError(f"{path}, line {number}: expected a JSON object, got {shown!r}")
            lines.append(line)
    # Only a last line without its newline can be half-written. If it is whole, it still counts.
    last = _json_object(tail)
    return lines if last is None else [*lines, last]


def _json_object(raw: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(raw)
    except ValueError:  # also a UnicodeDecodeError: a cut inside a character
        return None
    return value if isinstance(value, dict) else None


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
        done = [line["step"] for line in lines if isinstance(line.get("step"), int)]
        reached = counted(max(done, default=0), "step")
        return replace(report, lead=f"Not finished: {reached} so far.")
    last, steps = summary["scores"]["student"], counted(summary["steps"], "step")
    lead = f"{steps}; {NOTHING_MASKED}."
    if last["eval_loss"] is not None:
        lead = f"Held-out loss {fixed(last['eval_loss'], 3)}, accuracy "
        lead += f"{percent(last['eval_accuracy'])} after {steps}."
        if last.get("eval_kl") is not None:
            lead = f"Held-out perplexity {perplexity(last['eval_loss'])}, KL to the teacher "
            lead += f"{fixed(last['eval_kl'], 3)} nats after {steps}."
    return replace(
        report,
        title=f"{name}: {count(summary['parameters'])} parameters",
        lead=lead,
        models=list(model_rows(name, summary)),
        facts=_facts(flat_keys(config), summary),
        blocks={name: Blocks(**summary["heldout"])} if "heldout" in summary else {},
    )


def train_command(output: Path) -> str:
    """Return the command that repeats or resumes a run."""
    return shlex.join(["distilfast", "train", "--config", str(output / "config.yaml")])


def model_rows(name: str, summary: dict[str, Any]) -> Iterator[ModelRow]:
    """Yield a row for each model that a run has scored; its student is called ``name``."""
    for model, scores in summary["scores"].items():
        teacher, trained = model.startswith("teacher"), model == "student"
        parameters = summary.get("teacher_parameters") if teacher else summary["parameters"]
        if parameters is not None:  # old summaries do not count the teachers' parameters
            yield ModelRow(
                name=name if trained else SHOWN.get(model, model),
                parameters=parameters,
                size_mib=parameters * 4 / 2**20,
                train_time_s=summary["seconds"] if trained else None,
                steps=summary["steps"] if trained else None,
                teacher=teacher,
                **scores,
            )


def _facts(config: dict[str, Any], summary: dict[str, Any]) -> dict[str, str]:
    """Return what decides the figures. Older summaries hold less of it."""
    loss = {key.removeprefix("loss."): value for key, value in config.items()}
    blocks = Blocks(**summary["heldout"]) if "heldout" in summary else None
    tokens = f"{counted(summary['tokens'], 'token')} in {counted(summary['steps'], 'step')}"
    facts = {
        "teacher": ", ".join(summary["teacher"]),
        "student": summary.get("student", ""),
        "loss": weighted_sum(loss),
        "trained on": tokens,
        "evaluated on": held_out(blocks) if blocks else "",
        "seed": str(config.get("seed", "")),
        "device": summary["device"],
        "code": summary.get("code", ""),
    }
    return {name: value for name, value in facts.items() if value}
