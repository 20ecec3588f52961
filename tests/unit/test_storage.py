"""Storage: a reader never sees half a file, and what a disk answers becomes one clear error."""

import errno
import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from dualvla.errors import DataError, OutputError, StorageError, UsageError
from dualvla.io import storage

_WRITE_FOR_EVER = """
import sys
from dualvla.io import storage
for i in range(1 << 30):
    storage.write_bytes(sys.argv[1], bytes([i % 256]) * (8 << 20))
"""


def test_killed_writer_leaves_a_whole_file(tmp_path: Path, fault_seed: int) -> None:
    target = tmp_path / "file"
    process = subprocess.Popen([sys.executable, "-c", _WRITE_FOR_EVER, str(target)], start_new_session=True)
    deadline = time.monotonic() + 60
    while not target.exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    time.sleep(0.05 * fault_seed)  # another moment of a write for each seed
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    data = storage.read_bytes(target)
    assert data == data[:1] * (8 << 20)
    assert storage.list_files(tmp_path) == [str(target)]  # a left-over temporary file is not listed


def test_failed_write_keeps_the_old_content_and_no_litter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "file"
    storage.write_bytes(target, b"old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match=f"No space left on the disk that holds '{target}'"):
        storage.write_bytes(target, b"new")
    assert target.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_writing_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OutputError, match="Cannot write"):
        storage.write_bytes(tmp_path / "file" / "below", b"x")


def test_missing_input_names_the_path(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere"):
        storage.read_bytes(tmp_path / "nowhere")


def test_urls_behave_as_paths_do() -> None:
    url = "memory://dualvla-test/folder"
    storage.write_bytes(storage.join(url, "b.txt"), b"two")
    storage.write_bytes(storage.join(url, "a.txt"), b"one")
    storage.write_bytes(storage.join(url, "c.bin"), b"three")
    assert storage.list_files(url, ".txt") == [f"{url}/a.txt", f"{url}/b.txt"]
    assert storage.read_bytes(f"{url}/a.txt") == b"one"
    assert storage.exists(f"{url}/a.txt")
    assert not storage.exists(f"{url}/z.txt")
    with pytest.raises(DataError, match=r"z\.txt"):
        storage.read_bytes(f"{url}/z.txt")


class _Flaky(MemoryFileSystem):
    """A store that fails `failures` times before each operation that is not answered yet, and counts what it did."""

    protocol = "flaky"
    cachable = False
    failures: Iterator[BaseException | None] = iter(())
    done: list[str] = []

    def _fail(self, operation: str) -> None:
        error = next(_Flaky.failures, None)
        if error is not None:
            raise error
        _Flaky.done.append(operation)

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        self._fail("put")
        super().pipe_file(path, value)

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        self._fail("get")
        return super().cat_file(path, start, end)

    def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        return super().info(self._strip_protocol(path), **kwargs)


@pytest.fixture
def flaky(monkeypatch: pytest.MonkeyPatch) -> type[_Flaky]:
    fsspec.register_implementation("flaky", _Flaky, clobber=True)
    monkeypatch.setattr(storage.time, "sleep", lambda _: None)
    monkeypatch.setattr(_Flaky, "failures", iter(()))
    monkeypatch.setattr(_Flaky, "done", [])
    monkeypatch.setattr(storage, "_ATOMIC_PUT", (*storage._ATOMIC_PUT, "flaky"))
    return _Flaky


PASSING = [
    OSError(errno.EBUSY, "SlowDown"),
    ConnectionResetError("cut"),
    TimeoutError("late"),
    OSError(errno.EIO, "500"),
]


def test_what_passes_is_tried_again_and_done_once(flaky: type[_Flaky]) -> None:
    flaky.failures = iter([*PASSING, None, *PASSING])
    storage.write_bytes("flaky://bucket/file", b"content")
    assert storage.read_bytes("flaky://bucket/file") == b"content"
    assert flaky.done == ["put", "get"]


def test_patience_is_bounded_and_ends_in_a_typed_error(flaky: type[_Flaky], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DUALVLA_STORAGE_ATTEMPTS", "4")
    asked: list[float] = []
    monkeypatch.setattr(storage.time, "sleep", asked.append)
    flaky.failures = iter([PASSING[0]] * 99)
    with pytest.raises(
        StorageError, match=r"'flaky://bucket/file': the store failed 4 times, at last with: .*SlowDown"
    ):
        storage.read_bytes("flaky://bucket/file")
    assert len(asked) == 3
    assert all(0.05 * 2**i <= wait <= 0.1 * 2**i for i, wait in enumerate(asked))


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (FileNotFoundError("no"), DataError),
        (PermissionError("denied"), DataError),
        (OSError(errno.EINVAL, "x"), OSError),
    ],
)
def test_what_does_not_pass_is_not_tried_again(flaky: type[_Flaky], error: OSError, raised: type[Exception]) -> None:
    flaky.failures = iter([error])
    with pytest.raises(raised):
        storage.read_bytes("flaky://bucket/file")
    assert next(flaky.failures, "used") == "used"
    assert flaky.done == []


def test_waits_grow_to_a_limit() -> None:
    settings = storage.StorageSettings()
    assert all(settings.wait_s(failures) <= settings.longest_wait_s for failures in range(1, 40))
    assert settings.wait_s(30) >= settings.longest_wait_s / 2


def test_a_reader_asks_for_ranges_only_and_survives_cuts(flaky: type[_Flaky], monkeypatch: pytest.MonkeyPatch) -> None:
    content = bytes(range(256)) * 400
    storage.write_bytes("flaky://bucket/large", content)
    monkeypatch.setattr(storage, "_READ_AHEAD_BYTES", 1000)
    flaky.failures = iter([PASSING[1], None, PASSING[0], PASSING[2]])
    with storage.open_reader("flaky://bucket/large") as file:
        file.seek(-10, io.SEEK_END)
        assert file.read() == content[-10:]
        file.seek(50_000)
        assert file.read(5000) == content[50_000:55_000]
        assert file.seek(10, io.SEEK_CUR) == 55_010
        assert file.read(4) == content[55_010:55_014]
    with pytest.raises(DataError, match="nowhere"):
        storage.open_reader("flaky://bucket/nowhere")


@pytest.mark.parametrize("url", ["file://{}/below/file", "{}/below/file"])
def test_a_store_that_writes_in_place_is_written_aside_and_renamed(tmp_path: Path, url: str) -> None:
    storage.write_bytes(url.format(tmp_path), b"one")
    storage.write_bytes(url.format(tmp_path), b"two")
    assert [p.name for p in (tmp_path / "below").iterdir()] == ["file"]
    assert storage.read_bytes(url.format(tmp_path)) == b"two"
    assert storage.size_bytes(url.format(tmp_path)) == 3
    storage.remove(url.format(tmp_path))
    storage.remove(url.format(tmp_path))
    assert not storage.exists(url.format(tmp_path))


def test_folders_and_files_of_a_store_are_told_apart() -> None:
    storage.write_bytes("memory://tree/a/file", b"")
    storage.write_bytes("memory://tree/b", b"")
    assert storage.list_files("memory://tree") == ["memory://tree/b"]
    assert storage.list_folders("memory://tree") == ["memory://tree/a"]
    assert storage.list_files("memory://tree/nowhere") == []


def test_an_unknown_protocol_is_refused_by_name() -> None:
    with pytest.raises(UsageError, match="'s4://bucket/x' cannot be opened"):
        storage.read_bytes("s4://bucket/x")


@pytest.mark.parametrize("value", ["many", "0"])
def test_a_senseless_number_of_attempts_is_refused(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("DUALVLA_STORAGE_ATTEMPTS", value)
    with pytest.raises(UsageError, match=f"DUALVLA_STORAGE_ATTEMPTS='?{value}"):
        storage.read_bytes("memory://a/b")


def test_a_store_that_is_away_for_half_a_minute_is_outlasted_however_the_waits_are_drawn() -> None:
    settings = storage.StorageSettings()
    shortest = [min(settings.wait_s(failures) for _ in range(200)) for failures in range(1, settings.attempts)]
    assert sum(shortest) > 30
