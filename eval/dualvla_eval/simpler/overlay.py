"""The original's "visual matching": everything but robot, objects and cabinet is replaced by a real photograph.

Knows pictures and segmentation ids; nothing of scenes. Arithmetic as in the original: float, then truncated to 8 bits.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

import cv2
import numpy as np
from PIL import Image


class Overlay:
    """photo: file, resized (bilinear) to the camera's picture. kept: segmentation ids that stay simulated."""

    def __init__(self, photo: str, width: int, height: int, kept: Iterable[int]):
        self.photo = _load(photo, width, height)
        ids = np.array(sorted(set(kept)), dtype=np.int64)
        self._keep = np.zeros(max(256, int(ids.max()) + 1), dtype=bool)
        self._keep[ids] = True

    def apply(self, color: np.ndarray, actors: np.ndarray) -> np.ndarray:
        """color: uint8 [..., H, W, 3]. actors: ids [..., H, W]. Returns uint8 like color; changes nothing."""
        kept = self.kept(actors)
        picture = np.broadcast_to(self.photo, color.shape).copy()
        picture[kept] = color[kept]
        return picture

    def kept(self, actors: np.ndarray) -> np.ndarray:
        """bool [..., H, W]: which pixels stay simulated."""
        if actors.dtype == np.uint8:
            return self._keep[actors]
        known = np.minimum(actors, len(self._keep) - 1)
        return self._keep[known] & (actors == known)


@cache
def _load(photo: str, width: int, height: int) -> np.ndarray:
    """uint8 [H, W, 3]."""
    with Image.open(photo) as image:
        pixels = np.asarray(image.convert("RGB")) / 255
    resized = cv2.resize(pixels, (width, height)).astype(np.float32)
    truncated = (np.clip(resized, 0, 1) * 255).astype(np.uint8)
    truncated.setflags(write=False)
    return truncated
