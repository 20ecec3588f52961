"""The door of the endpoint, for HTTP requests and WebSocket upgrades alike: nothing behind it runs for a stranger.

An ASGI middleware; knows keys.py and no route but /healthz. With a key ring, everything else needs a key of scope
`infer`. Without one the endpoint is for this machine's own programs only: another `Host` (DNS rebinding) and web pages
(an `Origin` header) are turned away.
"""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from dualvla_serve.failures import new_failure
from dualvla_serve.keys import KeyRing, presented_key

LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")
_OPEN_PATH = "/healthz"
_POLICY_VIOLATION = 1008  # WebSocket close code


class Gate:
    def __init__(self, app: ASGIApp, ring: KeyRing | None):
        self._app = app
        self._ring = ring

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket") or self._admits(scope):
            await self._app(scope, receive, send)
            return
        kind, status = ("forbidden", 403) if self._ring is None else ("unauthorized", 401)
        failure = new_failure(kind, "a valid key is needed" if self._ring else "only programs on this machine may ask")
        if scope["type"] == "http" or "websocket.http.response" in scope.get("extensions", {}):
            response = JSONResponse(failure.to_dict(), status, {"WWW-Authenticate": "Bearer"} if self._ring else None)
            await response(scope, receive, send)  # Starlette words it as a denial of the upgrade where it is one
        else:
            await send({"type": "websocket.close", "code": _POLICY_VIOLATION})

    def _admits(self, scope: Scope) -> bool:
        if scope["type"] == "http" and scope["path"] == _OPEN_PATH:
            return True
        headers = Headers(scope=scope)
        if self._ring is None:
            return _host_name(headers.get("host", "")) in LOCAL_HOSTS and "origin" not in headers
        return self._ring.allows(presented_key(headers.get("authorization", "")), "infer")


def _host_name(host: str) -> str:
    """Without the port: `[::1]:8000` -> `::1`."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0].lower()
