"""A served policy as a local `Policy`: each session has a connection of its own, batches go out together."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from dualvla.client.asynchronous import AsyncPolicyClient
from dualvla.client.options import ClientOptions
from dualvla.client.synchronous import in_background, wait_for
from dualvla.schema import Observation, PolicyReply, PolicySpec
from dualvla.wire import messages


class RemotePolicy:
    """Drop-in for evaluation; arguments and errors are those of AsyncPolicyClient.

    A session's observations are asked in their order, different sessions at the same time.
    """

    def __init__(self, url: str, key: str | None = None, *, options: ClientOptions = ClientOptions()):
        self._url, self._key, self._options = url, key, options
        self._clients: dict[str, AsyncPolicyClient] = {}
        self.spec = wait_for(in_background(self._ask_spec()))

    def infer(self, observations: Sequence[Observation], sessions: Sequence[str]) -> list[PolicyReply]:
        return wait_for(in_background(self._infer(observations, sessions)))

    def reset(self, session: str) -> None:
        client = self._clients.pop(session, None)
        if client is not None:
            wait_for(in_background(client.close()))  # the server forgets a session whose connection closes

    def close(self) -> None:
        for session in list(self._clients):
            self.reset(session)

    async def _ask_spec(self) -> PolicySpec:
        async with AsyncPolicyClient(self._url, self._key, options=self._options) as client:
            return await client.spec()

    async def _infer(self, observations: Sequence[Observation], sessions: Sequence[str]) -> list[PolicyReply]:
        replies: dict[int, PolicyReply] = {}

        async def ask(client: AsyncPolicyClient, indices: Sequence[int]) -> None:
            for index in indices:
                replies[index] = messages.reply_from_wire(await client.infer(observations[index]))

        by_session: dict[str, list[int]] = {}
        for index, session in enumerate(sessions):
            by_session.setdefault(session, []).append(index)
        asked = [ask(self._client(session), indices) for session, indices in by_session.items()]
        for outcome in await asyncio.gather(*asked, return_exceptions=True):
            if outcome is not None:
                raise outcome
        return [replies[index] for index in range(len(observations))]

    def _client(self, session: str) -> AsyncPolicyClient:
        if session not in self._clients:
            self._clients[session] = AsyncPolicyClient(self._url, self._key, session=session, options=self._options)
        return self._clients[session]
