"""Large files of a store are read from this machine's disk: never an old version, never more than the bound, by many
processes at once."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from dualvla.errors import DataError, UsageError
from dualvla.io import storage
from dualvla.io.local_cache import LocalCache

URL = "counting://here/part-00000.parquet"


class _Counting(MemoryFileSystem):
    """A store in this process that counts what is fetched from it. before_get: what another process does meanwhile."""

    protocol = "counting"
    cachable = False
    store: dict[str, Any] = {}
    pseudo_dirs = [""]
    fetched: list[str] = []
    before_get: Callable[[], object] | None = None

    def get_file(self, rpath: str, lpath: str, **kwargs: Any) -> None:
        meanwhile, _Counting.before_get = _Counting.before_get, None
        if meanwhile is not None:
            meanwhile()
        _Counting.fetched.append(rpath)
        Path(lpath).write_bytes(super().cat_file(rpath))

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        _Counting.fetched.append(path)
        return super().cat_file(path, start, end)


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    fsspec.register_implementation("counting", _Counting, clobber=True)
    monkeypatch.setattr(storage, "_ATOMIC_PUT", (*storage._ATOMIC_PUT, "counting"))
    monkeypatch.setattr(_Counting, "store", {})
    monkeypatch.setattr(_Counting, "fetched", [])
    monkeypatch.setenv("DUALVLA_CACHE", str(tmp_path / "cache"))
    return _Counting.fetched


def copies(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if not path.name.startswith("lock-")]


def test_a_file_is_fetched_once_and_again_when_it_has_changed(fetched: list[str]) -> None:
    storage.write_bytes(URL, b"one")
    assert [storage.read_bytes(URL) for _ in range(3)] == [b"one"] * 3
    with storage.open_reader(URL) as file:
        file.seek(1)
        assert file.read() == b"ne"
    assert len(fetched) == 1
    storage.write_bytes(URL, b"two")  # as long as the first
    assert storage.read_bytes(URL) == b"two"
    assert len(fetched) == 2
    storage.remove(URL)
    with pytest.raises(DataError, match=r"part-00000\.parquet"):
        storage.read_bytes(URL)


def test_records_are_always_asked_of_the_store(fetched: list[str], tmp_path: Path) -> None:
    storage.write_bytes("counting://here/run.json", b"{}")
    assert [storage.read_bytes("counting://here/run.json") for _ in range(2)] == [b"{}"] * 2
    assert len(fetched) == 2
    assert not (tmp_path / "cache").exists()


def test_a_file_that_changes_while_it_is_fetched_is_read_new_and_not_kept_as_old(
    fetched: list[str], tmp_path: Path
) -> None:
    storage.write_bytes(URL, b"one")
    _Counting.before_get = lambda: storage.write_bytes(URL, b"longer")
    assert storage.read_bytes(URL) == b"longer"
    assert copies(tmp_path / "cache") == []


def test_a_copy_without_its_bytes_is_fetched_again(fetched: list[str], tmp_path: Path) -> None:
    """As a power cut leaves it."""
    storage.write_bytes(URL, b"content")
    storage.read_bytes(URL)
    (copy,) = copies(tmp_path / "cache")
    os.truncate(copy, 0)
    assert storage.read_bytes(URL) == b"content"
    assert len(fetched) == 2


def test_a_disk_that_takes_nothing_costs_the_copy_only(
    fetched: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("DUALVLA_CACHE", str(tmp_path / "file" / "cache"))
    storage.write_bytes(URL, b"one")
    assert storage.read_bytes(URL) == b"one"


def test_the_longest_unread_go_and_what_is_open_stays_readable(tmp_path: Path) -> None:
    cache = LocalCache(tmp_path, most_gb=100e-9)

    def ask(name: str, size: int = 30) -> bytes | None:
        def fetch(target: Path) -> bool:
            target.write_bytes(name.encode() * size)
            return True

        file = cache.open(name, "1", size, fetch)
        return None if file is None else file.read()

    for number, name in enumerate("abc"):
        assert ask(name) == name.encode() * 30
        (newest,) = (path for path in copies(tmp_path) if path.read_bytes().startswith(name.encode()))
        os.utime(newest, (number, number))
    opened = cache.open("a", "1", 30, lambda _: False)  # read again: b is the longest unread now
    (tmp_path / "gone.part").write_bytes(b"x" * 60)
    os.utime(tmp_path / "gone.part", (0, 0))
    assert ask("d") == b"d" * 30
    assert {path.read_bytes()[:1] for path in copies(tmp_path)} == {b"a", b"c", b"d"}
    for name in "efg":
        assert ask(name) is not None
    assert sum(path.stat().st_size for path in copies(tmp_path)) <= 100
    assert opened is not None
    assert opened.read() == b"a" * 30
    assert ask("h", 101) is None  # larger than all there may be


@pytest.mark.parametrize("value", ["0", "-1", "many", "nan"])
def test_a_senseless_bound_is_refused(fetched: list[str], monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("DUALVLA_CACHE_GB", value)
    storage.write_bytes(URL, b"")
    with pytest.raises(UsageError, match="DUALVLA_CACHE_GB"):
        storage.read_bytes(URL)


def _ask_often(folder: str, most_gb: float, log: str, seed: int) -> None:
    """Reads files of six names and 10 kB in turn; notes each that it had to fetch."""
    cache = LocalCache(Path(folder), most_gb)
    for step in range(60):
        name = str((step * (seed + 1)) % 6)

        def fetch(target: Path, name: str = name) -> bool:
            with open(log, "a") as file:
                file.write(f"{name}\n")
            with target.open("wb") as file:
                for _ in range(10):  # slowly, so that a reader of a half-written file would be caught
                    file.write(name.encode() * 1000)
                    file.flush()
            return True

        opened = cache.open(name, "1", 10_000, fetch)
        assert opened is not None
        with opened:
            assert opened.read() == name.encode() * 10_000


@pytest.mark.parametrize("files", [3, 6])
def test_processes_that_share_a_folder_fetch_a_file_once_and_never_see_half_of_it(tmp_path: Path, files: int) -> None:
    context = multiprocessing.get_context("fork")
    cache, log = tmp_path / "cache", tmp_path / "fetched"
    arguments = [(str(cache), files * 1e-5, str(log), seed) for seed in range(4)]
    workers = [context.Process(target=_ask_often, args=each) for each in arguments]
    for worker in workers:
        worker.start()
    deadline = time.monotonic() + 300
    for worker in workers:
        worker.join(max(0.0, deadline - time.monotonic()))
        assert worker.exitcode == 0
    assert sum(path.stat().st_size for path in copies(cache)) <= (files + len(workers)) * 10_000
    assert not list(cache.glob("*.part"))
    names = log.read_text().split()
    assert set(names) == set("012345")
    if files == 6:  # there is room for all
        assert len(names) == 6
