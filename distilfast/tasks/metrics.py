"""The metrics of the tasks: shares from 0 to 1, correlations from -1 to 1."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import numpy as np


def _accuracy(labels: np.ndarray, predictions: np.ndarray) -> float:
    from sklearn.metrics import accuracy_score

    return float(accuracy_score(labels, predictions))


def _f1(labels: np.ndarray, predictions: np.ndarray) -> float:
    """Return the F1 of class 1; 0 if neither labels nor predictions contain it."""
    from sklearn.metrics import f1_score

    return float(f1_score(labels, predictions, zero_division=0))


def _matthews(labels: np.ndarray, predictions: np.ndarray) -> float:
    """Return Matthews' correlation; 0 if the labels or the predictions are all the same."""
    from sklearn.metrics import matthews_corrcoef

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "A single label was found", UserWarning)
        return float(matthews_corrcoef(labels, predictions))


def _correlation(name: str) -> Callable[[np.ndarray, np.ndarray], float]:
    def correlation(labels: np.ndarray, predictions: np.ndarray) -> float:
        """Return the correlation; NaN if the labels or the predictions are all the same."""
        from scipy import stats

        if len(labels) < 2:  # scipy raises here, but gives NaN for two equal values
            return math.nan
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", stats.ConstantInputWarning)
            warnings.simplefilter("ignore", stats.NearConstantInputWarning)
            return float(getattr(stats, name)(labels, predictions).statistic)

    return correlation


METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "accuracy": _accuracy,
    "F1": _f1,
    "Matthews": _matthews,
    "Pearson": _correlation("pearsonr"),
    "Spearman": _correlation("spearmanr"),
}
