"""Teachers as Ray actors: frozen models in processes, or on GPUs, of their own, which all training workers ask.

A model that is asked is a `Forward` as one in process is, so nothing else of distillation knows the difference. Whole
answers cross processes (of a reasoning teacher, every logit): through shared memory on one machine, over the network
between two, where a teacher cache or a served teacher sends less.
"""

from __future__ import annotations

import itertools
import logging
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import ray
import torch
from ray.exceptions import RayActorError
from torch import Tensor

from dualvla.errors import PlatformError, ServerError
from dualvla.models.checkpoint import load_model
from dualvla.wire.teacher import FIELDS
from dualvla_pipelines.ray_parts import Workers
from dualvla_pipelines.recipes import Domain

log = logging.getLogger(__name__)

_RESTARTS = 2  # of an actor that died; what it was asked is asked again
_READS = {"action": sorted({*FIELDS["velocity"], *FIELDS["bins"]}), "logits": sorted(FIELDS["words"])}


class TeacherActorImpl:
    """One frozen model."""

    def __init__(self, folder: str, device: str, bf16: bool):
        model, _, _ = load_model(folder)
        self._model = model.eval().requires_grad_(False).to(device)
        self._device, self._bf16 = device, bf16

    def pid(self) -> int:
        return os.getpid()

    def answer(self, mode: str, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """What `VLA.forward` gives in this mode, float32."""
        batch = {name: torch.from_numpy(array.copy()).to(self._device) for name, array in arrays.items()}
        with torch.inference_mode(), torch.autocast(self._device, torch.bfloat16, enabled=self._bf16):
            found = self._model(batch, mode=mode)
        return {name: tensor.float().cpu().numpy() for name, tensor in found.items()}


@contextmanager
def teaching(
    folders: Mapping[Domain, str], each: int, *, bf16: bool, cpus: float, gpus: float
) -> Iterator[dict[Domain, list[str]]]:
    """Starts `each` actors for every teacher, gives their names, and ends them. folders: domain -> checkpoint.

    cpus, gpus: that are free for them. Raises: PlatformError if one cannot start.
    """
    total = each * len(folders)
    _, shares = Workers(total).plan(total, cpus, gpus, learned=True)
    actor = ray.remote(max_restarts=_RESTARTS, max_task_retries=_RESTARTS, **shares)(TeacherActorImpl)
    device, run = "cuda" if shares["num_gpus"] else "cpu", secrets.token_hex(4)
    names = {domain: [f"dualvla-teacher-{run}-{domain}-{i}" for i in range(each)] for domain in folders}
    started = [
        actor.options(name=name).remote(folder, device, bf16)
        for domain, folder in folders.items()
        for name in names[domain]
    ]
    try:
        ray.get([handle.__ray_ready__.remote() for handle in started])
    except RayActorError as error:
        raise PlatformError(f"A teacher could not be started: {error}", "take fewer --teacher-actors") from error
    try:
        yield names
    finally:
        if ray.is_initialized():  # not after Ctrl-C
            for handle in started:
                ray.kill(handle)


class ActorForward:
    """A model behind several actors, as a `Forward`: each ask goes to the next one, past those that are gone."""

    def __init__(self, names: Sequence[str], first: int = 0):
        """first: whom to ask first, so that workers do not all ask the same."""
        self._handles = [ray.get_actor(name) for name in names]
        self._turn = itertools.count(first)

    def __call__(self, batch: dict[str, Tensor], mode: str) -> dict[str, Tensor]:
        """Raises: ServerError if no actor is left."""
        device = batch["robot"].device
        arrays = {name: batch[name].cpu().numpy() for name in _READS[mode]}
        while self._handles:
            handle = self._handles[next(self._turn) % len(self._handles)]
            try:
                found = ray.get(handle.answer.remote(mode, arrays))
            except RayActorError as error:
                self._handles.remove(handle)
                log.warning("a teacher is gone, %d are left: %s", len(self._handles), error)
            else:
                return {name: torch.from_numpy(array.copy()).to(device) for name, array in found.items()}
        raise ServerError(
            f"All actors of a teacher died, each more than {_RESTARTS} times.",
            "look at their memory; the same command goes on from the last resume state",
        )
