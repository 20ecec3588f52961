"""A model at an OpenAI-compatible endpoint (OpenAI, vLLM, ...), one attempt a call. Knows HTTP statuses, no judging.

The key is read from an environment variable only and handed to the client: it stands in no option, file, error or log.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import openai

from dualvla.errors import ServerError, UsageError
from dualvla_eval.judges.chat import PassingError, RefusedError, Reply
from dualvla_eval.judges.prompt import Message

_NO_KEY = "none"  # what servers on one's own machine take
_PASSING_STATUS = (408, 409, 425, 429)
_REFUSED_STATUS = (400, 413, 422)


@dataclass(frozen=True)
class OpenAIOptions:
    """base_url: of the endpoint (default: OPENAI_BASE_URL, else OpenAI). api_key_env: the variable that holds the key.

    timeout_s: of one call. temperature: null where a model takes none. seed: null for none. max_reply_tokens: of one
    answer. response_format: how the form is asked for: json_schema where the endpoint enforces one, else json_object or
    none. The answer is checked all the same.
    """

    base_url: str | None = None
    api_key_env: str = "OPENAI_API_KEY"
    timeout_s: float = 120.0
    temperature: float | None = 0.0
    seed: int | None = 0
    max_reply_tokens: int = 1024
    response_format: Literal["json_schema", "json_object", "none"] = "json_schema"

    @property
    def sampling(self) -> dict[str, Any]:
        """All that changes an answer beside the prompt and the model."""
        names = ("temperature", "seed", "max_reply_tokens", "response_format")
        return {name: getattr(self, name) for name in names}


class OpenAIChat:
    """See the module. Raises: UsageError if no key is set for OpenAI itself."""

    def __init__(self, model: str, options: OpenAIOptions):
        self.model = model
        self._options = options
        base_url = options.base_url or os.environ.get("OPENAI_BASE_URL")
        key = os.environ.get(options.api_key_env)
        if key is None and base_url is None:
            raise UsageError(
                f"No key for OpenAI: {options.api_key_env} is not set.",
                f"export {options.api_key_env}=..., or name another endpoint with --set openai.base_url=http://HOST/v1",
            )
        self._base_url, self._key = base_url, key or _NO_KEY

    async def __aenter__(self) -> Self:
        self._client = openai.AsyncOpenAI(
            base_url=self._base_url, api_key=self._key, timeout=self._options.timeout_s, max_retries=0
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.close()

    async def ask(self, messages: Sequence[Message], schema: Mapping[str, Any]) -> Reply:
        try:
            answer = await self._client.chat.completions.create(**self._request(messages, schema))
        except openai.APITimeoutError as error:
            raise PassingError(f"no answer within {self._options.timeout_s:g} s") from error
        except openai.APIStatusError as error:
            raise self._translate(error) from error
        except openai.APIConnectionError as error:
            raise PassingError(f"no connection: {error.__cause__ or error}") from error
        except openai.APIError as error:  # an answer that is no completion at all
            raise PassingError(f"no completion: {type(error).__name__}") from error
        except json.JSONDecodeError as error:  # a proxy's page that calls itself JSON
            raise PassingError("no completion: not JSON") from error
        return _reply(answer)

    def _request(self, messages: Sequence[Message], schema: Mapping[str, Any]) -> dict[str, Any]:
        options = self._options
        request: dict[str, Any] = {"model": self.model, "messages": list(messages)}
        request["max_completion_tokens"] = options.max_reply_tokens
        if options.temperature is not None:
            request["temperature"] = options.temperature
        if options.seed is not None:
            request["seed"] = options.seed
        if options.response_format == "json_schema":
            form = {"name": "verdict", "strict": True, "schema": dict(schema)}
            request["response_format"] = {"type": "json_schema", "json_schema": form}
        elif options.response_format == "json_object":
            request["response_format"] = {"type": "json_object"}
        return request

    def _translate(self, error: openai.APIStatusError) -> PassingError | RefusedError | ServerError:
        status = error.status_code
        if status in _PASSING_STATUS or status >= 500:
            return PassingError(f"HTTP {status}", retry_after_s=_retry_after_s(error))
        if status in _REFUSED_STATUS:
            return RefusedError(f"HTTP {status}: {error.message}"[:300])
        return ServerError(
            f"The judge's endpoint answered HTTP {status} for model '{self.model}'.",
            f"check the model's name, openai.base_url and the key in {self._options.api_key_env}",
        )


def _reply(answer: Any) -> Reply:
    """Of what a server sent; one that is no completion, though its status was 200, is a passing failure."""
    choices = getattr(answer, "choices", None)
    message = getattr(choices[0], "message", None) if choices else None
    if message is None:
        raise PassingError("an answer without a message")
    usage = getattr(answer, "usage", None)
    return Reply(
        message.content or "",
        getattr(usage, "prompt_tokens", None) or 0,
        getattr(usage, "completion_tokens", None) or 0,
    )


def _retry_after_s(error: openai.APIStatusError) -> float | None:
    """Seconds of the header; the other form of it, a date, is not used by such servers."""
    text = error.response.headers.get("retry-after", "")
    return float(text) if text.replace(".", "", 1).isdecimal() else None
