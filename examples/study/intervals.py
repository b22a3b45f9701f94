"""Paired comparisons: a mean with its interval, its p, and Holm's correction."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from scipy.stats import t as student


def interval(differences: Sequence[float]) -> tuple[float, float]:
    """(mean, half the width of its 95 % confidence interval), by Student's t. The half is NaN of a single one."""
    mean = statistics.fmean(differences)
    if len(differences) < 2:
        return mean, float("nan")
    error = statistics.stdev(differences) / len(differences) ** 0.5
    return mean, float(student.ppf(0.975, len(differences) - 1)) * error


def p_value(differences: Sequence[float]) -> float:
    """Two-sided, of the paired t test against zero; 1 of fewer than two."""
    if len(differences) < 2:
        return 1.0
    mean, error = statistics.fmean(differences), statistics.stdev(differences) / len(differences) ** 0.5
    if error == 0:
        return 0.0 if mean else 1.0
    return 2 * float(student.sf(abs(mean) / error, len(differences) - 1))


def holm(p_values: Sequence[float]) -> list[float]:
    """p, adjusted for the whole family (Holm 1979): the i-th smallest of n times n - i + 1, never falling."""
    order = sorted(range(len(p_values)), key=lambda at: p_values[at])
    adjusted, highest = [1.0] * len(p_values), 0.0
    for rank, at in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[at]))
        adjusted[at] = highest
    return adjusted
