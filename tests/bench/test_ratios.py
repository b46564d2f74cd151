"""bench/ratios.py: it measures what it says, and with the long tests holds what it measures."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT


def ratios(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": str(os.cpu_count())}
    environment.pop("TRITON_INTERPRET", None)
    return subprocess.run(
        [sys.executable, "ratios.py", *arguments],
        capture_output=True,
        text=True,
        env=environment,
        cwd=ROOT / "bench",
    )


@pytest.mark.thorough
def test_ratios_are_those_of_the_times_beside_them() -> None:
    done = ratios("--quick", "--seconds", "0.5", "--json")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["rows"]
    assert [row["ratio"] for row in rows] == ["dense", "head", "step"]
    for row in rows:
        assert row["p20"] <= row["median"] <= row["p80"]
        # Of medians and the median of ratios: near each other, as both are of the same rounds.
        assert row["ours_ms"] / row["yardstick_ms"] == pytest.approx(row["median"], rel=1.0)
        assert row["limit"] > 1


@pytest.mark.slow
def test_no_ratio_is_beyond_its_limit() -> None:
    done = ratios("--seconds", "30")
    assert done.returncode == 0, done.stdout + done.stderr
