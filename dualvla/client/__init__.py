"""The robot's side of a served policy: ask it, get actions back. Knows numpy, msgpack, websockets; no torch, no Ray.

    with PolicyClient("ws://127.0.0.1:8000", key="...") as client:
        reply = client.infer(Observation(images={"main": image}, instruction="pick up the red cube", step=0, id="0"))
        robot.execute(reply["actions"])

One client is one session: the policy behind it remembers what this robot saw until `reset` or `close`.

    PolicyClient, AsyncPolicyClient  one observation, one reply        (dialogue.py has the words, the rest the sockets)
    ActionStream                     one action a control period, while chunks come in the background or not at all
    ChunkBuffer                      chunks joined in time
    RemotePolicy                     a served policy as a local `Policy`
"""

from dualvla.client.asynchronous import AsyncPolicyClient
from dualvla.client.chunks import ChunkBuffer
from dualvla.client.dialogue import KEY_VARIABLE, Reply
from dualvla.client.options import ClientOptions
from dualvla.client.remote import RemotePolicy
from dualvla.client.stream import ActionStream, Command, StreamOptions
from dualvla.client.synchronous import PolicyClient

__all__ = [
    "KEY_VARIABLE",
    "ActionStream",
    "AsyncPolicyClient",
    "ChunkBuffer",
    "ClientOptions",
    "Command",
    "PolicyClient",
    "RemotePolicy",
    "Reply",
    "StreamOptions",
]
