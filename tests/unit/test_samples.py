"""What training sees, and in which order."""

import itertools
from collections import Counter

import numpy as np
import pytest

from dualvla.errors import DataError
from dualvla.io import dataset, manifest
from dualvla_pipelines.samples import Sampler, TrainRows

HORIZON = 4


def write_rows(folder, rows, labels=False):
    folder = str(folder)
    manifest.begin(folder, dataset.KIND, {}, {})
    dataset.write_table(dataset.part_url(folder, 0), dataset.rows_to_table(rows, labels))
    dataset.finish_dataset(folder, {}, {}, rows_in=len(rows))
    return folder


def test_a_chunk_never_crosses_an_episodes_end_or_a_missing_step(tmp_path, make_rows):
    rows = make_rows("a", steps=6) + make_rows("b", steps=6)
    for i, row in enumerate(rows):
        row["action"] = [float(i)] * 7
    del rows[9]  # b lacks its step 3
    loaded = TrainRows.load(write_rows(tmp_path / "data", rows))
    seen = {}
    for i in range(len(rows)):
        sample = loaded.robot(i, HORIZON, True)
        seen[i] = sample.actions[sample.action_mask][:, 0].tolist()
        assert not sample.actions[~sample.action_mask].any()
    assert seen[0] == [0, 1, 2, 3]
    assert seen[4] == [4, 5]
    assert seen[6] == [6, 7, 8]
    assert seen[9] == [10, 11]


def test_only_training_rows_are_seen_and_pruned_reasoning_is_gone(tmp_path, make_rows):
    train, test = make_rows("a", steps=4), make_rows("b", steps=4)
    for i, row in enumerate(train + test):
        row |= {"scene_label": False, "action_label": False, "keep_reasoning": i % 2 == 0}
    for row in test:
        row |= {"split": "test"}
    loaded = TrainRows.load(write_rows(tmp_path / "data", train + test, labels=True))
    assert loaded.counts == {"robot": 4, "multimodal": 0}
    assert [loaded.robot(i, HORIZON, True).reasoning is not None for i in range(4)] == [True, False, True, False]
    assert all(loaded.robot(i, HORIZON, False).reasoning is None for i in range(4))


def test_keys_are_unique_over_domains_and_images_survive(make_dataset, make_rows):
    loaded = TrainRows.load(make_dataset(parts=2, episodes=1, questions=2, steps=5))
    samples = [loaded.robot(i, HORIZON, True) for i in range(10)] + [loaded.multimodal(i) for i in range(4)]
    assert len({s.key for s in samples}) == 14
    expected = dataset.decode_image(make_rows("x", steps=5)[3]["images"]["main"])
    assert np.array_equal(samples[3].images["main"], expected)
    assert samples[-1].reasoning == "red"
    assert samples[-1].actions is None


@pytest.mark.parametrize("broken", [{"action": [float("nan")] * 7}, {"action": [0.0] * 3}, {"control_hz": 10.0}])
def test_rows_that_do_not_agree_are_refused_by_name(tmp_path, make_rows, broken):
    rows = make_rows("a", steps=4)
    rows[2] |= broken
    folder = write_rows(tmp_path / "data", rows)
    with pytest.raises(DataError, match="data"):
        _ = TrainRows.load(folder).facts


def test_every_epoch_shows_every_row_once_and_each_in_another_order():
    sampler = Sampler({"robot": 30, "multimodal": 7}, batch_size=8, multimodal_fraction=0.25, seed=3)
    robot = [row for step in range(10) for domain, row in sampler.batch(step) if domain == "robot"]  # 60: two epochs
    assert Counter(robot[:30]) == Counter(robot[30:]) == Counter(range(30))
    assert robot[:30] != robot[30:]
    assert all(sum(d == "multimodal" for d, _ in sampler.batch(s)) == 2 for s in range(10))


def test_a_batch_depends_on_seed_and_step_alone():
    counts = {"robot": 100, "multimodal": 50}
    first, again, other = (Sampler(counts, 16, 0.25, seed=s) for s in (1, 1, 2))
    assert first.batch(37) == again.batch(37)
    assert first.batch(37) != other.batch(37)


def test_workers_slices_make_up_the_batch_and_all_hold_both_domains():
    batch = Sampler({"robot": 100, "multimodal": 50}, 16, 0.25, seed=1).batch(5)
    for world in (1, 2, 4):
        slices = [batch[rank::world] for rank in range(world)]
        assert Counter(itertools.chain(*slices)) == Counter(batch)
        assert all({domain for domain, _ in part} == {"robot", "multimodal"} for part in slices)


def test_data_without_questions_fill_the_batch_with_robot_steps():
    assert Sampler({"robot": 9, "multimodal": 0}, 8, 0.25, seed=0).share == {"robot": 8, "multimodal": 0}


def bucketed(bucket, seed=1, counts=None, batch_size=16):
    """A sampler whose rows have random lengths."""
    counts = counts or {"robot": 210, "multimodal": 33}
    rng = np.random.default_rng(0)
    lengths = {domain: rng.integers(0, 60, count) for domain, count in counts.items()}
    return Sampler(counts, batch_size, 0.25, seed, bucket, lengths)


def spread(sampler, steps=60):
    """Mean over steps and domains of the longest less the shortest length in a batch."""
    found = []
    for step in range(steps):
        for domain in ("robot", "multimodal"):
            lengths = [sampler.lengths[d][row] for d, row in sampler.batch(step) if d == domain]
            found.append(max(lengths) - min(lengths))
    return float(np.mean(found))


def test_buckets_deal_out_the_same_samples_in_batches_of_like_length():
    plain, sorted_ = bucketed(0), bucketed(10)
    for block in range(4):
        steps = range(10 * block, 10 * block + 10)
        assert Counter(x for s in steps for x in sorted_.batch(s)) == Counter(x for s in steps for x in plain.batch(s))
    assert all(sum(d == "multimodal" for d, _ in sorted_.batch(s)) == 4 for s in range(40))
    assert spread(sorted_) < 0.35 * spread(plain)


def test_buckets_do_not_train_from_short_to_long():
    sampler = bucketed(10)
    means = np.array([np.mean([sampler.lengths[d][r] for d, r in sampler.batch(s)]) for s in range(200)])
    within = means.reshape(-1, 10)
    assert abs(np.mean([np.corrcoef(np.arange(10), block)[0, 1] for block in within])) < 0.25
    assert abs(np.corrcoef(np.arange(200), means)[0, 1]) < 0.25


def test_a_bucketed_batch_depends_on_seed_and_step_alone():
    first, again, other = bucketed(8), bucketed(8), bucketed(8, seed=2)
    later = [again.batch(step) for step in (37, 5, 11)]  # in whatever order, as after a resume
    assert [first.batch(step) for step in (37, 5, 11)] == later
    assert first.batch(37) != other.batch(37)


def test_long_questions_come_with_long_robot_texts():
    sampler = bucketed(10)
    pairs = [
        [np.mean([sampler.lengths[d][r] for d, r in sampler.batch(s) if d == domain]) for s in range(100)]
        for domain in ("robot", "multimodal")
    ]
    assert np.corrcoef(*pairs)[0, 1] > 0.8


def test_pruned_reasoning_and_texts_that_are_not_learned_have_no_length(tmp_path, make_rows):
    rows = make_rows("a", steps=3)
    for row, keep in zip(rows, (True, False, True), strict=True):
        row |= {"scene_label": keep, "action_label": keep, "keep_reasoning": keep}
    rows[2]["reasoning"] += " and a little more"
    loaded = TrainRows.load(write_rows(tmp_path / "data", rows, labels=True))
    learned, plain = (loaded.lengths(with_reasoning)["robot"] for with_reasoning in (True, False))
    assert learned[1] < learned[0] < learned[2]
    assert learned[1] == plain[0] == plain[2] == len(rows[0]["instruction"])
