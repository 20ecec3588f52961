"""The statistics that LeRobot policies normalise by: of each episode, and of all together. Knows arrays and tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

Stats = dict[str, Any]  # name -> nested lists, ready for JSON and parquet
_QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}
_IMAGES, _PIXELS = 100, 150  # at most: of an episode, and along a side of an image


def of_episode(table: pa.Table, features: Iterable[str]) -> dict[str, Stats]:
    """Column -> its statistics over the steps, [D] each."""
    found = {}
    for name in features:
        values = np.array(table[name].to_pylist(), dtype=np.float64).reshape(len(table), -1)
        found[name] = _of(values)
    return found


def of_images(images: Sequence[np.ndarray]) -> Stats:
    """Of uint8 [H, W, 3] images, by channel, scaled to [0, 1], [3, 1, 1] each; over a sample of images and pixels."""
    chosen = np.unique(np.linspace(0, len(images) - 1, min(len(images), _IMAGES)).round().astype(int))
    stride = max(1, int(np.ceil(max(images[0].shape[:2]) / _PIXELS)))
    pixels = np.concatenate([images[i][::stride, ::stride].reshape(-1, 3) for i in chosen]).astype(np.float64) / 255.0
    stats = {name: np.reshape(value, (3, 1, 1)).tolist() for name, value in _of(pixels).items() if name != "count"}
    return stats | {"count": [len(chosen)]}


def _of(values: np.ndarray) -> Stats:
    quantiles = np.quantile(values, list(_QUANTILES.values()), axis=0)
    return {
        "min": values.min(axis=0).tolist(),
        "max": values.max(axis=0).tolist(),
        "mean": values.mean(axis=0).tolist(),
        "std": values.std(axis=0).tolist(),
        "count": [len(values)],
        **{name: row.tolist() for name, row in zip(_QUANTILES, quantiles, strict=True)},
    }


class Total:
    """The statistics of all episodes from those of each, one at a time: exact but for the quantiles, which are means
    weighted by count (as LeRobot's own)."""

    def __init__(self) -> None:
        self._sums: dict[str, dict[str, np.ndarray]] = {}

    def add(self, row: Mapping[str, Any]) -> None:
        """row: an episode's metadata, statistics as `stats/{feature}/{name}`."""
        features = {key.split("/")[1] for key in row if key.startswith("stats/")}
        for feature in sorted(features):
            one = {
                name: np.array(row[f"stats/{feature}/{name}"]) for name in ("min", "max", "mean", "std", *_QUANTILES)
            }
            count = np.array(row[f"stats/{feature}/count"], dtype=np.float64)[0]
            weighted = {name: one[name] * count for name in ("mean", *_QUANTILES)}
            weighted["square"] = (one["std"] ** 2 + one["mean"] ** 2) * count
            held = self._sums.get(feature)
            if held is None:
                self._sums[feature] = {"min": one["min"], "max": one["max"], "count": np.array(count), **weighted}
                continue
            held["min"], held["max"] = np.minimum(held["min"], one["min"]), np.maximum(held["max"], one["max"])
            held["count"] = held["count"] + count
            for name, value in weighted.items():
                held[name] = held[name] + value

    def result(self) -> dict[str, Stats]:
        """For meta/stats.json."""
        found = {}
        for feature, held in self._sums.items():
            count = float(held["count"])
            mean = held["mean"] / count
            spread = np.sqrt(np.maximum(held["square"] / count - mean**2, 0.0))
            found[feature] = {
                "min": held["min"].tolist(),
                "max": held["max"].tolist(),
                "mean": mean.tolist(),
                "std": spread.tolist(),
                "count": [int(count)],
                **{name: (held[name] / count).tolist() for name in _QUANTILES},
            }
        return found
