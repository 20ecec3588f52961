"""Who may use an endpoint: keys from a file, kept as digests and compared in constant time. Knows no protocol.

A keys file has one key a line, its scopes after a space (default `infer`); empty lines and lines starting with # are
skipped. Only digests leave this module, so no key can end in a log, in Ray's object store or in a traceback.
"""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass
from pathlib import Path

from dualvla.errors import UsageError, did_you_mean

SCOPES = ("infer", "admin")
MIN_KEY_LENGTH = 16
_SCHEMES = ("bearer", "api-key")


@dataclass(frozen=True)
class KeyRing:
    """(sha256 of the key, scopes) of every key."""

    entries: tuple[tuple[str, frozenset[str]], ...]

    def allows(self, key: str, scope: str) -> bool:
        """Takes the same time for every key: all entries are compared, whichever matches."""
        digest = _digest(key)
        allowed = False
        for known, scopes in self.entries:
            allowed |= hmac.compare_digest(digest, known) and scope in scopes
        return allowed


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
        key, *scopes = line.split()
        if len(key) < MIN_KEY_LENGTH:
            raise UsageError(
                f"{path}:{number}: a key has at least {MIN_KEY_LENGTH} characters, this one {len(key)}.",
                "make one with `openssl rand -hex 24`",
            )
        for scope in scopes:
            if scope not in SCOPES:
                raise UsageError(f"{path}:{number}: unknown scope '{scope}'.", did_you_mean(scope, SCOPES))
        entries.append((_digest(key), frozenset(scopes or ("infer",))))
    if not entries:
        raise UsageError(f"Keys file '{path}' holds no key.", "write one key a line")
    return KeyRing(tuple(entries))


def presented_key(authorization: str) -> str:
    """The key in an `Authorization` header, `Bearer KEY` or `Api-Key KEY`; empty if there is none."""
    scheme, _, key = authorization.strip().partition(" ")
    return key.strip() if scheme.lower() in _SCHEMES else ""


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()
