"""Who gets in, how much they may ask, what they never learn. Limits on a message: test_app.py, test_protocols.py."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import ssl
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path

import pytest
from serve.local_endpoint import endpoint, listening
from serve.test_sessions import ask, eventually, talking
from serve_fakes import example
from websockets.asyncio.client import connect as connect_async
from websockets.exceptions import InvalidMessage, InvalidStatus
from websockets.sync.client import connect

from dualvla.client import PolicyClient
from dualvla.errors import BusyError, PlatformError, UsageError
from dualvla_serve.config import Tls
from dualvla_serve.keys import KeyFile, presented_key, read_keys
from dualvla_serve.limits import ConnectionCounter, Limits, RateLimiter
from dualvla_serve.logs import JsonFormatter

INFER, ADMIN, BOTH, OLD = (f"{name}-key-0123456789" for name in ("infer", "admin", "both", "old"))
ADMIN_ROUTES = [
    ("GET", "/metrics"),
    ("GET", "/status"),
    ("POST", "/v1/admin/clear"),
    ("GET", "/v1/admin/sessions"),
    ("GET", "/v1/admin/latency"),
    ("GET", "/v1/admin/sessions/x/frame"),
    ("GET", "/v1/admin"),
]
INFER_ROUTES = [
    ("GET", "/v1/spec"),
    ("GET", "/v1/listeners"),
    ("GET", "/readyz"),
    ("GET", "/config"),
    ("GET", "/openapi.json"),
    ("POST", "/v1/infer"),
    ("POST", "/v1/reset"),
]
EITHER_ROUTES = [("POST", "/v1/admin/stop"), ("GET", "/v1/admin/stop"), ("GET", "/v1/models")]
SOCKETS = ["/", "/vla-eval"]
WRONG = {
    "missing": None,
    "wrong": f"Bearer {INFER}x",
    "expired": f"Bearer {OLD}",
    "basic without a password": "Basic " + base64.b64encode(INFER.encode()).decode(),
    "no base64": "Basic \xff\xff",
}


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    file = tmp_path_factory.mktemp("keys") / "keys"
    file.write_text(
        f"{INFER}\n{ADMIN} admin\n{BOTH} infer admin expires=2999-01-01\n{OLD} infer admin expires=2020-01-31\n"
    )
    with listening(keys_file=str(file), status_page=True) as found:
        yield found


def status(address: str, method: str, path: str, authorization: str | None, **headers: str) -> int:
    connection = HTTPConnection(address, timeout=10)
    given = {} if authorization is None else {"Authorization": authorization}
    connection.request(method, path, b"{}" if method == "POST" else None, {**given, **headers})
    found = connection.getresponse().status
    connection.close()
    return found


@pytest.mark.parametrize("authorization", WRONG.values(), ids=WRONG.keys())
def test_without_a_good_key_every_route_and_upgrade_is_refused(locked: str, authorization: str | None) -> None:
    for method, path in (*ADMIN_ROUTES, *INFER_ROUTES, *EITHER_ROUTES):
        assert status(locked, method, path, authorization) == 401, path
    for path in SOCKETS:
        with pytest.raises(InvalidStatus) as refused:
            connect(f"ws://{locked}{path}", additional_headers={"Authorization": authorization or ""}).__enter__()
        assert refused.value.response.status_code in (401, 403)
    for path in ("/healthz", "/health"):
        assert status(locked, "GET", path, authorization) == 200


def test_a_scope_opens_its_own_routes_only(locked: str) -> None:
    for method, path in ADMIN_ROUTES:
        assert status(locked, method, path, f"Bearer {INFER}") == 401, path
        assert status(locked, method, path, f"Bearer {ADMIN}") not in (401, 403), path
    for method, path in INFER_ROUTES:
        assert status(locked, method, path, f"Bearer {ADMIN}") == 401, path
        assert status(locked, method, path, f"Api-Key {BOTH}") not in (401, 403), path


def test_a_key_in_the_url_opens_both_sockets(locked: str) -> None:
    for path in SOCKETS:
        with connect(f"ws://robot:{INFER}@{locked}{path}") as connection:
            assert connection.response.status_code == 101


@pytest.mark.parametrize(
    "headers",
    [{"Origin": "https://evil.example"}, {"Sec-Fetch-Site": "cross-site"}, {"Origin": "null"}],
)
def test_no_page_of_another_site_gets_in_even_with_a_key(locked: str, headers: dict[str, str]) -> None:
    basic = "Basic " + base64.b64encode(f"admin:{BOTH}".encode()).decode()
    for method, path in (*ADMIN_ROUTES, *INFER_ROUTES, *EITHER_ROUTES):
        assert status(locked, method, path, basic, **headers) == 403, path
    assert status(locked, "GET", "/status", basic, Origin=f"http://{locked}") == 200
    assert status(locked, "GET", "/status", basic, Host="evil.example") == 403


def test_keys_that_are_added_and_taken_away_count_within_a_second(tmp_path: Path) -> None:
    file, now = tmp_path / "keys", [0.0]
    file.write_text(INFER)
    ring = KeyFile(str(file), lambda: now[0])
    assert ring.identify(INFER) is not None
    file.write_text(f"{BOTH} infer admin\n")
    now[0] += 1.0
    assert ring.identify(INFER) is None
    assert ring.identify(BOTH).scopes == {"infer", "admin"}
    file.write_text("short\n")  # a slip of the editor changes nothing
    now[0] += 1.0
    assert ring.identify(BOTH) is not None
    file.unlink()
    now[0] += 1.0
    assert ring.identify(BOTH) is not None


def test_a_key_expires_at_its_moment(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"{INFER} expires=2027-01-31T12:00:00+01:00\n")
    ring = read_keys(str(file))
    noon_in_utc = 1801393200.0
    assert ring.identify(INFER, noon_in_utc - 1) is not None
    assert ring.identify(INFER, noon_in_utc) is None
    file.write_text(f"{INFER} expires=tomorrow\n")
    with pytest.raises(UsageError, match="'tomorrow' is no date"):
        read_keys(str(file))


def test_a_key_is_found_in_every_scheme() -> None:
    basic = "Basic " + base64.b64encode(f"any:{INFER}".encode()).decode()
    assert [presented_key(h) for h in (f"Bearer {INFER}", f"api-key  {INFER} ", basic)] == [INFER] * 3
    assert [presented_key(h) for h in ("", "Bearer", f"Digest {INFER}", "Basic !!", "Basic /w==")] == [""] * 5


def test_too_many_requests_are_told_and_others_are_not_hurt(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(f"{INFER}\n{BOTH}\n")
    limits = Limits(requests_per_s=0.1, burst=3)
    first, second = ({"Authorization": f"Bearer {key}"} for key in (INFER, BOTH))
    with listening(keys_file=str(tmp_path / "keys"), limits=limits) as address:
        with talking(address, **first) as (connection, _):
            kinds = [ask(connection).get("error", {}).get("kind", "ok") for _ in range(5)]
        assert kinds == ["ok", "ok", "ok", "busy", "busy"]
        assert status(address, "POST", "/v1/infer", first["Authorization"]) == 429
        with talking(address, **second) as (connection, _):
            assert "actions" in ask(connection)


def test_a_bucket_fills_with_time_and_a_jump_back_of_the_clock_empties_nothing() -> None:
    now = [0.0]
    limiter = RateLimiter(10.0, 2, lambda: now[0])
    limiter.admit("a")
    limiter.admit("a")
    with pytest.raises(BusyError):
        limiter.admit("a")
    limiter.admit("b")
    now[0] += 0.1
    limiter.admit("a")


def test_too_many_connections_are_told() -> None:
    with listening(limits=Limits(connections=2)) as address:
        with talking(address), talking(address), connect(f"ws://{address}") as third:
            assert json.loads(third.recv(timeout=5))["error"]["kind"] == "busy"

        def free() -> bool:
            with connect(f"ws://{address}") as connection:
                return isinstance(connection.recv(timeout=5), bytes)

        eventually(free)
    counter = ConnectionCounter(10, 1)
    with counter.one("a"), counter.one("b"), pytest.raises(BusyError), counter.one("a"):
        pass
    assert counter.total == 0


def test_nothing_secret_is_logged_and_every_error_can_be_found(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    (tmp_path / "keys").write_text(INFER)
    with (
        listening(keys_file=str(tmp_path / "keys")) as address,
        talking(address, Authorization=f"Bearer {INFER}") as (connection, _),
    ):
        failure = ask(connection, prompt="raise", id="obs-7")["error"]
        status(address, "GET", "/v1/spec", "Bearer not-the-key-0123456789")
    lines = [json.loads(JsonFormatter().format(record)) for record in caplog.records if record.name == "dualvla.serve"]
    (line,) = [line for line in lines if line.get("error_id") == failure["id"]]
    assert line["kind"] == "failed"
    ours = [record for record in caplog.records if record.name != "websockets.client"]  # the test's own side
    everything = "\n".join(JsonFormatter().format(record) for record in ours)
    for secret in (INFER, "not-the-key-0123456789"):
        assert secret not in everything
    assert "secret detail" in everything  # the log has what the client must not see
    assert "secret" not in json.dumps(failure)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Tls:
    folder = tmp_path_factory.mktemp("tls")
    cert, key = folder / "cert.pem", folder / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "1",
         "-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(cert)],
        check=True, capture_output=True,
    )  # fmt: skip
    return Tls(str(cert), str(key))


def test_the_listener_speaks_tls(certificate: Tls, tmp_path: Path) -> None:
    trusting = ssl.create_default_context(cafile=certificate.certificate)

    async def greeting(address: str) -> str | bytes:  # websockets' threaded client hangs now and then over TLS
        async with connect_async(f"wss://{address}", ssl=trusting) as connection:
            return await asyncio.wait_for(connection.recv(), 5)

    with listening(tls=certificate) as address:
        assert isinstance(asyncio.run(greeting(address)), bytes)
        with urllib.request.urlopen(f"https://{address}/healthz", context=trusting, timeout=5) as answer:
            assert answer.read() == b"OK"
        with pytest.raises(ssl.SSLCertVerificationError), connect(f"wss://{address}"):
            pass
        with pytest.raises(InvalidMessage), connect(f"ws://{address}", open_timeout=3):
            pass  # plain text is not spoken here


def test_tls_files_that_are_none_are_named(tmp_path: Path) -> None:
    (tmp_path / "x.pem").write_text("no certificate")
    tls = Tls(str(tmp_path / "x.pem"), str(tmp_path / "x.pem"))
    with pytest.raises(PlatformError, match="--cert"):
        endpoint(tls=tls).__enter__()


def test_the_client_is_served_over_a_wrong_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the wall clock does, deadlines, lifetimes and rates are counted on another."""
    with listening(deadline_ms=5000.0) as address, PolicyClient(f"ws://{address}") as client:
        assert client.infer(example())["actions"].shape == (3, 7)
        real = time.time
        for jump_s in (-3e8, 3e8):
            monkeypatch.setattr(time, "time", lambda jump_s=jump_s: real() + jump_s)
            assert client.infer(example())["actions"].shape == (3, 7)


@pytest.mark.parametrize(
    ("method", "path", "found"), [("GET", "/nothing", 404), ("GET", "/v1/infer", 405), ("POST", "/v1/admin/stop", 400)]
)
def test_every_answer_is_typed_even_of_routes_that_are_not_there(method: str, path: str, found: int) -> None:
    with listening() as address:
        connection = HTTPConnection(address, timeout=10)
        connection.request(method, path, b'{"reason": 7}' if method == "POST" else None)
        answer = connection.getresponse()
        assert answer.status == found
        assert set(json.loads(answer.read())["error"]) == {"kind", "id", "message"}
        connection.close()
