"""A page of one's own on this machine: one HTML file, and plain functions that it calls by name.

Nobody else can use it: it listens on this machine only, its address holds a secret, and pages of other sites are
refused by Host and Origin. Knows nothing of what the page is for.
"""

from __future__ import annotations

import hmac
import json
import logging
import secrets
import socket
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, cast
from urllib.parse import parse_qsl, urlsplit

from dualvla.errors import DualVLAError, PlatformError

log = logging.getLogger(__name__)

HOST = "127.0.0.1"
_NONCE = b"{{nonce}}"
_CONTENT_SECURITY = (
    "default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; img-src 'self' data:; "
    "media-src 'self' blob:; connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
)
_IDLE_CONNECTION_S = 30.0


@dataclass(frozen=True)
class Content:
    """What a route answers when it is not JSON: an image, a film."""

    body: bytes
    content_type: str


Route = Callable[[Mapping[str, Any]], Any]


@dataclass(frozen=True)
class Page:
    """html: the page; its `<script>` and `<style>` carry `nonce="{{nonce}}"`, and its requests are relative addresses.

    get: name -> function of the query (text values); the page fetches `api/NAME?key=value`. post: name -> function of
    the JSON object sent. Each returns something JSON-ready, or a `Content`. They are called one at a time. A
    DualVLAError reaches the page as {"error": ..., "fix": ...} with status 400; of any other error it learns nothing.
    """

    html: bytes
    get: Mapping[str, Route]
    post: Mapping[str, Route]
    max_body_bytes: int = 1 << 20


class PageServer:
    """Serves `page` on this machine until stopped. Use `serve` in a command, or as a context manager beside other work.

    port: 0 takes a free one. Raises: PlatformError if the port is taken.
    """

    def __init__(self, page: Page, port: int = 0):
        self._token = secrets.token_urlsafe(24)
        try:
            self._server = _Server(page, self._token, port)
        except OSError as error:
            raise PlatformError(f"Port {port} cannot be used: {error.strerror}.", "pass another --port") from error
        self._thread: threading.Thread | None = None

    @property
    def url(self) -> str:
        """The whole address, secret included: for the person who started the command."""
        return f"http://{HOST}:{self._server.server_port}/{self._token}/"

    def serve(self) -> None:
        """Until Ctrl-C, which is how a page is put away: no error."""
        try:
            self._server.serve_forever(poll_interval=0.2)
        except KeyboardInterrupt:
            log.info("stopped")
        finally:
            self._server.server_close()

    def __enter__(self) -> PageServer:
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        if self._thread is not None:
            self._thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, page: Page, token: str, port: int):
        super().__init__((HOST, port), _Handler)
        self.page, self.token = page, token
        self.one_at_a_time = threading.Lock()

    def handle_error(self, request: socket.socket | tuple[bytes, socket.socket], client_address: Any) -> None:
        log.exception("a request failed")  # the page sees a closed connection


class _RefusedError(DualVLAError):
    """An answer that is not a route's: `status` and a word for the page."""

    def __init__(self, status: HTTPStatus, message: str):
        super().__init__(message)
        self.status = status


class _Handler(BaseHTTPRequestHandler):
    timeout = _IDLE_CONNECTION_S  # HTTP/1.0: a connection serves one request, so that stopping leaves none behind

    def do_GET(self) -> None:
        self._respond(self._get)

    def do_POST(self) -> None:
        self._respond(self._post)

    def _respond(self, answer: Callable[[], Content]) -> None:
        try:
            self._answer(HTTPStatus.OK, answer())
        except _RefusedError as error:
            self._answer(error.status, _as_json({"error": error.message}))
        except DualVLAError as error:
            self._answer(HTTPStatus.BAD_REQUEST, _as_json({"error": error.message, "fix": error.fix}))

    def _get(self) -> Content:
        self._check_sender()
        path, query = self._path()
        if not path:
            self._nonce = secrets.token_urlsafe(16)
            return Content(self._page.html.replace(_NONCE, self._nonce.encode()), "text/html; charset=utf-8")
        return self._call(self._page.get, path, dict(parse_qsl(query)))

    def _post(self) -> Content:
        self._check_sender()
        path, _ = self._path()
        if self.headers.get("Origin") is None:
            raise _RefusedError(HTTPStatus.FORBIDDEN, "no Origin")
        if self.headers.get_content_type() != "application/json":
            raise _RefusedError(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "send application/json")
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or "Transfer-Encoding" in self.headers:
            raise _RefusedError(HTTPStatus.LENGTH_REQUIRED, "no Content-Length")
        if len(length) > 12 or int(length) > self._page.max_body_bytes:
            raise _RefusedError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"more than {self._page.max_body_bytes} bytes")
        try:
            payload = json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or nested without end
            raise _RefusedError(HTTPStatus.BAD_REQUEST, "not JSON") from error
        if not isinstance(payload, dict):
            raise _RefusedError(HTTPStatus.BAD_REQUEST, "not a JSON object")
        return self._call(self._page.post, path, payload)

    def _check_sender(self) -> None:
        """A page of another site may make the browser call us: by a name that resolves here, or from its own origin."""
        hosts = {f"{name}:{self._local.server_port}" for name in (HOST, "localhost")}
        if self.headers.get("Host") not in hosts:
            raise _RefusedError(HTTPStatus.FORBIDDEN, "wrong Host")
        origin = self.headers.get("Origin")
        if origin is not None and origin != f"http://{self.headers['Host']}":
            raise _RefusedError(HTTPStatus.FORBIDDEN, "wrong Origin")

    def _path(self) -> tuple[str, str]:
        """(what follows the secret, query). Without the secret nothing is here."""
        parts = urlsplit(self.path)
        token, _, rest = parts.path.removeprefix("/").partition("/")
        if not hmac.compare_digest(token.encode(errors="replace"), self._local.token.encode()):
            raise _RefusedError(HTTPStatus.NOT_FOUND, "not found")
        return rest, parts.query

    def _call(self, routes: Mapping[str, Route], path: str, argument: Mapping[str, Any]) -> Content:
        route = routes.get(path.removeprefix("api/")) if path.startswith("api/") else None
        if route is None:
            raise _RefusedError(HTTPStatus.NOT_FOUND, "not found")
        with self._local.one_at_a_time:
            result = route(argument)
        return result if isinstance(result, Content) else _as_json(result)

    def _answer(self, status: HTTPStatus, content: Content) -> None:
        log.debug("%s %d", self.command, status)  # never the address: it holds the secret
        self.send_response_only(status)
        for name, value in (
            ("Content-Type", content.content_type),
            ("Content-Length", str(len(content.body))),
            ("Content-Security-Policy", _CONTENT_SECURITY.format(nonce=self._nonce)),
            ("X-Content-Type-Options", "nosniff"),
            ("Cross-Origin-Resource-Policy", "same-origin"),
            ("Referrer-Policy", "no-referrer"),
            ("Cache-Control", "no-store"),
        ):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content.body)

    def log_message(self, format: str, *args: Any) -> None:
        log.debug("a malformed request")  # the library's own words would repeat the address

    @property
    def _local(self) -> _Server:
        return cast(_Server, self.server)

    @property
    def _page(self) -> Page:
        return self._local.page

    _nonce = "none"  # allows nothing: only the page itself gets one


def _as_json(value: Any) -> Content:
    return Content(json.dumps(value).encode(), "application/json")
