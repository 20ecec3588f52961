"""What a model judge is shown: one system message and one user message of texts and pictures.

Texts of policies, tasks and examples are *data*: escaped here so that they can neither close their delimiter, nor look
like another message to a chat template, nor hide characters. Knows recorded trajectories; nothing of who answers.
"""

from __future__ import annotations

import base64
import hashlib
import json
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import numpy as np

from dualvla_eval import frames
from dualvla_eval.results import Trajectory

Message = dict[str, Any]

# Written as they are. All else becomes \uXXXX: no bracket, quote or control character of a text reaches the model.
_PLAIN = frozenset(string.ascii_letters + string.digits + " .,:;!?'()+-=%/_")
_TEXT_LIMIT = 600  # characters of one text; a longer one is cut, and that is said
_TEXTS_A_FRAME = 6  # newly said texts between two pictures; more are counted
_MOVING_M = 0.005  # both motions of a reversal are at least this long
_TEMPLATES = ("system", "reasoning_marks", "case", "examples", "example", "closing", "repair")


@dataclass(frozen=True)
class Example:
    """A scored trajectory to learn the scale from. marks: of the JSON answer. pictures: JPEGs."""

    id: str
    task: str
    texts: tuple[str, ...]
    marks: Mapping[str, int]
    rationale: str
    pictures: tuple[bytes, ...]


@dataclass(frozen=True)
class Prompt:
    """messages: as the chat API takes them. texts: what the policy said, as shown. asks_reasoning: R and RA too."""

    messages: tuple[Message, ...]
    texts: tuple[str, ...]
    asks_reasoning: bool

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(self.messages, sort_keys=True).encode()).hexdigest()

    @property
    def pictures(self) -> int:
        return sum(part["type"] == "image_url" for part in self.messages[1]["content"])

    @property
    def characters(self) -> int:
        written = (part["text"] for part in self.messages[1]["content"] if part["type"] == "text")
        return len(self.messages[0]["content"]) + sum(map(len, written))


def build(
    trajectory: Trajectory,
    shown: Sequence[tuple[int, str]],
    pictures: Sequence[bytes],
    *,
    examples: Sequence[Example],
    order: Sequence[int],
    detail: str,
) -> Prompt:
    """shown: (step, why) of each picture. order: in which the pictures are listed."""
    said = statements(trajectory)
    asks_reasoning = bool(said)
    content: list[dict[str, Any]] = []
    for number, example in enumerate(examples, 1):
        intro = fill("examples") if number == 1 else ""
        content.append(_text(intro + _example(number, example, asks_reasoning)))
        content += [_picture(p, detail) for p in example.pictures]
    content.append(
        _text(
            fill(
                "case",
                task=as_data(str(trajectory.row["instruction"])),
                steps=trajectory.num_steps,
                frames=len(shown),
            )
        )
    )
    for i in order:
        since = shown[i - 1][0] if i else None
        content.append(_text(_label(trajectory, said, i, len(shown), shown[i], since)))
        content.append(_picture(pictures[i], detail))
    content.append(_text(fill("closing")))
    marks = fill("reasoning_marks") if asks_reasoning else ""
    system = fill("system", reasoning_marks=marks, answer=answer_form(asks_reasoning))
    messages = ({"role": "system", "content": system}, {"role": "user", "content": content})
    return Prompt(messages, tuple(text for _, text in said), asks_reasoning)


def repair(prompt: Prompt, reply: str, problem: str) -> list[Message]:
    """The conversation that asks once more after an answer that could not be read."""
    again = fill("repair", problem=problem, answer=answer_form(prompt.asks_reasoning))
    return [
        *prompt.messages,
        {"role": "assistant", "content": as_data(reply, limit=4 * _TEXT_LIMIT)},
        {"role": "user", "content": again},
    ]


def answer_form(asks_reasoning: bool) -> str:
    more = ', "Reasoning": int, "Alignment": int' if asks_reasoning else ""
    return f'{{"Thought": str, "Result": {{"Action": int, "Intention": int{more}, "Success": bool}}}}'


def as_data(text: str, limit: int = _TEXT_LIMIT) -> str:
    """A JSON string of plain characters and \\uXXXX alone; what is longer than `limit` is cut and says so."""
    cut = f" (cut after {limit} of {len(text)} characters)" if len(text) > limit else ""
    return '"' + "".join(c if c in _PLAIN else _escaped(c) for c in text[:limit]) + '"' + cut


def _escaped(character: str) -> str:
    code = character.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{code[i]:02x}{code[i + 1]:02x}" for i in range(0, len(code), 2))


def statements(trajectory: Trajectory) -> list[tuple[int, str]]:
    """(first step, text) of every text that differs from the one before it."""
    found: list[tuple[int, str]] = []
    before: str | None = None
    for step, text in enumerate(trajectory.reasoning):
        if text is not None and text != before:
            found.append((step, text))
        before = text
    return found


def fill(name: str, **values: Any) -> str:
    """A template of `prompts/` with its places filled in; what is filled in is never looked at again."""
    return _template(name).format(**values) if values else _template(name)


@cache
def _template(name: str) -> str:
    assert name in _TEMPLATES, name
    return (resources.files("dualvla_eval.prompts") / f"judge_{name}.md").read_text(encoding="utf-8")


@cache
def prompts_digest() -> str:
    """Of all templates: another wording is another judge."""
    return hashlib.sha256("\0".join(_template(name) for name in _TEMPLATES).encode()).hexdigest()[:12]


def _example(number: int, example: Example, asks_reasoning: bool) -> str:
    said = "".join(f"It wrote: <data>{as_data(text)}</data>\n" for text in example.texts[:_TEXTS_A_FRAME])
    marks = {k: v for k, v in example.marks.items() if asks_reasoning or k in ("Action", "Intention")}
    return fill(
        "example",
        number=number,
        task=as_data(example.task),
        said=said if asks_reasoning else "",
        marks=json.dumps(marks),
        rationale=as_data(example.rationale),
    )


def _label(
    trajectory: Trajectory,
    said: Sequence[tuple[int, str]],
    index: int,
    count: int,
    shown: tuple[int, str],
    since: int | None,
) -> str:
    """What stands before a picture: how it got there from the picture before, what was said on the way, and when."""
    step, why = shown
    lines = []
    if since is not None:
        lines.append(_motion(trajectory, since, step))
    lines += _said_between(said, -1 if since is None else since, step)
    reason = {frames.EVENT: "something happened", frames.GRIPPER: "the gripper moved"}.get(why, why)
    now = f"Picture {index + 1} of {count}: step {step} ({reason})"
    opening = ", ".join(f"{g:.2f}" for g in trajectory.gripper[step])
    place = ", ".join(f"{100 * v:.1f}" for v in trajectory.ee_pose[step, :3])
    lines.append(f"{now}. Tool at ({place}) cm, gripper {opening}.")
    return "\n".join(lines)


def _motion(trajectory: Trajectory, since: int, step: int) -> str:
    """Path, net way and reversals tell shaking from smooth motion, which single pictures cannot."""
    moves = np.diff(trajectory.ee_pose[since : step + 1, :3], axis=0)
    lengths = np.linalg.norm(moves, axis=1)
    net = ", ".join(f"{100 * v:+.1f}" for v in moves.sum(axis=0))
    a, b = moves[:-1], moves[1:]
    both = (lengths[:-1] > _MOVING_M) & (lengths[1:] > _MOVING_M)
    turns = int((np.sum(a * b, axis=1)[both] < 0).sum())
    return (
        f"From step {since} to {step} the tool moved ({net}) cm over a path of {100 * lengths.sum():.1f} cm; "
        f"it turned back {turns} times."
    )


def _said_between(said: Sequence[tuple[int, str]], after: int, until: int) -> list[str]:
    """The texts newly written in (after, until]."""
    new = [(t, text) for t, text in said if after < t <= until]
    lines = [f"At step {t} it wrote: <data>{as_data(text)}</data>" for t, text in new[-_TEXTS_A_FRAME:]]
    return lines if len(new) == len(lines) else [f"({len(new) - len(lines)} more texts before these)", *lines]


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text.rstrip("\n")}


def _picture(jpeg: bytes, detail: str) -> dict[str, Any]:
    url = f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"
    return {"type": "image_url", "image_url": {"url": url, "detail": detail}}
