"""Rollouts as mp4: the frame, and under it the instruction, what the policy thinks, its gripper, and how it ended.

Knows rollout records and PyAV; knows nothing of tasks or folders.
"""

from __future__ import annotations

import io
import textwrap

import av
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dualvla_eval.rollout import EpisodeResult, StepRecord

FRAME_PX = 320
_PANEL_PX = 144  # under the frame; both sides of the picture must be even for yuv420p
_MARGIN = 10
_INK, _DIM, _PAPER = (236, 238, 242), (150, 158, 170), (22, 25, 31)
_GOOD, _BAD = (92, 200, 130), (235, 110, 100)
_CLOSING_S = 1.5  # how long the last picture with the verdict stays


def encode(frames: list[np.ndarray], fps: float) -> bytes:
    """uint8 [H, W, 3] pictures of even size as an H.264 mp4 (yuv420p) that any browser plays."""
    height, width, _ = frames[0].shape
    sink = io.BytesIO()
    with av.open(sink, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=round(fps), options={"crf": "26", "preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.thread_count = 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return sink.getvalue()


def rollout_video(result: EpisodeResult, policy: str, control_hz: float) -> bytes:
    """The mp4 of an episode whose frames were kept, at its real speed."""
    pictures = [
        _picture(result, policy, record, frame) for record, frame in zip(result.steps, result.frames, strict=True)
    ]
    return encode(pictures + [pictures[-1]] * round(_CLOSING_S * control_hz), control_hz)


def _picture(result: EpisodeResult, policy: str, record: StepRecord, frame: np.ndarray) -> np.ndarray:
    canvas = Image.new("RGB", (FRAME_PX, FRAME_PX + _PANEL_PX), _PAPER)
    canvas.paste(Image.fromarray(frame).resize((FRAME_PX, FRAME_PX)), (0, 0))
    draw = ImageDraw.Draw(canvas)
    y = FRAME_PX + _MARGIN
    y = _write(draw, y, result.instruction, _INK, size=14, lines=2)
    _gripper(draw, float(record.gripper[0]))
    y = _write(draw, y, f"{policy}   step {record.step} of {result.num_steps}", _DIM, size=11, lines=1)
    last = record.step == result.num_steps
    if last:
        verdict = "success" if result.success else f"{result.stop_reason}: {result.failure}".removesuffix(": None")
        y = _write(draw, y, verdict, _GOOD if result.success else _BAD, size=14, lines=2)
    elif record.reasoning:
        ink = _INK if record.keyframe else _DIM
        _write(draw, y + 2, record.reasoning, ink, size=12, lines=6)
    return np.asarray(canvas)


def _write(draw: ImageDraw.ImageDraw, y: int, text: str, ink: tuple[int, int, int], size: int, lines: int) -> int:
    """Wraps `text` into at most `lines` lines from height `y`; returns the height after them."""
    font = ImageFont.load_default(size)
    width = int((FRAME_PX - 2 * _MARGIN) / (size * 0.52))
    for line in textwrap.wrap(text, width, max_lines=lines, placeholder=" ..."):
        draw.text((_MARGIN, y), line, fill=ink, font=font)
        y += size + 4
    return y


def _gripper(draw: ImageDraw.ImageDraw, opening: float) -> None:
    """Two fingers in the corner of the frame, as far apart as the gripper is open (0 closed, 1 open)."""
    x, y, span = FRAME_PX - 34, 10, 9 * min(max(opening, 0.0), 1.0)
    draw.rectangle((x - 18, y - 4, x + 18, y + 20), fill=_PAPER)
    for side in (-1, 1):
        centre = x + side * (3 + span)
        draw.rectangle((centre - 2, y, centre + 2, y + 16), fill=_INK)
