"""How replies become actions: chunks, ensembles, sticky grippers, termination, and their names on the command line."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from eval_fakes import FakeEnv, FakePolicy, fake_suite
from hypothesis import given, settings
from hypothesis import strategies as st

from dualvla.errors import UsageError
from dualvla.schema import PolicyReply, PolicySpec
from dualvla_eval.conventions import Conventions, Plan, parse
from dualvla_eval.rollout import run_episodes

SPEC = PolicySpec("ee_delta_pose+gripper", 5.0, ("main",), "specialist", horizon=4, execute_steps=2)
SUITE = fake_suite()


def chunk(*firsts: float, gripper: float = 1.0) -> PolicyReply:
    actions = np.zeros((len(firsts), 7), np.float32)
    actions[:, 0], actions[:, 6] = firsts, gripper
    return PolicyReply(actions)


def test_without_an_ensemble_the_first_steps_of_a_chunk_are_executed_in_order() -> None:
    plan = Plan(Conventions(), SPEC)
    plan.add(0, chunk(1, 2, 3, 4))
    assert [plan.next()[0] for _ in range(2)] == [1, 2]
    assert plan.empty


def test_an_ensemble_is_the_mean_of_the_last_predictions_for_this_step() -> None:
    plan = Plan(Conventions(ensemble=3), SPEC)
    executed = []
    for step, reply in enumerate([chunk(0, 10, 20, 30), chunk(11, 21, 31), chunk(22, 32), chunk(33), chunk(44)]):
        plan.add(step, reply)
        executed.append(float(plan.next()[0]))
        assert plan.empty
    # Step 2: from chunks 0 (its third), 1 (its second) and 2. Step 3: 0 is too old. Step 4: the others are too short.
    assert executed == [0, (10 + 11) / 2, (20 + 21 + 22) / 3, (31 + 32 + 33) / 3, 44]


def gripper_of(openings: list[float], sticky: int) -> list[float]:
    plan = Plan(Conventions(sticky_gripper=sticky), replace(SPEC, execute_steps=1))
    held = []
    for step, opening in enumerate(openings):
        plan.add(step, chunk(0, gripper=opening))
        held.append(float(plan.next()[6]))
    return held


def test_a_sticky_gripper_holds_what_the_command_jumped_to() -> None:
    assert gripper_of([1, 0.9, 0, 1, 1, 1, 1, 0.6], sticky=3) == pytest.approx([1, 0.9, 0, 0, 0, 1, 1, 0.6])
    assert gripper_of([1, 0, 1], sticky=0) == [1, 0, 1]


@settings(deadline=None)
@given(st.lists(st.floats(0, 1, width=32), max_size=30), st.integers(0, 15))
def test_a_sticky_gripper_only_ever_repeats_a_command(openings: list[float], sticky: int) -> None:
    held = gripper_of(openings, sticky)
    assert all(now in openings[: i + 1] for i, now in enumerate(held))
    assert held[:1] == openings[:1]


def test_conventions_on_the_command_line() -> None:
    found = parse(Conventions(ensemble=4), ["sticky_gripper=15", "termination=original"])
    assert found == Conventions(termination="original", sticky_gripper=15, ensemble=4)
    for text, told in (
        ("stiky_gripper=15", "did you mean 'sticky_gripper'"),
        ("ensemble=many", "write ensemble=4"),
        ("termination=orignal", "did you mean 'original'"),
        ("proprioception", "given, withheld"),
    ):
        with pytest.raises(UsageError, match=told):
            parse(Conventions(), [text])


class LeavingEnv(FakeEnv):
    """Success holds while the target is touched; nothing ends the episode."""

    def step(self, action):  # type: ignore[no-untyped-def]
        obs, reward, _, truncated, info = super().step(action)
        target = self.state().object(self.state().target)
        near = np.linalg.norm(np.subtract(self.state().ee_pose[:3], target.position)) < 0.04
        return obs, reward, False, truncated, {**info, "success": bool(near)}


class PassingPolicy(FakePolicy):
    """Goes to the target and, if told so, away again."""

    def __init__(self, leaves: bool):
        super().__init__()
        self._leaves = leaves

    def reply(self, observation, session):  # type: ignore[no-untyped-def]
        reply = super().reply(observation, session)
        return replace(reply, actions=-reply.actions) if self._leaves and observation.step > 14 else reply


@pytest.mark.parametrize(
    ("rule", "leaves", "reason"),
    [("first_success", True, "success"), ("original", True, "step_limit"), ("original", False, "success")],
)
def test_the_original_rule_asks_what_holds_at_the_last_step(rule, leaves, reason) -> None:  # type: ignore[no-untyped-def]
    conventions = Conventions(termination=rule)
    (result,) = run_episodes(
        PassingPolicy(leaves), [LeavingEnv()], SUITE, SUITE.episodes("touch", 1), conventions=conventions
    )
    assert result.stop_reason == reason
    assert result.first_success is not None
    assert result.num_steps == (result.first_success if rule == "first_success" else SUITE.task("touch").max_steps)


def test_proprioception_can_be_withheld() -> None:
    seen = []

    class Watching(FakePolicy):
        def infer(self, observations, sessions):  # type: ignore[no-untyped-def]
            seen.extend(o.proprio for o in observations)
            shown = [replace(o, proprio=np.zeros(3, np.float32)) for o in observations]
            return super().infer(shown, sessions)

    conventions = Conventions(proprioception="withheld")
    list(run_episodes(Watching(), [FakeEnv()], SUITE, SUITE.episodes("touch", 1), conventions=conventions))
    assert seen == [None] * len(seen) != []
