"""The pictures of a filmed episode that a judge looks at: which steps, and reading them from the film.

A film shows one picture a step, the camera above and a panel of text below (`videos.py`). The panel is cut off here:
what a policy said reaches a judge as escaped text only, never as a picture. Knows films and recorded steps; nothing of
judges.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from PIL import Image

from dualvla.errors import DataError
from dualvla.io import dataset, storage

if TYPE_CHECKING:
    from dualvla_eval.results import Trajectory

_JPEG_QUALITY = 85
_GRIPPER_CLOSED, _GRIPPER_OPEN = 0.45, 0.55  # hysteresis around 0.5 (method.md section 1)
_SCHEMA = pa.schema([("step", pa.int32()), ("jpeg", pa.binary())])

# Why a picture is shown, in the order in which they are given room.
START, END, EVENT, GRIPPER, TEXT, BETWEEN = "start", "end", "event", "gripper", "new text", "between"


@dataclass(frozen=True)
class Frames:
    """The film of one episode.

    video: URL of the mp4. kept: URL where pictures are kept once they have been taken out of it. order: the filmed
    step that is shown at each step, for a trajectory put into another order; None: as filmed.
    """

    video: str
    kept: str
    order: tuple[int, ...] | None = None

    def read(self, steps: Sequence[int]) -> list[bytes]:
        """JPEGs of the camera alone, one a step. Raises: DataError if the film is missing, damaged or too short."""
        wanted = [s if self.order is None else self.order[s] for s in steps]
        found = self._kept()
        missing = sorted(set(wanted) - set(found))
        if missing:
            found |= {step: encode(picture) for step, picture in _decode(self.video, missing).items()}
            keep(self.kept, found)
        return [found[s] for s in wanted]

    def _kept(self) -> dict[int, bytes]:
        if not storage.exists(self.kept):
            return {}
        table = dataset.read_table(self.kept, _SCHEMA.names)
        return dict(zip(table["step"].to_pylist(), table["jpeg"].to_pylist(), strict=True))


def keep(url: str, pictures: dict[int, bytes]) -> None:
    """Writes step -> JPEG where `Frames.read` looks first."""
    rows = [{"step": step, "jpeg": pictures[step]} for step in sorted(pictures)]
    dataset.write_table(url, pa.Table.from_pylist(rows, schema=_SCHEMA))


def encode(picture: np.ndarray) -> bytes:
    """uint8 [H, W, 3] -> JPEG."""
    sink = io.BytesIO()
    Image.fromarray(picture).save(sink, format="JPEG", quality=_JPEG_QUALITY)
    return sink.getvalue()


def _decode(video: str, steps: Sequence[int]) -> dict[int, np.ndarray]:
    """Step -> uint8 [W, W, 3], the camera's square at the top of the film."""
    import av

    wanted = set(steps)
    found: dict[int, np.ndarray] = {}
    try:
        with av.open(io.BytesIO(storage.read_bytes(video))) as container:
            container.streams.video[0].thread_count = 1  # films are decoded side by side
            for step, frame in enumerate(container.decode(video=0)):
                if step in wanted:
                    found[step] = frame.to_ndarray(format="rgb24")[: frame.width]
                if len(found) == len(wanted):
                    break
    except av.FFmpegError as error:
        raise DataError(f"'{video}' is not a readable film: {error}.", "evaluate again with --videos all") from error
    if len(found) < len(wanted):
        raise DataError(f"'{video}' ends before step {max(wanted)}.", "evaluate again with --videos all")
    return found


def choose(trajectory: Trajectory, limit: int) -> list[tuple[int, str]]:
    """At most `limit` (2 or more) of the steps 0 .. T with the reason for each, in order of time.

    First and last always; then where something happened: the simulator's events, the gripper opening or closing, a new
    text. Too many of one kind are thinned evenly; room that is left halves the longest gaps.
    """
    last = trajectory.num_steps
    chosen = {0: START, last: END}
    candidates = (
        (EVENT, [t + 1 for t, events in enumerate(trajectory.events) if events]),  # what the step led to
        (GRIPPER, _gripper_flips(trajectory.gripper)),
        (TEXT, [t for t in range(1, last) if _says_something_new(trajectory, t)]),
    )
    for why, steps in candidates:
        fresh = [s for s in steps if s not in chosen]
        for step in _thin(fresh, limit - len(chosen)):
            chosen[step] = why
    while len(chosen) < min(limit, last + 1):
        steps = sorted(chosen)
        gap, start = max(((b - a, a) for a, b in itertools.pairwise(steps)), key=lambda g: (g[0], -g[1]))
        chosen[start + gap // 2] = BETWEEN
    return sorted(chosen.items())


def _thin(steps: Sequence[int], room: int) -> list[int]:
    if len(steps) <= room:
        return list(steps)
    return [steps[int((i + 0.5) * len(steps) / room)] for i in range(max(0, room))]


def _gripper_flips(gripper: np.ndarray) -> list[int]:
    """Steps at which an arm's gripper has changed between open and closed; gripper [T + 1, arms]."""
    flips = []
    for arm in gripper.T:
        is_open = arm[0] >= 0.5
        for t, opening in enumerate(arm):
            if opening < _GRIPPER_CLOSED if is_open else opening > _GRIPPER_OPEN:
                is_open = not is_open
                flips.append(t)
    return sorted(set(flips))


def _says_something_new(trajectory: Trajectory, step: int) -> bool:
    text = trajectory.reasoning[step]
    return text is not None and text != trajectory.reasoning[step - 1]
