"""Who may use an endpoint: keys from a file, kept as digests and compared in constant time. Knows no protocol.

A keys file has one key a line, after it its scopes (default `infer`) and, optionally, `expires=2027-01-31` or
`expires=2027-01-31T12:00:00Z`; empty lines and lines starting with # are skipped. Only digests leave this module, so no
key can end in a log, in Ray's object store or in a traceback.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from dualvla.errors import UsageError, did_you_mean

log = logging.getLogger("dualvla.serve")

SCOPES = ("infer", "admin")
MIN_KEY_LENGTH = 16
_EXPIRES = "expires="
_LOOK_EVERY_S = 1.0


@dataclass(frozen=True)
class Identity:
    """Who asks. id: the first digits of the key's digest, good for logs and for telling keys apart."""

    id: str
    scopes: frozenset[str]


@dataclass(frozen=True)
class Entry:
    """digest: sha256 of the key. expires: Unix time, None for never."""

    digest: str
    scopes: frozenset[str]
    expires: float | None = None


@dataclass(frozen=True)
class KeyRing:
    entries: tuple[Entry, ...]

    def identify(self, key: str, now: float | None = None) -> Identity | None:
        """Takes the same time for every key: all entries are compared, whichever matches. now: Unix time."""
        moment = time.time() if now is None else now
        digest = _digest(key)
        found: Identity | None = None
        for entry in self.entries:
            matches = hmac.compare_digest(digest, entry.digest)
            if matches and (entry.expires is None or moment < entry.expires):
                found = Identity(entry.digest[:12], entry.scopes)
        return found

    def allows(self, key: str, scope: str) -> bool:
        identity = self.identify(key)
        return identity is not None and scope in identity.scopes


class KeyFile:
    """The ring of a file that may be edited while the endpoint runs: it is read again within a second of a change.

    A file that cannot be read leaves the ring as it was: a slip of an editor must not stop every robot.
    """

    def __init__(self, path: str, clock: Callable[[], float] = time.monotonic):
        """Raises: UsageError."""
        self._path, self._clock = path, clock
        self._stamp = _stamp(path)
        self._ring = read_keys(path)
        self._looked = clock()
        self.reloads = 0

    def identify(self, key: str) -> Identity | None:
        if self._clock() - self._looked >= _LOOK_EVERY_S:
            self._look()
        return self._ring.identify(key)

    def _look(self) -> None:
        self._looked = self._clock()
        stamp = _stamp(self._path)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._ring = read_keys(self._path)
        except UsageError as error:
            log.error("the keys stay as they were: %s", error)
            return
        self.reloads += 1
        log.info("read %d keys again", len(self._ring.entries))


def read_keys(path: str) -> KeyRing:
    """Raises: UsageError naming the file and line, never the key."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"The keys file '{path}' cannot be read: {error}.", "pass a text file, one key a line"
        ) from None
    entries = []
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.startswith("#"):
            continue
        key, *words = line.split()
        if len(key) < MIN_KEY_LENGTH:
            raise UsageError(
                f"{path}:{number}: a key has at least {MIN_KEY_LENGTH} characters, this one {len(key)}.",
                "make one with `openssl rand -hex 24`",
            )
        scopes = [word for word in words if not word.startswith(_EXPIRES)]
        for scope in scopes:
            if scope not in SCOPES:
                raise UsageError(f"{path}:{number}: unknown scope '{scope}'.", did_you_mean(scope, SCOPES))
        dates = [word.removeprefix(_EXPIRES) for word in words if word.startswith(_EXPIRES)]
        expires = min((_unix_time(date, f"{path}:{number}") for date in dates), default=None)
        entries.append(Entry(_digest(key), frozenset(scopes or ("infer",)), expires))
    if not entries:
        raise UsageError(f"Keys file '{path}' holds no key.", "write one key a line")
    return KeyRing(tuple(entries))


def presented_key(authorization: str) -> str:
    """The key in an `Authorization` header: `Bearer KEY`, `Api-Key KEY`, or the password of `Basic` (for clients that
    can only put it into their URL, as in ws://robot:KEY@host, and for browsers). Empty if there is none."""
    scheme, _, value = authorization.strip().partition(" ")
    if scheme.lower() in ("bearer", "api-key"):
        return value.strip()
    if scheme.lower() != "basic":
        return ""
    try:
        return base64.b64decode(value.strip(), validate=True).decode().partition(":")[2]
    except (binascii.Error, UnicodeDecodeError, ValueError):
        return ""


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def _unix_time(text: str, where: str) -> float:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise UsageError(f"{where}: '{text}' is no date.", "write expires=2027-01-31 or 2027-01-31T12:00:00Z") from None
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _stamp(path: str) -> tuple[int, ...] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
