"""The benches as programs, since nothing may import them."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from conftest import ROOT

BENCH = ROOT / "bench"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
# What contestants may do wrong.
WRONG = """
import torch
def crash(*_):
    raise RuntimeError("no such luck")
def out_of_memory(*_):
    raise torch.OutOfMemoryError("tried to allocate")
class HalfGradient(torch.autograd.Function):
    forward = staticmethod(lambda context, x: x.clone())
    backward = staticmethod(lambda context, gradient: gradient / 2)
"""


def bench(*arguments: Any, **variables: str) -> str:
    """What a Python program in bench/ printed; it has to end well."""
    environment = {**ENVIRONMENT, **variables}
    environment.pop("TRITON_INTERPRET", None)  # interpreted kernels are not timed, but skipped
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=BENCH,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def result_of(code: str) -> Any:
    """What a script in bench/ puts into ``result``, as JSON has it."""
    told = f"import json, sys\nsys.path.insert(0, '.')\n{WRONG}\n{code}\nprint(json.dumps(result))"
    return json.loads(bench("-c", told).splitlines()[-1])


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def assert_written_with_their_environment(report: dict[str, Any]) -> None:
    """The rows of a report's CSV are those of its JSON, with where and when they were measured."""
    assert {"date", "commit", "tree", "device", "torch"} <= report["environment"].keys()
    for written, row in zip(report["csv"], report["rows"], strict=True):
        assert written.keys() == {**report["environment"], **row}.keys()
        assert written["date"] == report["environment"]["date"]
        assert [written[x] for x in ("loss", "contestant")] == [row["loss"], row["contestant"]]
