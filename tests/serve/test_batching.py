"""Batches, deadlines and queues over a policy in the same process; the choice of a batch as a plain function."""

import asyncio
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serve_fakes import SPEC, CountingPolicy, example, load_counting

from dualvla.errors import BusyError, DualVLAError, LateError, PolicyError
from dualvla.schema import Observation, PolicyReply
from dualvla_serve.batching import Asked, BatchCost, LoadedPolicy, PolicyRunner, Waiting, next_batch

FLAT_S = 0.04


class FlatPolicy:
    """Every batch takes the same time, as a GPU's does. Knows nothing of sessions."""

    spec = SPEC

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def infer(self, observations: Sequence[Observation], sessions: Sequence[str]) -> list[PolicyReply]:
        time.sleep(FLAT_S)
        self.sizes.append(len(observations))
        return [PolicyReply(np.full((3, 7), o.step, np.float32)) for o in observations]

    def reset(self, session: str) -> None:
        pass


def run(scenario: Callable[[PolicyRunner], Coroutine[Any, Any, Any]], policy: Any = None, **limits: int) -> Any:
    async def main() -> Any:
        load = load_counting if policy is None else (lambda: LoadedPolicy(policy, example()))
        runner = await asyncio.to_thread(PolicyRunner, load, limits.get("batch", 16), limits.get("waiting", 512))
        try:
            return await scenario(runner)
        finally:
            runner.close()

    return asyncio.run(main())


def asked(step: int, deadline_ms: float | None = None, state: Mapping[str, Any] = {}, session: str = "") -> Asked:
    deadline = None if deadline_ms is None else time.monotonic() + deadline_ms / 1000
    return Asked(example(step), session or f"s{step}", state, deadline=deadline)


def test_what_comes_in_during_a_batch_shares_the_next() -> None:
    policy = FlatPolicy()

    async def scenario(runner: PolicyRunner) -> None:
        answers = await asyncio.gather(*(runner.infer(asked(i)) for i in range(16)))
        assert [a.reply.actions[0, 0] for a in answers] == list(range(16))

    run(scenario, policy)
    assert policy.sizes[2:] == [16]  # after the warm-up: all came in before the worker began


def test_a_deadline_that_cannot_be_met_is_refused_at_once() -> None:
    async def scenario(runner: PolicyRunner) -> float:
        busy = asyncio.create_task(runner.infer(asked(0)))
        await asyncio.sleep(0.005)
        started = time.monotonic()
        with pytest.raises(LateError, match="30 ms"):
            await runner.infer(asked(1, deadline_ms=30))
        refused_s = time.monotonic() - started
        assert (await runner.infer(asked(2, deadline_ms=2000))).reply.actions[0, 0] == 2
        await busy
        return refused_s

    assert run(scenario, FlatPolicy()) < 0.02


def test_no_answer_comes_after_its_deadline_even_if_the_policy_is_slower_than_ever() -> None:
    class Stalls(FlatPolicy):
        def infer(self, observations: Sequence[Observation], sessions: Sequence[str]) -> list[PolicyReply]:
            if any(o.step == 9 for o in observations):
                time.sleep(0.5)
            return super().infer(observations, sessions)

    async def scenario(runner: PolicyRunner) -> float:
        started = time.monotonic()
        with pytest.raises(LateError):
            await runner.infer(asked(9, deadline_ms=150))
        return time.monotonic() - started

    assert run(scenario, Stalls()) < 0.4


def test_the_most_urgent_goes_first() -> None:
    policy, order = FlatPolicy(), []

    async def scenario(runner: PolicyRunner) -> None:
        async def ask(step: int, deadline_ms: float | None) -> None:
            await runner.infer(asked(step, deadline_ms))
            order.append(step)

        first = asyncio.create_task(ask(0, None))
        await asyncio.sleep(0.01)
        await asyncio.gather(ask(1, 900), ask(2, None), ask(3, 400), first)

    run(scenario, policy, batch=1)
    assert order == [0, 3, 1, 2]


def test_a_full_queue_is_told() -> None:
    async def scenario(runner: PolicyRunner) -> int:
        calls = [asyncio.create_task(runner.infer(asked(i))) for i in range(8)]
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        return sum(isinstance(outcome, BusyError) for outcome in outcomes)

    assert run(scenario, FlatPolicy(), waiting=5) == 3


def test_the_state_of_a_session_comes_and_goes_with_its_question() -> None:
    async def scenario(runner: PolicyRunner) -> None:
        state: Mapping[str, Any] = {}
        for count in (1, 2, 3):
            answered = await runner.infer(asked(0, state=state))
            assert answered.reply.actions[0, 0] == count
            state = answered.state
        other = await runner.infer(asked(0))  # the same name without that state: a stranger
        assert other.reply.actions[0, 0] == 1

    policy = CountingPolicy()
    run(scenario, policy)
    assert not policy.asked  # nothing stays behind


def test_two_observations_of_one_session_are_never_in_one_batch() -> None:
    policy = FlatPolicy()

    async def scenario(runner: PolicyRunner) -> None:
        await asyncio.gather(*(runner.infer(asked(i, session="one")) for i in range(3)))

    run(scenario, policy)
    assert policy.sizes[2:] == [1, 1, 1]


def test_one_fault_in_a_batch_is_not_anothers() -> None:
    async def scenario(runner: PolicyRunner) -> list[Any]:
        instructions = ("go", "raise", "nan", "go")
        calls = [runner.infer(Asked(example(i, text), f"s{i}", {})) for i, text in enumerate(instructions)]
        return await asyncio.gather(*calls, return_exceptions=True)

    good, raised, nan, also = run(scenario)
    assert good.reply.actions[0, 0] == also.reply.actions[0, 0] == 1  # asked again alone, it counted once
    assert isinstance(raised, PolicyError)
    assert "secret" not in str(raised)
    assert isinstance(nan, PolicyError)


def test_who_gave_up_is_not_worked_for() -> None:
    policy = FlatPolicy()

    async def scenario(runner: PolicyRunner) -> None:
        first = asyncio.create_task(runner.infer(asked(0)))
        await asyncio.sleep(0.01)
        gone = asyncio.create_task(runner.infer(asked(1)))
        await asyncio.sleep(0.001)
        gone.cancel()
        await first
        await runner.infer(asked(2))

    run(scenario, policy)
    assert policy.sizes[2:] == [1, 1]


def waiting(deadlines: Sequence[float | None], since: float = 0.0) -> list[Waiting]:
    loop = asyncio.new_event_loop()
    found = [
        Waiting(Asked(example(), f"s{i}", {}, deadline=d), loop.create_future(), since) for i, d in enumerate(deadlines)
    ]
    loop.close()
    return found


@settings(max_examples=200, deadline=None)
@given(
    deadlines=st.lists(st.none() | st.floats(0.0, 0.5), min_size=1, max_size=20),
    costs=st.lists(st.floats(0.001, 0.2), min_size=5, max_size=5),
    most=st.integers(1, 16),
)
def test_a_batch_makes_nobody_late_and_leaves_nobody_to_wait_for_nothing(
    deadlines: list[float | None], costs: list[float], most: int
) -> None:
    cost = BatchCost()
    for power, seconds in enumerate(sorted(costs)):
        cost.add(2**power, seconds)
    queue = waiting(deadlines)
    batch, late = next_batch(queue, 0.0, cost, most)
    assert batch or len(late) == len(queue)
    assert len(batch) <= most
    finish = cost.estimate(max(1, len(batch)))
    assert all(one.asked.deadline is None or one.asked.deadline >= finish for one in batch)
    assert all(one.asked.deadline is not None and one.asked.deadline < cost.estimate(1) for one in late)
    left = [one for one in queue if one not in batch and one not in late]
    assert all(one.due >= max((b.due for b in batch), default=0) for one in left)


def test_a_cost_is_learnt_and_no_larger_batch_is_taken_for_cheaper() -> None:
    cost = BatchCost()
    assert cost.estimate(4) == 0.0
    cost.add(1, 0.01)
    cost.add(16, 0.04)
    assert cost.estimate(1) == pytest.approx(0.01)
    assert cost.estimate(3) == cost.estimate(16) == cost.estimate(64) == pytest.approx(0.04)
    for _ in range(100):
        cost.add(16, 0.08)
    assert 0.08 <= cost.estimate(9) < 0.1


def test_a_policy_that_fails_its_warm_up_is_not_served() -> None:
    class Broken(FlatPolicy):
        def infer(self, observations: Sequence[Observation], sessions: Sequence[str]) -> list[PolicyReply]:
            return [PolicyReply(np.zeros((3, 2)))]

    with pytest.raises(DualVLAError, match=r"not \[H, 7\]"):
        PolicyRunner(lambda: LoadedPolicy(Broken(), example()), 4)
