"""An action at every control period: answers that are late, absent or errors, given by hand, so nothing here waits."""

from __future__ import annotations

import time
from concurrent.futures import Future

import numpy as np
import pytest
from serve.scripted_endpoint import Connection, scripted
from serve_fakes import example

from dualvla.client import ActionStream, PolicyClient, Reply, StreamOptions
from dualvla.errors import LateError, ServerError, StoppedError, UsageError, WireError
from dualvla.schema import Observation, PolicySpec

HORIZON, EXECUTE = 6, 4


class HandClient:
    """A client whose answers a test gives when it likes."""

    spec = PolicySpec("ee_delta_pose+gripper", 5.0, ("main",), "reasoning", horizon=HORIZON, execute_steps=EXECUTE)

    def __init__(self, answers: dict[int, object] | None = None) -> None:
        self.asked: list[tuple[int, Future[Reply]]] = []
        self.resets = 0
        self.answers = answers or {}

    def submit(self, observation: Observation, *, deadline_s: float) -> Future[Reply]:
        future: Future[Reply] = Future()
        self.asked.append((observation.step, future))
        if observation.step in self.answers:
            self.give(self.answers[observation.step])
        return future

    def reset(self) -> None:
        self.resets += 1

    def give(self, answer: object, **changes: object) -> None:
        """To the newest question: an error, or the number that action 0 has in every dimension but the gripper."""
        future = self.asked[-1][1]
        if isinstance(answer, Exception):
            future.set_exception(answer)
            return
        actions = np.repeat(float(answer) + np.arange(HORIZON, dtype=np.float32)[:, None], 7, axis=1)
        actions[:, 6] = 0.0
        future.set_result({"actions": actions, "fault": None, **changes})


def stream_of(client: HandClient, **options: object) -> ActionStream:
    return ActionStream(client, StreamOptions(**{"deadline_s": 0.02, **options}))


def run(stream: ActionStream, steps: range) -> list[float]:
    return [float(stream.step(example(step)).action[0]) for step in steps]


def test_the_next_chunk_is_asked_for_while_the_present_one_is_executed() -> None:
    client = HandClient({0: 0})
    stream = stream_of(client)
    assert run(stream, range(4)) == [0, 1, 2, 3]
    assert [step for step, _ in client.asked] == [0]
    assert run(stream, range(4, 6)) == [4, 5]  # the tail, while the answer to step 4 is under way
    assert [step for step, _ in client.asked] == [0, 4]
    client.give(4)
    assert run(stream, range(6, 10)) == [6, 7, 8, 9]  # what has elapsed of it is left out


def test_an_answer_in_time_is_blended_into_what_is_left() -> None:
    client = HandClient({0: 0})
    stream = stream_of(client)
    run(stream, range(5))
    client.give(104)  # for steps 4 to 9: 100 more than the old chunk said
    value = run(stream, range(5, 6))[0]
    assert 5 < value < 105
    assert run(stream, range(6, 8)) == [106, 107]


def test_where_nothing_comes_the_arm_is_held_and_nothing_is_skipped() -> None:
    client = HandClient({0: 0})
    stream = stream_of(client)
    run(stream, range(6))
    for step in (6, 7):
        command = stream.step(example(step))
        assert command.held
        assert isinstance(command.error, LateError)
        assert command.action.tolist() == [0] * 7  # the gripper stays closed
    client.give(4)  # asked for before action 4; 5 is the last one executed
    command = stream.step(example(8))
    assert (command.held, command.action[0], command.reply["fault"]) == (False, 6, None)


def test_before_the_first_action_the_gripper_is_held_open() -> None:
    command = stream_of(HandClient()).step(example())
    assert (command.held, command.action.tolist()) == (True, [0] * 6 + [1])


def test_silence_is_an_error_where_that_is_wanted() -> None:
    with pytest.raises(LateError, match="No action"):
        stream_of(HandClient(), on_silence="raise").step(example())


def test_a_failure_holds_only_once_the_chunk_is_used_up_and_then_asks_again() -> None:
    client = HandClient({0: 0, 4: ServerError("down"), 5: ServerError("down"), 6: ServerError("still down"), 7: 50})
    stream = stream_of(client)
    assert run(stream, range(6)) == [0, 1, 2, 3, 4, 5]
    held = [stream.step(example(step)) for step in (6, 7)]
    assert [c.held for c in held] == [True, True]
    assert str(held[1].error) == "still down"
    assert run(stream, range(8, 10)) == [50, 51]


def test_an_emergency_stop_holds_at_once_whatever_is_left_of_the_chunk() -> None:
    client = HandClient({0: 0, 4: StoppedError("stopped by the operator"), 5: StoppedError("stopped"), 6: 70})
    stream = stream_of(client)
    run(stream, range(5))
    commands = [stream.step(example(step)) for step in (5, 6, 7)]
    assert [c.held for c in commands] == [True, True, False]
    assert commands[0].action.tolist() == [0] * 7
    assert commands[2].action[0] == 70


def test_a_hold_that_the_server_answers_is_a_hold() -> None:
    client = HandClient()
    stream = stream_of(client, deadline_s=5)
    fault = {"kind": "stopped", "id": "1", "message": "stopped by the operator"}
    client.submit = lambda observation, deadline_s: _with_fault(fault)
    command = stream.step(example())
    assert command.held
    assert isinstance(command.error, StoppedError)


def _with_fault(fault: dict[str, str]) -> Future[Reply]:
    future: Future[Reply] = Future()
    future.set_result({"actions": np.zeros((HORIZON, 7), np.float32), "fault": fault})
    return future


def test_an_observation_that_the_server_refuses_is_a_mistake_to_be_told() -> None:
    with pytest.raises(WireError, match="camera"):
        stream_of(HandClient({0: WireError("no such camera")})).step(example())


def test_a_new_episode_starts_with_nothing_of_the_old_one() -> None:
    client = HandClient({0: 0})
    stream = stream_of(client)
    run(stream, range(5))
    stream.reset()
    assert client.asked[-1][1].cancelled()
    client.answers = {0: 30}
    assert run(stream, range(2)) == [30, 31]
    assert client.resets == 1


def test_a_chunk_that_is_executed_whole_is_asked_for_one_step_early() -> None:
    client = HandClient({0: 0})
    client.spec = PolicySpec("ee_delta_pose+gripper", 5.0, ("main",), "reasoning", horizon=6, execute_steps=6)
    run(stream_of(client), range(6))
    assert [step for step, _ in client.asked] == [0, 5]


def test_impossible_options_are_refused() -> None:
    with pytest.raises(UsageError, match="deadline_s"):
        StreamOptions(deadline_s=0)


def test_over_a_socket_a_slow_server_never_makes_the_robot_wait_while_actions_are_left() -> None:
    def slow(connection: Connection) -> None:
        connection.greet()
        for seq in range(1, 1000):
            message = connection.receive()
            time.sleep(0.05)
            connection.answer(message, seq)

    with scripted(slow) as (url, _), PolicyClient(url) as client, ActionStream(client) as stream:
        waited, values = [], []
        for step in range(9):
            started = time.monotonic()
            command = stream.step(example(step))
            waited.append(time.monotonic() - started)
            values.append(float(command.action[0]))
            time.sleep(max(0.0, 0.1 - waited[-1]))
    assert values == sorted(values)
    assert not any(w > 0.04 for w in waited[1:]), waited
