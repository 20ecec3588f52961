"""How a client waits, tries again and sends images. Knows nothing else."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

from dualvla.errors import UsageError

ImageEncoding = Literal["raw", "jpeg", "png"]
IMAGE_ENCODINGS: tuple[ImageEncoding, ...] = ("raw", "jpeg", "png")


@dataclass(frozen=True)
class ClientOptions:
    """How long to wait, how often to try again, how images travel.

    A dropped connection is opened `attempts` times in all, with pauses of first_pause_s, doubled each time up to
    longest_pause_s; a random part of each pause is left out, so that a fleet does not come back in one instant.
    reply_timeout_s: for each answer; a connection silent for longer is opened anew. images: "raw" arrays cost no
    processor, "png" (lossless) and "jpeg" (of jpeg_quality) save bandwidth and need pillow. direct: talk to the
    replica's own listener, which the endpoint names, and not through its proxy; falls back to the proxy where that
    listener cannot be reached.
    """

    connect_timeout_s: float = 10.0
    reply_timeout_s: float = 30.0
    attempts: int = 5
    first_pause_s: float = 0.1
    longest_pause_s: float = 2.0
    images: ImageEncoding = "raw"
    jpeg_quality: int = 92
    direct: bool = False

    def __post_init__(self) -> None:
        for name in ("connect_timeout_s", "reply_timeout_s", "attempts"):
            if not getattr(self, name) > 0:
                raise UsageError(f"{name} = {getattr(self, name)} must be above 0.", "leave it out for the default")
        if self.images not in IMAGE_ENCODINGS:
            raise UsageError(f"images = '{self.images}' is unknown.", f"choose from: {', '.join(IMAGE_ENCODINGS)}")

    def pause_s(self, attempt: int) -> float:
        """Before attempt number `attempt` + 2: between half of the back-off and all of it."""
        longest = min(self.longest_pause_s, self.first_pause_s * 2.0**attempt)
        return longest * random.uniform(0.5, 1.0)
