"""Bytes in and out of a local path or any fsspec URL, written so that a partial write is never seen.

Knows nothing of what the bytes mean.
"""

from __future__ import annotations

import contextlib
import errno
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

from dualvla.errors import DataError, OutputError, PlatformError


def is_local(url: str | os.PathLike[str]) -> bool:
    return "://" not in os.fspath(url)


def join(url: str | os.PathLike[str], *parts: str) -> str:
    return "/".join([os.fspath(url).rstrip("/"), *parts])


def _filesystem(url: str):  # type: ignore[no-untyped-def]  # fsspec is untyped
    try:
        import fsspec
    except ModuleNotFoundError as error:
        raise PlatformError(f"'{url}' needs fsspec.", 'pip install "dualvla[data]"') from error
    return fsspec.core.url_to_fs(url)


@contextlib.contextmanager
def writing(url: str) -> Iterator[None]:
    """Turns what a disk or a store answers while `url` is written into one clear error."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise OutputError(
                f"No space left on the disk that holds '{url}'.", "free space, or pass another --out"
            ) from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR, errno.EEXIST):
            raise OutputError(f"Cannot write '{url}': {error.strerror}.", "pass an --out you may write to") from error
        raise


def write_bytes(url: str | os.PathLike[str], data: bytes) -> None:
    """Atomic: readers see the old content or the whole new one."""
    url = os.fspath(url)
    with writing(url):
        if not is_local(url):
            fs, path = _filesystem(url)
            fs.pipe_file(path, data)  # one object PUT is atomic
            return
        target = Path(url)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)


def read_bytes(url: str | os.PathLike[str]) -> bytes:
    url = os.fspath(url)
    try:
        if is_local(url):
            return Path(url).read_bytes()
        fs, path = _filesystem(url)
        return fs.cat_file(path)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise DataError(f"'{url}' does not exist.", "check the path") from error


def exists(url: str | os.PathLike[str]) -> bool:
    url = os.fspath(url)
    if is_local(url):
        return Path(url).exists()
    fs, path = _filesystem(url)
    return fs.exists(path)


def list_files(folder: str | os.PathLike[str], suffix: str = "") -> list[str]:
    """Sorted URLs of the files directly in `folder`; empty if there is no such folder. Skips temporary files."""
    folder = os.fspath(folder)
    if is_local(folder):
        if not Path(folder).is_dir():
            return []
        names = [p.name for p in Path(folder).iterdir() if p.is_file()]
    else:
        fs, path = _filesystem(folder)
        names = [p.rsplit("/", 1)[-1] for p in fs.ls(path, detail=False)] if fs.exists(path) else []
    return [join(folder, n) for n in sorted(names) if n.endswith(suffix) and not n.startswith(".")]


def list_folders(folder: str | os.PathLike[str]) -> list[str]:
    """Sorted URLs of the folders directly in `folder`; empty if there is none. Skips hidden ones."""
    folder = os.fspath(folder)
    if is_local(folder):
        names = [p.name for p in Path(folder).iterdir() if p.is_dir()] if Path(folder).is_dir() else []
    else:
        fs, path = _filesystem(folder)
        entries = fs.ls(path, detail=True) if fs.exists(path) else []
        names = [e["name"].rstrip("/").rsplit("/", 1)[-1] for e in entries if e["type"] == "directory"]
    return [join(folder, n) for n in sorted(names) if not n.startswith(".")]
