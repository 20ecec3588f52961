"""Variants of suite blocks: another camera and light, and nothing else; what is held out stays out of what varies."""

import dataclasses

import numpy as np
import pytest

from dualvla import cli
from dualvla.errors import UsageError
from dualvla.io import dataset
from dualvla_eval.sim.looks import BASE, SECOND, VARIANTS, look_of
from dualvla_eval.suites import get_suite


def azimuth_deg(vector):
    return np.degrees(np.arctan2(vector[1], vector[0]))


def apart_deg(a, b):
    return abs((a - b + 180) % 360 - 180)


def test_varied_looks_differ_and_stay_clear_of_the_second_one():
    looks = [look_of("varied", seed) for seed in range(300)]
    assert len(set(looks)) == 300
    assert looks == [look_of("varied", seed) for seed in range(300)]
    second = azimuth_deg(np.subtract(SECOND.camera_eye_m, SECOND.camera_target_m))
    cameras = [azimuth_deg(np.subtract(look.camera_eye_m, look.camera_target_m)) for look in looks]
    assert min(apart_deg(camera, second) for camera in cameras) > 19.9
    assert min(cameras) < second < max(cameras)  # to either side of it
    light = azimuth_deg(SECOND.light_direction)
    assert min(apart_deg(azimuth_deg(look.light_direction), light) for look in looks) > 19.9
    assert look_of("base", 1) == look_of("base", 2) == BASE
    assert look_of("second", 1) == SECOND


def test_unknown_variants_are_refused_before_anything_is_made(tmp_path):
    with pytest.raises(UsageError, match="did you mean 'second'"):
        cli.call("collect", ["--variant", "secnd", "--episodes", "1", "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.sim
def test_only_the_picture_changes():
    suite = get_suite("blocks")
    env = suite.make_env()
    episode = suite.training_episode("pick", 0, seed=0)
    seen = {}
    for variant in VARIANTS:
        obs, _ = env.reset(options={"episode": dataclasses.replace(episode, variant=variant)})
        obs, *_ = env.step(np.array([0.02, 0, -0.02, 0, 0, 0, 1]))
        seen[variant] = (env.state(), obs["images"]["main"], env.project(np.array(env.state().objects[0].position)))
    states = {variant: state for variant, (state, *_) in seen.items()}
    assert states["second"] == states["varied"] == states["base"]
    for variant in ("second", "varied"):
        assert np.abs(seen[variant][1].astype(int) - seen["base"][1]).mean() > 10
        assert np.linalg.norm(seen[variant][2] - seen["base"][2]) > 0.02
    assert all((pixel > 0).all() and (pixel < 1).all() for *_, pixel in seen.values())


@pytest.mark.sim
@pytest.mark.usefixtures("ray_cluster")
def test_a_variant_makes_a_data_set_of_its_own_scenes(tmp_path):
    names, pictures = set(), set()
    for variant in ("base", "second"):
        out = str(tmp_path / variant)
        options = ["--episodes", "touch=1", "--workers", "1", "--variant", variant, "--out", out]
        assert cli.call("collect", options)["episodes"] == 1
        row = dataset.open_dataset(out).read().slice(0, 1).to_pylist()[0]
        names.add(row["episode_id"])
        pictures.add(dict(row["images"])["main"])
    assert names == {"blocks/touch/train/000000", "blocks/touch/train-second/000000"}
    assert len(pictures) == 2
