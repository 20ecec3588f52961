"""The rubric judge: deterministic scores from trajectory and privileged state, each with its reasons.

docs/vla_score.md gives the formulas. Knows recorded trajectories, the reasoning grammar and the expert's truth; reads
no picture and calls no model. A text is parsed by a fixed grammar: nothing in it can talk to the judge.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dualvla_eval.judges.base import SCALE, Advance, Contribution, Verdict, unheard
from dualvla_eval.judges.oracle import Truth, read_state, truths
from dualvla_eval.reasoning import StatedReasoning, Step, parse
from dualvla_eval.results import Trajectory
from dualvla_eval.sim.base import ObjectState, SceneState
from dualvla_eval.simpler.google_tasks import MAX_STEPS as GOOGLE_TASKS
from dualvla_eval.simpler.widowx_tasks import TASKS as WIDOWX_TASKS
from dualvla_eval.tasks.blocks import TASKS

_STILL_M = 0.002  # a displacement below this is not a motion
_MOVING_M = 0.005  # both motions of a reversal are at least this long
# Mean jerk over mean speed: what the expert's corners cost, and what steps of independent direction come near to.
_SMOOTH_JERK, _ROUGH_JERK = 0.45, 2.0
_MOST_REVERSALS = 0.25
_DETOUR = 1.3  # path over the straight way that is as good as the expert's
_LIFT_M, _CARRY_M = 0.05, 0.11
_FALL_M = 0.03
_WRONG_CONTACT_POINTS, _DROP_POINTS, _COLLISION_POINTS, _MOST_PENALTIES = 2.5, 2.0, 1.5, 2
_KNOCKED_M = 0.02
_SERVING_SHARE = 0.9
_STRAIGHT = 0.6  # an approach may wander this much and still count fully
_OVER_M = 0.05  # nearer than this, horizontally, the tool is over an object
_HOVER_M = 0.095  # of the tool above an object's centre, where reaching ends
_GRIPPER_CHANGE = 0.1
_PHASE = {
    "reach": 0,
    "touch": 1,
    "lower to": 1,
    "grasp": 2,
    "pull": 2,
    "push": 2,
    "lift": 3,
    "carry": 4,
    "place": 5,
    "release": 6,
}
_DRAWER_REACH_M = 0.3  # from the centre of its front to above its inside
_DRAWER_M = 0.15  # from where an open or a close task begins to where it ends
_AXES = {
    "forward": (1, 0, 0),
    "back": (-1, 0, 0),
    "left": (0, 1, 0),
    "right": (0, -1, 0),
    "up": (0, 0, 1),
    "down": (0, 0, -1),
}


@dataclass(frozen=True)
class _Evidence:
    """A trajectory of T steps, prepared once: states T + 1, tool [T + 1, 3] m, moves [T, 3] m (tool displacements)."""

    trajectory: Trajectory
    states: list[SceneState]
    truth: list[Truth]
    tool: np.ndarray
    moves: np.ndarray

    @property
    def success(self) -> bool:
        return bool(self.trajectory.row["success"])


@dataclass(frozen=True)
class _Statement:
    """A text and the steps [start, stop) it was in force. stated: what it says, None if it is not of the grammar."""

    start: int
    stop: int
    stated: StatedReasoning | None


class RubricJudge:
    """See the module."""

    name = "rubric-2"
    identity: Mapping[str, Any] = {"judge": name}

    def judge(self, trajectories: Sequence[Trajectory], advance: Advance = unheard) -> list[Verdict]:
        found = []
        for trajectory in trajectories:
            found.append(_judge(trajectory))
            advance(1)
        return found

    def usage(self) -> None:
        return None


def _judge(trajectory: Trajectory) -> Verdict:
    if trajectory.num_steps == 0:
        return Verdict(unjudged="the episode ended before its first step")
    states = [read_state(s) for s in trajectory.states]
    if states[0].task not in {*TASKS, *WIDOWX_TASKS, *GOOGLE_TASKS}:
        return Verdict(unjudged=f"the rubric has no expert for task '{states[0].task}'")
    tool = trajectory.ee_pose[:, :3]
    evidence = _Evidence(trajectory, states, truths(trajectory, states), tool, np.diff(tool, axis=0))
    action, intention = _action(evidence), _intention(evidence)
    statements = _statements(trajectory)
    if not statements:
        return Verdict(_total(action), _total(intention), explanation={"A": action, "I": intention})
    reasoning, alignment = _reasoning(evidence, statements), _alignment(evidence, statements)
    return Verdict(
        _total(action),
        _total(intention),
        _total(reasoning),
        _total(alignment),
        explanation={"A": action, "I": intention, "R": reasoning, "RA": alignment},
    )


def _total(contributions: Sequence[Contribution]) -> float:
    return float(np.clip(sum(c.points for c in contributions), 0.0, SCALE))


# --- A: how well it moved ---------------------------------------------------------------------------------------------


def _action(e: _Evidence) -> list[Contribution]:
    jerk, reversals = _jerk(e.moves), _reversals(e.moves)
    smooth = float(np.clip((_ROUGH_JERK - jerk) / (_ROUGH_JERK - _SMOOTH_JERK), 0, 1))
    steady = float(np.clip(1 - reversals / _MOST_REVERSALS, 0, 1))
    progress = 1.0 if e.success else _progress(e)
    travelled, straight = float(np.linalg.norm(e.moves, axis=1).sum()), _straight_m(e.states[0])
    efficiency = progress * float(np.clip(_DETOUR * straight / max(travelled, 1e-9), 0, 1))
    found = [
        Contribution("smoothness", 3.5 * smooth, f"jerk {jerk:.2f} of the mean speed"),
        Contribution("steadiness", 1.5 * steady, f"{reversals:.0%} of the motions turn back"),
        Contribution("progress", 2.5 * progress, "done" if e.success else f"{progress:.0%} of the way"),
        Contribution("efficiency", 2.5 * efficiency, f"{travelled:.2f} m travelled, {straight:.2f} m straight"),
    ]
    wrong = _wrong_contacts(e)
    if wrong:
        penalty = -_WRONG_CONTACT_POINTS * min(len(wrong), _MOST_PENALTIES)
        found.append(Contribution("wrong contact", penalty, "touched " + ", ".join(wrong)))
    drops = _drops(e)
    if drops:
        penalty = -_DROP_POINTS * min(len(drops), _MOST_PENALTIES)
        found.append(Contribution("drop", penalty, f"let it fall at step {', '.join(map(str, drops))}"))
    collisions = _collisions(e)
    if collisions:
        penalty = -_COLLISION_POINTS * min(len(collisions), _MOST_PENALTIES)
        found.append(Contribution("collision", penalty, "; ".join(collisions)))
    return found


def _jerk(moves: np.ndarray) -> float:
    """Mean third difference of the position over the mean speed: 0 for a straight line, 2.4 for white noise."""
    speed = np.linalg.norm(moves, axis=1).mean()
    if len(moves) < 3 or speed < _STILL_M:
        return 0.0
    return float(np.linalg.norm(np.diff(moves, n=2, axis=0), axis=1).mean() / speed)


def _reversals(moves: np.ndarray) -> float:
    """Share of consecutive motions that point apart."""
    a, b = moves[:-1], moves[1:]
    both = (np.linalg.norm(a, axis=1) > _MOVING_M) & (np.linalg.norm(b, axis=1) > _MOVING_M)
    return float((np.sum(a * b, axis=1)[both] < 0).mean()) if both.any() else 0.0


def _straight_m(first: SceneState) -> float:
    """Length of the straight way through the task: to the target, and then, if asked, up and over to the place."""
    target, drawer = first.object(first.target), _drawer(first)
    way, begin = 0.0, first.ee_pose[:3]
    if drawer is not None and drawer != target:  # is opened first
        way, begin = _distance(begin, drawer.position) + _DRAWER_M, drawer.position
    way += max(_distance(begin, target.position) - target.size[2] / 2, 0.0)
    if first.task == "touch":
        return way
    if drawer == target:
        return way + _DRAWER_M
    if first.reference is None:
        return way + _LIFT_M
    return way + 2 * _CARRY_M + _distance(target.position, first.object(first.reference).position)


def _drawer(state: SceneState) -> ObjectState | None:
    """The drawer that the task names, if any."""
    named = [o for o in state.objects if o.name in (state.target, state.reference)]
    return next((o for o in named if o.shape == "drawer"), None)


def _progress(e: _Evidence) -> float:
    """Of a failure: the mean share of its phases that was covered at best, in [0, 1]."""
    first = e.states[0]
    approach = [_distance(s.ee_pose[:3], s.object(s.target).position) for s in e.states]
    covered, drawer = [_covered(approach)], _drawer(first)
    if drawer is not None:
        covered.append(max(s.object(drawer.name).displaced_m for s in e.states) / _DRAWER_M)
    if first.task != "touch" and (drawer is None or drawer.name != first.target):
        if first.reference is None:
            covered.append(max(s.object(s.target).lifted_m for s in e.states) / _LIFT_M)
        else:
            covered.append(_covered([_to_reference(s) for s in e.states]))
    return float(np.mean(np.clip(covered, 0, 1)))


def _covered(distances: Sequence[float]) -> float:
    return 1 - min(distances) / max(distances[0], 1e-9)


def _to_reference(state: SceneState) -> float:
    return _distance(state.object(state.target).position, state.object(state.reference or "").position)


def _wrong_contacts(e: _Evidence) -> list[str]:
    allowed = {e.states[0].target, e.states[0].reference}
    return sorted(set(e.states[-1].touched) - allowed)


def _drops(e: _Evidence) -> list[int]:
    """Steps after which the held target fell, other than onto its place."""
    found = []
    for t, (now, then) in enumerate(zip(e.states[:-1], e.states[1:], strict=True)):
        if now.held != now.target or then.held == now.target:
            continue
        last = e.states[min(t + 3, len(e.states) - 1)].object(now.target)
        fallen = now.object(now.target).lifted_m - last.lifted_m
        reach = _DRAWER_REACH_M if _drawer(now) is not None else 2 * last.size[0]
        over_place = now.reference is not None and _to_reference(now) < reach
        if fallen > _FALL_M and not over_place:
            found.append(t)
    return found


def _collisions(e: _Evidence) -> list[str]:
    """The arm's blows against the table and the place, and what the carried object knocked aside, each told once."""
    first, last = e.states[0], e.states[-1]
    found = []
    pressed = (first.reference,) if first.task in WIDOWX_TASKS else ("table", first.reference)
    drawer = _drawer(first)
    for name in pressed:  # the WidowX's fingers reach the table wherever it takes something flat
        if drawer is not None and name == drawer.name:  # is there to be pulled
            continue
        hits = [name is not None and "robot" in s.touching(name) for s in e.states]
        starts = [t for t, hit in enumerate(hits) if hit and not (t and hits[t - 1])]
        found += [f"the arm hit the {name} at step {t}" for t in starts]
    for before, after in zip(first.objects, last.objects, strict=True):
        moved = float(np.hypot(*np.subtract(after.position[:2], before.position[:2])))
        if before.name != first.target and before.name not in last.touched and moved > _KNOCKED_M:
            found.append(f"the {before.name} was knocked aside by {100 * moved:.0f} cm")
    return found


# --- I: whether it moved for the task ---------------------------------------------------------------------------------


def _intention(e: _Evidence) -> list[Contribution]:
    choice, why = _target_choice(e)
    share = _serving_share(e)
    return [
        Contribution("target choice", 4 * choice, why),
        Contribution("motion that serves the task", 6 * min(1.0, share / _SERVING_SHARE), f"{share:.0%} of the motion"),
    ]


def _target_choice(e: _Evidence) -> tuple[float, str]:
    """1 if the expert's object was touched first; without a touch 0.5, if it was the one that was come nearest to."""
    target, touched = e.truth[0].stated.target, e.states[-1].touched
    if touched:
        return float(touched[0] == target), f"touched the {touched[0]} first"
    distance, nearest = min(
        (_distance(s.ee_pose[:3], o.position), o.name)
        for s in e.states
        for o in s.objects
        if o.name != s.reference or o.name == target
    )
    return 0.5 * (nearest == target), f"touched nothing; came nearest to the {nearest} ({distance:.2f} m)"


def _serving_share(e: _Evidence) -> float:
    """Share of the path that goes where the expert would go from there: cosines below 0 count as 0."""
    wanted = np.array([t.delta_m for t in e.truth])
    lengths, goals = np.linalg.norm(e.moves, axis=1), np.linalg.norm(wanted, axis=1)
    counted = (lengths > _STILL_M) & (goals > _STILL_M)
    if not counted.any():
        return 0.0
    cosine = np.sum(e.moves * wanted, axis=1)[counted] / (lengths * goals)[counted]
    return float((np.clip(cosine, 0, 1) * lengths[counted]).sum() / lengths[counted].sum())


# --- R: whether what it said was true ---------------------------------------------------------------------------------


def _statements(trajectory: Trajectory) -> list[_Statement]:
    """Runs of steps with the same text."""
    found: list[_Statement] = []
    start = 0
    for t in range(1, trajectory.num_steps + 1):
        if t < trajectory.num_steps and trajectory.reasoning[t] == trajectory.reasoning[start]:
            continue
        text = trajectory.reasoning[start]
        if text is not None:
            found.append(_Statement(start, t, parse(text)))
        start = t
    return found


def _reasoning(e: _Evidence, statements: Sequence[_Statement]) -> list[Contribution]:
    """Every text is compared with the truth at the steps at which it was written."""
    target, relation, subtask, plan, unread = [], [], [], [], 0
    for s in statements:
        written = [t for t in range(s.start, s.stop) if t == s.start or e.trajectory.keyframe[t]]
        if s.stated is None:
            unread += len(written)
        for t in written:
            truth = e.truth[t].stated
            target.append(float(s.stated is not None and s.stated.target == truth.target))
            if _relations(truth):
                relation.append(float(s.stated is not None and _relations(s.stated) == _relations(truth)))
            subtask.append(_same_subtask(s.stated, truth))
            plan.append(_same_plan(s.stated, truth))
    said = f"of {len(target)} texts" + (f", {unread} not of the grammar" if unread else "")
    object_points = 2.5 if relation else 4.0  # a task with one object has no relation to state
    found = [
        Contribution("stated object", object_points * float(np.mean(target)), f"right in {sum(target):.0f} {said}"),
        Contribution("stated subtask", 4 * float(np.mean(subtask)), f"agrees {np.mean(subtask):.0%} {said}"),
        Contribution("stated plan", 2 * float(np.mean(plan)), f"agrees {np.mean(plan):.0%} {said}"),
    ]
    if relation:
        points = (4.0 - object_points) * float(np.mean(relation))
        found.append(Contribution("stated relation", points, f"right in {sum(relation):.0f} {said}"))
    return found


def _relations(stated: StatedReasoning) -> set[tuple[str, str | None, str | None]]:
    """What is to be brought where: (object, link, other object) of the plan and the subtask."""
    return {(s.target, s.link, s.reference) for s in (*stated.plan, stated.subtask) if s.link is not None}


def _same_subtask(stated: StatedReasoning | None, truth: StatedReasoning) -> float:
    """1 for the same verb; 0.5 for the one just before or after it, as phases have no sharp borders."""
    if stated is None:
        return 0.0
    if stated.subtask.verb == truth.subtask.verb:
        return 1.0
    return 0.5 * (abs(_PHASE[stated.subtask.verb] - _PHASE[truth.subtask.verb]) <= 1)


def _same_plan(stated: StatedReasoning | None, truth: StatedReasoning) -> float:
    """Shared steps over all steps of both plans."""
    if stated is None:
        return 0.0
    said, true = set(stated.plan), set(truth.plan)
    return len(said & true) / len(said | true)


# --- RA: whether it did what it said ----------------------------------------------------------------------------------


def _alignment(e: _Evidence, statements: Sequence[_Statement]) -> list[Contribution]:
    """Every text is compared with what the robot did while it was in force, weighted by that time."""
    weights = np.array([s.stop - s.start for s in statements], dtype=np.float64)
    moves = np.array([_did_move(e, s) for s in statements])
    subtasks = np.array([_did_subtask(e, s) for s in statements])
    move, subtask = (float(np.average(v, weights=weights)) for v in (moves, subtasks))
    return [
        Contribution("stated motion was made", 5 * move, f"{move:.0%} over {len(statements)} texts"),
        Contribution("stated subtask was pursued", 5 * subtask, f"{subtask:.0%} over {len(statements)} texts"),
    ]


def _did_move(e: _Evidence, s: _Statement) -> float:
    if s.stated is None:
        return 0.0
    net = e.tool[s.stop] - e.tool[s.start]
    if s.stated.move in _AXES:
        largest = float(np.abs(net).max())
        return float(max(0.0, net @ _AXES[s.stated.move] / largest)) if largest > _STILL_M else 0.0
    if s.stated.move == "stay":
        return float(np.clip(1 - np.linalg.norm(net) / (_MOVING_M * (s.stop - s.start)), 0, 1))
    return float(_gripper_changed(e, s, opened=s.stated.move == "open gripper"))


def _did_subtask(e: _Evidence, s: _Statement) -> float:
    names = {o.name for o in e.states[0].objects}
    if s.stated is None or s.stated.target not in names:
        return 0.0
    step = s.stated.subtask
    if step.reference is not None and step.reference not in names:
        return 0.0
    before, after = e.states[s.start], e.states[s.stop]
    drawer = before.object(step.target).shape == "drawer"
    if step.verb in ("grasp", "release"):
        return float(_gripper_changed(e, s, opened=step.verb == "release"))
    if step.verb in ("lift", "carry", "place") and before.held != step.target:
        return 0.0
    if step.verb == "touch" and step.target in after.touched and step.target not in before.touched:
        return 1.0
    if step.verb in ("touch", "lower to") and not drawer and _offset(before, step.target) > _OVER_M:
        return 0.0
    path = float(np.linalg.norm(e.moves[s.start : s.stop], axis=1).sum())
    if path < _STILL_M:
        return 0.0
    return float(np.clip(_advance_m(step, before, after) / (_STRAIGHT * path), 0, 1))


def _advance_m(step: Step, before: SceneState, after: SceneState) -> float:
    """How much nearer the subtask came to its goal."""
    if step.verb == "lift":
        return after.ee_pose[2] - before.ee_pose[2]
    if step.verb in ("pull", "push"):
        return _opened_m(before, after, step.target) * (1 if step.verb == "pull" else -1)
    if step.verb in ("carry", "place") and step.reference is not None:
        return _distance(before.object(step.target).position, before.object(step.reference).position) - _distance(
            after.object(step.target).position, after.object(step.reference).position
        )
    above = (0.0, 0.0, _HOVER_M if step.verb == "reach" else 0.0)
    return _tool_to(before, step.target, above) - _tool_to(after, step.target, above)


def _opened_m(before: SceneState, after: SceneState, drawer: str) -> float:
    """How far its front came out of the cabinet."""
    front = before.object(drawer)
    way = np.subtract(after.object(drawer).position, front.position)
    return float(way[:2] @ (np.cos(front.yaw_rad), np.sin(front.yaw_rad)))


def _tool_to(state: SceneState, name: str, above: Sequence[float]) -> float:
    """To a drawer: to the nearest point of its wide front."""
    about = state.object(name)
    tool, place = np.array(state.ee_pose[:3]), np.array(about.position)
    if about.shape == "drawer":
        along = np.array([-np.sin(about.yaw_rad), np.cos(about.yaw_rad), 0.0])
        half = about.size[1] / 2
        place = place + float(np.clip((tool - place) @ along, -half, half)) * along
    return _distance(tool, np.add(place, above))


def _offset(state: SceneState, name: str) -> float:
    return _distance(state.ee_pose[:2], state.object(name).position[:2])


def _gripper_changed(e: _Evidence, s: _Statement, opened: bool) -> bool:
    change = e.states[s.stop].gripper - e.states[s.start].gripper
    return change > _GRIPPER_CHANGE if opened else change < -_GRIPPER_CHANGE


def _distance(a: Sequence[float] | np.ndarray, b: Sequence[float] | np.ndarray) -> float:
    return float(np.linalg.norm(np.subtract(a, b)))
