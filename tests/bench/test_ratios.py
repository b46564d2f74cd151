"""bench/ratios.py: it measures what it says, and with the long tests holds what it measures."""

from __future__ import annotations

import json
import os

import pytest
from programs import bench

THREADS = {"OMP_NUM_THREADS": str(os.cpu_count())}


@pytest.mark.thorough
def test_ratios_are_those_of_the_times_beside_them() -> None:
    rows = json.loads(bench("ratios.py", "--quick", "--seconds", "0.5", "--json", **THREADS))[
        "rows"
    ]
    assert [row["ratio"] for row in rows] == ["dense", "head", "step"]
    for row in rows:
        assert row["p20"] <= row["median"] <= row["p80"]
        # Of medians and the median of ratios: near each other, as both are of the same rounds.
        assert row["ours_ms"] / row["yardstick_ms"] == pytest.approx(row["median"], rel=1.0)
        assert row["limit"] > 1


@pytest.mark.slow
def test_no_ratio_is_beyond_its_limit() -> None:
    bench("ratios.py", "--seconds", "30", **THREADS)
