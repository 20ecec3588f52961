"""The process of an original simulator: a Ray actor with the interpreter that has it, on the machine of its user.

Knows Ray and the interpreter; nothing of tasks or conventions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray import cloudpickle
from ray._private.ray_constants import WORKER_PROCESS_SETUP_HOOK_ENV_VAR
from ray.exceptions import RayActorError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from dualvla.errors import PlatformError
from dualvla_eval.maniskill2 import original
from dualvla_eval.maniskill2.interpreter import Interpreter
from dualvla_eval.maniskill2.robots import OriginalRobot

cloudpickle.register_pickle_by_value(original)  # that interpreter has Ray and the simulator, and nothing of ours


class RemoteProcess:
    """`original.OriginalImpl` in its own process, which ends with this object.

    It reserves no CPU: whoever waits for it has one, and waits. Raises, from each call: PlatformError if nothing
    renders there, a file is missing or the process died.
    """

    def __init__(self, interpreter: Interpreter, package: str, robot: OriginalRobot, variables: Mapping[str, str]):
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        options: dict[str, Any] = {
            "num_cpus": 0,
            "scheduling_strategy": here,
            "runtime_env": {
                "py_executable": interpreter.python,
                "env_vars": {
                    **interpreter.variables,
                    **variables,
                    WORKER_PROCESS_SETUP_HOOK_ENV_VAR: "",  # a submitted job has one of ours, which is not there
                },
            },
        }
        make = ray.remote(original.OriginalImpl).options(**options)
        self._actor: Any = make.remote(package, robot.camera, list(robot.fingers))

    def reset(self, task: str, seed: int, episode_id: int) -> Mapping[str, Any]:
        return self._result(self._actor.reset.remote(task, seed, episode_id))

    def step(self, action: Sequence[float]) -> Mapping[str, Any]:
        return self._result(self._actor.step.remote(list(action)))

    def close(self) -> None:
        ray.kill(self._actor)

    def _result(self, reference: Any) -> Any:
        try:
            return reference.future().result()  # `ray.get` warns where an event loop waits; ours means to
        except RayTaskError as error:
            raise PlatformError(*_told(error)) from error
        except RayActorError as error:
            raise PlatformError(f"The process of the original simulator died: {error}", "see its log of Ray") from error


def _told(error: RayTaskError) -> tuple[str, str]:
    text = str(error.cause)
    if "vk::" in text or "rendering device" in text:
        return f"SAPIEN 2 renders on no device here: {text}.", "run `dualvla maniskill2 --remake` where cc is installed"
    if isinstance(error.cause, FileNotFoundError):
        return f"The original simulator lacks a file: {text}", "give its folder of data with --assets"
    return f"The original simulator failed: {text}", "see the log above"
