"""Naming policies on the command line, and the control experiments around them."""

from dataclasses import replace

import pytest
from eval_fakes import NAMES, FakeEnv, FakePolicy, fake_suite
from serve.checkpoints import write_checkpoint

from dualvla.errors import CheckpointError, UsageError
from dualvla_eval import policies
from dualvla_eval.asking import Batched
from dualvla_eval.policies import Ablated, PolicyRef, parse_policy
from dualvla_eval.rollout import run_episodes

SUITE = fake_suite()
EPISODES = SUITE.episodes("touch", 12)


def roll(policy, episodes=EPISODES):
    return list(run_episodes(policy, [FakeEnv(), FakeEnv()], SUITE, episodes))


@pytest.mark.parametrize(
    ("text", "name", "source"),
    [
        ("expert", "expert", "expert"),
        ("runs/one/dual/", "dual", "runs/one/dual/"),
        ("best=runs/one/dual", "best", "runs/one/dual"),
        ("s3://bucket/run=3/dual", "dual", "s3://bucket/run=3/dual"),
        ("ws://robot:8000", "robot-8000", "ws://robot:8000"),
        ("lab=ws://robot:8000", "lab", "ws://robot:8000"),
    ],
)
def test_names_and_sources(text, name, source):
    assert parse_policy(text) == PolicyRef(name, source)


def test_a_checkpoint_is_asked_as_its_options_say_and_counts_as_another_policy(tmp_path):
    folder = write_checkpoint(str(tmp_path / "dual"))
    plain, other = parse_policy(folder), parse_policy(f"other={folder}?think_first=false&latent_reuse=4")
    assert (other.name, other.source) == ("other", folder)
    assert parse_policy(f"{folder}?latent_reuse=4&think_first=false").name == "dual"
    assert policies.digest(plain) != policies.digest(other)
    options = policies.load_checkpoint(other.source, "never", other.options).options
    assert (options.latent_reuse, options.think_first, options.reasoning) == (4, False, "never")
    assert parse_policy("ws://robot:8000/?latent_reuse=4").options == ()


@pytest.mark.parametrize(
    ("text", "told"),
    [("a/dual?latent_resue=4", "latent_reuse"), ("a/dual?latent_reuse=0", "1 "), ("expert?ensemble=2", "no options")],
)
def test_an_option_that_cannot_be_is_refused_before_anything_runs(text, told):
    with pytest.raises(UsageError, match=told):
        parse_policy(text)


def test_an_ablation_is_part_of_the_name_and_makes_a_control():
    ref = parse_policy("mine=expert", "blank-images")
    assert (ref.name, ref.control) == ("mine+blank-images", True)
    assert parse_policy("expert-random-object").control


def test_a_word_that_is_no_policy_is_answered_with_the_nearest_one():
    with pytest.raises(UsageError, match="did you mean 'expert'"):
        policies.digest(parse_policy("exprt"))


def test_a_folder_that_is_no_checkpoint_says_what_it_lacks(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        policies.digest(parse_policy(str(tmp_path / "nowhere")))
    with pytest.raises(CheckpointError, match=r"lacks \*\.safetensors"):
        policies.digest(parse_policy(str(tmp_path)))


def test_a_policy_for_another_robot_is_refused(monkeypatch):
    policy = FakePolicy()
    monkeypatch.setattr(policies, "load_checkpoint", lambda *_: policy)
    assert policies.load(PolicyRef("mine", "folder"), suite=SUITE) is policy
    for change, words in (
        ({"action_space": "bimanual_ee_delta_pose+gripper"}, "action space 'bimanual"),
        ({"control_hz": 20.0}, "20.0"),
        ({"cameras": ("main", "wrist")}, "camera 'wrist'"),
    ):
        policy.spec = replace(FakePolicy().spec, **change)
        with pytest.raises(CheckpointError, match=words):
            policies.load(PolicyRef("mine", "folder"), suite=SUITE)


def test_the_expert_solves_and_an_expert_for_a_random_object_does_so_by_chance():
    expert = policies.load(PolicyRef("expert", "expert"), suite=SUITE)
    assert all(r.success for r in roll(expert))
    lost = policies.load(PolicyRef("lost", "expert-random-object"), suite=SUITE)
    many = SUITE.episodes("touch", 100)
    assert 35 <= sum(r.success for r in roll(lost, many)) <= 65


def test_random_actions_depend_on_the_seed_and_the_episode_only():
    def actions(seed, episodes):
        results = roll(policies.load(PolicyRef("random", "random"), suite=SUITE, seed=seed), episodes)
        return {r.episode.episode_id: r.steps[0].action for r in results}

    whole, part = actions(0, EPISODES), actions(0, EPISODES[5:])
    assert all((whole[i] == part[i]).all() for i in part)
    assert (whole[0] != whole[1]).any()
    assert (whole[0] != actions(1, EPISODES)[0]).any()


class Watching(FakePolicy):
    """Remembers what it was shown."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def infer(self, observations, sessions):
        self.seen += observations
        return super().infer(observations, sessions)


def test_blank_images_are_grey_and_nothing_else_changes():
    watching = Watching()
    results = roll(Ablated(Batched(watching), "blank-images", 0))
    assert all(r.success for r in results)  # the fake policy does not look
    assert all((o.images["main"] == 128).all() for o in watching.seen)
    assert {o.instruction for o in watching.seen} == {r.instruction for r in results}


def test_another_instruction_names_another_object_of_the_scene():
    watching = Watching()
    results = roll(Ablated(Batched(watching), "other-instruction", 0), EPISODES[:1])
    (told,) = {o.instruction for o in watching.seen}
    target = results[0].steps[0].state["target"]
    assert told != results[0].instruction
    assert told == f"touch the {next(n for n in NAMES if n != target)}"
