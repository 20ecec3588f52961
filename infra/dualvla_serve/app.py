"""The endpoint's routes, over one replica. FastAPI; knows neither Ray nor what the policy is.

WebSocket /           openpi's protocol and ours: the server greets, then one reply per observation (openpi_socket.py)
WebSocket /vla-eval   the vla-eval harness's protocol (vla_eval_socket.py); its control plane is GET /health, /config
POST /v1/infer        JSON (dualvla.wire.http_json); a session is named by X-Session-Id or ?session=, or there is none
POST /v1/reset        forgets the session named so
GET  /v1/spec, /v1/models, /v1/listeners   what the policy expects; what is loaded; where replicas listen themselves
GET  /readyz, /healthz                     200 once the policy answers, else 503; the process lives
GET  /metrics         Prometheus text of all replicas
     /v1/admin/*      the emergency stop, live sessions, their last frames (scope admin)
GET  /status          the status page, where it is switched on
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict
from typing import Any
from urllib.parse import quote

import pydantic
from fastapi import FastAPI, Request, Response, WebSocket
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
from starlette.exceptions import HTTPException

from dualvla.config import to_dict
from dualvla.errors import DualVLAError, ServerError, WireError
from dualvla.wire import http_json, messages
from dualvla.wire.openpi import WireLimits
from dualvla.wire.options import SESSION, SessionOptions, options_from_query
from dualvla_serve import metrics
from dualvla_serve.failures import STATUS, failure_of, new_failure
from dualvla_serve.gate import Gate, Identify, identity_of
from dualvla_serve.openpi_socket import OpenpiSocket
from dualvla_serve.replica import Arrival, Replica
from dualvla_serve.vla_eval_socket import VlaEvalSocket

log = logging.getLogger("dualvla.serve")

REQUEST_ID = "X-Request-Id"
_PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src 'self' blob: data:; "
    "connect-src 'self'; frame-ancestors 'none'; form-action 'none'; base-uri 'none'"
)


class InferRequest(pydantic.BaseModel):
    """An observation; images as base64 PNG or JPEG, or as nested lists [H][W][3] of 0..255."""

    model_config = pydantic.ConfigDict(extra="forbid")

    images: dict[str, str | list[list[list[int]]]]
    instruction: str
    proprio: list[float] | None = None
    ee_pose: list[float] | None = None
    step: int = 0
    id: str = ""
    deadline_ms: float | None = None
    age_ms: float | None = None


class ModelVersion(pydantic.BaseModel):
    name: str
    version: str


class InferReply(pydantic.BaseModel):
    """actions: [H][D] in the units of the policy's action space. fault: why they are a hold, if one was asked for."""

    actions: list[list[float]]
    reasoning: str | None
    keyframe: bool
    reasoning_tokens: int
    id: str
    timing_ms: dict[str, float]
    session: str
    seq: int
    model: ModelVersion
    interventions: list[str]
    fault: dict[str, str] | None = None


class Reason(pydantic.BaseModel):
    reason: str = pydantic.Field(default="", max_length=500)


def create_app(replica: Replica, identify: Identify | None, page: Callable[[], str] | None = None) -> FastAPI:
    """The whole endpoint as one ASGI app, guarded. identify: see gate.py. page: the status page's HTML."""
    app = FastAPI(title="DualVLA policy", docs_url=None, redoc_url=None)
    app.add_middleware(Gate, identify=identify, hosts=replica.config.allowed_hosts)
    _add_serving(app, replica)
    _add_vla_eval(app, replica)
    _add_operations(app, replica)
    _add_admin(app, replica)
    if page is not None:

        @app.get("/status", response_class=HTMLResponse, include_in_schema=False)
        async def status() -> HTMLResponse:
            headers = {"Content-Security-Policy": _PAGE_POLICY, "Cache-Control": "no-store", "X-Frame-Options": "DENY"}
            return HTMLResponse(page(), headers=headers)

    _add_errors(app)
    return app


def _add_errors(app: FastAPI) -> None:
    """Whatever goes wrong, the answer is a kind, a message and an id."""

    @app.exception_handler(DualVLAError)
    async def explain(request: Request, error: DualVLAError) -> JSONResponse:
        failure = failure_of(error, f"{request.method} {request.url.path}")
        return JSONResponse(failure.to_dict(), STATUS[failure.kind])

    @app.exception_handler(RequestValidationError)
    async def misfit(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        return await explain(request, WireError(f"'{where[:80]}': {first['msg']}.", "see /openapi.json"))

    @app.exception_handler(HTTPException)
    async def no_route(request: Request, error: HTTPException) -> JSONResponse:
        failure = new_failure("not_found" if error.status_code == 404 else "bad_request", str(error.detail))
        return JSONResponse(failure.to_dict(), error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def broken(request: Request, error: Exception) -> JSONResponse:
        """A mistake of ours. Starlette raises it on, so the server's log has it."""
        failure = new_failure("failed", "the server failed on this request")
        log.error("error %s (%s)", failure.id, request.url.path, extra={"error_id": failure.id}, exc_info=error)
        return JSONResponse(failure.to_dict(), 500)


def _add_serving(app: FastAPI, replica: Replica) -> None:
    @app.post(
        "/v1/infer", response_model=InferReply, response_model_exclude_unset=True, openapi_extra=_body_of(InferRequest)
    )
    async def infer(request: Request, response: Response) -> dict[str, Any]:
        arrived = time.monotonic()
        principal = identity_of(request.scope).id
        replica.rate.admit(principal)
        response.headers[REQUEST_ID] = request.headers.get(REQUEST_ID, uuid.uuid4().hex)[:128]
        content = await _read(request, replica.config.wire)
        asked = await asyncio.to_thread(_request_of, content)  # pictures and long lists take milliseconds to decode
        decode_ms = (time.monotonic() - arrived) * 1000
        async with replica.http_session(_session_of(request), principal, _options_of(request, replica)) as session:
            reply = await replica.answer(session, asked, Arrival(arrived, decode_ms))
        return _as_json(reply)

    @app.post("/v1/reset", status_code=204, response_class=Response)
    async def reset(request: Request) -> None:
        name = _session_of(request)
        if name is None:
            raise WireError("No session is named.", f"send {messages.SESSION_HEADER}")
        await replica.forget(name, identity_of(request.scope).id)

    @app.websocket("/")
    async def converse(websocket: WebSocket) -> None:
        await OpenpiSocket(replica, websocket).serve()

    @app.get("/v1/spec")
    async def spec(model: str = "") -> dict[str, Any]:
        _require_ready(replica)
        return to_dict(replica.models.get(model).runner.spec)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"models": replica.model_lines()}

    @app.get("/v1/listeners")
    async def listeners() -> dict[str, Any]:
        found = (await replica.reports()).items()
        return {"listeners": [{"replica": r, "url": report.listener} for r, report in found if report.listener]}


def _add_vla_eval(app: FastAPI, replica: Replica) -> None:
    @app.websocket("/vla-eval")
    async def converse(websocket: WebSocket) -> None:
        await VlaEvalSocket(replica, websocket).serve()

    @app.get("/health")
    async def health() -> JSONResponse:
        return JSONResponse({"status": "ok" if replica.ready else "starting"}, 200 if replica.ready else 503)

    @app.get("/config")
    async def config() -> dict[str, Any]:
        """Read only: parameters in the query are not applied."""
        return {"applied": {}, "config": {"max_batch_size": replica.config.max_batch_size}}


def _add_operations(app: FastAPI, replica: Replica) -> None:
    @app.get("/healthz", response_class=PlainTextResponse)
    async def healthz() -> str:
        return "OK"

    @app.get("/readyz", response_class=PlainTextResponse)
    async def readyz() -> str:
        _require_ready(replica)
        return "OK"

    @app.get("/metrics")
    async def page() -> Response:
        pages = {name: report.metrics for name, report in (await replica.reports()).items()}
        return Response(metrics.merge(pages), media_type=metrics.CONTENT_TYPE)


def _add_admin(app: FastAPI, replica: Replica) -> None:
    @app.post("/v1/admin/stop")
    async def stop(request: Request, body: Reason | None = None) -> dict[str, Any]:
        reason = (body.reason if body else "") or "no reason was given"
        return asdict(await replica.stop(reason, identity_of(request.scope).id))

    @app.post("/v1/admin/clear")
    async def clear(request: Request, body: Reason | None = None) -> dict[str, Any]:
        return asdict(await replica.clear(body.reason if body else "", identity_of(request.scope).id))

    @app.get("/v1/admin/stop")
    async def stopped() -> dict[str, Any]:
        state = replica.stop_view.stopped()
        return asdict(state) if state is not None else {"stopped": False}

    @app.get("/v1/admin/sessions")
    async def sessions() -> dict[str, Any]:
        return {"sessions": [line for report in (await replica.reports()).values() for line in report.sessions]}

    @app.get("/v1/admin/latency")
    async def latency() -> dict[str, Any]:
        pages = {name: report.metrics for name, report in (await replica.reports()).items()}
        return {"stages": metrics.latency(pages)}

    @app.get("/v1/admin/sessions/{session}/frame")
    async def frame(session: str, camera: str = "") -> Response:
        found = await replica.link.frame(session)
        if found is None:
            return Response(status_code=404)
        seq, reasoning, pictures = found
        picture = pictures.get(camera) if camera else next(iter(pictures.values()), None)
        if picture is None:
            return Response(status_code=202)
        cameras = ",".join(quote(name) for name in pictures)
        headers = {
            "X-Reasoning": quote(reasoning),
            "X-Seq": str(seq),
            "X-Cameras": cameras,
            "Cache-Control": "no-store",
        }
        return Response(picture, media_type="image/png", headers=headers)


def _require_ready(replica: Replica) -> None:
    if not replica.ready:
        raise ServerError("The policy is not ready.")


def _session_of(request: Request) -> str | None:
    name = request.headers.get(messages.SESSION_HEADER) or request.query_params.get(SESSION)
    return None if name is None else messages.session_name(name)


def _options_of(request: Request, replica: Replica) -> SessionOptions:
    return options_from_query(dict(request.query_params), replica.config.session)


def _as_json(reply: dict[str, Any]) -> dict[str, Any]:
    """The message of the WebSocket as JSON: lists for arrays, one map of milliseconds."""
    known = messages.reply_from_wire(reply)
    extra = {name: reply[name] for name in ("session", "seq", "model", "interventions", "fault") if name in reply}
    return http_json.reply_to_json(known, {}, **extra)


async def _read(request: Request, limits: WireLimits) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limits.max_message_bytes:
            raise WireError(f"A body of more than {limits.max_message_bytes} bytes is refused.")
    return bytes(body)


def _request_of(content: bytes) -> messages.Request:
    return http_json.request_from_json(_parse(content).model_dump())


def _parse(body: bytes) -> InferRequest:
    try:
        return InferRequest.model_validate_json(body)
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "body"
        raise WireError(f"'{where[:80]}': {first['msg']}.", "GET /openapi.json describes the body") from None


def _body_of(model: type[pydantic.BaseModel]) -> dict[str, Any]:
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": model.model_json_schema()}}}}
