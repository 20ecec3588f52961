"""Rollouts recorded from the original SimplerEnv, and how far from them something is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

GOLDEN = Path(__file__).parent / "sim" / "golden_simpler"


def golden(name: str) -> dict[str, Any]:
    return json.loads((GOLDEN / f"{name}.json").read_text())


def offset_mm(pose: Any, expected: list[float]) -> float:
    return 1e3 * float(np.linalg.norm(np.subtract(pose.p, expected[:3])))


def turn_deg(pose: Any, expected: list[float]) -> float:
    cosine = abs(float(np.dot(pose.q, expected[3:]) / np.linalg.norm(expected[3:]) / np.linalg.norm(pose.q)))
    return float(np.degrees(2 * np.arccos(min(cosine, 1.0))))


def end_offset_mm(name: str, source: str, pose: Any) -> float:
    """Of the object to move, from its recorded end or the nearest to which the original came from 0.1 mm beside.

    `beside.json` has those ends, as benchmarks/simpler_spread.py measured them, for recordings that the original does
    not repeat: 30 of a can at the edge of the grasp and 30 of the apple, which it misses from all of them; 5 of the
    eggplant, which rolls.
    """
    ends = [golden(name)["objects_final"][source], *golden("beside").get(name, [])]
    return min(offset_mm(pose, end) for end in ends)


def boxed(picture: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(picture).resize((160, 120), Image.Resampling.BOX), dtype=np.float64)
