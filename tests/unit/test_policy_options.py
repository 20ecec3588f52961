"""Inference options of a policy: latent reuse, ensembling; all their state is explicit, resettable and portable."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from unit import vla_fakes as fakes

from dualvla import ensembling
from dualvla.errors import UsageError
from dualvla.models.config import HeadConfig, TowerConfig
from dualvla.models.processing import Processor
from dualvla.models.stages import prepare
from dualvla.models.vla import VLA
from dualvla.schema import Observation, PolicyReply
from dualvla.vla_policy import PolicyOptions, VLAPolicy

CAMERAS = ("left_wrist", "head", "right_wrist")
_TOWER = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 8}


@pytest.fixture(scope="module", params=["one arm", "two arms, three cameras, tower", "two arms, token head"])
def trained(request: pytest.FixtureRequest) -> tuple[VLA, Processor]:
    changes: dict = {}
    if request.param != "one arm":
        changes = {"action_space": "bimanual_ee_delta_pose+gripper", "cameras": CAMERAS}
    head = {"hidden": 32, "layers": 2, "heads": 2, "draws": 3, "vision": True}
    if "tower" in request.param:
        head["tower"] = TowerConfig(config=_TOWER, image_size=32)
    if "token" in request.param:
        head["kind"] = "token"
    config = prepare(fakes.config(head=HeadConfig(**head), **changes), "dual")
    processor = fakes.processor(config)
    model = VLA.create(config, processor, seed=0).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "backbone" in name and parameter.dim() > 1:
                parameter.copy_(3 * torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
            elif not parameter.any():
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model, processor


def _policy(trained: tuple[VLA, Processor], **options: object) -> VLAPolicy:
    return VLAPolicy(*trained, trained[0].config, PolicyOptions(**options))  # type: ignore[arg-type]


def _look(trained: tuple[VLA, Processor], seed: int, step: int = 0) -> Observation:
    s = fakes.sample(seed, cameras=trained[0].config.cameras)
    return Observation(s.images, fakes.TEXTS[0], proprio=s.proprio, step=step, id=f"o{seed}")


def _same(a: PolicyReply, b: PolicyReply) -> None:
    np.testing.assert_allclose(a.actions, b.actions, atol=1e-4)
    assert (a.reasoning, a.keyframe, a.reasoning_tokens) == (b.reasoning, b.keyframe, b.reasoning_tokens)


def test_every_camera_and_every_dimension_counts(trained: tuple[VLA, Processor]) -> None:
    config = trained[0].config
    (reply,) = _policy(trained, reasoning="never").infer([_look(trained, 0)], ["s"])
    assert reply.actions.shape == (config.horizon, config.actions.size)
    low, high = np.float32(trained[1].action.low), np.float32(trained[1].action.high)
    assert ((reply.actions >= low) & (reply.actions <= high)).all()
    for camera in config.cameras:
        seen = _look(trained, 0)
        blind = Observation({**seen.images, camera: 255 - seen.images[camera]}, seen.instruction, seen.proprio)
        (other,) = _policy(trained, reasoning="never").infer([blind], ["s"])
        assert not np.array_equal(other.actions, reply.actions), camera


def test_a_latent_action_is_reused_without_the_backbone(
    trained: tuple[VLA, Processor], monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []
    whole = VLA.read_prompt
    monkeypatch.setattr(
        VLA, "read_prompt", lambda self, batch: (read.append(len(batch["images"])), whole(self, batch))[1]
    )
    policy = _policy(trained, latent_reuse=2, reasoning="every:1")
    replies = [policy.infer([_look(trained, t, 2 * t)], ["s"])[0] for t in range(4)]
    assert read == [1, 1]
    assert [r.keyframe for r in replies] == [True, False, True, False]
    assert replies[1].reasoning == replies[0].reasoning != None  # noqa: E711
    _same(replies[2], _policy(trained, reasoning="every:1").infer([_look(trained, 2, 4)], ["s"])[0])
    policy.reset("s")
    policy.infer([_look(trained, 0)], ["s"])
    assert len(read) == 4
    policy.infer([_look(trained, 0)], ["s"])  # the same step again: an episode began anew
    assert len(read) == 5


@pytest.mark.parametrize("trained", ["one arm", "two arms, three cameras, tower"], indirect=True)
def test_what_is_reused_is_the_latent_action_not_what_the_expert_sees(trained: tuple[VLA, Processor]) -> None:
    """The expert sees new proprioception beside an old latent action; a head with a tower sees new pictures, too."""
    policy, seen = _policy(trained, latent_reuse=9, reasoning="never"), _look(trained, 0)
    first = policy.infer([seen], ["s"])[0]
    moved = Observation(seen.images, seen.instruction, seen.proprio + 1.0, step=2)
    assert not np.array_equal(policy.infer([moved], ["s"])[0].actions, first.actions)


def test_sessions_in_a_batch_reuse_their_own(trained: tuple[VLA, Processor]) -> None:
    together, alone = (_policy(trained, latent_reuse=3, ensemble=2, reasoning="every:2") for _ in range(2))
    together.infer([_look(trained, 0)], ["a"])
    alone.infer([_look(trained, 0)], ["a"])
    mixed = together.infer([_look(trained, 1, 2), _look(trained, 2, 2)], ["a", "b"])
    _same(mixed[0], alone.infer([_look(trained, 1, 2)], ["a"])[0])
    _same(mixed[1], alone.infer([_look(trained, 2, 2)], ["b"])[0])


def test_all_state_travels_as_plain_values(trained: tuple[VLA, Processor]) -> None:
    """After any number of calls a session goes on elsewhere as if it had never moved; reset leaves nothing."""
    options = {"latent_reuse": 3, "ensemble": 3, "reasoning": "every:4"}
    here = _policy(trained, **options)
    for t in range(5):
        there = _policy(trained, **options)
        there.restore("s", json.loads(json.dumps(here.state_of("s"))))
        ours, theirs = (p.infer([_look(trained, t, 2 * t)], ["s"])[0] for p in (here, there))
        _same(ours, theirs)
    assert set(here.state_of("s")) == {"thought", "latent", "chunks"}
    here.reset("s")
    assert here.state_of("s") == {}
    _same(here.infer([_look(trained, 9)], ["s"])[0], _policy(trained, **options).infer([_look(trained, 9)], ["s"])[0])


def test_overlapping_chunks_are_blended(trained: tuple[VLA, Processor]) -> None:
    grippers = trained[0].config.actions.gripper_dims
    plain, blended = _policy(trained, reasoning="never"), _policy(trained, reasoning="never", ensemble=2)
    for policy in (plain, blended):
        policy.infer([_look(trained, 0)], ["s"])
    old = plain.infer([_look(trained, 0)], ["x"])[0].actions
    new, got = (p.infer([_look(trained, 1, 2)], ["s"])[0].actions for p in (plain, blended))
    np.testing.assert_allclose(got, ensembling.blend([(0, old)], 2, new, 0.1, grippers), atol=1e-4)
    np.testing.assert_array_equal(got[:, grippers], new[:, grippers])
    np.testing.assert_array_equal(got[2:], new[2:])  # nobody else planned these
    assert not np.array_equal(got[:2], new[:2])


def test_the_weights_are_those_of_adaptive_ensembling() -> None:
    """Hand-computed: w = exp(alpha cos), normalised over the newest and the older predictions of the same step."""
    new, same, opposite = (
        np.array([[1.0, 0.0, 1.0]]),
        np.array([[0, 0, 0], [2.0, 0.0, 0.0]]),
        np.array([[0, 0, 0], [-1.0, 0.0, 0.0]]),
    )
    got = ensembling.blend([(4, same), (4, opposite)], 5, new, 0.5, [2])
    weights = np.exp(0.5 * np.array([1.0, 1.0, -1.0]))
    np.testing.assert_allclose(got[0, 0], weights @ [1.0, 2.0, -1.0] / weights.sum())
    assert got[0, 2] == 1.0


@given(st.integers(0, 10_000), st.integers(2, 8), st.integers(1, 4))
def test_a_blend_stays_among_what_was_planned(seed: int, horizon: int, execute: int) -> None:
    rng = np.random.default_rng(seed)
    past: list[ensembling.Chunk] = []
    for step in range(0, 6 * execute, execute):
        actions = rng.normal(size=(6, 3))
        past = ensembling.until(past, step)
        got = ensembling.blend(past, step, actions, 0.1, [])
        for j in range(6):
            planned = [actions[j], *(c[step - s + j] for s, c in past if step - s + j < len(c))]
            assert (got[j] >= np.min(planned, axis=0) - 1e-9).all()
            assert (got[j] <= np.max(planned, axis=0) + 1e-9).all()
        past = ensembling.remember(past, step, actions, horizon)
        assert len(past) < horizon
    assert ensembling.until(past, 0) == []


def test_options_out_of_range_are_refused() -> None:
    for wrong in ({"latent_reuse": 0}, {"ensemble": 0}, {"reasoning": "every:0"}):
        with pytest.raises(UsageError):
            PolicyOptions(**wrong)  # type: ignore[arg-type]
