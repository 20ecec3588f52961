"""The policy: greedy decoding with a cache, sessions, and replies that depend on observation, session and step only."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from unit import vla_fakes as fakes

from dualvla.errors import DataError, UsageError
from dualvla.models.checkpoint import save_checkpoint
from dualvla.models.config import ModelConfig
from dualvla.models.processing import Processor
from dualvla.models.stages import prepare
from dualvla.models.vla import VLA
from dualvla.policy import Policy
from dualvla.schema import Observation
from dualvla.vla_policy import PolicyOptions, VLAPolicy


def _observation(seed: int, instruction: str = fakes.TEXTS[0], step: int = 0) -> Observation:
    s = fakes.sample(seed)
    return Observation(s.images, instruction, proprio=s.proprio, step=step, id=f"o{seed}")


@pytest.fixture(scope="module", params=sorted(fakes.BACKBONES))
def trained(request: pytest.FixtureRequest) -> tuple[VLA, Processor]:
    """A reasoning model with weights large enough that it says different things about different pictures."""
    config = prepare(fakes.config(request.param), "dual")
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
    model, processor = trained
    return VLAPolicy(model, processor, model.config, PolicyOptions(**options))  # type: ignore[arg-type]


def _uncached_greedy(trained: tuple[VLA, Processor], observation: Observation) -> list[int]:
    """The same text, by reading the whole sequence again for every token."""
    model, processor = trained
    prompt = processor.prompts([observation.images], [observation.instruction], ["robot"], [observation.proprio])
    ids: list[int] = []
    for _ in range(model.config.max_text_tokens):
        batch = {**prompt, **processor.replies([ids])}
        with torch.no_grad():
            logits = model.backbone.logits(model.encode(batch).text[:, -1])[0, : processor.vocab_size]
        if not ids:
            if logits.softmax(dim=-1)[processor.act_id] > 0.5:
                break
            logits[[processor.act_id, processor.eos_id, processor.pad_id]] = -torch.inf
        token = int(logits.argmax())
        if token in (processor.act_id, processor.eos_id, processor.pad_id):
            break
        ids.append(token)
    return ids


def test_it_is_a_policy(trained: tuple[VLA, Processor]) -> None:
    policy = _policy(trained)
    assert isinstance(policy, Policy)
    assert policy.spec.kind == "reasoning"
    (reply,) = policy.infer([_observation(0)], ["s"])
    assert reply.actions.shape == (4, 7)
    assert reply.actions.dtype == np.float32
    assert reply.id == "o0"
    assert policy.infer([], []) == []


def test_cached_decoding_says_what_uncached_decoding_says(trained: tuple[VLA, Processor]) -> None:
    _, processor = trained
    policy = _policy(trained, think_first=False)
    lengths = set()
    for seed in range(6):
        observation = _observation(seed)
        expected = _uncached_greedy(trained, observation)
        (reply,) = policy.infer([observation], [f"s{seed}"])
        assert reply.reasoning_tokens == len(expected)
        assert (reply.reasoning or "") == processor.decode(expected)
        lengths.add(len(expected))
    assert max(lengths) > 0


def test_a_batch_answers_as_each_alone(trained: tuple[VLA, Processor]) -> None:
    """Also with instructions of different lengths, and texts that end at different tokens."""
    observations = [_observation(i, ("touch the red cube", "go")[i % 2]) for i in range(5)]
    sessions = [f"s{i}" for i in range(5)]
    together = _policy(trained).infer(observations, sessions)
    for observation, session, reply in zip(observations, sessions, together, strict=True):
        (alone,) = _policy(trained).infer([observation], [session])
        np.testing.assert_allclose(reply.actions, alone.actions, atol=1e-4)
        assert (reply.reasoning, reply.keyframe, reply.id) == (alone.reasoning, alone.keyframe, alone.id)
    assert _policy(trained).answer(observations) == [_policy(trained).answer([o])[0] for o in observations]


def test_never_thinking_is_acting_without_text(trained: tuple[VLA, Processor]) -> None:
    model, processor = trained
    policy = _policy(trained, reasoning="never")
    (reply,) = policy.infer([_observation(0)], ["s"])
    assert (reply.reasoning, reply.keyframe, reply.reasoning_tokens) == (None, False, 0)
    batch = {**processor.collate([fakes.sample(0)], 0, 0, train=False)}
    with torch.inference_mode():
        encoded = model.encode(batch)
        noise = policy._noise(_observation(0), "s").unsqueeze(0)
        steps = model.config.head.euler_steps
        chunk = model.head.sample(model.head.context(encoded.latents, batch["proprio"]), noise, steps)
    np.testing.assert_allclose(reply.actions, processor.action.restore(chunk[0].numpy()), atol=1e-4)


def test_thinking_every_k_steps_keeps_the_text_in_between(trained: tuple[VLA, Processor]) -> None:
    policy = _policy(trained, reasoning="every:4")
    replies = [policy.infer([_observation(0, step=t)], ["s"])[0] for t in (0, 2, 4, 6)]
    assert [r.keyframe for r in replies] == [True, False, True, False]
    assert replies[1].reasoning == replies[0].reasoning
    assert replies[1].reasoning_tokens == 0
    policy.reset("s")
    assert policy.infer([_observation(0, step=6)], ["s"])[0].keyframe


def test_it_thinks_where_a_text_is_likelier_than_its_threshold() -> None:
    config = prepare(fakes.config(), "dual")
    processor = fakes.processor(config)
    model = VLA.create(config, processor, seed=0).eval()
    observations = [_observation(i) for i in range(8)]
    sessions = list("abcdefgh")
    batch = processor.prompts(*zip(*((o.images, o.instruction, "robot", o.proprio) for o in observations), strict=True))
    with torch.inference_mode():
        likely = 1 - model.read_prompt(batch).logits.softmax(dim=-1)[:, processor.act_id]
    threshold = float(likely.sort().values[3:5].mean())
    config = dataclasses.replace(model.config, think_above=threshold)
    policy = VLAPolicy(model, processor, config, PolicyOptions(think_first=False))
    replies = policy.infer(observations, sessions)
    assert [r.keyframe for r in replies] == (likely > threshold).tolist()
    assert 0 < sum(r.keyframe for r in replies) < 8
    forced = VLAPolicy(model, processor, config, PolicyOptions(reasoning="every:1")).infer(observations, sessions)
    assert all(r.keyframe for r in forced)


def test_every_episode_begins_with_a_thought_unless_told_otherwise() -> None:
    """Also one that follows another in the same session; after the first call the model decides."""
    config = prepare(fakes.config(), "dual")
    processor = fakes.processor(config)
    model = VLA.create(config, processor, seed=0).eval()
    never = dataclasses.replace(model.config, think_above=1.0)
    for first in (True, False):
        policy = VLAPolicy(model, processor, never, PolicyOptions(think_first=first))
        replies = [policy.infer([_observation(0, step=step)], ["s"])[0] for step in (0, 2, 4, 0, 2)]
        assert [r.keyframe for r in replies] == [first, False, False, first, False]
        policy.reset("s")
        assert policy.infer([_observation(0, step=6)], ["s"])[0].keyframe == first
    silent = VLAPolicy(model, processor, never, PolicyOptions(reasoning="never"))
    assert not silent.infer([_observation(0)], ["s"])[0].keyframe


def test_sessions_do_not_mix(trained: tuple[VLA, Processor]) -> None:
    """A session whose text is due and one that keeps its own, in one batch, act as they would alone."""
    both = _policy(trained, reasoning="every:4")
    both.infer([_observation(0)], ["a"])
    mixed = both.infer([_observation(1, step=2), _observation(2, step=2)], ["a", "b"])
    alone = _policy(trained, reasoning="every:4")
    alone.infer([_observation(0)], ["a"])
    np.testing.assert_allclose(mixed[0].actions, alone.infer([_observation(1, step=2)], ["a"])[0].actions, atol=1e-4)
    np.testing.assert_allclose(mixed[1].actions, alone.infer([_observation(2, step=2)], ["b"])[0].actions, atol=1e-4)


def test_the_same_question_gets_the_same_reply_and_noise_follows_session_and_step(
    trained: tuple[VLA, Processor],
) -> None:
    first, again = (_policy(trained, noise_scale=1.0).infer([_observation(0)], ["s"])[0] for _ in range(2))
    np.testing.assert_array_equal(first.actions, again.actions)
    for other in (
        _policy(trained, noise_scale=1.0).infer([_observation(0)], ["t"]),
        _policy(trained, noise_scale=1.0).infer([_observation(0, step=1)], ["s"]),
    ):
        assert not np.array_equal(other[0].actions, first.actions)


def test_a_misfit_observation_names_both_sides(trained: tuple[VLA, Processor]) -> None:
    observation = dataclasses.replace(_observation(0), images={"main": np.zeros((64, 64, 3), np.uint8)})
    with pytest.raises(DataError, match=r"\(64, 64, 3\), the model wants \(32, 32, 3\)"):
        _policy(trained).infer([observation], ["s"])
    with pytest.raises(UsageError, match="every:K"):
        _policy(trained, reasoning="sometimes")


def test_actions_stay_in_the_range_of_the_training_data(trained: tuple[VLA, Processor]) -> None:
    _, processor = trained
    replies = _policy(trained, noise_scale=50.0).infer([_observation(i) for i in range(4)], list("abcd"))
    actions = np.concatenate([r.actions for r in replies])
    assert (actions >= np.float32(processor.action.low)).all()
    assert (actions <= np.float32(processor.action.high)).all()


def test_from_pretrained_acts_as_the_model_that_was_saved(trained: tuple[VLA, Processor], tmp_path: Path) -> None:
    model, processor = trained
    config: ModelConfig = model.config
    save_checkpoint(str(tmp_path / "c"), model.state_dict(), config, processor, {"stage": "dual"})
    loaded = VLAPolicy.from_pretrained(str(tmp_path / "c"))
    expected, got = (p.infer([_observation(0)], ["s"])[0] for p in (_policy(trained), loaded))
    np.testing.assert_array_equal(got.actions, expected.actions)
    assert got.reasoning == expected.reasoning
