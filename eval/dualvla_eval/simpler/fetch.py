"""Brings SimplerEnv's assets: one archive of upstream's repository at a pinned commit, resumed, unpacked, checked.

Knows HTTP, tar files and the table of hashes; no git and no simulator. Nothing that does not agree with the table gets
into the folder, and no name in the archive can lead out of it.
"""

from __future__ import annotations

import gzip
import hashlib
import http.client
import logging
import os
import tarfile
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from dualvla.console import progress
from dualvla.errors import DataError, StorageError
from dualvla_eval.simpler.assets import Upstream, upstream

log = logging.getLogger(__name__)

# Folders of the repository, and what we call them.
FOLDERS = {
    "data/custom/": "custom/",
    "data/real_inpainting/": "real_inpainting/",
    "data/hab2_bench_assets/stages/": "stages/",
    "mani_skill2_real2sim/assets/descriptions/widowx_description/": "robots/widowx/",
    "mani_skill2_real2sim/assets/descriptions/googlerobot_description/": "robots/googlerobot/",
}
_CHUNK = 1 << 20
_PARTIAL, _RECEIPT = ".archive.part", ".fetched"


@dataclass(frozen=True)
class FetchOptions:
    """attempts: in a row without a byte. wait_s: between them, doubled each time."""

    url: str = "https://codeload.github.com/{repository}/tar.gz/{commit}"
    attempts: int = 5
    wait_s: float = 1.0
    timeout_s: float = 60.0


def fetch(folder: str, options: FetchOptions = FetchOptions(), known: Upstream | None = None) -> dict[str, Any]:
    """Fills `folder`. Returns {"files", "verified", "unverified": names without a pinned hash, "skipped"}.

    Raises: StorageError if the server keeps failing; DataError if a file is not what it should be.
    """
    known, root = known or upstream(), Path(folder).expanduser()
    receipt = root / _RECEIPT
    if receipt.exists() and receipt.read_text() == known.commit:
        return {**_report(root, known), "skipped": True}
    root.mkdir(parents=True, exist_ok=True)
    url = options.url.format(repository=known.repository, commit=known.commit)
    partial = root / _PARTIAL
    _download(url, partial, options)
    try:
        with gzip.open(partial) as whole:  # its checksum comes last, and tarfile would not read on to it
            for _ in _chunks(whole.read):
                pass
        _unpack(partial, root, known)
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        partial.unlink(missing_ok=True)
        raise DataError(f"The archive from '{url}' is damaged: {error}.", "run `dualvla assets fetch` again") from error
    except DataError:
        partial.unlink(missing_ok=True)
        raise
    partial.unlink()
    found = _report(root, known)
    missing = sorted(name for name in known.sha256 if not (root / name).exists())
    if missing:
        raise DataError(f"The archive from '{url}' lacks '{missing[0]}'.", f"pin another commit than {known.commit}")
    receipt.write_text(known.commit)
    return {**found, "skipped": False}


def _report(root: Path, known: Upstream) -> dict[str, Any]:
    names = {str(p.relative_to(root)) for p in root.rglob("*") if p.is_file() and p.name not in (_PARTIAL, _RECEIPT)}
    unverified = sorted(names - set(known.sha256))
    return {"files": len(names), "verified": len(names) - len(unverified), "unverified": unverified}


def _download(url: str, partial: Path, options: FetchOptions) -> None:
    """Goes on where an earlier attempt or run was cut off; from the start if the server knows no ranges."""
    failures = 0
    while True:
        before = partial.stat().st_size if partial.exists() else 0
        try:
            if _read_on(url, partial, before, options.timeout_s):
                return
            error: str = "the connection was cut"
        except (urllib.error.URLError, http.client.HTTPException, OSError) as caught:
            if isinstance(caught, urllib.error.HTTPError) and caught.code == 416:  # nothing is left to send
                return
            if isinstance(caught, urllib.error.HTTPError) and 400 <= caught.code < 500:
                raise StorageError(f"'{url}' answered {caught.code}.", "check the address, or pass --url") from caught
            error = str(caught)
        grown = partial.exists() and partial.stat().st_size > before
        failures = 0 if grown else failures + 1
        if failures >= options.attempts:
            raise StorageError(f"'{url}' keeps failing: {error}.", "run `dualvla assets fetch` again: it resumes")
        log.info("%s, going on at %.1f MB", error, partial.stat().st_size / 1e6 if partial.exists() else 0)
        time.sleep(options.wait_s * 2**failures)


def _read_on(url: str, partial: Path, start: int, timeout_s: float) -> bool:
    """Appends what is left. Returns whether the server sent all it had announced."""
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    with urllib.request.urlopen(request, timeout=timeout_s) as reply:
        resumed = reply.status == 206
        length = reply.headers.get("Content-Length")
        expected = None if length is None else int(length)
        got = 0
        megabytes = 0 if expected is None else expected >> 20
        with open(partial, "ab" if resumed else "wb") as file, progress("fetch, MB", max(megabytes, 1)) as advance:
            while chunk := reply.read(_CHUNK):
                file.write(chunk)
                advance(((got + len(chunk)) >> 20) - (got >> 20))
                got += len(chunk)
    return expected is None or got == expected


def _unpack(archive: Path, root: Path, known: Upstream) -> None:
    """Only what is in `FOLDERS`, each file checked before it gets its name."""
    with tarfile.open(archive, "r:gz") as tar:
        for member in tar:
            name = our_name(member.name)
            source = tar.extractfile(member) if name is not None and member.isfile() else None
            if name is not None and source is not None:
                _write_checked(source, root, name, known.sha256.get(name))


def our_name(member: str) -> str | None:
    """`<repository>-<commit>/data/custom/x` -> `custom/x`; None for what we do not need or would lead elsewhere."""
    _, _, path = member.partition("/")
    for theirs, ours in FOLDERS.items():
        if path.startswith(theirs):
            name = ours + path.removeprefix(theirs)
            return None if ".." in name.split("/") or name.endswith("/") else name
    return None


def _write_checked(source: IO[bytes], root: Path, name: str, sha256: str | None) -> None:
    target = root / name
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.part")
    digest = hashlib.sha256()
    with open(temporary, "wb") as file:
        for chunk in _chunks(source.read):
            digest.update(chunk)
            file.write(chunk)
    if sha256 is not None and digest.hexdigest() != sha256:
        temporary.unlink()
        raise DataError(f"'{name}' has sha256 {digest.hexdigest()}, not {sha256}.", "run `dualvla assets fetch` again")
    os.replace(temporary, target)


def _chunks(read: Callable[[int], bytes]) -> Iterator[bytes]:
    while chunk := read(_CHUNK):
        yield chunk
