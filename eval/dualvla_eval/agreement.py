"""How far two raters agree on marks from 0 to 10. Pure functions on numbers; knows nothing of judges."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

_LEVELS = 11  # marks 0 .. 10
_RESAMPLES = 1000


def agreement(a: Sequence[float], b: Sequence[float]) -> dict[str, Any]:
    """n, spearman, kendall (tau-b), mae (marks), kappa (quadratic weights), and the 95 % interval of each, from a
    bootstrap over pairs. A figure that is not defined (fewer than two different marks) is None."""
    pairs = np.stack([np.asarray(a, float), np.asarray(b, float)], axis=1)
    rng = np.random.default_rng(0)
    samples = [pairs[rng.integers(len(pairs), size=len(pairs))] for _ in range(_RESAMPLES)] if len(pairs) else []
    found: dict[str, Any] = {"n": len(pairs)}
    for name, measure in (("spearman", spearman), ("kendall", kendall), ("mae", mae), ("kappa", weighted_kappa)):
        found[name] = measure(pairs[:, 0], pairs[:, 1]) if len(pairs) else None
        drawn = [v for s in samples if (v := measure(s[:, 0], s[:, 1])) is not None]
        found[f"{name}_low"], found[f"{name}_high"] = _interval(drawn) if found[name] is not None else (None, None)
    return found


def _interval(values: Sequence[float]) -> tuple[float, float]:
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def spearman(a: np.ndarray, b: np.ndarray) -> float | None:
    """Rank correlation; ties get their mean rank."""
    return _correlation(a, b, "spearmanr")


def kendall(a: np.ndarray, b: np.ndarray) -> float | None:
    """Tau-b, which allows for ties."""
    return _correlation(a, b, "kendalltau")


def _correlation(a: np.ndarray, b: np.ndarray, name: str) -> float | None:
    from scipy import stats

    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    return float(getattr(stats, name)(a, b).statistic)


def mae(a: np.ndarray, b: np.ndarray) -> float | None:
    """Mean absolute difference in marks."""
    return float(np.abs(a - b).mean())


def weighted_kappa(a: np.ndarray, b: np.ndarray) -> float | None:
    """Cohen's kappa with quadratic weights (Cohen 1968) over the marks 0 .. 10, to which others are rounded.

    1 - (mean squared difference) / (that of independent raters with the same marks); None if that is 0.
    """
    a, b = np.clip(np.rint(a), 0, _LEVELS - 1), np.clip(np.rint(b), 0, _LEVELS - 1)
    by_chance = float(np.mean((a[:, None] - b[None, :]) ** 2))
    return None if by_chance == 0 else 1 - float(np.mean((a - b) ** 2)) / by_chance
