"""The detector network and its folder: shapes, exactness, ends of episodes, damaged files; and the clips it is fed."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from transformers import ResNetConfig, ResNetModel

from dualvla.errors import CheckpointError, DataError, UsageError
from dualvla.io import dataset, manifest
from dualvla.pruning.annotations import Annotation, write_annotations
from dualvla.pruning.ddm import (
    KIND,
    DDMConfig,
    DDMNet,
    DifferenceMap,
    EventDetector,
    fit_images,
    load_detector,
    pretrained_net,
    save_detector,
    window_indices,
)
from dualvla.pruning.similarity import SelfSimilarity
from dualvla_pipelines.clips import BoundaryRule, Shares, annotations_for, data_digest, read_clips

SMALL = DDMConfig(image_size=16, half_window=2, stem=4, widths=(4, 8), depths=(1, 1), levels=2, grid=2, dim=8,
                  map_channels=4, queries=2, heads=2)  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    net = DDMNet(SMALL).train()
    with torch.no_grad():  # so that the running statistics are not those of nothing
        net.frame_features(torch.randint(0, 255, (50, 3, 16, 16), dtype=torch.uint8))
    return net.eval()


@pytest.fixture(scope="module")
def detector(net):
    return EventDetector(net, threshold=0.5, gap=2)


def frames_of(count, size=16, seed=0):
    return np.random.default_rng(seed).integers(0, 255, (count, size, size, 3), dtype=np.uint8)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 70])
def test_every_frame_of_an_episode_of_any_length_gets_a_label(detector, count):
    scores = detector.scores(frames_of(count))
    (labels,) = detector([frames_of(count)])
    assert scores.shape == labels.shape == (count,)
    assert labels.dtype == bool
    assert ((scores > 0) & (scores < 1)).all()
    assert labels[:1].all()  # in the first frame, all is new
    assert (labels[1:] == (scores[1:] >= 0.5)).all()


def test_what_else_is_in_the_batch_changes_nothing(detector):
    episodes = [frames_of(n, seed=n) for n in (5, 1, 80)]
    together = detector(episodes)
    for episode, labels in zip(episodes, together, strict=True):
        assert (detector([episode])[0] == labels).all()


def test_only_the_window_is_looked_at(detector):
    frames = frames_of(30)
    other = frames.copy()
    other[20:] = 0
    assert np.allclose(detector.scores(frames)[:18], detector.scores(other)[:18])
    assert not np.isclose(detector.scores(frames)[18], detector.scores(other)[18], rtol=0, atol=1e-9)


def test_boundaries_are_peaks_of_the_scores(detector):
    frames = frames_of(40)
    detector = EventDetector(detector.net, float(np.median(detector.scores(frames))), gap=3)
    boundaries = detector.boundaries(frames)
    assert len(boundaries) > 1
    assert (np.diff(boundaries) > 3).all()
    assert (detector.scores(frames)[boundaries] >= detector.threshold).all()


def test_windows_repeat_the_ends():
    assert window_indices(3, SMALL).tolist() == [[0, 0, 0, 1, 2], [0, 0, 1, 2, 2], [0, 1, 2, 2, 2]]
    wide = dataclasses.replace(SMALL, half_window=1, frame_step=3)
    assert window_indices(5, wide)[2].tolist() == [0, 2, 4]


def test_a_difference_map_is_blank_where_nothing_changes():
    torch.manual_seed(0)
    make = DifferenceMap(SMALL).eval()
    one = torch.randn(1, 1, SMALL.dim)
    still, other = one.expand(1, SMALL.window, -1), (one + 3).expand(1, SMALL.window, -1)
    assert torch.allclose(make(still), make(other))  # what is there does not matter, only what differs
    moving = torch.randn(1, SMALL.window, SMALL.dim)
    assert not torch.allclose(make(moving), make(still))


def test_pictures_of_any_size_are_fitted():
    frames = np.full((2, 30, 50, 3), (10, 100, 200), np.uint8)
    assert (fit_images(frames, 16) == np.array([10, 100, 200])[None, :, None, None]).all()
    same = frames_of(2)
    assert (fit_images(same, 16) == same.transpose(0, 3, 1, 2)).all()


def test_sizes_that_do_not_fit_are_refused():
    for wrong in ({"levels": 3}, {"depths": (1,)}, {"half_window": 0}, {"image_size": 8}, {"heads": 3}):
        with pytest.raises(UsageError):
            DDMNet(dataclasses.replace(SMALL, **wrong))


@pytest.fixture
def folder(net, tmp_path):
    folder = str(tmp_path / "detector")
    manifest.begin(folder, KIND, {}, {})
    save_detector(folder, net, 0.25, 2)
    manifest.finish(folder, KIND, {}, {})
    return folder


def test_a_saved_detector_answers_the_same(folder, detector):
    loaded = load_detector(folder)
    assert (loaded.threshold, loaded.gap, loaded.net.config) == (0.25, 2, SMALL)
    assert (loaded.scores(frames_of(20)) == detector.scores(frames_of(20))).all()


def test_damaged_and_foreign_folders_are_refused(folder, tmp_path, make_dataset):
    with pytest.raises(DataError, match="not a detector"):
        load_detector(make_dataset())
    config, weights = tmp_path / "detector" / "config.json", tmp_path / "detector" / "model.safetensors"
    whole = {path: path.read_bytes() for path in (config, weights)}
    other = json.loads(whole[config])
    for path, content in (
        (weights, whole[weights][:-100]),
        (weights, b""),
        (config, b"{"),
        (config, json.dumps({**other, "architecture": "other"}).encode()),
        (config, json.dumps({**other, "network": {**other["network"], "dim": 16}}).encode()),
        (config, json.dumps({**other, "network": {**other["network"], "dims": 16}}).encode()),
    ):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="detector"):
            load_detector(folder)
        path.write_bytes(whole[path])
    load_detector(folder)


def test_a_pretrained_resnet_brings_its_sizes_and_weights(tmp_path):
    resnet = ResNetModel(ResNetConfig(embedding_size=6, hidden_sizes=[6, 10], depths=[1, 2], layer_type="basic"))
    resnet.save_pretrained(tmp_path / "resnet")
    net = pretrained_net(SMALL, str(tmp_path / "resnet"))
    assert (net.config.stem, net.config.widths, net.config.depths) == (6, (6, 10), (1, 2))
    for name, tensor in resnet.state_dict().items():
        assert torch.equal(net.resnet.state_dict()[name], tensor)
    with pytest.raises(UsageError, match="No ResNet"):
        pretrained_net(SMALL, str(tmp_path / "nothing"))


def test_self_similarity_peaks_where_the_scene_changes():
    rng = np.random.default_rng(0)
    frames = np.concatenate([np.full((10, 16, 16, 3), level) for level in (40, 200)]) + rng.integers(
        0, 9, (20, 1, 1, 3)
    )
    scores = SelfSimilarity().scores(frames.astype(np.uint8))
    assert scores.argmax() == 10
    for count in (0, 1, 2):
        assert SelfSimilarity().scores(frames_of(count)).shape == (count,)


def test_events_become_boundaries():
    events = [["contact:a"], None, ["contact:a", "grasp:a"], ["lift:a"], [], [], [], ["release:a"]]
    assert BoundaryRule()(events).tolist() == [2, 7]
    assert BoundaryRule(kinds=("lift", "release"), gap=0)(events).tolist() == [3, 7]
    assert BoundaryRule()([["contact:a"]]).tolist() == []  # of a first frame nothing is new


def test_held_out_episodes_are_an_exact_share_whatever_their_order():
    names = [f"suite/task/{i}" for i in range(50)]
    shares = Shares(validation=0.2, test=0.1)
    splits = shares.split(names)
    assert [splits.count(split) for split in ("train", "validation", "test")] == [35, 10, 5]
    assert shares.split(names[::-1]) == splits[::-1]
    assert splits != sorted(splits)
    assert Shares(validation=0.5, test=0.0).split(names[:1]) == ["train"]


def test_annotations_replace_events_of_their_own_data_set_only(make_dataset, tmp_path):
    folder, other = make_dataset("data", steps=9), make_dataset("other", parts=1)
    clips = list(read_clips(folder, BoundaryRule()))
    assert [len(clip.frames) for clip in clips] == [9] * 6
    assert not any(len(clip.boundaries) for clip in clips)
    marks = {clips[1].episode_id: Annotation((3, 7), 9, "ada", ""), clips[4].episode_id: Annotation((), 9, "ada", "")}
    url = str(tmp_path / "marks.json")
    write_annotations(url, {"folder": "elsewhere", "manifest": data_digest(folder)}, marks)
    annotated = list(read_clips(folder, BoundaryRule(), annotations_for(folder, [url])))
    assert [(clip.episode_id, clip.boundaries.tolist()) for clip in annotated] == [
        (clips[1].episode_id, [3, 7]),
        (clips[4].episode_id, []),
    ]
    with pytest.raises(DataError, match="belongs to"):
        annotations_for(other, [url])
    write_annotations(
        url, {"folder": "", "manifest": data_digest(folder)}, {clips[0].episode_id: Annotation((3,), 8, "", "")}
    )
    with pytest.raises(DataError, match="9 frames, its annotation 8"):
        list(read_clips(folder, BoundaryRule(), annotations_for(folder, [url])))


def test_an_episode_with_a_broken_picture_is_named(make_rows, tmp_path):
    rows = make_rows("suite/task/broken", 3)
    rows[1]["images"] = {"main": b"no picture"}
    folder = str(tmp_path / "data")
    manifest.begin(folder, dataset.KIND, {}, {})
    dataset.write_table(dataset.part_url(folder, 0), dataset.rows_to_table(rows))
    dataset.finish_dataset(folder, {}, {}, rows_in=3)
    with pytest.raises(DataError, match="suite/task/broken"):
        list(read_clips(folder, BoundaryRule()))
