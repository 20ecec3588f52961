"""How a scene of suite `blocks` is seen: where the camera stands, how light falls, what colour the table has.

A variant of the suite changes the look and nothing else: tasks, physics and experts stay. Knows no simulator.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dualvla.errors import UsageError, did_you_mean

Vector = tuple[float, float, float]


@dataclass(frozen=True)
class Look:
    """Positions in m, base frame. Lights and the table: RGB; light_direction: the way the light travels."""

    camera_eye_m: Vector = (0.865, 0.42, 0.50)
    camera_target_m: Vector = (0.550, -0.01, 0.04)
    camera_fov_rad: float = 0.70
    ambient: Vector = (0.5, 0.5, 0.5)
    light: Vector = (1.2, 1.2, 1.2)
    light_direction: Vector = (-0.3, -0.3, -1.0)
    table: Vector = (0.45, 0.42, 0.40)


BASE = Look()
# From the robot's other side, under a low, warm, weak light, over a darker table.
SECOND = Look(
    camera_eye_m=(0.87, -0.59, 0.47),
    camera_target_m=(0.550, 0.01, 0.04),
    ambient=(0.36, 0.32, 0.27),
    light=(1.25, 1.05, 0.75),
    light_direction=(0.2, 0.9, -0.7),
    table=(0.30, 0.26, 0.22),
)
_FIXED = {"base": BASE, "second": SECOND}
VARIED = "varied"
VARIANTS = (*_FIXED, VARIED)

# What `varied` draws from. Angles of the camera around the middle of the table: 0 looks back at the robot.
_AZIMUTH_DEG, _ELEVATION_DEG, _DISTANCE_M = (-115.0, 115.0), (28.0, 55.0), (0.62, 0.85)
_KEEP_AWAY_DEG = 20.0  # no varied camera stands nearer in azimuth to that of `second`, nor has light its direction


def look_of(variant: str, seed: int) -> Look:
    """The look of one episode: a pure function of its variant and its scene's seed.

    `varied` draws camera, lights and table anew for every scene, and stays clear of `second`, so that a model trained
    on it can be tested there. Raises: UsageError on an unknown variant.
    """
    if variant in _FIXED:
        return _FIXED[variant]
    if variant != VARIED:
        raise UsageError(f"Suite 'blocks' has no variant '{variant}'.", did_you_mean(variant, VARIANTS))
    rng = np.random.default_rng([seed, 2])  # the layout and the noise have drawn from this seed too
    target = np.array(BASE.camera_target_m) + rng.uniform(-0.03, 0.03, size=3)
    azimuth = _draw_azimuth(rng, _azimuth_deg(np.subtract(SECOND.camera_eye_m, SECOND.camera_target_m)), _AZIMUTH_DEG)
    elevation = np.radians(rng.uniform(*_ELEVATION_DEG))
    offset = np.array([np.cos(azimuth) * np.cos(elevation), np.sin(azimuth) * np.cos(elevation), np.sin(elevation)])
    light_azimuth = _draw_azimuth(rng, _azimuth_deg(np.array(SECOND.light_direction)), (-180.0, 180.0))
    slope = rng.uniform(0.2, 1.0)  # horizontal part of the light, to one part down
    return Look(
        camera_eye_m=_vector(target + rng.uniform(*_DISTANCE_M) * offset),
        camera_target_m=_vector(target),
        ambient=_vector(rng.uniform(0.3, 0.65) * rng.uniform(0.85, 1.15, size=3)),
        light=_vector(rng.uniform(0.7, 1.4) * rng.uniform(0.8, 1.2, size=3)),
        light_direction=_vector(np.array([slope * np.cos(light_azimuth), slope * np.sin(light_azimuth), -1.0])),
        table=_vector(rng.uniform(0.2, 0.6) * rng.uniform(0.85, 1.15, size=3)),
    )


def _draw_azimuth(rng: np.random.Generator, keep_away_deg: float, between_deg: tuple[float, float]) -> float:
    """In rad."""
    while True:
        azimuth_deg = rng.uniform(*between_deg)
        if abs((azimuth_deg - keep_away_deg + 180) % 360 - 180) > _KEEP_AWAY_DEG:
            return float(np.radians(azimuth_deg))


def _azimuth_deg(direction: np.ndarray) -> float:
    return float(np.degrees(np.arctan2(direction[1], direction[0])))


def _vector(values: np.ndarray) -> Vector:
    x, y, z = (float(v) for v in values)
    return x, y, z
