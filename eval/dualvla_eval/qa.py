"""The multimodal domain of suite `blocks`: one question about one picture of a scene, with a short answer.

Four kinds, named by the row's `task`: colour, count, spatial relation (in the picture), and what the robot has picked
up. Answers of one kind are about equally frequent. Scenes of the splits are disjoint from each other and from every
episode.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from dualvla_eval.experts import Expert
from dualvla_eval.sim.base import SceneState, SimEnv
from dualvla_eval.suites import Episode, scene_seed
from dualvla_eval.tasks.blocks import QA_SCENE, get_task, sample_layout

QASplit = Literal["train", "test"]

_NUMBERS = {2: "two", 3: "three", 4: "four"}
_COLOR = ("what color is the {shape}?", "which color does the {shape} have?")
_COUNT = ("how many objects are on the table?", "how many objects do you see?")
_SPATIAL = ("is the {a} to the {side} of the {b}?", "do you see the {a} to the {side} of the {b}?")
_HELD = ("what is the robot holding?", "what does the gripper hold?")
_CLEARLY_BESIDE = 0.08  # of the picture's width
_MAX_GRASP_STEPS = 30


@dataclass(frozen=True)
class Question:
    """image: uint8 [H, W, 3] of camera "main"."""

    kind: str
    question: str
    answer: str
    image: np.ndarray


def make_question(env: SimEnv, split: QASplit, index: int, seed: int) -> Question:
    """Question `index` of a split: a pure function of its arguments, but for the environment it is rendered in."""
    kind = KINDS[index % len(KINDS)]
    for attempt in range(1000):
        rng = np.random.default_rng(scene_seed("qa_train" if split == "train" else "qa_test", seed, index, attempt))
        made = _MAKERS[kind](env, rng)
        if made is not None:
            return Question(f"qa_{kind}", *made)
    raise AssertionError(f"no scene fits a question about {kind}")


def _scene(env: SimEnv, rng: np.random.Generator, task: str = "touch") -> tuple[SceneState, np.ndarray]:
    """A scene with 2, 3 or 4 objects, about equally often, and its picture."""
    seed = int(rng.integers(2**32))
    layout = sample_layout(QA_SCENE if task == "touch" else get_task(task), seed)
    obs, _ = env.reset(options={"episode": Episode("blocks", task, "base", 0, seed), "layout": layout})
    return env.state(), obs["images"]["main"]


def _ask_color(env: SimEnv, rng: np.random.Generator) -> tuple[str, str, np.ndarray] | None:
    state, image = _scene(env, rng)
    shapes = [o.shape for o in state.objects]
    unique = [o for o in state.objects if shapes.count(o.shape) == 1]
    if not unique:
        return None
    chosen = unique[rng.integers(len(unique))]
    assert chosen.color is not None
    return str(rng.choice(_COLOR)).format(shape=chosen.shape), chosen.color, image


def _ask_count(env: SimEnv, rng: np.random.Generator) -> tuple[str, str, np.ndarray]:
    state, image = _scene(env, rng)
    return str(rng.choice(_COUNT)), _NUMBERS[len(state.objects)], image


def _ask_spatial(env: SimEnv, rng: np.random.Generator) -> tuple[str, str, np.ndarray] | None:
    state, image = _scene(env, rng)
    a, b = (state.objects[i] for i in rng.choice(len(state.objects), 2, replace=False))
    side = str(rng.choice(["left", "right"]))
    rightward = float(env.project(np.array(a.position))[0] - env.project(np.array(b.position))[0])
    if abs(rightward) < _CLEARLY_BESIDE:
        return None
    answer = "yes" if (rightward > 0) == (side == "right") else "no"
    return str(rng.choice(_SPATIAL)).format(a=a.name, b=b.name, side=side), answer, image


def _ask_held(env: SimEnv, rng: np.random.Generator) -> tuple[str, str, np.ndarray] | None:
    """Half of the time the expert picks something up first; else it is stopped on its way."""
    state, image = _scene(env, rng, task="pick")
    lifts = bool(rng.random() < 0.5)
    steps = _MAX_GRASP_STEPS if lifts else int(rng.integers(0, 8))
    expert = Expert(env, rng)
    for _ in range(steps):
        obs, _, terminated, _, _ = env.step(expert.act().action)
        image = obs["images"]["main"]
        if terminated:
            break
    state = env.state()
    if lifts != (state.held is not None):
        return None
    return str(rng.choice(_HELD)), state.held or "nothing", image


_MAKERS = {"color": _ask_color, "count": _ask_count, "spatial": _ask_spatial, "held": _ask_held}
KINDS = tuple(_MAKERS)
