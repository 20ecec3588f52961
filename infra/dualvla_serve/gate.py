"""The door of the endpoint, for HTTP requests and WebSocket upgrades alike: nothing behind it runs for a stranger.

An ASGI middleware. With keys, every route but the open ones needs one, of the scope that the route asks for. Without,
the endpoint is for this machine's own programs only: another `Host` (DNS rebinding) is turned away. A web page (an
`Origin` header) gets in only if it came from this very endpoint. Knows keys.py and which scope a path needs.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from dualvla_serve.config import LOCAL_HOSTS
from dualvla_serve.failures import new_failure
from dualvla_serve.keys import Identity, presented_key

_OPEN_PATHS = ("/healthz", "/health")
_EITHER_PATHS = ("/v1/admin/stop", "/v1/models")  # whoever may use a robot may stop it; the status page names models
_ADMIN_PATHS = ("/v1/admin", "/metrics", "/status")
_POLICY_VIOLATION = 1008  # WebSocket close code
_LOCAL = Identity("", frozenset(("infer", "admin")))
_IDENTITY = "dualvla.identity"

Identify = Callable[[str], Identity | None]


def identity_of(scope: MutableMapping[str, Any]) -> Identity:
    """Who asks, on every request that the gate let through."""
    return scope[_IDENTITY]


def required_scopes(method: str, path: str) -> tuple[str, ...]:
    """Any of these opens the path. To clear a stop takes an admin."""
    if path in _EITHER_PATHS:
        return ("infer", "admin")
    if any(path == admin or path.startswith(admin + "/") for admin in _ADMIN_PATHS):
        return ("admin",)
    return ("infer",)


class Gate:
    """identify: the identity of a key that is known and not expired; None where there are no keys at all."""

    def __init__(self, app: ASGIApp, identify: Identify | None, hosts: tuple[str, ...] = ()):
        self._app = app
        self._identify = identify
        self._hosts = hosts or LOCAL_HOSTS

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        refused = self._refuses(scope, headers)
        if refused is None:
            await self._app(scope, receive, send)
            return
        kind, message, status = refused
        failure = new_failure(kind, message)
        answer = {"WWW-Authenticate": "Basic" if scope["path"] == "/status" else "Bearer"} if status == 401 else None
        if scope["type"] == "http" or "websocket.http.response" in scope.get("extensions", {}):
            response = JSONResponse(failure.to_dict(), status, answer)
            await response(scope, receive, send)  # Starlette words it as a denial of the upgrade where it is one
        else:
            await send({"type": "websocket.close", "code": _POLICY_VIOLATION})

    def _refuses(self, scope: Scope, headers: Headers) -> tuple[str, str, int] | None:
        """(kind, message, status) of a refusal; else puts the identity into the scope."""
        path = scope["path"]
        if scope["type"] == "http" and path in _OPEN_PATHS:
            scope[_IDENTITY] = Identity("", frozenset())
            return None
        if _foreign_page(headers):
            return "forbidden", "pages of other sites may not ask", 403
        local = self._identify is None
        if (local or path == "/status") and host_name(headers.get("host", "")) not in self._hosts:
            return "forbidden", "this endpoint goes by another name", 403
        if self._identify is None:
            scope[_IDENTITY] = _LOCAL
            return None
        identity = self._identify(presented_key(headers.get("authorization", "")))
        allowed = required_scopes(scope.get("method", ""), path)
        if identity is None or not identity.scopes.intersection(allowed):
            return "unauthorized", "a valid key is needed", 401
        scope[_IDENTITY] = identity
        return None


def _foreign_page(headers: Headers) -> bool:
    """Browsers name the site that a request comes from; programs do not."""
    origin = headers.get("origin")
    if origin is not None and origin.partition("://")[2] != headers.get("host"):
        return True
    return headers.get("sec-fetch-site") in ("cross-site", "same-site")


def host_name(host: str) -> str:
    """Without the port: `[::1]:8000` -> `::1`."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0].lower()
