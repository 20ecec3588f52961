"""Every error a user can cause or meet, each naming the value, the place and the fix. Knows nothing else."""

import difflib
from collections.abc import Iterable


class DualVLAError(Exception):
    """Base of all errors raised on purpose. `exit_code` is the process exit code of contract.md.

    Picklable (it crosses Ray's process boundaries): all state is in `args`.
    """

    exit_code = 1

    def __init__(self, message: str, fix: str | None = None):
        super().__init__(message, fix)

    @property
    def message(self) -> str:
        return self.args[0]

    @property
    def fix(self) -> str | None:
        return self.args[1]

    def __str__(self) -> str:
        return f"{self.message} Fix: {self.fix}" if self.fix else self.message


class UsageError(DualVLAError):
    """A command, option, recipe or configuration key that does not exist or does not fit."""

    exit_code = 2


class DataError(DualVLAError):
    """A data set, evaluation folder or file that is missing, truncated or breaks its schema."""

    exit_code = 2


class CheckpointError(DualVLAError):
    """A checkpoint that is missing, damaged, of another architecture, or does not fit data or environment."""

    exit_code = 2


class OutputError(DualVLAError):
    """An output folder that belongs to another run, or that cannot be written (full disk, permissions)."""

    exit_code = 2


class StorageError(DualVLAError):
    """A store (S3 or another) that kept failing, or that was given no credentials."""


class PlatformError(DualVLAError):
    """Something this machine lacks: a Vulkan device, an installed extra, a reachable cluster."""

    exit_code = 2


class PolicyError(DualVLAError):
    """A policy that returned nothing, NaN, or the wrong shape."""


class TrainingError(DualVLAError):
    """Training that cannot go on, such as a loss that is not finite."""


class WireError(DualVLAError):
    """A message that breaks the wire protocol: malformed, too large, or holding a type that is refused."""


class ServerError(DualVLAError):
    """A policy endpoint that cannot be reached, refuses the key, does not answer in time, or failed."""


class LateError(ServerError):
    """An observation whose deadline could not be met: refused at once, or at the deadline, never answered late."""


class StoppedError(ServerError):
    """The emergency stop is latched, or its state is not known."""


class UnsafeError(ServerError):
    """An observation that nothing may act on: too old, or from a camera that has frozen."""


class BusyError(ServerError):
    """Over a limit of requests, connections or waiting observations: ask again later."""


class SessionLostError(ServerError):
    """A session that has reached its idle or maximum lifetime, or that belongs to another key."""


def did_you_mean(value: str, options: Iterable[str]) -> str:
    """The fix to print for an unknown name: the nearest option, and all of them.

    >>> did_you_mean("speciallist", ["specialist", "dual"])
    "did you mean 'specialist'? (choose from: dual, specialist)"
    """
    names = sorted(options)
    near = difflib.get_close_matches(value, names, n=1)
    listing = f"(choose from: {', '.join(names)})"
    return f"did you mean '{near[0]}'? {listing}" if near else f"choose from: {', '.join(names)}"
