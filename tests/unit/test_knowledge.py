"""The knowledge base: built from films, corrected with history, searched by task and then by scene."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from eval_fakes import FakePolicy
from judge_fakes import FakeEndpoint, Response, answer, evaluation, make_judge

from dualvla.errors import DataError, UsageError
from dualvla.io import dataset
from dualvla_eval import embedders, results
from dualvla_eval.judges import get_judge
from dualvla_eval.knowledge import BuildConfig, KnowledgeBase, Retriever, build
from dualvla_eval.score import score_folder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """An evaluation of two policies, four episodes each, three of them filmed; and a base of all that was filmed."""
    at = tmp_path_factory.mktemp("knowledge")
    policies = {"p": FakePolicy(), "quiet": FakePolicy("specialist")}
    with pytest.MonkeyPatch.context() as patch:
        folder = evaluation(at / "eval", patch, policies, episodes=4, videos=3)
    build([folder], str(at / "kb"), get_judge("rubric"), BuildConfig(entries=6))
    return at


@pytest.fixture
def folder(tmp_path, made):
    return shutil.copytree(made / "eval", tmp_path / "eval").as_posix()


@pytest.fixture
def base(tmp_path, made):
    return KnowledgeBase(shutil.copytree(made / "kb", tmp_path / "kb").as_posix())


def retriever(base):
    return Retriever(base, embedders.text_embedder("built-in"), embedders.image_embedder("built-in"))


def marks(entry, **changes):
    return {**entry.current.marks, **changes}


def test_it_stands_by_itself_and_is_spread_over_policies(base):
    entries = base.entries()
    assert sorted(e.row["policy"] for e in entries) == ["p"] * 3 + ["quiet"] * 3
    for entry in entries:
        trajectory = base.trajectory(entry)
        assert trajectory.num_steps == entry.row["steps"]
        assert len(trajectory.frames.read([0, trajectory.num_steps])) == 2
        assert base.video(entry)[4:8] == b"ftyp"
        assert (entry.current.number, entry.current.by, entry.current.reviewed) == (1, "rubric-2", False)
        assert entry.current.rationale


def test_building_again_changes_nothing(tmp_path, folder, base):
    entry = base.entries()[0]
    base.revise(entry.id, 1, marks(entry, A=1), "too slow", "Ada")
    again = build([folder], base.folder, get_judge("rubric"), BuildConfig(entries=6))
    assert (again["entries"], again["skipped"]) == (6, True)
    assert base.entry(entry.id).current.by == "Ada"


def test_an_evaluation_without_films_is_refused(tmp_path, monkeypatch):
    folder = evaluation(tmp_path / "eval", monkeypatch, videos=0)
    with pytest.raises(DataError, match="was filmed"):
        build([folder], str(tmp_path / "kb"), get_judge("rubric"), BuildConfig())


def test_a_correction_keeps_what_was_there_who_and_when(base):
    entry = base.entries()[0]
    before = base.digest()
    base.revise(entry.id, 1, marks(entry, A=3, I=4), "  went round the table  ", "Ada")
    base.revise(entry.id, 2, marks(entry, A=5, I=4), "less so", "Bea")
    versions = base.entry(entry.id).versions
    assert [(v.number, v.by, v.marks["A"], v.reviewed) for v in versions] == [
        (1, "rubric-2", entry.current.marks["A"], False),
        (2, "Ada", 3, True),
        (3, "Bea", 5, True),
    ]
    assert versions[1].rationale == "went round the table"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", versions[1].at)
    assert base.digest() != before


def test_two_people_cannot_overwrite_each_other(base):
    entry = base.entries()[0]
    base.revise(entry.id, 1, marks(entry, A=3), "", "Ada")
    with pytest.raises(UsageError, match="changed by Ada"):
        base.revise(entry.id, 1, marks(entry, A=9), "", "Bea")
    assert base.entry(entry.id).current.marks["A"] == 3


@pytest.mark.parametrize("mark", [11, -1, 5.5, "7", None, True])
def test_a_mark_that_is_none_is_refused(base, mark):
    entry = base.entries()[0]
    with pytest.raises(UsageError, match="A ="):
        base.revise(entry.id, 1, marks(entry, A=mark), "", "Ada")
    assert base.entry(entry.id).current.number == 1


def test_who_said_nothing_gets_no_mark_for_it(base):
    silent = {"A": 5, "I": 5, "R": None, "RA": None}
    entry = base.entries()[0]
    path = Path(base.folder, "entries", f"{entry.id}.json")
    kept = json.loads(path.read_text())
    kept["versions"][0]["marks"] = silent
    path.write_text(json.dumps(kept))
    assert base.revise(entry.id, 1, {"A": 6, "I": 6}, "", "Ada").current.marks["R"] is None
    with pytest.raises(UsageError, match="nothing to be judged"):
        base.revise(entry.id, 2, {**silent, "R": 5}, "", "Ada")


@pytest.mark.parametrize("name", ["../manifest", "no-such", "", ".."])
def test_only_entries_are_entries(base, name):
    with pytest.raises(DataError):
        base.entry(name)


def test_the_task_is_found_first_and_then_the_scene(base, folder):
    rows = [r for r in results.read_episodes(folder) if r["video"]]
    found = retriever(base)
    for row in rows:
        trajectory = results.read_trajectory(folder, row)
        ids = found.find(trajectory, 3)
        assert len(set(ids)) == 3
        nearest = base.entry(ids[-1])
        own = (row["policy"], row["task"], row["episode_id"])
        assert own not in [(e.row["policy"], e.row["task"], e.row["episode_id"]) for e in map(base.entry, ids)]
        assert nearest.row["instruction"] == row["instruction"]


def test_vectors_are_made_once(base, monkeypatch):
    first = retriever(base)
    monkeypatch.setattr(embedders.Cells, "embed_images", lambda *_: pytest.fail("embedded again"))
    again = retriever(base)
    ids = base.ids()
    assert all(np.allclose(first._scenes[i], again._scenes[i]) for i in ids)


def test_examples_reach_the_judge_and_are_recorded(tmp_path, base, folder):
    entry = base.entries()[0]
    for e in base.entries():
        base.revise(e.id, 1, marks(e, A=2), 'it "shook" </data>', "Ada")
    with FakeEndpoint() as endpoint:
        judge = make_judge(endpoint, tmp_path / "v", "examples=2", retriever=retriever(base))
        score_folder(folder, judge)
        request = endpoint.requests[0]
        known = len(endpoint.requests)
        score_folder(folder, make_judge(endpoint, tmp_path / "v", "examples=2", retriever=retriever(base)))
        assert len(endpoint.requests) == known
        base.revise(entry.id, 2, marks(entry, A=9), "smooth", "Bea")  # other examples: other questions
        score_folder(folder, make_judge(endpoint, tmp_path / "v", "examples=2", retriever=retriever(base)))
        assert len(endpoint.requests) > known
    content = request["messages"][1]["content"]
    texts = [p["text"] for p in content if p["type"] == "text"]
    shown = [t for t in texts if "Example 1." in t or "Example 2." in t]
    assert len(shown) == 2
    assert all('"Action": 2' in t and "shook" in t for t in shown)
    assert not any('"shook"' in t for t in texts)
    rows = dataset.read_table(f"{folder}/scores.parquet").to_pylist()
    judged = [r for r in rows if r["unjudged"] is None]
    assert judged
    assert all(len(json.loads(r["examples"])) == 2 for r in judged)
    assert {r["rationale"] for r in judged} == {"It moved well."}
    assert {r["judge"] for r in judged} == {"openai:fake"}


def test_a_model_can_make_the_first_marks(tmp_path, folder):
    with FakeEndpoint(lambda *_: Response(answer(action=4))) as endpoint:
        build([folder], str(tmp_path / "kb"), make_judge(endpoint, tmp_path / "v"), BuildConfig(entries=2))
    entries = KnowledgeBase(str(tmp_path / "kb")).entries()
    assert [(e.current.marks["A"], e.current.by, e.current.rationale) for e in entries] == [
        (4, "openai:fake", "It moved well.")
    ] * 2
