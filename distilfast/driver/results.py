"""Write a run's results after training: model/, report.html and summary.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from distilfast import atomic, models
from distilfast import config as configs
from distilfast.config import Config
from distilfast.driver import export, processes
from distilfast.driver.checks import Setup
from distilfast.driver.processes import World
from distilfast.report import write_report
from distilfast.report.training_run import training_report


def write(
    config: Config,
    world: World,
    setup: Setup,
    output: Path,
    scores: dict[str, dict[str, Any]],
    lines: list[dict[str, Any]],
    weights: dict[str, Tensor],
    record: dict[str, Any],
) -> None:
    """Write model/, report.html and, last, summary.json, which marks the run as complete.

    Args:
        scores: the teacher's, by the name it is shown by.
        record: what the summary holds besides the figures made here.
    """
    evaluations = [line for line in lines if "eval_loss" in line]
    steps = [line for line in lines if "loss" in line]
    taken = [
        b["tokens"] - a["tokens"] for a, b in zip([{"tokens": 0}, *steps], steps, strict=False)
    ]
    seconds = sum(n / line["tokens_per_second"] for n, line in zip(taken, steps, strict=True))
    summary = {
        "teacher": [t.name for t in config.teachers],
        "teacher_parameters": _count(setup.teachers[0].model),
        **({"student": config.student.origin} if config.student.model else {}),
        "parameters": sum(w.numel() for w in _distinct(setup.student, weights)),
        "student_layers": models.depth(setup.student),
        "steps": setup.steps,
        "tokens": steps[-1]["tokens"],
        "seconds": seconds,
        "device": ", ".join(processes.describe(world)),
        "scores": {
            **scores,
            "untrained student": _scores(evaluations[0]),
            "student": _scores(evaluations[-1]),
        },
        **record,
    }
    export.export(setup.student, weights, setup.tokenizer, config, summary, output / "model")
    report = training_report(output, configs.to_yaml(config), lines, summary)
    write_report(report, output / "report.html")
    entries = ",\n ".join(f"{json.dumps(key)}: {json.dumps(x)}" for key, x in summary.items())
    atomic.write(output / "summary.json", f"{{\n {entries}\n}}\n")
    print(f"model: {output / 'model'}\nreport: {output / 'report.html'}")


def _scores(line: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in line.items() if key.startswith("eval_")}


def _count(model: Any) -> int:
    # A partitioned parameter is empty; ds_numel is its size.
    return sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())


def _distinct(model: Any, weights: dict[str, Tensor]) -> list[Tensor]:
    """Each weight once. A tied weight has two names."""
    return [weights[name] for name, _ in model.named_parameters()]
