"""Data sets in S3: a store that throttles, errs and cuts connections costs time, not a row; none is written twice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import s3fs
from inline import run_inline
from robot_sources import write_bridge, write_lerobot_v3
from s3_faults import FAULTS, FaultPlan, fault_proxy, moto_server

from dualvla.errors import DataError, OutputError, StorageError
from dualvla.io import dataset, storage
from dualvla_pipelines import export, ingest, validate
from dualvla_pipelines.export import ExportConfig
from dualvla_pipelines.ingest import IngestConfig

pytestmark = pytest.mark.slow
KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test-secret", "AWS_DEFAULT_REGION": "us-east-1"}


@pytest.fixture(scope="module")
def s3_port() -> Iterator[int]:
    with moto_server() as port:
        yield port


@pytest.fixture
def plan(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, s3_port: int) -> Iterator[FaultPlan]:
    """A keyed client of a proxy without faults yet, with a bucket of its own (`bucket()`)."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setattr(storage.StorageSettings, "wait_s", lambda *_: 0.01)
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    run_inline(monkeypatch, ingest, export, validate)
    s3fs.S3FileSystem.clear_instance_cache()
    made = FaultPlan()
    with fault_proxy(s3_port, made) as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        yield made


def bucket() -> str:
    name = f"b-{uuid.uuid4().hex[:12]}"
    s3fs.S3FileSystem(endpoint_url=os.environ["AWS_ENDPOINT_URL"]).mkdir(name)
    return f"s3://{name}"


def upload(folder: Path, url: str) -> str:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            storage.write_bytes(storage.join(url, str(path.relative_to(folder))), path.read_bytes())
    return url


def local(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def remote(url: str) -> dict[str, bytes]:
    found = {file.removeprefix(url + "/"): storage.read_bytes(file) for file in storage.list_files(url)}
    for folder in storage.list_folders(url):
        below = remote(folder)
        found |= {f"{folder.removeprefix(url + '/')}/{name}": data for name, data in below.items()}
    return found


def start_faults(plan: FaultPlan, seed: int, rate: float) -> None:
    plan.seed, plan.rate = seed, rate
    plan.__post_init__()
    plan.requests.clear()


def test_a_failing_store_changes_no_byte_and_nothing_is_written_twice(
    plan: FaultPlan, tmp_path: Path, fault_seed: int
) -> None:
    write_bridge(tmp_path / "src", files=3, episodes=2, steps=6)
    told = {f"/bridge/{i}.npy": {str(2 * i): {"features": {"move_primitive": ["go"] * 6}}} for i in range(3)}
    (tmp_path / "told.json").write_text(json.dumps(told))
    here = bucket()
    source = upload(tmp_path / "src", f"{here}/src")
    storage.write_bytes(f"{here}/told.json", (tmp_path / "told.json").read_bytes())
    rlds = IngestConfig("rlds")
    ingest.ingest(str(tmp_path / "src"), str(tmp_path / "data"), rlds, str(tmp_path / "told.json"))
    export.export(str(tmp_path / "data"), str(tmp_path / "lerobot"), ExportConfig())

    start_faults(plan, fault_seed, rate=0.35)
    result = ingest.ingest(source, f"{here}/data", rlds, f"{here}/told.json")
    assert result["rows_in"] == result["rows_out"] + result["rows_quarantined"] == 36
    export.export(f"{here}/data", f"{here}/lerobot", ExportConfig())
    assert validate.validate(f"{here}/data")["ok"]
    plan.rate = 0.0
    assert plan.faults() == set(FAULTS)
    assert sum(request.fault is not None for request in plan.requests) >= 25
    assert remote(f"{here}/data") == local(tmp_path / "data")
    assert remote(f"{here}/lerobot") == local(tmp_path / "lerobot")
    bucket_path = here.removeprefix("s3:/")
    written = plan.puts(f"{bucket_path}/data/") | plan.puts(f"{bucket_path}/lerobot/")
    assert set(written.values()) == {1}


def test_a_store_that_stays_down_ends_in_a_typed_error_and_the_job_resumes(
    plan: FaultPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_lerobot_v3(tmp_path / "src", files=2, episodes=2, steps=5)
    here = bucket()
    source = upload(tmp_path / "src", f"{here}/src")
    config = IngestConfig("lerobot", convention="bridge")
    ingest.ingest(str(tmp_path / "src"), str(tmp_path / "data"), config)

    monkeypatch.setenv("DUALVLA_STORAGE_ATTEMPTS", "3")
    write = storage.write_bytes

    def write_then_fail(url: Any, data: bytes) -> None:
        write(url, data)
        plan.down = plan.down or "progress/unit" in str(url)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "write_bytes", write_then_fail)
        with pytest.raises(
            StorageError, match=r"the store failed 3 times, at last with: .*(Service Unavailable|Reduce your rate)"
        ) as caught:
            ingest.ingest(source, f"{here}/data", config)
    assert caught.value.exit_code == 1
    assert "the same command resumes" in str(caught.value)
    plan.down = False
    assert not storage.exists(f"{here}/data/manifest.json")
    plan.requests.clear()
    ingest.ingest(source, f"{here}/data", config)
    assert remote(f"{here}/data") == local(tmp_path / "data")
    again = [path for path in plan.puts("/") if path.endswith("data/part-00000-000.parquet")]
    assert again == []  # the unit that was finished is not made again


def test_keyed_requests_are_signed_and_anonymous_ones_are_not(
    plan: FaultPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = bucket()
    storage.write_bytes(f"{here}/file", b"content")
    storage.write_bytes(f"{here}/secret", b"content")
    s3fs.S3FileSystem(endpoint_url=os.environ["AWS_ENDPOINT_URL"]).chmod(f"{here}/file", acl="public-read")
    assert all(request.signed for request in plan.requests)
    for name in KEYS:
        monkeypatch.delenv(name)
    monkeypatch.setenv("DUALVLA_S3_ANONYMOUS", "1")
    plan.requests.clear()
    assert storage.read_bytes(f"{here}/file") == b"content"
    with pytest.raises(DataError, match="secret' may not be read"):
        storage.read_bytes(f"{here}/secret")
    assert plan.requests
    assert not any(request.signed for request in plan.requests)
    monkeypatch.delenv("DUALVLA_S3_ANONYMOUS")
    s3fs.S3FileSystem.clear_instance_cache()  # it holds the keys it was made with
    with pytest.raises(StorageError, match="No credentials"):
        storage.write_bytes(f"{here}/other", b"")


def test_a_bucket_that_is_not_there_is_named(plan: FaultPlan, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="s3://no-such-bucket-here/data/x"):
        storage.write_bytes("s3://no-such-bucket-here/data/x", b"")
    assert storage.list_files("s3://no-such-bucket-here/data") == []


def test_large_objects_go_up_whole_in_parts(plan: FaultPlan) -> None:
    here = bucket()
    data = os.urandom(1 << 20) * 110  # beyond s3fs's limit for one PUT
    start_faults(plan, 1, rate=0.15)
    storage.write_bytes(f"{here}/large", data)
    assert sum(plan.puts("/").values()) >= 3
    with storage.open_reader(f"{here}/large") as file:
        file.seek(-1000, os.SEEK_END)
        assert file.read() == data[-1000:]
    assert storage.size_bytes(f"{here}/large") == len(data)


def test_an_upload_that_is_given_up_leaves_no_part_behind(plan: FaultPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts without an object are not listed, and paid for."""
    here = bucket()
    monkeypatch.setenv("DUALVLA_STORAGE_ATTEMPTS", "1")
    faults = iter([None, None, "503"])  # the upload is announced, a part comes, another does not
    monkeypatch.setattr(plan, "draw", lambda: next(faults, None))
    with pytest.raises(StorageError):
        storage.write_bytes(f"{here}/large", bytes(110 << 20))
    assert [r.method for r in plan.requests].count("DELETE") == 1
    fs = s3fs.S3FileSystem(endpoint_url=os.environ["AWS_ENDPOINT_URL"])
    assert fs.call_s3("list_multipart_uploads", Bucket=here.removeprefix("s3://")).get("Uploads", []) == []
    assert not storage.exists(f"{here}/large")


def test_the_command_runs_on_ray_from_store_to_store(plan: FaultPlan, tmp_path: Path) -> None:
    write_bridge(tmp_path / "src", files=3, episodes=2, steps=6)
    ingest.ingest(str(tmp_path / "src"), str(tmp_path / "data"), IngestConfig("rlds"))
    here = bucket()
    source = upload(tmp_path / "src", f"{here}/src")
    start_faults(plan, 0, rate=0.1)
    done = subprocess.run(
        [sys.executable, "-m", "dualvla", "ingest", "--format", "rlds", source, f"{here}/data", "--json"],
        capture_output=True, text=True, env=dict(os.environ),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout)["rows_out"] == 24
    assert "test-secret" not in done.stdout + done.stderr
    plan.rate = 0.0
    assert plan.faults()
    assert remote(f"{here}/data") == local(tmp_path / "data")
    assert dataset.open_dataset(f"{here}/data").read().num_rows == 24
