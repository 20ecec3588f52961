"""Where a difference between two policies comes from: Eq. 8 taken apart into R, A, I, RA and success.

Paired by episode. Of each pair the difference of the two scores is shared among the five parts by their Shapley values:
the mean, over all orders in which the parts could be exchanged one after the other, of what each exchange changes. The
shares add up to the difference exactly and depend on no order. Knows rows of scores; nothing of judges.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dualvla_eval import statistics
from dualvla_eval.judges.base import SCALE

PARTS = ("R", "A", "I", "RA", "success")
_EPISODE = ("task", "variant", "episode_id")


def differences(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One record for every two policies, in points (x 100): difference = score(a) - score(b) over the n episodes on
    which both were judged, its 95 % interval (paired bootstrap), and the parts that add up to it."""
    by_policy: dict[str, dict[tuple[Any, ...], Mapping[str, Any]]] = {}
    for row in rows:
        if row["unjudged"] is None:
            by_policy.setdefault(row["policy"], {})[tuple(row[name] for name in _EPISODE)] = row
    found = []
    for a, b in itertools.combinations(by_policy, 2):
        shared = [key for key in by_policy[a] if key in by_policy[b]]
        if shared:
            pairs = [(by_policy[a][key], by_policy[b][key]) for key in shared]
            found.append({"a": a, "b": b, "n": len(pairs), **_difference(pairs)})
    return found


def _difference(pairs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> dict[str, Any]:
    shares_NP = 100 * shapley(np.array([_parts(a) for a, _ in pairs]), np.array([_parts(b) for _, b in pairs]))
    mean, low, high = statistics.bootstrap_mean(shares_NP.sum(axis=1).tolist())
    parts = dict(zip(PARTS, shares_NP.mean(axis=0).tolist(), strict=True))
    return {"difference": mean, "low": low, "high": high, "parts": parts}


def _parts(row: Mapping[str, Any]) -> list[float]:
    """In the order of PARTS, in [0, 1]. A policy that does not reason counts as one with R = A I and RA = 1, for which
    Eq. 8 for reasoning policies gives its own A I B."""
    action, intention = row["A"] / SCALE, row["I"] / SCALE
    reasoning, alignment = action * intention, 1.0
    if row["R"] is not None:
        reasoning, alignment = row["R"] / SCALE, row["RA"] / SCALE
    return [reasoning, action, intention, alignment, float(row["success"])]


def shapley(a_NP: np.ndarray, b_NP: np.ndarray) -> np.ndarray:
    """[N, 5] shares of eq8(a) - eq8(b): that of a part is the mean gain of giving it a's value instead of b's."""
    count = a_NP.shape[1]
    shares = np.zeros_like(a_NP)
    for part in range(count):
        others = [p for p in range(count) if p != part]
        for size in range(count):
            weight = 1 / (count * math.comb(count - 1, size))
            for taken in itertools.combinations(others, size):
                without, with_part = b_NP.copy(), b_NP.copy()
                without[:, taken] = with_part[:, taken] = a_NP[:, taken]
                with_part[:, part] = a_NP[:, part]
                shares[:, part] += weight * (_eq8(with_part) - _eq8(without))
    return shares


def _eq8(parts_NP: np.ndarray) -> np.ndarray:
    reasoning, action, intention, alignment, success = parts_NP.T
    return (reasoning + action * intention) / 2 * alignment * success
