"""Differences seed by seed, and whether they are more than chance."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Difference:
    """Of one row from another, a value a seed."""

    values: list[float]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def stdev(self) -> float | None:
        """The sample's; None of a single seed."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    @property
    def p(self) -> float | None:
        """Of a two-sided paired t-test; None where it has nothing to go by."""
        from scipy import stats

        if not self.stdev:
            return None
        return float(stats.ttest_1samp(self.values, 0.0).pvalue)

    def cells(self, digits: int) -> list[str]:
        """Mean ± standard deviation, and p, as a table shows them."""
        spread = "" if self.stdev is None else f" ± {self.stdev:.{digits}f}"
        p = "" if self.p is None else "< 0.001" if self.p < 0.001 else f"{self.p:.3f}"
        return [f"{self.mean:+.{digits}f}{spread}", p]


def difference(ours: Sequence[float], baseline: Sequence[float]) -> Difference:
    """Paired by seed."""
    return Difference([a - b for a, b in zip(ours, baseline, strict=True)])
