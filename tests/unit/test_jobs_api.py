"""What `dualvla submit` and `jobs` make of a cluster's answers: another Ray, a quota, a certificate, nothing free."""

from __future__ import annotations

import contextlib
import json
import os
import ssl
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import ray

from dualvla import cli
from dualvla.errors import PlatformError, UsageError
from dualvla_cluster import secrets, shipping
from dualvla_cluster.jobs import Jobs, Shipment
from dualvla_cluster.resources import get_profile

VERSION = {"version": "4", "ray_version": ray.__version__, "ray_commit": "x", "session_name": "s"}
NODE = {"state": "ALIVE", "resources_total": {"CPU": 2.0, "memory": 8e9}}


@contextlib.contextmanager
def head(answers: dict[str, Any], context: ssl.SSLContext | None = None) -> Iterator[str]:
    """Answers by path; a number is a status. Everything else is an empty list."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found = answers.get(self.path.partition("?")[0], [])
            status, body = (found, b"no") if isinstance(found, int) else (200, json.dumps(found).encode())
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.do_GET()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    if context:
        server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"{'https' if context else 'http'}://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def answers(**more: Any) -> dict[str, Any]:
    state = {"data": {"result": {"result": [NODE]}}}
    return {"/api/version": VERSION, "/api/v0/nodes": state, **{f"/api/{name}": v for name, v in more.items()}}


def test_another_ray_is_told_before_anything_is_sent() -> None:
    with head({"/api/version": {**VERSION, "ray_version": "2.9.3"}}) as address:
        with pytest.raises(PlatformError, match=r"runs Ray 2\.9\.3, here is") as told:
            Jobs(address).submit(["report"], Shipment(code="image"))
        assert "ray==2.9.3" in told.value.fix


def test_a_quota_is_called_one() -> None:
    with head(answers() | {"/api/jobs/": 429}) as address:
        with pytest.raises(PlatformError, match="refused this by a quota") as told:
            Jobs(address).list()
        assert "dualvla jobs list" in told.value.fix


def test_what_waits_and_what_no_machine_has_is_said() -> None:
    load = {
        "usage": {"CPU": [2.0, 2.0], "memory": [0.0, 8e9]},
        "resourceDemand": [[{"CPU": 1.0}, 3]],
        "pgDemand": [[{"bundles": [[{"CPU": 1.0, "GPU": 1.0}, 8]], "strategy": "PACK"}, 1]],
        "nodeTypes": [[{"CPU": 2.0, "memory": 8e9}, 1]],
    }
    refused = {"unavailableNodeInformation": {"description": "exceeded quota: gpus"}, "isAvailable": False}
    scaler = {"nodeAvailabilitySummary": {"nodeAvailabilities": {"gpu": refused}}}
    status = {"data": {"clusterStatus": {"loadMetricsReport": load, "autoscalerReport": scaler}}}
    with head(answers(cluster_status=status)) as address:
        said = Jobs(address).waiting()
    assert said is not None
    for part in (
        "3 x (1 CPU)",
        "8 x (1 CPU, 1 GPU)",
        "2 of 2 CPU",
        "No machine here has 1 GPU",
        "exceeded quota: gpus",
    ):
        assert part in said
    with head(answers(cluster_status={"data": {"clusterStatus": None}})) as address:
        assert Jobs(address).waiting() is None


def test_a_profile_without_room_is_refused_and_one_that_grows_is_not() -> None:
    with head(answers()) as address:
        jobs = Jobs(address)
        with pytest.raises(PlatformError, match=r"stage 'train', on http.*find no room") as told:
            jobs.require(get_profile("node8"), ["train"])
        assert "--queue" in told.value.fix
        jobs.require(get_profile("spot:2"), ["train", "eval"])


def test_only_a_worker_that_has_looked_at_its_own_disk_can_have_a_full_one() -> None:
    def node(name: str, disk: dict[str, Any], **state: Any) -> dict[str, Any]:
        return {"disk": disk, "raylet": {"nodeId": name, "state": "ALIVE", "isHeadNode": False, **state}}

    full, small = {"total": 1e9, "free": 5.0}, {"total": 1e9, "free": 2e8}
    nodes = [
        node("full", {"/": small, "/tmp/ray": full}),
        node("read-only root", {"/": full, "/tmp/ray": small}),
        node("pod", {"/": {"total": 1, "free": 1}, "/tmp/ray": {"total": 1, "free": 1}}),
        node("head", {"/": small, "/tmp/ray": full}, isHeadNode=True),
        node("dead", {"/": small, "/tmp/ray": full}, state="DEAD"),
        node("new", {}),
    ]
    with head(answers() | {"/nodes": {"data": {"summary": nodes}}}) as address:
        assert Jobs(address).free_disk_bytes() == {"full": 5.0, "read-only root": 2e8}


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("tls")
    options = "req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext subjectAltName=IP:127.0.0.1"
    files = folder / "cert.pem", folder / "key.pem"
    command = ["openssl", *options.split(), "-out", str(files[0]), "-keyout", str(files[1])]
    subprocess.run(command, check=True, capture_output=True)
    return files


def test_an_https_head_is_trusted_by_its_authority_only(
    certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*map(str, certificate))
    with head(answers(), context) as address:
        with pytest.raises(PlatformError, match="is not trusted") as told:
            Jobs(address)
        assert "--ca" in told.value.fix
        assert Jobs(address, str(certificate[0])).list() == []
        monkeypatch.setenv("DUALVLA_CA_FILE", str(certificate[0]))
        assert Jobs(address).list() == []
        with pytest.raises(UsageError, match="no certificate file"):
            Jobs(address, "/nowhere.pem")


def test_what_is_shipped_is_the_packages_alone_and_its_digest_their_content(tmp_path: Path) -> None:
    one, two = (shipping.unpack(tmp_path / name) for name in ("one", "two"))
    roots = {"dualvla", "dualvla_cluster", "dualvla_eval", "dualvla_pipelines", "dualvla_serve"}
    assert {part.name for part in one if not part.name.endswith(".dist-info")} == roots
    assert not list((tmp_path / "one").rglob("*.pyc"))
    assert not [p for p in (tmp_path / "one").rglob("*") if p.name in ("tests", ".git", ".venv", "docs")]
    assert "dualvla.commands" in (one[-1] / "entry_points.txt").read_text()
    assert shipping.digest(one) == shipping.digest(two)
    (two[0] / "schema.py").write_text("changed")
    assert shipping.digest(one) != shipping.digest(two)


def test_an_environment_that_differs_is_named_package_by_package() -> None:
    expected = shipping.pinned()
    shipping.check(expected)
    with pytest.raises(PlatformError, match=r"ray .* \(expected 2\.9\.0\), nosuch is missing \(expected 1\)") as told:
        shipping.check({**expected, "ray": "2.9.0", "nosuch": "1"})
    assert "--environment pinned" in told.value.fix


def test_an_environment_to_be_installed_is_all_that_dualvla_asks_for_but_ray() -> None:
    wanted = shipping.requirements()
    exact = {f"{n}=={v}" for n, v in shipping.pinned().items() if n not in ("python", "ray")}
    assert exact <= set(wanted)
    assert {text.partition("==")[0] for text in wanted} >= {"numpy", "pillow", "websockets", "fastapi"}
    assert not [text for text in wanted if text.startswith(("ray=", "dualvla=", "pytest=", "ruff=")) or "+" in text]
    argv = ["--environment", "pinned", "--python", "/usr/bin/python3", "--", "report", "x"]
    with pytest.raises(UsageError, match="would not see"):
        cli.call("submit", argv)


def test_secrets_travel_as_references(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = tmp_path / "key"
    key.write_text("from the file\n")
    monkeypatch.setenv("ELSEWHERE", "from the node")
    found = secrets.parse([f"A=file:{key}", "B=env:ELSEWHERE"])
    monkeypatch.setenv(secrets.VARIABLE, json.dumps(found))
    for name in ("A", "B"):
        monkeypatch.setenv(name, "")  # restored after the test
    secrets.resolve()
    assert (os.environ["A"], os.environ["B"]) == ("from the file", "from the node")
    key.unlink()
    with pytest.raises(PlatformError, match=r"Secret A: there is no file"):
        secrets.resolve()


@pytest.mark.parametrize("text", ["KEY=hunter2", "KEY", "KEY=file:relative", "=env:X", "KEY=vault:x"])
def test_a_secret_given_as_it_is_is_refused_and_not_repeated(text: str) -> None:
    with pytest.raises(UsageError, match="is no reference") as told:
        secrets.parse([text])
    assert "hunter2" not in str(told.value)
