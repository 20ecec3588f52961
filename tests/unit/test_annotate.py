"""Annotations by hand: which episodes are offered, what is kept, what is refused."""

import json

import pytest

from dualvla.errors import DataError, OutputError, UsageError
from dualvla.io import dataset
from dualvla.pruning.annotations import Annotation, read_annotations, write_annotations
from dualvla_pipelines.annotate import Annotator, offered_episodes

DATA = {"folder": "data", "manifest": "0" * 64}


@pytest.fixture
def folder(make_dataset):
    return make_dataset(parts=2, episodes=8, questions=1, steps=7)


@pytest.fixture
def annotator(folder, tmp_path):
    return Annotator(folder, str(tmp_path / "marks.json"), "ada", 5)


def test_annotations_survive_the_file(tmp_path):
    url = str(tmp_path / "marks.json")
    episodes = {
        "b": Annotation((), 4, "ada", "2026-01-01T00:00:00+00:00"),
        "a/\u00e9": Annotation((0, 3), 4, "bob", ""),
    }
    write_annotations(url, DATA, episodes)
    assert read_annotations(url) == (DATA, episodes)


@pytest.mark.parametrize("marks", [[3, 1], [1, 1], [-1], [4]])
def test_marks_must_be_frames_in_order(marks):
    with pytest.raises(DataError):
        Annotation(tuple(marks), 4, "ada", "")


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"version": 2}', '{"version": 1, "data": {"folder": "d"}, "episodes": {}}', "\x00"],
)
def test_another_file_is_refused(tmp_path, content):
    (tmp_path / "marks.json").write_text(content)
    with pytest.raises(DataError, match=r"marks\.json"):
        read_annotations(str(tmp_path / "marks.json"))


@pytest.mark.parametrize("entry", [{}, {"boundaries": [1.5]}, {"boundaries": [9]}, {"boundaries": [True]}, None])
def test_a_broken_entry_is_named(tmp_path, entry):
    whole = {"boundaries": [1], "frames": 4, "by": "ada", "at": ""}
    entries = {"good": whole, "bad": entry and {**whole, **entry}}
    (tmp_path / "marks.json").write_text(json.dumps({"version": 1, "data": DATA, "episodes": entries}))
    with pytest.raises(DataError, match="'bad'"):
        read_annotations(str(tmp_path / "marks.json"))


def test_a_few_of_every_file_are_offered_first_and_more_never_change_the_earlier_ones(folder):
    everything = [episode.episode_id for episode in offered_episodes(folder)]
    assert len(everything) == len(set(everything)) == 16  # questions are no episodes
    assert {name.split("/")[2][0] for name in everything[:10]} == {"0", "1"}
    assert sorted(everything[:5]) != everything[:5]


def test_what_is_shown_is_the_stored_picture(annotator, folder):
    rows = dataset.open_dataset(folder).read().to_pylist()
    for number, episode in enumerate(annotator.state({})["episodes"]):
        stored = [dict(row["images"])["main"] for row in rows if row["episode_id"] == episode["id"]]
        assert episode["frames"] == len(stored) == 7
        for frame in (0, 6):
            shown = annotator.frame({"episode": str(number), "frame": str(frame)})
            assert (shown.body, shown.content_type) == (stored[frame], "image/png")


def test_marks_are_kept_at_once_and_gone_on_with(annotator, folder, tmp_path):
    first, second = (episode["id"] for episode in annotator.state({})["episodes"][:2])
    annotator.save({"episode": 0, "boundaries": [2, 5]})
    annotator.save({"episode": 1, "boundaries": []})
    data, kept = read_annotations(str(tmp_path / "marks.json"))
    assert data["folder"] == folder
    assert {name: (a.boundaries, a.frames, a.by) for name, a in kept.items()} == {
        first: ((2, 5), 7, "ada"),
        second: ((), 7, "ada"),
    }
    again = Annotator(folder, str(tmp_path / "marks.json"), "bob", 9)
    assert [e["boundaries"] for e in again.state({})["episodes"][:3]] == [[2, 5], [], None]
    again.save({"episode": 2, "boundaries": [1]})
    _, kept = read_annotations(str(tmp_path / "marks.json"))
    assert [kept[e["id"]].by for e in again.state({})["episodes"][:3]] == ["ada", "ada", "bob"]


@pytest.mark.parametrize(
    "payload",
    [
        {"episode": 5, "boundaries": []},
        {"episode": -1, "boundaries": []},
        {"episode": "../0", "boundaries": []},
        {"boundaries": []},
        {"episode": 0, "boundaries": [7]},
        {"episode": 0, "boundaries": ["1"]},
        {"episode": 0, "boundaries": None},
    ],
)
def test_what_does_not_fit_is_refused_and_changes_nothing(annotator, tmp_path, payload):
    annotator.save({"episode": 0, "boundaries": [1]})
    before = (tmp_path / "marks.json").read_bytes()
    with pytest.raises(DataError):
        annotator.save(payload)
    assert (tmp_path / "marks.json").read_bytes() == before
    assert annotator.state({})["episodes"][0]["boundaries"] == [1]


def test_frames_that_are_not_there_are_refused(annotator):
    for query in ({"episode": "0", "frame": "7"}, {"episode": "0"}, {"episode": "0", "frame": "\u00b2"}):
        with pytest.raises(DataError, match="frame"):
            annotator.frame(query)


def test_annotations_of_other_data_are_left_alone(annotator, make_dataset, tmp_path):
    annotator.save({"episode": 0, "boundaries": [1]})
    other = make_dataset("other", parts=1)
    with pytest.raises(OutputError, match="another data set"):
        Annotator(other, str(tmp_path / "marks.json"), "ada", 5)
    with pytest.raises(DataError, match="no robot episode"):
        Annotator(make_dataset("questions", episodes=0), str(tmp_path / "new.json"), "ada", 5)
    with pytest.raises(UsageError, match="less than 1"):
        Annotator(other, str(tmp_path / "new.json"), "ada", 0)
