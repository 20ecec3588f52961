"""The endpoint's routes, over whatever backend it is given. FastAPI; knows neither Ray nor what the policy is.

WebSocket /        openpi's protocol (dualvla.wire.messages): the server greets, then one reply per observation
POST /v1/infer     JSON (dualvla.wire.http_json); a session is named by the header X-Session-Id, or there is none
POST /v1/reset     forgets the session named by that header
GET  /v1/spec      what the policy expects and answers
GET  /readyz       200 once the policy answers, else 503
GET  /healthz      OK
"""

from __future__ import annotations

import contextlib
import logging
import time
import uuid
from collections import OrderedDict
from collections.abc import AsyncIterator
from typing import Any

import pydantic
from fastapi import FastAPI, Request, Response, WebSocket
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.websockets import WebSocketDisconnect

from dualvla.config import to_dict
from dualvla.errors import DualVLAError, WireError
from dualvla.wire import http_json, messages
from dualvla.wire.openpi import WireLimits, pack, unpack
from dualvla_serve.backend import Backend
from dualvla_serve.failures import STATUS, failure_of
from dualvla_serve.gate import Gate
from dualvla_serve.keys import KeyRing

log = logging.getLogger("dualvla.serve")

_TAKEN_OVER = 4001  # WebSocket close code: another connection goes on with this session
_MOST_HTTP_SESSIONS = 256


class InferRequest(pydantic.BaseModel):
    """An observation; images as base64 PNG or JPEG, or as nested lists [H][W][3] of 0..255."""

    model_config = pydantic.ConfigDict(extra="forbid")

    images: dict[str, str | list[list[list[int]]]]
    instruction: str
    proprio: list[float] | None = None
    ee_pose: list[float] | None = None
    step: int = 0
    id: str = ""


class InferReply(pydantic.BaseModel):
    """actions: [H][D] in the units of the policy's action space."""

    actions: list[list[float]]
    reasoning: str | None
    keyframe: bool
    reasoning_tokens: int
    id: str
    timing_ms: dict[str, float]


def create_app(backend: Backend, ring: KeyRing | None, limits: WireLimits) -> FastAPI:
    """The whole endpoint as one ASGI app, guarded."""
    app = FastAPI(title="DualVLA policy", docs_url=None, redoc_url=None)
    app.add_middleware(Gate, ring=ring)
    connections = Connections(backend, limits)
    http_sessions = HttpSessions(backend)

    @app.get("/healthz", response_class=PlainTextResponse)
    async def healthz() -> str:
        return "OK"

    @app.get("/readyz", response_class=PlainTextResponse)
    async def readyz() -> str:
        await backend.describe()
        return "OK"

    @app.get("/v1/spec")
    async def spec() -> dict[str, Any]:
        return to_dict(await backend.describe())

    @app.post("/v1/infer", response_model=InferReply, openapi_extra=_body_of(InferRequest))
    async def infer(request: Request) -> dict[str, Any]:
        started = time.perf_counter()
        body = _parse(await _read(request, limits))
        observation = http_json.observation_from_json(body.model_dump())
        async with http_sessions.of(request) as session:
            reply = await backend.infer(observation, session)
        return http_json.reply_to_json(reply, {"server_ms": _ms_since(started)})

    @app.post("/v1/reset", status_code=204, response_class=Response)
    async def reset(request: Request) -> None:
        await http_sessions.drop(request)

    @app.websocket("/")
    async def converse(websocket: WebSocket) -> None:
        await connections.serve(websocket)

    @app.exception_handler(DualVLAError)
    async def explain(request: Request, error: DualVLAError) -> JSONResponse:
        failure = failure_of(error, f"{request.method} {request.url.path}")
        return JSONResponse(failure.to_dict(), STATUS[failure.kind])

    return app


class Connections:
    """WebSocket connections, each a session of its own that starts clean and is forgotten when it closes.

    A client may name its session. A second connection of that name takes it over, clean, and the first is closed: a
    robot whose connection died unnoticed is never locked out by its own ghost.
    """

    def __init__(self, backend: Backend, limits: WireLimits):
        self._backend = backend
        self._limits = limits
        self._owners: dict[str, WebSocket] = {}

    async def serve(self, websocket: WebSocket) -> None:
        await websocket.accept()
        try:
            session = messages.session_name(websocket.headers.get(messages.SESSION_HEADER) or uuid.uuid4().hex)
            spec = await self._backend.describe()
        except DualVLAError as error:
            await websocket.send_text(failure_of(error, "greeting").to_json())
            await websocket.close()
            return
        await self._take(session, websocket)
        try:
            await websocket.send_bytes(pack(messages.metadata(spec)))
            await self._converse(websocket, session)
        except WebSocketDisconnect:
            log.debug("the client of session %s left in the middle of a reply", session)
        finally:
            await self._release(session, websocket)

    async def _converse(self, websocket: WebSocket, session: str) -> None:
        previous_ms: float | None = None
        while (event := await websocket.receive())["type"] != "websocket.disconnect":
            started = time.perf_counter()
            try:
                frame = event.get("bytes")
                if frame is None:
                    raise WireError("Text is refused.", "send one binary msgpack message per observation")
                answer = await self._answer(unpack(frame, self._limits), session, previous_ms)
            except DualVLAError as error:
                await websocket.send_text(failure_of(error, f"session {session}").to_json())
            else:
                await websocket.send_bytes(pack(answer))
            previous_ms = _ms_since(started)

    async def _answer(self, message: Any, session: str, previous_ms: float | None) -> dict[str, Any]:
        if messages.is_reset(message):
            await self._backend.reset(session)
            return dict(messages.RESET)
        observation = messages.observation_from_wire(message)
        started = time.perf_counter()
        reply = await self._backend.infer(observation, session)
        timing = {"infer_ms": _ms_since(started)}
        if previous_ms is not None:
            timing["prev_total_ms"] = previous_ms
        return messages.reply_to_wire(reply, timing)

    async def _take(self, session: str, websocket: WebSocket) -> None:
        previous = self._owners.get(session)
        self._owners[session] = websocket
        if previous is not None:
            await self._backend.reset(session)
            await previous.close(_TAKEN_OVER)

    async def _release(self, session: str, websocket: WebSocket) -> None:
        if self._owners.get(session) is websocket:
            del self._owners[session]
            await self._backend.reset(session)


class HttpSessions:
    """Sessions of HTTP requests, named by a header; the least recently used are forgotten beyond a fixed number."""

    def __init__(self, backend: Backend):
        self._backend = backend
        self._recent: OrderedDict[str, None] = OrderedDict()

    @contextlib.asynccontextmanager
    async def of(self, request: Request) -> AsyncIterator[str]:
        """The request's session; a nameless one lasts for this request only."""
        name = request.headers.get(messages.SESSION_HEADER)
        if name is None:
            session = uuid.uuid4().hex
            try:
                yield session
            finally:
                await self._backend.reset(session)
            return
        session = messages.session_name(name)
        self._recent[session] = None
        self._recent.move_to_end(session)
        while len(self._recent) > _MOST_HTTP_SESSIONS:
            oldest, _ = self._recent.popitem(last=False)
            await self._backend.reset(oldest)
        yield session

    async def drop(self, request: Request) -> None:
        session = messages.session_name(request.headers.get(messages.SESSION_HEADER, ""))
        self._recent.pop(session, None)
        await self._backend.reset(session)


async def _read(request: Request, limits: WireLimits) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limits.max_message_bytes:
            raise WireError(f"A body of more than {limits.max_message_bytes} bytes is refused.")
    return bytes(body)


def _parse(body: bytes) -> InferRequest:
    try:
        return InferRequest.model_validate_json(body)
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "body"
        raise WireError(f"'{where[:80]}': {first['msg']}.", "GET /openapi.json describes the body") from None


def _body_of(model: type[pydantic.BaseModel]) -> dict[str, Any]:
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": model.model_json_schema()}}}}


def _ms_since(started: float) -> float:
    return (time.perf_counter() - started) * 1000
