"""`dualvla assets fetch` against a local server that cuts connections, knows ranges or not, and serves rubbish."""

from __future__ import annotations

import hashlib
import io
import random
import tarfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from dualvla.cli import main
from dualvla.errors import DataError, StorageError
from dualvla_eval.simpler.assets import Upstream
from dualvla_eval.simpler.fetch import FetchOptions, fetch, our_name

_TOP = "ManiSkill2_real2sim-abc/"
FILES = {
    "data/custom/info.json": b"{}" * 100,
    "data/hab2_bench_assets/stages/room.glb": random.Random(0).randbytes(300_000),
    "mani_skill2_real2sim/assets/descriptions/widowx_description/wx250s.urdf": b"<robot/>",
    "README.md": b"not needed",
    "data/custom/../../escape": b"never",
}
KNOWN = Upstream(
    "owner/name",
    "abc",
    "a licence",
    {
        "custom/info.json": hashlib.sha256(FILES["data/custom/info.json"]).hexdigest(),
        "robots/widowx/wx250s.urdf": hashlib.sha256(b"<robot/>").hexdigest(),
    },
)


def archive(files: dict[str, bytes] = FILES) -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(_TOP + name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return sink.getvalue()


class Server(HTTPServer):
    """cuts: after how many bytes the next replies end. ranges: whether it can go on in the middle."""

    body = archive()
    cuts: list[int] = []
    ranges = True
    asked: list[str | None] = []


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        self.server.asked.append(wanted)
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and self.server.ranges else 0
        body = self.server.body[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: self.server.cuts.pop(0)] if self.server.cuts else body)

    def log_message(self, format: str, *args: Any) -> None:
        """Silent."""


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server(("127.0.0.1", 0), Handler)
    made.cuts, made.asked = [], []
    thread = threading.Thread(target=made.serve_forever)
    thread.start()
    yield made
    made.shutdown()
    thread.join()
    made.server_close()


def options(server: Server) -> FetchOptions:
    return FetchOptions(f"http://127.0.0.1:{server.server_port}/{{repository}}/{{commit}}", attempts=3, wait_s=0.01)


@pytest.mark.parametrize("ranges", [True, False])
def test_a_connection_that_is_cut_twice_is_gone_on_with(server: Server, tmp_path: Path, ranges: bool) -> None:
    server.cuts, server.ranges = [100_000, 50_000], ranges
    found = fetch(str(tmp_path), options(server), KNOWN)
    assert (found["files"], found["verified"], found["unverified"]) == (3, 2, ["stages/room.glb"])
    assert (tmp_path / "stages/room.glb").read_bytes() == FILES["data/hab2_bench_assets/stages/room.glb"]
    assert not (tmp_path.parent / "escape").exists()
    assert server.asked[0] is None
    assert server.asked[1] == "bytes=100000-"
    if ranges:
        assert server.asked[2] == "bytes=150000-"
    assert fetch(str(tmp_path), options(server), KNOWN)["skipped"]
    assert len(server.asked) == 3


def test_another_run_goes_on_where_a_dead_one_stopped(server: Server, tmp_path: Path) -> None:
    server.cuts = [100_000, 0, 0, 0]
    with pytest.raises(StorageError, match="it resumes"):
        fetch(str(tmp_path), options(server), KNOWN)
    assert not fetch(str(tmp_path), options(server), KNOWN)["skipped"]
    assert server.asked[-1] == "bytes=100000-"


def test_a_file_with_another_hash_is_refused_and_a_good_archive_mends_it(server: Server, tmp_path: Path) -> None:
    server.body = archive({**FILES, "data/custom/info.json": b"corrupted"})
    with pytest.raises(DataError, match=r"custom/info\.json"):
        fetch(str(tmp_path), options(server), KNOWN)
    assert not (tmp_path / "custom/info.json").exists()
    server.body = archive()
    assert fetch(str(tmp_path), options(server), KNOWN)["verified"] == 2


@pytest.mark.parametrize("damage", [b"\x00" * 64, None])
def test_a_damaged_archive_is_thrown_away(server: Server, tmp_path: Path, damage: bytes | None) -> None:
    good = archive()
    server.body = damage if damage else good[:5000] + bytes(200) + good[5200:]
    with pytest.raises(DataError, match="is damaged"):
        fetch(str(tmp_path), options(server), KNOWN)
    server.body = good
    assert fetch(str(tmp_path), options(server), KNOWN)["verified"] == 2


def test_the_command_refuses_an_archive_that_is_not_upstreams(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(["assets", "fetch", "--assets", str(tmp_path), "--url", options(server).url])
    assert code == 2
    assert "has sha256" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["top/data/custom/../../x", "top/other/x", "top/data/custom/", "top/README.md"])
def test_what_is_not_needed_or_leads_elsewhere_is_left_in_the_archive(name: str) -> None:
    assert our_name(name) is None
