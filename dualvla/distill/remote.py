"""A teacher behind a WebSocket, as a `Teacher`: what `teacher_server.py` serves. Knows the wire and no weights."""

from __future__ import annotations

import logging
import os
import time
from contextlib import ExitStack
from typing import Any, Literal
from urllib.parse import urlsplit

import numpy as np
import torch
from torch import Tensor
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus, InvalidURI
from websockets.sync.client import ClientConnection, connect

from dualvla.distill.alignment import ids_for_student, ids_for_teacher
from dualvla.distill.facts import align
from dualvla.distill.teacher_server import KEY_VARIABLE, LOOPBACK
from dualvla.distill.topk import Known
from dualvla.errors import CheckpointError, ServerError, UsageError
from dualvla.models.processing import Processor
from dualvla.wire import teacher as wire
from dualvla.wire.teacher import Ask

log = logging.getLogger(__name__)

_ROWS_AT_ONCE = 32
_WAITS_S = (0.5, 2.0)  # before asking again where the teacher went away


class RemoteTeacher:
    """One teacher of one domain. Asks again, on a new connection, where the old one broke; never about what it refused.

    student: whose targets these are. top_k, temperature: of a reasoning teacher's words.
    """

    def __init__(
        self,
        url: str,
        domain: Literal["robot", "multimodal"],
        student: Processor,
        *,
        temperature: float = 1.0,
        top_k: int = 50,
        key: str | None = None,
        timeout_s: float = 120.0,
    ):
        """Connects. key: default the variable DUALVLA_TEACHER_KEY.

        Raises: UsageError for what is no URL, CheckpointError for a teacher that cannot teach this student (with the
        reason), ServerError, WireError.
        """
        if not url.startswith(wire.SCHEMES) or not urlsplit(url).hostname:
            raise UsageError(f"'{url}' is no teacher's address.", "pass ws://HOST:PORT")
        self.url, self._domain, self._timeout_s = url, domain, timeout_s
        self._key = key or os.environ.get(KEY_VARIABLE)
        if self._key and url.startswith("ws://") and urlsplit(url).hostname not in LOOPBACK:
            log.warning("the key travels to %s unencrypted: use wss:// outside a trusted network", url)
        self._top_k, self._temperature = top_k, temperature
        self._vocab_size = student.config.backbone_config["text_config"]["vocab_size"]
        self._target = "bins" if student.config.head.kind == "token" else "velocity"
        self._connection: ClientConnection | None = None
        self._open = ExitStack()
        self.checkpoint = ""
        greeting = self._retrying(self._greeted)
        self._mapping = align(
            student,
            greeting["model"],
            greeting["fingerprints"],
            self._tokenizer,
            f"The teacher at {url} cannot teach here",
        )

    def targets(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """velocity [B, K, H, D] or bins [B, H, D, bins] of robot rows, else zero; `topk.Known.targets` of questions.

        Raises: ServerError, WireError.
        """
        robot = batch["robot"]
        rows = (robot if self._domain == "robot" else ~robot).nonzero().squeeze(1)
        if not len(rows):
            return {}
        parts = [self._ask_rows(batch, part) for part in rows.split(_ROWS_AT_ONCE)]
        device = robot.device
        found = {}
        for name in parts[0]:
            values = torch.cat([part[name] for part in parts])
            whole = torch.zeros((len(robot), *values.shape[1:]), dtype=values.dtype)
            if name == "top_ids":
                whole[:] = torch.arange(self._top_k)  # rows that are not asked about: any k different tokens
            found[name] = whole.index_copy_(0, rows.cpu(), values).to(device)
        return found

    def close(self) -> None:
        self._open.close()
        self._connection = None

    def _ask_rows(self, batch: dict[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
        kind = self._target if self._domain == "robot" else "words"
        part = ids_for_teacher({name: batch[name][rows] for name in wire.FIELDS[kind]}, self._mapping)
        if kind != "words":  # pi(a | o, i): the text is left out
            part |= {name: part[name][:, :0] for name in ("text_ids", "text_mask")}
        arrays = {name: tensor.cpu().numpy() for name, tensor in part.items()}
        answer = self._ask(Ask(kind, arrays, self._top_k, self._temperature))
        if kind != "words":
            chunk = arrays["actions"].shape[1:]
            shape = (len(rows), arrays["tau"].shape[1], *chunk)
            if kind == "bins":
                bins = answer["values"].shape[-1] if isinstance(answer.get("values"), np.ndarray) else 0
                shape = (len(rows), *chunk, bins)
            return {kind: torch.from_numpy(wire.array(answer, "values", "float32", shape))}
        places = (len(rows), arrays["text_ids"].shape[1] + 1)
        ids = wire.array(answer, "ids", "int64", (*places, self._top_k))
        log_p = wire.array(answer, "log_p", "float32", (*places, self._top_k + 1))
        if not (ids.min() >= 0 and ids.max() < self._vocab_size and log_p.max() <= 1e-3):
            raise ServerError(f"The teacher at {self.url} gave no distribution over words.", "check what serves there")
        no_draws = torch.zeros((*places, 0))
        known = Known(
            torch.from_numpy(ids_for_student(ids, self._mapping)),
            torch.from_numpy(np.exp(log_p)),
            no_draws.long(),
            no_draws,
        )
        return known.targets()

    def _tokenizer(self) -> str:
        found = self._ask(Ask("tokenizer", {})).get("tokenizer")
        if not isinstance(found, str):
            raise ServerError(f"The teacher at {self.url} did not send its tokenizer.", "check what serves there")
        return found

    def _ask(self, ask: Ask) -> dict[str, Any]:
        frame = wire.ask_to_bytes(ask)
        return self._retrying(lambda: self._exchange(frame))

    def _exchange(self, frame: bytes) -> dict[str, Any]:
        if self._connection is None:
            self._greeted()
        assert self._connection is not None
        self._connection.send(frame)
        return wire.answer_from_bytes(self._connection.recv(timeout=self._timeout_s))

    def _greeted(self) -> dict[str, Any]:
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        opening = connect(
            self.url, additional_headers=headers, max_size=wire.LIMITS.max_message_bytes, compression=None,
            open_timeout=self._timeout_s,
        )  # fmt: skip
        self._connection = self._open.enter_context(opening)
        greeting = wire.greeting_from_bytes(self._connection.recv(timeout=self._timeout_s))
        if self.checkpoint and greeting["checkpoint"] != self.checkpoint:
            raise CheckpointError(f"At {self.url} there is another teacher than before.", "start the run anew")
        self.checkpoint = greeting["checkpoint"]
        return greeting

    def _retrying(self, call: Any) -> Any:
        for wait_s in (*_WAITS_S, None):
            try:
                return call()
            except InvalidURI as error:
                raise UsageError(f"'{self.url}' is no teacher's address: {error}.", "pass ws://HOST:PORT") from error
            except InvalidStatus as error:
                status = error.response.status_code
                raise ServerError(
                    f"The teacher at {self.url} refuses this student (HTTP {status}).", f"set {KEY_VARIABLE} to its key"
                ) from error
            except (OSError, TimeoutError, ConnectionClosed, InvalidHandshake) as error:
                self.close()
                if wait_s is None:
                    raise ServerError(
                        f"The teacher at {self.url} cannot be reached: {error}.", "start it: `dualvla teach --serve C`"
                    ) from error
                log.warning("the teacher at %s went away (%s); asking again in %g s", self.url, error, wait_s)
                time.sleep(wait_s)
        raise AssertionError("unreachable")
