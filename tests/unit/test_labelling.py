"""Pruning a table: nothing is lost, nothing is touched, and what is unfit leaves with its reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from dualvla.errors import DataError
from dualvla.io.dataset import encode_png, rows_to_table
from dualvla.pruning import MODES, FrameDifferences, action_labels
from dualvla_pipelines.labelling import label_table, tally

MakeRows = Callable[..., list[dict[str, Any]]]
DETECTOR = FrameDifferences()


def question(name: str) -> dict[str, Any]:
    return {"episode_id": name, "step": 0, "domain": "multimodal", "instruction": "how many?", "reasoning": "two"}


@pytest.mark.parametrize("mode", MODES)
def test_rows_images_and_order_stay(make_rows: MakeRows, mode: str) -> None:
    table = rows_to_table([*make_rows("a"), question("q1"), question("q2"), *make_rows("b", 7)])
    good, bad = label_table(table, mode, 0, DETECTOR)
    assert good.select(table.schema.names).equals(table)
    assert len(bad) == 0
    assert good.filter(good["domain"].to_numpy() == "multimodal")["keep_reasoning"].to_pylist() == [True, True]
    assert good["action_label"].to_pylist()[12:14] == [None, None]


def test_labels_are_those_of_the_rules(make_rows: MakeRows) -> None:
    rows = make_rows("a")
    good, _ = label_table(rows_to_table([*make_rows("z", 5), *rows]), "both", 0, DETECTOR)
    expected = action_labels(np.array([r["ee_pose"] for r in rows]), np.array([r["gripper"][0] for r in rows]))
    assert good["action_label"].to_pylist()[5:] == expected.tolist()
    scene, action = np.array(good["scene_label"].to_pylist()), np.array(good["action_label"].to_pylist())
    assert good["keep_reasoning"].to_pylist() == (scene & action).tolist()


def test_modes_without_the_scene_decode_nothing(make_rows: MakeRows) -> None:
    rows = [row | {"images": {"main": b"not an image"}} for row in make_rows("a")]
    good, bad = label_table(rows_to_table(rows), "action", 0, None)
    assert len(bad) == 0
    assert set(good["scene_label"].to_pylist()) == {None}
    assert good["keep_reasoning"].to_pylist() == good["action_label"].to_pylist()


def test_random_keeps_as_many_as_both_in_every_episode(make_rows: MakeRows) -> None:
    table = rows_to_table([row for name in "abcdef" for row in make_rows(name)])
    both, _ = label_table(table, "both", 0, DETECTOR)
    drawn = [label_table(table, "random", seed, DETECTOR)[0] for seed in (1, 1, 2)]
    kept = [np.array(t["keep_reasoning"].to_pylist()).reshape(6, -1) for t in (both, *drawn)]
    assert (kept[0].sum(axis=1) == kept[1].sum(axis=1)).all()
    assert (kept[1] == kept[2]).all()
    assert (kept[1] != kept[3]).any()
    assert len({tuple(episode) for episode in kept[1].tolist()}) > 1  # keyed by the episode, not only by the seed


FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "NaN pose": ({"ee_pose": [np.nan] * 6}, "ee_pose is not finite"),
    "infinite gripper": ({"gripper": [np.inf]}, "gripper is not finite"),
    "NaN action": ({"action": [np.nan] * 7}, "action is not finite"),
    "no pose": ({"ee_pose": None}, "ee_pose has 0 numbers"),
    "odd pose": ({"ee_pose": [0.0] * 7}, "ee_pose has 7 numbers"),
    "no gripper": ({"gripper": []}, "gripper has 0 numbers"),
    "second arm": ({"ee_pose": [0.0] * 12, "gripper": [0.0, 0.0]}, "number of arms"),
    "lost step": ({"step": 9}, "step 9 follows step 3"),
    "no image": ({"images": {}}, "no image"),
    "broken image": ({"images": {"main": b"\x89PNG\r\n\x1a\n"}}, "cannot be decoded"),
    "other size": ({"images": {"main": encode_png(np.zeros((8, 8, 3), np.uint8))}}, "size of the images"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_one_unfit_step_quarantines_its_episode_and_no_other(make_rows: MakeRows, fault: str) -> None:
    change, reason = FAULTS[fault]
    spoiled = make_rows("spoiled")
    spoiled[4] |= change
    rows = [*make_rows("before"), *spoiled, question("q"), *make_rows("after")]
    good, bad = label_table(rows_to_table(rows), "both", 0, DETECTOR)
    assert good["episode_id"].to_pylist() == [r["episode_id"] for r in rows if r["episode_id"] != "spoiled"]
    assert set(bad["episode_id"].to_pylist()) == {"spoiled"}
    assert all(reason in text for text in bad["reason"].to_pylist())
    counts = tally(good, bad)
    assert counts["rows_quarantined"] + len(good) == len(rows)
    alone, _ = label_table(
        rows_to_table([*make_rows("before"), question("q"), *make_rows("after")]), "both", 0, DETECTOR
    )
    assert good.equals(alone)


def test_scattered_and_foreign_rows_are_quarantined(make_rows: MakeRows) -> None:
    rows = [*make_rows("a"), *make_rows("b"), *make_rows("a"), question("q") | {"domain": "audio"}, question("")]
    _, bad = label_table(rows_to_table(rows), "both", 0, DETECTOR)
    reasons = dict.fromkeys(bad["reason"].to_pylist())
    assert list(reasons) == [
        "the rows of this episode are not next to each other",
        "unknown domain 'audio'",
        "no episode_id",
    ]


def test_counts_of_words_and_of_silent_episodes(make_rows: MakeRows) -> None:
    still = [row | {"ee_pose": [0.0] * 6, "gripper": [1.0]} for row in make_rows("still")]
    good, bad = label_table(rows_to_table([*make_rows("a"), *still, question("q")]), "both", 0, DETECTOR)
    counts = tally(good, bad)["tasks"]["touch"]
    assert counts["episodes"] == 2
    assert counts["episodes_without_reasoning"] == 1
    assert counts["frames"] == 24
    assert counts["words_before"] == 24 * 6
    assert counts["words_after"] == 6 * counts["kept_frames"] > 0


def test_labelled_data_is_not_labelled_again(make_rows: MakeRows) -> None:
    good, _ = label_table(rows_to_table(make_rows("a")), "both", 0, DETECTOR)
    with pytest.raises(DataError, match="labelled already"):
        label_table(good, "both", 0, DETECTOR)


def test_an_empty_table_stays_empty() -> None:
    good, bad = label_table(rows_to_table([]), "both", 0, DETECTOR)
    assert (len(good), len(bad)) == (0, 0)
    assert tally(good, bad)["tasks"] == {}
