"""Every route that the app has, whoever adds one: shut to each kind of wrong key, HTTP and upgrades alike."""

import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest
from fastapi.routing import APIRoute, APIWebSocketRoute
from serve.local_endpoint import LocalEndpoint, endpoint
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

INFER, ADMIN, EXPIRED = (f"{name}-key-0123456789" for name in ("infer", "admin", "expired"))
OPEN = {"/healthz", "/health"}
WRONG = {
    "missing": {},
    "unknown": {"Authorization": "Bearer unknown-key-0123456789"},
    "expired": {"Authorization": f"Bearer {EXPIRED}"},
    "a part": {"Authorization": f"Bearer {ADMIN[:-1]}"},
    "longer": {"Authorization": f"Bearer {ADMIN}x"},
    "empty": {"Authorization": "Bearer "},
    "other scheme": {"Authorization": f"Digest {ADMIN}"},
    "a comment": {"Authorization": "Bearer #"},
    "basic, unknown": {"Authorization": "Basic dXNlcjp3cm9uZw=="},
    "basic, no base64": {"Authorization": "Basic ????"},
    "not ASCII": {"Authorization": "Bearer \xff\xfe"},
}


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalEndpoint]:
    file = tmp_path_factory.mktemp("keys") / "keys"
    file.write_text(f"{INFER}\n{ADMIN} admin\n{EXPIRED} infer admin expires=2020-01-01\n")
    with endpoint(keys_file=str(file), status_page=True) as running:
        yield running


def routes(locked: LocalEndpoint) -> Iterator[tuple[str, str]]:
    """(method, path) of every route; the method of an upgrade is WS."""
    for route in locked.listener.server.config.app.routes:
        path = getattr(route, "path", "").replace("{session}", "robot")
        if isinstance(route, APIWebSocketRoute):
            yield "WS", path
        elif isinstance(route, APIRoute):
            yield from ((method, path) for method in route.methods)
        else:
            yield "GET", path  # FastAPI's own, such as /openapi.json


def status(locked: LocalEndpoint, method: str, path: str, headers: dict[str, str]) -> int:
    if method == "WS":
        try:
            with connect(f"ws://{locked.address}{path}", additional_headers=headers):
                return 101
        except InvalidStatus as refused:
            return refused.response.status_code
    data = b"{}" if method == "POST" else None
    request = urllib.request.Request(f"http://{locked.address}{path}", data, headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


@pytest.mark.parametrize("headers", WRONG.values(), ids=WRONG.keys())
def test_a_wrong_key_opens_nothing(locked: LocalEndpoint, headers: dict[str, str]) -> None:
    found = list(routes(locked))
    assert {"/", "/vla-eval", "/v1/infer", "/v1/admin/clear", "/metrics", "/status", "/openapi.json"} <= {
        path for _, path in found
    }
    for method, path in [*found, ("GET", "/nothing"), ("GET", "//healthz"), ("GET", "/healthz/"), ("PUT", "/status")]:
        if path not in OPEN:
            assert status(locked, method, path, headers) in ((401, 403) if method == "WS" else (401,)), (method, path)


@pytest.mark.parametrize(("key", "scope"), [(INFER, "infer"), (ADMIN, "admin")])
def test_a_key_opens_what_its_scope_says_and_no_more(locked: LocalEndpoint, key: str, scope: str) -> None:
    headers = {"Authorization": f"Bearer {key}"}
    for method, path in routes(locked):
        if path in OPEN:
            continue
        opened = status(locked, method, path, headers) not in (401, 403)
        if path in ("/v1/admin/stop", "/v1/models"):
            assert opened
            continue
        for_admins = path.startswith("/v1/admin") or path in ("/metrics", "/status")
        assert opened == (for_admins == (scope == "admin")), (method, path)


def test_the_open_routes_tell_nothing_but_that_the_process_lives(locked: LocalEndpoint) -> None:
    for path in OPEN:
        with urllib.request.urlopen(f"http://{locked.address}{path}", timeout=10) as answer:
            assert len(answer.read()) < 40


@pytest.mark.parametrize("path", ["/status", "/v1/admin/sessions", "/v1/admin/stop"])
@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Origin": "http://127.0.0.1:1"},
    ],
    ids=["other site", "sandbox", "fetch", "other port"],
)
def test_a_page_of_another_site_is_refused_even_with_a_key(
    locked: LocalEndpoint, path: str, headers: dict[str, str]
) -> None:
    headers = {"Authorization": f"Bearer {ADMIN}", **headers}
    assert status(locked, "GET", path, headers) == 403
    assert status(locked, "POST", "/v1/admin/clear", headers) == 403
    assert status(locked, "WS", "/", {**headers, "Authorization": f"Bearer {INFER}"}) == 403


def test_the_status_page_goes_by_its_own_name_only(locked: LocalEndpoint) -> None:
    headers = {"Authorization": f"Bearer {ADMIN}"}
    assert status(locked, "GET", "/status", headers) == 200
    assert status(locked, "GET", "/status", {**headers, "Host": "rebound.example"}) == 403


def test_the_status_page_is_off_by_default() -> None:
    with endpoint() as running:
        assert status(running, "GET", "/status", {}) == 404
        assert status(running, "GET", "/v1/models", {}) == 200
