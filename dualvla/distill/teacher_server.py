"""A checkpoint as a teacher for students elsewhere: `wire/teacher.py` over a WebSocket, one ask after the other.

`TeacherService` is bytes in, bytes out and knows no socket; `serve` is the thin layer around it. A page in a browser
cannot ask: handshakes with an Origin are refused, as are those for another Host.
"""

from __future__ import annotations

import hmac
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http import HTTPStatus
from typing import Any

import torch
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response
from websockets.sync.server import Server, ServerConnection
from websockets.sync.server import serve as listen

from dualvla.distill import topk
from dualvla.distill.facts import model_facts
from dualvla.errors import UsageError, WireError
from dualvla.io import manifest
from dualvla.models.checkpoint import load_model
from dualvla.wire import teacher as wire
from dualvla.wire.openpi import pack
from dualvla.wire.teacher import Ask

log = logging.getLogger(__name__)

KEY_VARIABLE = "DUALVLA_TEACHER_KEY"
LOOPBACK = ("127.0.0.1", "localhost", "::1")
_MIN_KEY_LENGTH = 16


class TeacherService:
    """Answers asks with one frozen model; one at a time, whoever asks."""

    def __init__(self, folder: str, device: str = "cpu"):
        """Raises: CheckpointError, DataError for a folder that is no finished checkpoint."""
        manifest.require(folder, "checkpoint")
        model, self._processor, self._config = load_model(folder)
        self._model = model.eval().requires_grad_(False).to(device)
        self._device, self._lock = device, threading.Lock()
        self.facts = model_facts(self._config)
        self._greeting = wire.greeting_to_bytes(
            manifest.input_digests({"": folder})[""], self.facts, self._processor.fingerprints(), topk.MAX_K
        )

    def greeting(self) -> bytes:
        return self._greeting

    def answer(self, frame: bytes) -> bytes:
        """Never raises for anything in `frame`."""
        try:
            ask = wire.ask_from_bytes(frame)
            if ask.kind == "tokenizer":
                return pack({"tokenizer": self._processor.tokenizer.to_str()})
            self._check(ask)
            return pack(self._words(ask) if ask.kind == "words" else self._actions(ask))
        except WireError as error:
            return wire.error_to_bytes("bad_ask", error.message)
        except RuntimeError as error:  # of PyTorch, such as memory that ran out
            log.exception("an ask failed")
            return wire.error_to_bytes("failed", str(error).splitlines()[0][:200])

    def _words(self, ask: Ask) -> dict[str, Any]:
        ids, p, tail = topk.top_k(self._forward(ask, "logits")["logits"], ask.top_k, ask.temperature)
        log_p = torch.cat([p, tail.unsqueeze(-1)], dim=-1).log()
        return {"ids": ids.cpu().numpy(), "log_p": log_p.cpu().numpy()}

    def _actions(self, ask: Ask) -> dict[str, Any]:
        return {"values": self._forward(ask, "action")[ask.kind].float().cpu().numpy()}

    def _forward(self, ask: Ask, mode: str) -> dict[str, torch.Tensor]:
        batch = {name: torch.from_numpy(array).to(self._device) for name, array in ask.batch.items()}
        with self._lock, torch.inference_mode():
            return self._model(batch, mode=mode)

    def _check(self, ask: Ask) -> None:
        """Whether the model can read it. Raises: WireError naming what does not fit."""
        facts, config, batch = self.facts, self._config, ask.batch
        if ask.kind not in ("words", self._model.head.target):
            raise WireError(f"This teacher has no {ask.kind}, but {self._model.head.target}.")
        size, chunk = facts["image_size"], (facts["horizon"], facts["action_size"])
        wanted: dict[str, tuple[int, ...]] = {
            "images": (len(facts["cameras"]), size, size, 3),
            "instruction_mask": batch["instruction_ids"].shape[1:],
            "text_mask": batch["text_ids"].shape[1:],
            "proprio": (facts["proprio_dim"],),
        }
        if ask.kind != "words":
            draws = batch["tau"].shape[1:]
            wanted |= {"actions": chunk, "action_mask": chunk[:1], "noise": (*draws, *chunk)}
        elif not ask.top_k <= min(topk.MAX_K, facts["vocab_size"] - 1):
            raise WireError(f"top_k = {ask.top_k} of {facts['vocab_size']} words; at most {topk.MAX_K}.")
        for name, shape in wanted.items():
            if batch[name].shape[1:] != shape:
                raise WireError(f"'{name}' is {batch[name].shape[1:]} a row, this teacher reads {shape}.")
        if batch["text_ids"].shape[1] > config.max_text_tokens:
            raise WireError(
                f"'text_ids' has {batch['text_ids'].shape[1]} tokens, this teacher reads {config.max_text_tokens}."
            )
        for name in ("instruction_ids", "text_ids"):
            if batch[name].size and not (batch[name].min() >= 0 and batch[name].max() < facts["vocab_size"]):
                raise WireError(f"'{name}' holds ids beyond the {facts['vocab_size']} of this teacher.")


@contextmanager
def serving(
    service: TeacherService, host: str = "127.0.0.1", port: int = 0, key: str | None = None
) -> Iterator[Server]:
    """A listening server; `serve_forever` answers until `shutdown`. port 0: any free one.

    key: what students must send as `Authorization: Bearer KEY`; without one only this machine may ask.
    Raises: UsageError for a host beyond this machine without a key, or a port that is taken.
    """
    if key is None and host not in LOOPBACK:
        raise UsageError(f"--host {host} lets others ask without a key.", f"put one into {KEY_VARIABLE}")
    if key is not None and len(key) < _MIN_KEY_LENGTH:
        raise UsageError(f"The teacher's key has {len(key)} characters.", f"take {_MIN_KEY_LENGTH} or more")
    try:
        server = listen(
            lambda connection: _converse(connection, service),
            host,
            port,
            max_size=wire.LIMITS.max_message_bytes,
            compression=None,
            origins=[None],
            process_request=_doorkeeper(host, key),
        )
    except OSError as error:
        raise UsageError(f"{host}:{port} cannot be listened on: {error}.", "take another --port") from error
    with server:
        yield server


def _converse(connection: ServerConnection, service: TeacherService) -> None:
    try:
        connection.send(service.greeting())
        for frame in connection:
            connection.send(
                service.answer(frame) if isinstance(frame, bytes) else wire.error_to_bytes("bad_ask", "Text is no ask.")
            )
    except ConnectionClosed:
        log.info("a student went away")


def _doorkeeper(host: str, key: str | None) -> Callable[[ServerConnection, Request], Response | None]:
    """Refuses wrong keys, and names of this host that a page could have made up (DNS rebinding)."""

    def check(connection: ServerConnection, request: Request) -> Response | None:
        named = request.headers.get("Host", "").rsplit(":", 1)[0].strip("[]")
        if host in LOOPBACK and named not in LOOPBACK:
            return connection.respond(HTTPStatus.FORBIDDEN, "this teacher is not known by that name\n")
        sent = request.headers.get("Authorization", "")
        if key is not None and not hmac.compare_digest(sent.encode(), f"Bearer {key}".encode()):
            return connection.respond(HTTPStatus.UNAUTHORIZED, "this teacher wants its key\n")
        return None

    return check
