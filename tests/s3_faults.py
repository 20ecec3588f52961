"""A real S3 server (moto, in a process of its own) behind a proxy that fails as stores do."""

from __future__ import annotations

import contextlib
import http.client
import random
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

FAULTS = ("500", "503", "cut before", "cut after", "cut body")
_XML = "<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message></Error>"


@contextlib.contextmanager
def moto_server() -> Iterator[int]:
    """The port of a running server. Ends the process it started."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 60
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/moto-api/", timeout=5):
                break
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        yield port
    finally:
        process.kill()
        process.wait()


@dataclass(frozen=True)
class Request:
    """One request as the client saw it: fault is what it met, status what it was answered (0: nothing)."""

    method: str
    path: str
    signed: bool
    fault: str | None
    status: int


@dataclass
class FaultPlan:
    """Which requests fail: each with probability `rate`, drawn from `seed`; all of them if `down`."""

    seed: int = 0
    rate: float = 0.0
    down: bool = False
    requests: list[Request] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)

    def draw(self) -> str | None:
        with self.lock:
            if self.down:
                return "503"
            return self._random.choice(FAULTS) if self._random.random() < self.rate else None

    def take_away(self, seconds: float) -> None:
        """Every request fails for so long."""
        self.down = True
        time.sleep(seconds)
        self.down = False

    def faults(self) -> set[str]:
        return {request.fault for request in self.requests if request.fault}

    def puts(self, prefix: str) -> dict[str, int]:
        """Path -> how often the client was told that it had been written."""
        counts: dict[str, int] = {}
        for request in self.requests:
            if request.method == "PUT" and request.path.startswith(prefix) and request.status == 200:
                counts[request.path] = counts.get(request.path, 0) + 1
        return counts


@contextlib.contextmanager
def fault_proxy(upstream: int, plan: FaultPlan) -> Iterator[str]:
    """The URL of a proxy to the server on port `upstream`."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def _serve(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            fault = plan.draw()
            status = 0
            if fault in ("500", "503"):
                status = int(fault)
                code, message = ("InternalError", "We erred") if status == 500 else ("SlowDown", "Reduce your rate")
                self._answer(
                    status, {"Content-Type": "application/xml"}, _XML.format(code=code, message=message).encode()
                )
            elif fault == "cut before":
                self._cut()
            else:
                answer, headers, content = self._forward(body)
                if fault == "cut after":
                    self._cut()
                elif fault == "cut body" and len(content) > 1:
                    self._answer(answer, headers, content, sent=len(content) // 2)
                    self._cut()
                else:
                    fault, status = None, answer
                    self._answer(answer, headers, content)
            request = Request(
                self.command, urllib.parse.urlsplit(self.path).path, "Authorization" in self.headers, fault, status
            )
            with plan.lock:
                plan.requests.append(request)

        def _forward(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
            connection = http.client.HTTPConnection("127.0.0.1", upstream, timeout=60)
            headers = {k: v for k, v in self.headers.items() if k.lower() not in ("expect", "connection")}
            connection.request(self.command, self.path, body=body or None, headers=headers)
            answer = connection.getresponse()
            content = answer.read()
            connection.close()
            kept = {k: v for k, v in answer.getheaders() if k.lower() not in ("connection", "transfer-encoding")}
            return answer.status, kept, content

        def _answer(self, status: int, headers: dict[str, str], content: bytes, sent: int | None = None) -> None:
            self.send_response_only(status)
            lengths = {k: v for k, v in headers.items() if k.lower() == "content-length"}
            for name, value in headers.items():
                if name not in lengths:
                    self.send_header(name, value)
            told = next(iter(lengths.values()), "0") if self.command == "HEAD" else str(len(content))
            self.send_header("Content-Length", told)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content if sent is None else content[:sent])
                self.wfile.flush()

        def _cut(self) -> None:
            self.close_connection = True
            with contextlib.suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)

        do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _serve  # noqa: N815  # names that http.server calls

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *of: Any) -> None:
            if not isinstance(sys.exc_info()[1], ConnectionError):  # a client that was killed
                super().handle_error(*of)

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
