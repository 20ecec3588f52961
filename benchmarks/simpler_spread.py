"""How near our SimplerEnv comes to the original's physics, beside how far the original comes to itself.

    python benchmarks/simpler_spread.py --original PYTHON [--starts 5] [--more-starts 31]

PYTHON is one that has SAPIEN 2.2.2 and ruckig (`simpler_original.py`). The commands of each recorded contact-rich
episode are replayed from its own start and from others that differ by 0.1 mm in a random horizontal direction, of each
object, and of the robot where it pulls a drawer: what the original does not repeat from there, nobody can be asked to
follow. Recordings that it does not repeat get more starts. And the objects of every numbered episode settle in both,
in the original also from 0.1 mm beside.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dualvla_eval.simpler import google_tasks, widowx_tasks
from dualvla_eval.simpler.assets import Assets
from dualvla_eval.simpler.specs import EpisodeSetup, Pose

_HERE = Path(__file__).resolve().parent
_ROOT = _HERE.parent
_RECORDINGS = _ROOT / "tests" / "sim" / "golden_simpler"
_RESULT = _HERE / "results" / "simpler_spread.json"
_ASIDE_M = 1e-4
_UNREPEATED = ("contact/google_robot_move_near_25", "contact/google_robot_place_apple_in_closed_top_drawer_0")
_ASKED_MM = 10.0  # of the moved object, at the end

Placed = tuple[np.ndarray, np.ndarray]  # position [3] in m, quaternion [4] w first


@dataclass(frozen=True)
class Start:
    """A recording, or a numbered episode ("simpler-widowx/widowx_stack_cube/3"). seed 0: its own start."""

    name: str
    seed: int

    @property
    def recorded(self) -> bool:
        return self.name.startswith("contact/")


@dataclass
class Ended:
    """Distances from the recording: mm and degrees after settling; the tool's and the drawer's largest; the source's
    at the end, None without one. source_m: where that lies then, in the world."""

    settled: dict[str, tuple[float, float]]
    tool_mm: float = 0.0
    drawer_mm: float | None = None
    source_mm: float | None = None
    source_m: tuple[float, ...] | None = None

    def step(self, recorded: Mapping[str, Any], i: int, tool: Placed, cabinet: Mapping[str, float] | None) -> None:
        """After action `i`, from 1. tool: in the frame of the base. cabinet: joint -> m."""
        self.tool_mm = max(self.tool_mm, _mm(tool[0], recorded["tcp"][i]))
        if cabinet is not None:
            joint = f"{recorded['drawer_id']}_drawer_joint"
            theirs = recorded["cabinet_qpos"][i][recorded["cabinet_joints"].index(joint)]
            self.drawer_mm = max(self.drawer_mm or 0.0, 1e3 * abs(float(cabinet[joint]) - theirs))

    def finish(self, recorded: Mapping[str, Any], source: str | None, positions: Mapping[str, np.ndarray]) -> None:
        if source in positions:
            self.source_mm = _mm(positions[source], recorded["objects_final"][source])
            self.source_m = tuple(map(float, positions[source]))


def numbered(start: Start) -> EpisodeSetup:
    suite, task, number = start.name.split("/")
    if suite == widowx_tasks.SUITE:
        setup = widowx_tasks.setup(task, int(number))
    else:
        setup = google_tasks.setup(suite, task, "base", int(number))
    return setup if start.seed == 0 else _aside(setup, np.random.default_rng(start.seed))


def start_of(start: Start) -> tuple[dict[str, Any], EpisodeSetup]:
    """Of a recording."""
    recorded = json.loads((_RECORDINGS / f"{start.name}.json").read_text())
    name, episode_id = recorded["name"], recorded["episode_id"]
    if name.startswith("widowx"):
        setup = widowx_tasks.setup(name, episode_id)
    else:
        options = recorded["options"].get("obj_init_options", {})
        xy = options.get("init_xy")
        setup = google_tasks.prepackaged(
            name, recorded["seed"], tuple(xy) if xy else None, options.get("orientation"), episode_id
        )
    return recorded, setup if start.seed == 0 else _aside(setup, np.random.default_rng(start.seed))


def _aside(setup: EpisodeSetup, rng: np.random.Generator) -> EpisodeSetup:
    def moved(pose: Pose) -> Pose:
        angle = rng.uniform(0, 2 * np.pi)
        x, y, z = pose.position
        return replace(pose, position=(x + _ASIDE_M * np.cos(angle), y + _ASIDE_M * np.sin(angle), z))

    objects = tuple(o if o.locked else replace(o, pose=moved(o.pose)) for o in setup.objects)
    if setup.station is None:
        return replace(setup, objects=objects)
    return replace(setup, objects=objects, robot=replace(setup.robot, pose=moved(setup.robot.pose)))


def compared(recorded: Mapping[str, Any], placed: Mapping[str, Placed]) -> Ended:
    """Where the objects have settled."""
    theirs = {model: pose for model, pose in recorded["objects"].items() if model in placed}
    return Ended({m: (_mm(placed[m][0], pose), _degrees(placed[m][1], pose[3:])) for m, pose in theirs.items()})


def _mm(position: np.ndarray, pose: list[float]) -> float:
    return 1e3 * float(np.linalg.norm(np.asarray(position) - pose[:3]))


def _degrees(rotation: np.ndarray, other: list[float]) -> float:
    cosine = abs(float(np.dot(rotation, other))) / float(np.linalg.norm(rotation) * np.linalg.norm(other))
    return float(np.degrees(2 * np.arccos(min(cosine, 1.0))))


def replay(start: Start, env: Any) -> Ended:
    """In our own environment."""
    recorded, setup = start_of(start)
    env.reset(options={"setup": setup})
    poses = {spec.model: env.world.pose(spec.model) for spec in setup.objects}
    ended = compared(recorded, {model: (pose.p, pose.q) for model, pose in poses.items()})
    for i, action in enumerate(recorded["actions"], 1):
        info = env.step_native(np.array(action))[4]
        tool, opened = env.task.agent.tool_poses()[0], info["stats"].get("qpos")
        ended.step(
            recorded,
            i,
            (tool.p, tool.q),
            None if opened is None else {f"{recorded['drawer_id']}_drawer_joint": opened},
        )
    ended.finish(recorded, setup.source, {spec.model: env.world.position(spec.model) for spec in setup.objects})
    return ended


def originals(starts: list[Start], python: str) -> list[dict[str, Any]]:
    paths = os.pathsep.join(map(str, (_ROOT, _ROOT / "eval", _HERE)))
    done = subprocess.run(
        [python, str(_HERE / "simpler_original.py")],
        input="\n".join(json.dumps(asdict(start)) for start in starts),
        env={**os.environ, "PYTHONPATH": paths},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


def settle(start: Start, env: Any) -> dict[str, list[float]]:
    """Where the objects of a numbered episode come to rest: model -> position and quaternion, 7."""
    setup = numbered(start)
    env.reset(options={"setup": setup})
    poses = {spec.model: env.world.pose(spec.model) for spec in setup.objects if not spec.locked}
    return {model: [*map(float, pose.p), *map(float, pose.q)] for model, pose in poses.items()}


def _cell(values: list[float | None]) -> str:
    """From the recorded start, and the least and most from those beside it."""
    own, *beside = [value for value in values if value is not None] or [None]
    return "-" if own is None else f"{own:.1f} ({min(beside):.1f} to {max(beside):.1f})"


def _near(values: list[float | None]) -> str:
    """Of all starts."""
    told = [value for value in values if value is not None]
    return f"{sum(value < _ASKED_MM for value in told)} of {len(told)}" if told else "-"


def _nearest(runs: list[dict[str, Any]]) -> str:
    """How far our object ends, from its own start, from the nearest of the original's ends."""
    ours = runs[0]["ours"]["source_m"]
    if ours is None:
        return "-"
    return f"{min(_mm(np.array(ours), run['original']['source_m']) for run in runs):.1f}"


def table(found: dict[str, Any]) -> str:
    """Markdown, mm."""
    lines = [
        "| recording | original: tool | drawer | object | within 1 cm | ours: tool | drawer | object | "
        "from the nearest original |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for recording in dict.fromkeys(run["start"]["name"] for run in found["runs"]):
        runs = [run for run in found["runs"] if run["start"]["name"] == recording]
        cells = []
        for engine in ("original", "ours"):
            for measure in ("tool_mm", "drawer_mm", "source_mm"):
                cells.append(_cell([run[engine][measure] for run in runs]))
            if engine == "original":
                cells.append(_near([run[engine]["source_mm"] for run in runs]))
        lines.append("| " + " | ".join([recording.split("/")[-1], *cells, _nearest(runs)]) + " |")
    return "\n".join(lines)


def settled_table(found: dict[str, Any]) -> str:
    """Markdown: median and largest distance of each model."""
    lines = [
        "| task | object | episodes | ours, mm: median, largest | degrees | original, 0.1 mm beside, mm | degrees |",
        "|---|---|---|---|---|---|---|",
    ]
    cells: dict[tuple[str, str], list[tuple[float, ...]]] = {}
    for name, there in found["settled"].items():
        for model, pose in there["original"].items():
            ours, beside = there["ours"][model], there["original_beside"][model]
            apart = (
                _mm(ours[:3], pose),
                _degrees(ours[3:], pose[3:]),
                _mm(beside[:3], pose),
                _degrees(beside[3:], pose[3:]),
            )
            cells.setdefault((name.split("/")[1], model), []).append(apart)
    for (task, model), rows in cells.items():
        told = [f"{np.median(v):.2f}, {max(v):.2f}" for v in zip(*rows, strict=True)]
        lines.append("| " + " | ".join([task, model, str(len(rows)), *told]) + " |")
    return "\n".join(lines)


def numbered_names() -> list[str]:
    """Every numbered episode on a table or in the sink, of the base variants."""
    names = [
        f"{widowx_tasks.SUITE}/{task}/{i}" for task in widowx_tasks.TASKS for i in range(widowx_tasks.NUM_EPISODES)
    ]
    suite = google_tasks.VISUAL_MATCHING
    for task, variant, count, _ in google_tasks.suite_cells(suite):
        if variant == "base" and task in (google_tasks.PICK_COKE_CAN, google_tasks.MOVE_NEAR):
            names += [f"{suite}/{task}/{i}" for i in range(count)]
    return names


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--original", required=True, metavar="PYTHON", help="one with SAPIEN 2.2.2 and ruckig")
    parser.add_argument("--starts", type=int, default=5, help="of each recording, its own first")
    parser.add_argument("--more-starts", type=int, default=31, help="of those that the original does not repeat")
    parser.add_argument("--out", type=Path, default=_RESULT)
    arguments = parser.parse_args()
    os.environ.setdefault("LP_NUM_THREADS", "1")
    from dualvla_eval.simpler.env import SimplerEnv

    recordings = sorted(f"contact/{path.stem}" for path in (_RECORDINGS / "contact").glob("*.json"))
    counts = {r: arguments.more_starts if r in _UNREPEATED else arguments.starts for r in recordings}
    starts = [Start(recording, seed) for recording, count in counts.items() for seed in range(count)]
    names = numbered_names()
    alone = [Start(name, 0) for name in names]
    together = [*starts, *alone, *(Start(name, 1) for name in names)]
    found_there = dict(zip(together, originals(together, arguments.original), strict=True))

    def ours(start: Start) -> dict[str, Any]:
        camera = (start_of(start)[1] if start.recorded else numbered(start)).camera
        env = SimplerEnv(Assets.find(), camera.width, camera.height)
        found = asdict(replay(start, env)) if start.recorded else settle(start, env)
        env.close()
        print(f"{start.name} {start.seed}", file=sys.stderr, flush=True)
        return found

    runs = [{"start": asdict(start), "original": found_there[start], "ours": ours(start)} for start in starts]
    settled = {
        start.name: {
            "original": found_there[start],
            "original_beside": found_there[Start(start.name, 1)],
            "ours": ours(start),
        }
        for start in alone
    }
    found = {"aside_m": _ASIDE_M, "starts": counts, "runs": runs, "settled": settled}
    arguments.out.write_text(json.dumps(found) + "\n")
    print(table(found), settled_table(found), sep="\n\n")


if __name__ == "__main__":
    main()
