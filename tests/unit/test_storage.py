"""Storage: a reader never sees half a file, and what a disk answers becomes one clear error."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dualvla.errors import DataError, OutputError
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
