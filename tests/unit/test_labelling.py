"""Pruning a table: nothing is lost, nothing is touched, and what is unfit leaves with its reason."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dualvla.errors import DataError
from dualvla.io.dataset import encode_png, rows_to_table
from dualvla.pruning import MODES, FrameDifferences, action_labels
from dualvla_pipelines import labelling
from dualvla_pipelines.labelling import SceneSource, decode_frames, label_table, merge, tally

MakeRows = Callable[..., list[dict[str, Any]]]
DETECTOR = SceneSource(FrameDifferences())


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


DAMAGED = bytearray(encode_png(np.zeros((8, 8, 3), np.uint8)))
DAMAGED[33 + 4 : 33 + 8] = b"\xd8\xe4b\x02"  # the name of the chunk after the header: Pillow has an error of its own
DAMAGED = bytes(DAMAGED)

FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "NaN pose": ({"ee_pose": [np.nan] * 6}, "ee_pose is not finite"),
    "infinite gripper": ({"gripper": [np.inf]}, "gripper is not finite"),
    "NaN action": ({"action": [np.nan] * 7}, "action is not finite"),
    "no pose": ({"ee_pose": None}, "ee_pose has 0 numbers"),
    "odd pose": ({"ee_pose": [0.0] * 7}, "ee_pose has 7 numbers"),
    "no gripper": ({"gripper": []}, "gripper has 0 numbers"),
    "NaN gripper": ({"gripper": [np.nan]}, "gripper is not finite"),
    "null in a pose": ({"ee_pose": [0.0, None, 0.0, 0.0, 0.0, 0.0]}, "ee_pose is not finite"),
    "second arm": ({"ee_pose": [0.0] * 12, "gripper": [0.0, 0.0]}, "number of arms"),
    "lost step": ({"step": 9}, "step 9 follows step 3"),
    "repeated step": ({"step": 3}, "step 3 follows step 3"),
    "step back": ({"step": 1}, "step 1 follows step 3"),
    "no image": ({"images": {}}, "no image"),
    "broken image": ({"images": {"main": b"\x89PNG\r\n\x1a\n"}}, "cannot be decoded"),
    "damaged chunk": ({"images": {"main": DAMAGED}}, "cannot be decoded"),
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


def test_a_fault_far_into_a_table_is_found_at_its_row(make_rows: MakeRows) -> None:
    rows = [row for name in "abc" for row in make_rows(name)]
    rows[30] |= {"ee_pose": [np.inf] * 6}
    _, bad = label_table(rows_to_table(rows), "action", 0, None)
    assert set(bad["episode_id"].to_pylist()) == {"c"}


def test_the_named_camera_is_the_one_that_is_looked_at(make_rows: MakeRows) -> None:
    rows = make_rows("a")
    still = rows[0]["images"]["main"]
    two = [row | {"images": {"wrist": still, "main": row["images"]["main"]}} for row in rows]
    alone, _ = label_table(rows_to_table(rows), "scene", 0, DETECTOR)
    main, _ = label_table(rows_to_table(two), "scene", 0, SceneSource(FrameDifferences(), "main"))
    first, _ = label_table(rows_to_table(two), "scene", 0, DETECTOR)
    assert main["scene_label"].equals(alone["scene_label"])
    assert first["scene_label"].to_pylist() == [True] + [False] * 11
    _, bad = label_table(rows_to_table(two), "scene", 0, SceneSource(FrameDifferences(), "side"))
    assert set(bad["reason"].to_pylist()) == {"a step has no image of camera 'side'"}


def test_a_jpeg_is_decoded_no_larger_than_it_must_be(make_rows: MakeRows) -> None:
    pixels = np.linspace(0, 255, 256 * 320 * 3).reshape(256, 320, 3).astype(np.uint8)
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, format="JPEG")
    rows = [row | {"images": {"main": sink.getvalue()}} for row in make_rows("a")]
    images = rows_to_table(rows)["images"]
    whole, small = decode_frames(images), decode_frames(images, at_least=64)
    assert (whole.shape, small.shape) == ((12, 256, 320, 3), (12, 64, 80, 3))
    assert abs(whole.mean() - small.mean()) < 1


def test_no_more_is_decoded_at_once_than_fits_and_nothing_depends_on_it(
    make_rows: MakeRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = rows_to_table([row for name in "abcdef" for row in make_rows(name)])
    sizes: list[int] = []

    def counting(episodes: Sequence[np.ndarray]) -> list[np.ndarray]:
        sizes.append(len(episodes))
        return FrameDifferences()(episodes)

    at_once, _ = label_table(table, "both", 0, SceneSource(counting))
    monkeypatch.setattr(labelling, "_DECODED_BYTES", 2 * 12 * 16 * 16 * 3)
    in_pairs, _ = label_table(table, "both", 0, SceneSource(counting))
    assert [size for size in sizes if size] == [6, 2, 2, 2]
    assert in_pairs.equals(at_once)


def test_counts_of_words_and_of_silent_episodes(make_rows: MakeRows) -> None:
    still = [row | {"ee_pose": [0.0] * 6, "gripper": [1.0]} for row in make_rows("still")]
    good, bad = label_table(rows_to_table([*make_rows("a"), *still, question("q")]), "both", 0, DETECTOR)
    counts = tally(good, bad)["tasks"]["touch"]
    assert counts["episodes"] == 2
    assert counts["episodes_without_reasoning"] == 1
    assert counts["frames"] == 24
    assert counts["words_before"] == 24 * 6
    assert counts["words_after"] == 6 * counts["kept_frames"] > 0
    assert counts["tokens_before"] == 24 * 7  # the semicolon is one
    assert counts["tokens_after"] == 7 * counts["kept_frames"]
    assert counts["kept_frames"] <= min(counts["scene_frames"], counts["action_frames"])


def test_counts_of_parts_add_up(make_rows: MakeRows) -> None:
    whole = rows_to_table([*make_rows("a"), *make_rows("b"), question("q"), *make_rows("c", 2)])
    spoiled = [row | {"gripper": [np.nan]} for row in make_rows("d")]
    parts = [whole.slice(0, 24), whole.slice(24), rows_to_table(spoiled)]
    total = merge([tally(*label_table(part, "both", 0, DETECTOR)) for part in parts])
    once = merge(
        [
            tally(
                *label_table(rows_to_table([*whole.to_pylist(maps_as_pydicts="strict"), *spoiled]), "both", 0, DETECTOR)
            )
        ]
    )
    assert total == once
    assert total["episodes"] == 4
    assert total["rows_quarantined"] == 12


def test_labelled_data_is_not_labelled_again(make_rows: MakeRows) -> None:
    good, _ = label_table(rows_to_table(make_rows("a")), "both", 0, DETECTOR)
    with pytest.raises(DataError, match="labelled already"):
        label_table(good, "both", 0, DETECTOR)


def test_an_empty_table_stays_empty() -> None:
    good, bad = label_table(rows_to_table([]), "both", 0, DETECTOR)
    assert (len(good), len(bad)) == (0, 0)
    assert tally(good, bad)["tasks"] == {}
