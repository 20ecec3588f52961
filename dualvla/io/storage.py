"""Bytes in and out of a local path or any fsspec URL, written so that a partial write is never seen.

The one place where a store's passing failures (5xx, throttling, cut connections) are retried, with growing waits and a
bound: those of s3fs and botocore are switched off, so that the bound holds. Knows nothing of what the bytes mean.

Environment: `AWS_ENDPOINT_URL` (or AWS_ENDPOINT_URL_S3) and the usual AWS_* credentials; DUALVLA_S3_ANONYMOUS=1 sends
unsigned requests; DUALVLA_STORAGE_ATTEMPTS and DUALVLA_STORAGE_TIMEOUT_S bound one operation. With DUALVLA_CACHE
(`local_cache`) large files of a store are read from this machine's disk while the store says that they are the same.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import logging
import os
import random
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

from dualvla.errors import DataError, OutputError, PlatformError, StorageError, UsageError
from dualvla.io.local_cache import LocalCache

log = logging.getLogger(__name__)

T = TypeVar("T")
_S3 = ("s3", "s3a")
# One PUT of these makes an object appear whole or not at all; elsewhere a file is written aside and renamed.
_ATOMIC_PUT = (*_S3, "gs", "gcs", "az", "abfs", "abfss", "adl", "oss", "memory")
_PASSING = (errno.EBUSY, errno.EIO, errno.EREMOTEIO, errno.ECONNRESET, errno.ECONNREFUSED, errno.EPIPE, errno.ETIMEDOUT)
_READ_AHEAD_BYTES = 4 << 20
_LARGE = (".parquet", ".safetensors", ".pt", ".mp4")  # worth a copy: data, checkpoints, teacher caches; not records
_LEFTOVER = re.compile(r"\..+\.[0-9a-f]{8}\.tmp")


@dataclass(frozen=True)
class StorageSettings:
    """How patiently a store is asked.

    attempts: of one operation, at least 1. timeout_s: of one connection or read. first_wait_s, longest_wait_s: the wait
    before attempt n + 1 is drawn evenly from [w/2, w], w = first_wait_s * 2^(n - 1), at most longest_wait_s.
    """

    anonymous: bool = False
    attempts: int = 14  # whatever is drawn, a store that is away for half a minute is outlasted
    timeout_s: float = 60.0
    first_wait_s: float = 0.1
    longest_wait_s: float = 10.0

    @classmethod
    def from_environment(cls) -> StorageSettings:
        """Raises: UsageError on a value that is not a number."""
        values: dict[str, Any] = {"anonymous": os.environ.get("DUALVLA_S3_ANONYMOUS") == "1"}
        for field, name, kind in (
            ("attempts", "DUALVLA_STORAGE_ATTEMPTS", int),
            ("timeout_s", "DUALVLA_STORAGE_TIMEOUT_S", float),
        ):
            if name in os.environ:
                try:
                    values[field] = kind(os.environ[name])
                except ValueError as error:
                    raise UsageError(f"{name}={os.environ[name]!r} is not a number.", f"unset {name}") from error
        return cls(**values)

    def wait_s(self, failures: int) -> float:
        longest = min(self.first_wait_s * 2 ** (failures - 1), self.longest_wait_s)
        return longest * random.uniform(0.5, 1.0)


def is_local(url: str | os.PathLike[str]) -> bool:
    return "://" not in os.fspath(url)


def join(url: str | os.PathLike[str], *parts: str) -> str:
    return "/".join([os.fspath(url).rstrip("/"), *parts])


def _filesystem(url: str):  # type: ignore[no-untyped-def]  # fsspec is untyped
    try:
        import fsspec
    except ModuleNotFoundError as error:
        raise PlatformError(f"'{url}' needs fsspec.", 'pip install "dualvla[data]"') from error
    protocol = url.split("://", 1)[0]
    options: dict[str, Any] = {}
    if protocol in _S3:
        settings = StorageSettings.from_environment()
        options = {
            "anon": settings.anonymous,
            "endpoint_url": os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"),
            "use_listings_cache": False,  # other processes write what this one lists
            "config_kwargs": {
                "retries": {"total_max_attempts": 1},
                "connect_timeout": settings.timeout_s,
                "read_timeout": settings.timeout_s,
            },
        }
    try:
        fs, path = fsspec.core.url_to_fs(url, **options)
    except (ValueError, ImportError) as error:  # an unknown protocol, or one whose library is missing
        raise UsageError(
            f"'{url}' cannot be opened: {error}.", "pass a local path, s3://... or a fsspec URL"
        ) from error
    if protocol in _S3:
        fs.retries = 1
    return fs, path


def _passing_errors() -> tuple[type[BaseException], ...]:
    """What a store may fail with now and not in a moment, beside the OSErrors of `_PASSING`."""
    kinds: list[type[BaseException]] = [TimeoutError, ConnectionError]
    with contextlib.suppress(ModuleNotFoundError):
        from aiohttp import ClientError

        kinds.append(ClientError)
    with contextlib.suppress(ModuleNotFoundError):
        from botocore.exceptions import HTTPClientError, IncompleteReadError, ResponseStreamingError
        from botocore.parsers import ResponseParserError

        kinds += [HTTPClientError, IncompleteReadError, ResponseStreamingError, ResponseParserError]
    return tuple(kinds)


def _no_credentials() -> tuple[type[BaseException], ...]:
    kinds: list[type[BaseException]] = []
    with contextlib.suppress(ModuleNotFoundError):
        from botocore.exceptions import NoCredentialsError, PartialCredentialsError

        kinds += [NoCredentialsError, PartialCredentialsError]
    return tuple(kinds)


def _ask(url: str, operation: Callable[[], T]) -> T:
    """The answer of a store, asked again while it fails in a way that passes.

    Raises: StorageError after `attempts` failures, or without credentials; other OSErrors at once, as they are.
    """
    settings = StorageSettings.from_environment()
    passing, no_credentials = _passing_errors(), _no_credentials()
    failures: tuple[type[BaseException], ...] = (*passing, OSError)
    for attempt in range(1, settings.attempts + 1):
        try:
            return operation()
        except no_credentials as error:
            raise StorageError(
                f"No credentials for '{url}'.",
                "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or DUALVLA_S3_ANONYMOUS=1",
            ) from error
        except failures as error:
            if not isinstance(error, passing) and cast(OSError, error).errno not in _PASSING:
                raise
            if attempt == settings.attempts:
                raise StorageError(
                    f"'{url}': the store failed {attempt} times, at last with: {error or type(error).__name__}.",
                    "try later: the same command resumes; DUALVLA_STORAGE_ATTEMPTS raises the bound",
                ) from error
            wait_s = settings.wait_s(attempt)
            log.debug("'%s': attempt %d failed (%s), the next in %.1f s", url, attempt, error, wait_s)
            time.sleep(wait_s)
    raise UsageError(f"DUALVLA_STORAGE_ATTEMPTS={settings.attempts} allows no attempt.", "set it to 1 or more")


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
        refused = (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR, errno.EEXIST)
        if error.errno in refused or isinstance(error, PermissionError):
            raise OutputError(
                f"Cannot write '{url}': {error.strerror or error}.", "pass an --out you may write to"
            ) from error
        if isinstance(error, FileNotFoundError):  # a bucket: folders are made
            raise OutputError(f"Cannot write '{url}': {error}.", "make the bucket first") from error
        raise


@contextlib.contextmanager
def _reading(url: str) -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise DataError(f"'{url}' does not exist.", "check the path") from error
    except PermissionError as error:
        raise DataError(f"'{url}' may not be read: {error}.", "check its permissions, or the credentials") from error


def write_bytes(url: str | os.PathLike[str], data: bytes) -> None:
    """Atomic: readers see the old content or the whole new one."""
    url = os.fspath(url)
    with writing(url):
        if is_local(url):
            _write_local(Path(url), data)
            return
        fs, path = _filesystem(url)
        if url.split("://", 1)[0] in _ATOMIC_PUT:
            _ask(url, lambda: fs.pipe_file(path, data))
            return
        parent, _, name = path.rpartition("/")
        temporary = f"{parent}/{_temporary(name)}"
        _ask(url, lambda: fs.makedirs(parent, exist_ok=True))
        _ask(url, lambda: fs.pipe_file(temporary, data))
        _ask(url, lambda: fs.mv(temporary, path))


def _write_local(target: Path, data: bytes) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(_temporary(target.name))
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _temporary(name: str) -> str:
    return f".{name}.{uuid.uuid4().hex[:8]}.tmp"


def remove_leftovers(folder: str | os.PathLike[str]) -> None:
    """Deletes the temporary files that killed writers left anywhere below `folder`; nobody may be writing there now."""
    url = os.fspath(folder)
    with writing(url):
        if is_local(url):
            for path in Path(url).rglob(".*.tmp"):
                if _LEFTOVER.fullmatch(path.name):
                    path.unlink(missing_ok=True)
        elif url.split("://", 1)[0] not in _ATOMIC_PUT:
            fs, path = _filesystem(url)
            for found in _ask(url, lambda: fs.find(path)):
                if _LEFTOVER.fullmatch(found.rsplit("/", 1)[-1]):
                    _ask(url, functools.partial(fs.rm_file, found))


def upload(path: Path, url: str) -> None:
    """Copies a file of any size into a store without reading it into memory (S3: it appears whole or not at all)."""
    fs, target = _filesystem(url)
    with writing(url):
        _ask(url, lambda: fs.put_file(str(path), target))


def read_bytes(url: str | os.PathLike[str]) -> bytes:
    """Raises: DataError if there is no such file."""
    url = os.fspath(url)
    with _reading(url):
        if is_local(url):
            return Path(url).read_bytes()
        fs, path = _filesystem(url)
        copy = _local_copy(url, fs, path)
        if copy is not None:
            with copy:
                return copy.read()
        return _ask(url, lambda: fs.cat_file(path))


def open_reader(url: str | os.PathLike[str]) -> BinaryIO:
    """A seekable binary file over a file of any size: only what is asked for is read, unless a copy is kept here.

    Raises: DataError if there is no such file.
    """
    url = os.fspath(url)
    with _reading(url):
        if is_local(url):
            return open(url, "rb")
        fs, path = _filesystem(url)
        copy = _local_copy(url, fs, path)
        if copy is not None:
            return copy
        size = int(_ask(url, lambda: fs.info(path))["size"])
        return cast(BinaryIO, io.BufferedReader(_RemoteFile(url, fs, path, size), _READ_AHEAD_BYTES))


def _local_copy(url: str, fs: Any, path: str) -> BinaryIO | None:
    """The file on this machine's disk, copied there if need be; None where none is kept of it."""
    cache = LocalCache.from_environment()
    if cache is None or not path.endswith(_LARGE):
        return None
    now = _ask(url, lambda: fs.info(path))

    def fetch(target: Path) -> bool:
        def download() -> bool:
            fs.get_file(path, str(target))
            then = fs.info(path)
            if target.stat().st_size != then["size"]:
                raise OSError(errno.EIO, "the file came incomplete")
            return bool(then == now)

        return _ask(url, download)

    return cache.open(url, str(sorted(now.items())), int(now["size"]), fetch)


class _RemoteFile(io.RawIOBase):
    """Reads byte ranges of one object, each range with retries."""

    def __init__(self, url: str, fs: Any, path: str, size: int):
        self._url, self._fs, self._path, self._size = url, fs, path, size
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = max(0, offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence])
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        start, end = self._at, min(self._size, self._at + len(buffer))
        if start >= end:
            return 0
        data = _ask(self._url, lambda: self._fs.cat_file(self._path, start=start, end=end))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def exists(url: str | os.PathLike[str]) -> bool:
    url = os.fspath(url)
    if is_local(url):
        return Path(url).exists()
    fs, path = _filesystem(url)
    return _ask(url, lambda: fs.exists(path))


def size_bytes(url: str | os.PathLike[str]) -> int:
    """Raises: DataError if there is no such file."""
    url = os.fspath(url)
    with _reading(url):
        if is_local(url):
            return Path(url).stat().st_size
        fs, path = _filesystem(url)
        return int(_ask(url, lambda: fs.info(path))["size"])


def modified_s(url: str | os.PathLike[str]) -> float:
    """When a file was last written, in seconds since the epoch. Raises: DataError if there is no such file."""
    url = os.fspath(url)
    with _reading(url):
        if is_local(url):
            return Path(url).stat().st_mtime
        fs, path = _filesystem(url)
        return float(_ask(url, lambda: fs.modified(path)).timestamp())


def remove(url: str | os.PathLike[str]) -> None:
    """Removes one file; nothing happens if there is none. Locally also the folder it leaves empty."""
    url = os.fspath(url)
    if is_local(url):
        path = Path(url)
        path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # not empty, or gone
            path.parent.rmdir()
        return
    fs, name = _filesystem(url)
    with contextlib.suppress(FileNotFoundError):
        _ask(url, lambda: fs.rm_file(name))


def remove_tree(folder: str | os.PathLike[str]) -> None:
    """Removes a folder and all below it; nothing happens if there is none."""
    folder = os.fspath(folder)
    if is_local(folder):
        shutil.rmtree(folder, ignore_errors=True)
        return
    fs, path = _filesystem(folder)
    with contextlib.suppress(FileNotFoundError):
        _ask(folder, lambda: fs.rm(path, recursive=True))


def list_files(folder: str | os.PathLike[str], suffix: str = "") -> list[str]:
    """Sorted URLs of the files directly in `folder`; empty if there is no such folder. Skips temporary files."""
    folder = os.fspath(folder)
    if is_local(folder):
        names = [p.name for p in Path(folder).iterdir() if p.is_file()] if Path(folder).is_dir() else []
    else:
        names = list(_list_remote(folder, "file"))
    return [join(folder, n) for n in sorted(names) if n.endswith(suffix) and not n.startswith(".")]


def file_sizes(folder: str | os.PathLike[str]) -> dict[str, int]:
    """URL -> bytes of each file directly in `folder`, by one listing; empty if there is no such folder."""
    folder = os.fspath(folder)
    if is_local(folder):
        return {file: Path(file).stat().st_size for file in list_files(folder)}
    return {join(folder, name): size for name, size in sorted(_list_remote(folder, "file").items())}


def list_folders(folder: str | os.PathLike[str]) -> list[str]:
    """Sorted URLs of the folders directly in `folder`; empty if there is none. Skips hidden ones."""
    folder = os.fspath(folder)
    if is_local(folder):
        names = [p.name for p in Path(folder).iterdir() if p.is_dir()] if Path(folder).is_dir() else []
    else:
        names = list(_list_remote(folder, "directory"))
    return [join(folder, n) for n in sorted(names) if not n.startswith(".")]


def _list_remote(folder: str, kind: str) -> dict[str, int]:
    """Name -> bytes."""
    fs, path = _filesystem(folder)
    try:
        entries = _ask(folder, lambda: fs.ls(path, detail=True))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    here = path.rstrip("/")
    found = {e["name"].rstrip("/"): int(e.get("size") or 0) for e in entries if e["type"] == kind}
    # A store may list the folder's own marker.
    return {name.rsplit("/", 1)[-1]: size for name, size in found.items() if name != here}
