"""Intervals for rates and means, and tests for pairs. Pure functions on numbers; knows nothing of policies or tasks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

_Z_95 = 1.959963984540054  # 97.5 % quantile of the standard normal distribution
_RESAMPLES = 2000


@dataclass(frozen=True)
class Proportion:
    """`successes` of `n` trials: rate and Wilson 95 % interval [low, high] in [0, 1] (0, 0 and 1 for no trials)."""

    n: int
    successes: int
    rate: float
    low: float
    high: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def wilson(successes: int, n: int) -> Proportion:
    """The Wilson score interval (Wilson 1927), which stays in [0, 1] and is honest for rates of 0 and 1."""
    if not 0 <= successes <= n:
        raise ValueError(f"{successes} successes of {n} trials")
    if n == 0:
        return Proportion(0, 0, 0.0, 0.0, 1.0)
    rate = successes / n
    scale = 1 + _Z_95**2 / n
    centre = (rate + _Z_95**2 / (2 * n)) / scale
    half = _Z_95 * math.sqrt(rate * (1 - rate) / n + _Z_95**2 / (4 * n * n)) / scale
    # At the ends the formula gives the exact bound up to rounding.
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == n else centre + half
    return Proportion(n, successes, rate, low, high)


def bootstrap_mean(values: Sequence[float] | np.ndarray, seed: int = 0) -> tuple[float, float, float]:
    """(mean, low, high): the mean and its percentile-bootstrap 95 % interval. Deterministic for a seed.

    Raises: ValueError for no values.
    """
    if len(values) == 0:
        raise ValueError("the mean of no values")
    array = np.asarray(values, dtype=np.float64)
    picks = np.random.default_rng(seed).integers(0, len(array), size=(_RESAMPLES, len(array)))
    low, high = np.quantile(array[picks].mean(axis=1), [0.025, 0.975])
    return float(array.mean()), float(low), float(high)


def bootstrap_mean_of_means(groups: Sequence[Sequence[float]], seed: int = 0) -> tuple[float, float, float]:
    """(mean, low, high) of the unweighted mean of the groups' means; each group is resampled by itself.

    Raises: ValueError for no groups or an empty one.
    """
    if not groups or any(len(g) == 0 for g in groups):
        raise ValueError("the mean of no values")
    rng = np.random.default_rng(seed)
    arrays = [np.asarray(g, dtype=np.float64) for g in groups]
    drawn = [a[rng.integers(0, len(a), size=(_RESAMPLES, len(a)))].mean(axis=1) for a in arrays]
    low, high = np.quantile(np.mean(drawn, axis=0), [0.025, 0.975])
    return float(np.mean([a.mean() for a in arrays])), float(low), float(high)


def mcnemar(only_first: int, only_second: int) -> float:
    """Two-sided p-value of the exact McNemar test (binomial on the discordant pairs); 1 where no pair is discordant.

    only_first, only_second: episodes that one of two policies solved and the other did not. Raises: ValueError.
    """
    if only_first < 0 or only_second < 0:
        raise ValueError(f"{only_first} and {only_second} discordant pairs")
    n, k = only_first + only_second, min(only_first, only_second)
    tail = sum(math.comb(n, i) for i in range(k + 1))
    return min(1.0, 2 * tail / 2**n)


def paired_difference(
    first: Sequence[float] | np.ndarray, second: Sequence[float] | np.ndarray, seed: int = 0
) -> tuple[float, float, float]:
    """(mean, low, high) of first - second over the same episodes: pairs are resampled, never their halves.

    Raises: ValueError for no pairs or sequences of different lengths.
    """
    if len(first) != len(second):
        raise ValueError(f"{len(first)} values against {len(second)} are no pairs")
    return bootstrap_mean(np.subtract(first, second), seed)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's (1979) adjustment of p-values for being many, in the given order."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted
