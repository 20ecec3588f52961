"""Frames of a video at given times, decoded one after the other (PyAV). Knows no data set."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO, Literal

import av
import numpy as np

from dualvla.io import dataset


@dataclass(frozen=True)
class FrameEncoding:
    """How a decoded frame is stored. A video has lost detail already: JPEG adds little loss, PNG keeps codec noise."""

    format: Literal["jpeg", "png"] = "jpeg"
    jpeg_quality: int = 95

    def __call__(self, frame: np.ndarray) -> bytes:
        """uint8 [H, W, 3] -> encoded bytes; equal frames give equal bytes."""
        if self.format == "png":
            return dataset.encode_png(frame)
        from PIL import Image

        sink = io.BytesIO()
        Image.fromarray(frame).save(sink, format="JPEG", quality=self.jpeg_quality, subsampling=0)
        return sink.getvalue()


def read_frames(file: BinaryIO, times_s: Sequence[float], tolerance_s: float) -> Iterator[np.ndarray | str]:
    """For each of the ascending times its frame, uint8 [H, W, 3], or why there is none within the tolerance.

    Never raises for a damaged video: from the damage on, every time gets the reason.
    """
    given = 0
    reason = "the video ends before this frame"
    try:
        with av.open(file, mode="r") as container:
            stream = container.streams.video[0]
            stream.thread_type = "SLICE"  # frame threads would decode far beyond what is asked for
            if times_s:
                before = max(0.0, times_s[0] - tolerance_s)
                container.seek(int(before / stream.time_base), stream=stream, backward=True, any_frame=False)
            for frame in container.decode(stream):
                if given == len(times_s):
                    return
                if frame.pts is None:
                    continue
                at_s = float(frame.pts * stream.time_base)
                if at_s < times_s[given] - tolerance_s:
                    continue
                image = None
                while given < len(times_s) and times_s[given] <= at_s + tolerance_s:
                    if abs(times_s[given] - at_s) <= tolerance_s:
                        image = frame.to_ndarray(format="rgb24") if image is None else image
                        yield image
                    else:
                        yield f"no video frame at {times_s[given]:.3f} s"
                    given += 1
    except (av.error.FFmpegError, IndexError) as error:  # IndexError: no video stream
        reason = f"the video cannot be read: {error}"
    for _ in times_s[given:]:
        yield reason
