"""A step does not depend on how it is split: a selection of bench/exactness.py and
bench/accumulation.py, run as programs, since nothing may import them."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

pytestmark = pytest.mark.thorough

Rows = list[dict[str, str]]


def quick(bench: str, folder: Path) -> Rows:
    """The rows of a selection, within its limits."""
    done = subprocess.run(
        [sys.executable, ROOT / "bench" / bench, "--quick", "--csv", folder / "rows.csv"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    with (folder / "rows.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def splits(tmp_path_factory: pytest.TempPathFactory) -> Rows:
    return quick("exactness.py", tmp_path_factory.mktemp("exactness"))


@pytest.fixture(scope="module")
def sums(tmp_path_factory: pytest.TempPathFactory) -> Rows:
    return quick("accumulation.py", tmp_path_factory.mktemp("accumulation"))


def test_split_changes_neither_gradient_nor_parameters(splits: Rows) -> None:
    rows = [row for row in splits if row["mean"] == "step"]
    lowest = {(row["ranks"], row["micro_sequences"]) for row in rows if row["stage"] == "0"}
    assert {("1", "64"), ("1", "1"), ("2", "32"), ("2", "1"), ("4", "16"), ("4", "1")} <= lowest
    assert {(row["ranks"], row["stage"]) for row in rows} >= {(n, s) for n in "24" for s in "0123"}
    assert {row["padding"] for row in rows} == {"8", "longest"}
    for row in rows:
        assert float(row["gradient"]) <= 1e-5, row
        assert float(row["parameters"]) <= 1e-5, row


def test_mean_of_micro_batches_would_be_seen(splits: Rows) -> None:
    rows = [row for row in splits if row["mean"] == "micro-batch"]
    assert {row["ranks"] for row in rows} == {"1", "2", "4"}
    for row in rows:
        assert float(row["gradient"]) > 1e-2, row
        assert float(row["parameters"]) > 1e-3, row


def test_aligned_bf16_gradients_are_summed_in_fp32(sums: Rows) -> None:
    """256 of them: a sum in bf16 has stopped by then."""
    assert {(row["ranks"], row["stage"]) for row in sums} == {("2", stage) for stage in "123"}
    for row in sums:
        assert float(row["error"]) <= 2e-3, row
        assert float(row["bf16_error"]) > 5e-2, row
