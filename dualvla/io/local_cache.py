"""Copies of a store's large files on this machine's own disk, by name and version, bounded in size.

Any number of processes share one folder: a file appears whole by a rename, of those that want the same one only one
fetches it, and one that is deleted while it is read stays readable to its end. Knows no store: who asks brings the
version, so a copy is never older than what the store says now.

Environment: DUALVLA_CACHE names the folder (none: nothing is kept); DUALVLA_CACHE_GB bounds it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from dualvla.errors import UsageError

log = logging.getLogger(__name__)

_AFTER_CLEANING = 0.9  # of the bound: so that not every new file cleans up
_LOCKS = 64
_ABANDONED_S = 3600.0
_GB = 10**9


@dataclass(frozen=True)
class LocalCache:
    """folder: on a local disk. most_gb: of all copies together, in 10^9 bytes; the longest unread go first."""

    folder: Path
    most_gb: float = 100.0

    @classmethod
    def from_environment(cls) -> LocalCache | None:
        """None unless DUALVLA_CACHE names a folder. Raises: UsageError on a bound that is no number above 0."""
        folder = os.environ.get("DUALVLA_CACHE")
        if not folder:
            return None
        text = os.environ.get("DUALVLA_CACHE_GB", str(cls.most_gb))
        try:
            most_gb = float(text)
        except ValueError:
            most_gb = 0.0
        if not most_gb > 0:
            raise UsageError(f"DUALVLA_CACHE_GB={text!r} is no number above 0.", "unset DUALVLA_CACHE_GB")
        return cls(Path(folder), most_gb)

    def open(self, name: str, version: str, size: int, fetch: Callable[[Path], bool]) -> BinaryIO | None:
        """The copy of this version of a file of `size` bytes, fetched if it is not there.

        fetch: writes it to a path; False if that was another version after all. None: it is not kept, because it is
        larger than the bound, changed meanwhile, or does not fit on the disk.
        """
        if size > self.most_gb * _GB:
            return None
        copy = self.folder / hashlib.sha256(f"{name}\0{version}".encode()).hexdigest()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._lock(copy.name):
                return self._opened(copy, size) or self._fetched(copy, size, fetch)
        except OSError as error:
            log.warning("'%s' is not kept in '%s': %s", name, self.folder, error)
            return None

    def _opened(self, copy: Path, size: int) -> BinaryIO | None:
        """A copy that a power cut left without its bytes counts as none."""
        try:
            file = copy.open("rb")
        except FileNotFoundError:
            return None
        if os.fstat(file.fileno()).st_size != size:
            file.close()
            return None
        os.utime(file.fileno())  # read just now
        return file

    def _fetched(self, copy: Path, size: int, fetch: Callable[[Path], bool]) -> BinaryIO | None:
        self._make_room(size)
        part = copy.with_name(f"{copy.name}.{uuid.uuid4().hex[:8]}.part")
        try:
            if not fetch(part):
                return None
            file = part.open("rb")  # before another process can find it, and make room at its cost
            os.replace(part, copy)
            return file
        finally:
            part.unlink(missing_ok=True)

    def _make_room(self, size: int) -> None:
        """For one more file; also takes away what killed processes left half fetched."""
        found = []
        for entry in os.scandir(self.folder):
            with contextlib.suppress(FileNotFoundError):  # another process makes room, too
                status = entry.stat()
                if not entry.name.startswith("lock-"):
                    found.append((status.st_mtime, status.st_size, entry))
        total = size + sum(length for _, length, _ in found)
        bound = self.most_gb * _GB
        cleaning = total > bound
        for modified, length, entry in sorted(found, key=lambda one: one[0]):
            half = entry.name.endswith(".part")
            abandoned = half and time.time() - modified > _ABANDONED_S
            if abandoned or (cleaning and not half and total > _AFTER_CLEANING * bound):
                Path(entry.path).unlink(missing_ok=True)
                total -= length

    @contextlib.contextmanager
    def _lock(self, name: str) -> Iterator[None]:
        """Held by one process for the files of a name's kind; given back by the system if that one dies."""
        with (self.folder / f"lock-{int(name[:8], 16) % _LOCKS:02d}").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
