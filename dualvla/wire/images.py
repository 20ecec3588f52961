"""Encoded images on the wire: PNG or JPEG bytes into pixels, with every bound checked before a pixel is decoded.

Knows pillow, and only once an encoded image comes in.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import numpy as np

from dualvla.errors import WireError

MAX_SIDE = 2048  # pixels
FORMATS = ("PNG", "JPEG")


def decode(name: str, data: bytes) -> np.ndarray:
    """uint8 [H, W, 3] of a PNG or JPEG. Raises: WireError, before anything is decoded if a side is over MAX_SIDE."""
    from PIL import Image, UnidentifiedImageError

    damaged = (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError)
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if max(image.size) > MAX_SIDE:
                raise WireError(f"'{name[:60]}' has size {image.size}; each side must be 1 to {MAX_SIDE} pixels.")
            return np.array(image.convert("RGB"))
    except damaged as error:
        raise WireError(f"'{name[:60]}' is no PNG or JPEG: {error}.") from error


def is_encoded(value: Any) -> bool:
    """Whether it is {"__image__": True, "format", "data", "shape"}: vla-eval's form; our own protocol takes it, too."""
    return isinstance(value, Mapping) and "__image__" in value


def decode_marked(name: str, value: Mapping[str, Any]) -> np.ndarray:
    """uint8 [H, W, 3] of an `is_encoded` map. Raises: WireError."""
    data, kind, shape = value.get("data"), value.get("format"), value.get("shape")
    if not isinstance(data, bytes):
        raise WireError(f"'{name[:60]}' has no bytes in 'data'.")
    if kind == "raw":
        return _raw(name, data, shape, value.get("dtype"))
    if kind not in ("png", "jpeg"):
        raise WireError(f"'{name[:60]}' has format {kind!r:.40}.", "send png, jpeg or raw")
    image = decode(name, data)
    if isinstance(shape, list) and shape[:2] != list(image.shape[:2]):
        raise WireError(f"'{name[:60]}' says it is {shape!r:.40}, but holds {list(image.shape)}.")
    return image


def fit(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bilinear to the largest size that fits, black bars around: uint8 [H, W, 3] -> uint8 [height, width, 3]."""
    from PIL import Image

    if image.shape[:2] == (height, width):
        return image
    scale = min(height / image.shape[0], width / image.shape[1])
    size = max(1, round(image.shape[0] * scale)), max(1, round(image.shape[1] * scale))
    small = np.asarray(Image.fromarray(image).resize((size[1], size[0]), Image.Resampling.BILINEAR))
    out = np.zeros((height, width, 3), np.uint8)
    top, left = (height - size[0]) // 2, (width - size[1]) // 2
    out[top : top + size[0], left : left + size[1]] = small
    return out


def _raw(name: str, data: bytes, shape: Any, dtype: Any) -> np.ndarray:
    if dtype not in ("|u1", "<u1", "=u1", "uint8"):
        raise WireError(f"'{name[:60]}' has dtype {dtype!r:.40}; images are uint8.")
    sizes = shape if isinstance(shape, list) and all(type(n) is int for n in shape) else []
    if len(sizes) != 3 or sizes[2] != 3 or not all(1 <= n <= MAX_SIDE for n in sizes[:2]):
        raise WireError(f"'{name[:60]}' has shape {shape!r:.40}, not [H, W, 3] of 1 to {MAX_SIDE} pixels a side.")
    if len(data) != sizes[0] * sizes[1] * 3:
        raise WireError(f"'{name[:60]}' of shape {sizes} does not match its {len(data)} bytes.")
    return np.frombuffer(data, np.uint8).reshape(sizes).copy()
