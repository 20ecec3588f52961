"""A suite without a simulator, and policies for it: the tool is a point, an object is touched within 4 cm.

The proprioception is the vector to the target, so that a policy without vision can solve it.
"""

from __future__ import annotations

import asyncio
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np

from dualvla.schema import PolicyReply, PolicySpec
from dualvla_eval import sweep
from dualvla_eval.actors import SimulatorImpl
from dualvla_eval.policies import PolicyRef
from dualvla_eval.sim.base import ObjectState, SceneState
from dualvla_eval.suites import Episode, Suite, TaskSpec

NAMES = ("red cube", "blue cylinder")
STEP_M = 0.03
REACH_M = 0.04


class FakeEnv:
    """Two objects 20 cm apart; touching the wrong one first is a failure."""

    def reset(self, *, seed=None, options=None):
        rng = np.random.default_rng(options["episode"].seed)
        y = rng.uniform(0.08, 0.12)
        places = {name: (0.5, sign * y, 0.025) for name, sign in zip(NAMES, (1, -1), strict=True)}
        objects = tuple(
            ObjectState(n, n.split()[1], n.split()[0], p, p, 0.0, (0.05, 0.05, 0.05)) for n, p in places.items()
        )
        target = str(rng.choice(NAMES))
        start = (0.4, float(rng.uniform(-0.05, 0.05)), 0.2)
        self._state = SceneState(
            task=options["episode"].task,
            instruction=f"touch the {target}",
            target=target,
            reference=None,
            step=0,
            objects=objects,
            ee_pose=(*start, np.pi, 0.0, 0.0),
            gripper=1.0,
            contacts=(),
            held=None,
            touched=(),
            still=True,
        )
        return self._obs(), {}

    def step(self, action):
        s = self._state
        at = np.array(s.ee_pose[:3]) + np.clip(action[:3], -STEP_M, STEP_M)
        hit = [o.name for o in s.objects if np.linalg.norm(at - o.position) < REACH_M and o.name not in s.touched]
        self._state = replace(
            s,
            step=s.step + 1,
            ee_pose=(*at.tolist(), *s.ee_pose[3:]),
            gripper=float(action[6]),
            touched=(*s.touched, *hit),
            contacts=tuple(("robot", name) for name in hit),
        )
        first = self._state.touched[:1]
        success = first == (s.target,)
        failure = f"touched the {first[0]} first" if first and not success else None
        info = {"success": success, "failure": failure, "events": [f"contact:{name}" for name in hit]}
        return self._obs(), float(success), bool(first), False, info

    def state(self):
        return self._state

    def instruction_for(self, target):
        return f"touch the {target}"

    def render(self, size=None):
        frame = np.full((size or 8, size or 8, 3), 40, np.uint8)
        frame[: 1 + self._state.step] = 200
        return frame

    def project(self, position):
        return np.array([0.5, 0.5])

    def close(self):
        pass

    def _obs(self):
        s = self._state
        to_target = np.subtract(s.object(s.target).position, s.ee_pose[:3])
        return {
            "images": {"main": self.render(8)},
            "instruction": s.instruction,
            "proprio": to_target.astype(np.float32),
            "ee_pose": np.array(s.ee_pose),
            "gripper": np.array([s.gripper]),
        }


class FakePolicy:
    """Goes straight for the target, executes two of four actions a reply, and speaks at every other reply."""

    def __init__(self, kind="reasoning"):
        self.spec = PolicySpec("ee_delta_pose+gripper", 5.0, ("main",), kind, horizon=4, execute_steps=2)
        self.asked = []  # batch sizes
        self.open_sessions = set()

    def infer(self, observations, sessions):
        self.asked.append(len(observations))
        self.open_sessions.update(sessions)
        return [self.reply(o, s) for o, s in zip(observations, sessions, strict=True)]

    def reply(self, observation, session):
        actions = np.zeros((4, 7), np.float32)
        distance = max(float(np.linalg.norm(observation.proprio)), 1e-9)
        actions[:, :3] = observation.proprio * min(1.0, STEP_M / distance)
        actions[:, 6] = 1.0
        new = observation.step % 4 == 0
        text = f"go to it, step {observation.step}" if new else None
        return PolicyReply(actions, text, new, 6 if new else 0, id=observation.id)

    def reset(self, session):
        self.open_sessions.discard(session)


class FaultyPolicy(FakePolicy):
    """Misbehaves from a given step on, in the one episode whose session is named."""

    def __init__(self, fault, episode_id=1, from_step=2):
        super().__init__()
        self._fault, self._where, self._from = fault, f"/{episode_id}?", from_step

    def reply(self, observation, session):
        reply = super().reply(observation, session)
        if self._where not in session or observation.step < self._from:
            return reply
        return self._fault(reply)


class CrashingPolicy(FakePolicy):
    """Kills its process whenever it meets the episode with this id; leaves a mark at each attempt."""

    def __init__(self, episode_id, marks):
        super().__init__()
        self._where, self._marks = f"/{episode_id}?", Path(marks)

    def reply(self, observation, session):
        if self._where in session:
            (self._marks / f"{os.getpid()}").touch()
            os._exit(1)
        return super().reply(observation, session)


class FakeSuite(Suite):
    """Its episodes carry their number as seed."""

    def episodes(self, task, count=None, variant=None):
        spec = self.task(task, variant)
        return [Episode(self.name, task, spec.variant, i, i) for i in range(count or spec.num_episodes)]


def fake_suite():
    return FakeSuite(
        name="fake",
        tasks=(TaskSpec("touch", 30, 12), TaskSpec("tap", 30, 12)),
        action_space="ee_delta_pose+gripper",
        control_hz=5.0,
        cameras=("main",),
        make_env=FakeEnv,
        conventions={"frame": "base"},
    )


class SayingPolicy(FakePolicy):
    """Says one given text at every step."""

    def __init__(self, text):
        super().__init__()
        self._text = text

    def reply(self, observation, session):
        return replace(super().reply(observation, session), reasoning=self._text, keyframe=True, reasoning_tokens=3)


def run_items_here(config, items, machinery, max_batch):
    """Instead of Ray: the work of a sweep in this process, for tests that are about something else."""

    async def run_all():
        simulator = SimulatorImpl(config)
        for item in items:
            await simulator.run(item)

    with ThreadPoolExecutor(1) as thread:  # this one may have a loop already
        thread.submit(asyncio.run, run_all()).result()


def evaluate_fake(folder, name, policy, monkeypatch, *, control=False, episodes=3, videos=1):
    """An evaluation folder of `policy` on the fake suite, made in this process."""
    monkeypatch.setattr(sweep, "_run_items", run_items_here)
    ref = PolicyRef(name, "expert-random-object" if control else "expert")
    config = sweep.SweepConfig({"touch": episodes}, videos_per_task=videos)
    sweep.run_sweep(folder, fake_suite(), [ref], config, load_policy=lambda *_, **__: policy)
    return folder
