"""What a model judge needs of a model: one conversation in, one text out. Knows no particular model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

from dualvla.errors import DualVLAError
from dualvla_eval.judges.prompt import Message


class PassingError(DualVLAError):
    """No answer this time; asking again may help: too many requests, a server error, a time-out, a lost connection."""

    @property
    def retry_after_s(self) -> float | None:
        """What the server asks to wait, if it says."""
        return self.args[2] if len(self.args) > 2 else None

    def __init__(self, message: str, fix: str | None = None, retry_after_s: float | None = None):
        super().__init__(message, fix)
        self.args = (message, fix, retry_after_s)


class RefusedError(DualVLAError):
    """This one conversation is refused (a content filter, too long): no answer, and asking again does not help."""


class BudgetError(DualVLAError):
    """The calls or tokens that were allowed are used up. What has been judged is kept."""


@dataclass(frozen=True)
class Reply:
    """tokens are 0 where the server does not count them."""

    text: str
    prompt_tokens: int = 0
    completion_tokens: int = 0


class Chat(Protocol):
    """model: what answers, for the results and the cache: equal models give equal names.

    A context manager around the work of one event loop; it may be entered again in another one.
    """

    model: str

    async def __aenter__(self) -> Self: ...

    async def __aexit__(self, *_: object) -> None: ...

    async def ask(self, messages: Sequence[Message], schema: Mapping[str, Any]) -> Reply:
        """Raises: PassingError, RefusedError for this conversation; any other DualVLAError ends the whole work."""
