"""Both action heads behind one interface: bins as OpenVLA has them, exact distillation, eyes of their own."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Dinov2Config, Dinov2Model
from unit import vla_fakes as fakes

from dualvla.distill.step import training_loss
from dualvla.distill.teachers import Teachers
from dualvla.errors import CheckpointError
from dualvla.models.checkpoint import load_model, save_checkpoint
from dualvla.models.config import HeadConfig, LossWeights, TowerConfig
from dualvla.models.processing import Batch, Processor, Statistics
from dualvla.models.stages import apply_stage, prepare
from dualvla.models.token_head import from_bins, to_bins
from dualvla.models.vla import VLA, loss_counts
from dualvla.schema import Observation
from dualvla.vla_policy import VLAPolicy

DINO = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 14, "image_size": 28,
    "layerscale_value": 1.0,
}  # fmt: skip
HEADS = {
    "flow": HeadConfig(hidden=32, layers=2, heads=2, draws=3),
    "token": HeadConfig(kind="token", hidden=32, layers=2, heads=2),
    "flow with a tower": HeadConfig(hidden=32, layers=2, heads=2, draws=3, tower=TowerConfig(None, DINO, 28)),
    "token with both eyes": HeadConfig(
        kind="token", hidden=32, layers=2, heads=2, vision=True, tower=TowerConfig(None, DINO, 28)
    ),
}
TERM = {"flow": "flow", "token": "bins"}
ARMS = {7: "ee_delta_pose+gripper", 14: "bimanual_ee_delta_pose+gripper"}


def _made(head: str, size: int = 7, cameras: tuple[str, ...] = ("main",)) -> tuple[VLA, Processor, Batch]:
    """A model whose every parameter has a value, and a batch of three robot samples and two questions."""
    changes = {"head": HEADS[head], "action_space": ARMS[size], "cameras": cameras}
    config = prepare(fakes.config(**changes), "specialist")
    processor = fakes.processor(config)
    model = VLA.create(config, processor, seed=0).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    samples = [fakes.sample(i, cameras=cameras, size=size) for i in range(3)]
    samples += [fakes.sample(i, "multimodal", cameras=cameras) for i in (3, 4)]
    return model, processor, processor.collate(samples, seed=0, step=0)


@pytest.mark.parametrize("size", [7, 14])
@pytest.mark.parametrize("head", HEADS)
def test_every_head_learns_saves_and_acts(head: str, size: int, tmp_path: Path) -> None:
    cameras = ("main", "wrist") if size == 14 else ("main",)
    model, processor, batch = _made(head, size, cameras)
    apply_stage(model, "specialist", model.config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    term = TERM[model.config.head.kind]
    losses = []
    for _ in range(12):
        out = model(batch)
        assert term in out
        out["loss"].backward()
        losses.append(out[term].item())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.9 * losses[0]

    save_checkpoint(str(tmp_path), model.state_dict(), model.config, processor, {})
    loaded, loaded_processor, config = load_model(str(tmp_path))
    assert config == model.config
    assert torch.equal(loaded(batch)["loss"], model.eval()(batch)["loss"])
    policy = VLAPolicy(loaded, loaded_processor, config)
    sample = fakes.sample(0, cameras=cameras, size=size)
    observation = Observation(sample.images, sample.instruction, proprio=sample.proprio)
    (alone,) = policy.infer([observation], ["a"])
    assert alone.actions.shape == (4, size)
    assert np.isfinite(alone.actions).all()
    other = dataclasses.replace(observation, instruction=fakes.TEXTS[2])
    together = policy.infer([other, observation], ["b", "a"])
    np.testing.assert_allclose(together[1].actions, alone.actions, atol=1e-4)


@pytest.mark.parametrize("head", HEADS)
def test_distillation_reaches_unmasked_steps_of_robot_samples_only(head: str) -> None:
    model, _, batch = _made(head)
    kd = f"kd_{TERM[model.config.head.kind]}"
    weights = LossWeights(temperature=2.0)
    targets = Teachers.in_process(model, None).targets(batch)
    assert model(batch, targets=targets, weights=weights)[kd].item() == pytest.approx(0.0, abs=1e-6)
    (name,) = targets
    masked = ~batch["action_mask"] | ~batch["robot"].unsqueeze(1)  # sample 1 ends after three steps; questions
    targets[name][0] += torch.randn(targets[name][0].shape)
    base = model(batch, targets=targets, weights=weights)
    assert base[kd].item() > 1e-4
    for row, step in masked.nonzero().tolist():
        index = (row, slice(None), step) if name == "velocity" else (row, step)
        targets[name][index] = torch.randn(targets[name][index].shape)
    assert torch.equal(model(batch, targets=targets, weights=weights)["loss"], base["loss"])


def test_kd_of_the_token_head_is_the_kl_of_softened_bins() -> None:
    model, _, batch = _made("token")
    teacher = torch.randn(5, 4, 7, 256)
    out = model(batch, targets={"bins": teacher}, weights=LossWeights(temperature=3.0))
    student = model.head.predict(model.head.context(model.encode(batch).latents, batch["proprio"]), batch)
    p, q = (torch.distributions.Categorical(logits=logits / 3.0) for logits in (teacher, student))
    steps = batch["action_mask"] & batch["robot"].unsqueeze(1)
    expected = 9.0 * torch.distributions.kl_divergence(p, q)[steps].mean()
    assert out["kd_bins"].item() == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("head", ["flow", "token"])
def test_micro_batches_sum_to_the_global_loss(head: str) -> None:
    model, _, batch = _made(head)
    teachers = Teachers.in_process(_made(head)[0], None)
    whole = training_loss(model, batch, LossWeights(), teachers=teachers)
    parts = [{n: t[rows] for n, t in batch.items()} for rows in (slice(0, 1), slice(1, 5))]
    counts = sum(loss_counts(p) for p in parts) / 2
    found = [training_loss(model, p, LossWeights(), counts=counts, teachers=teachers)["loss"] for p in parts]
    torch.testing.assert_close(sum(found) / 2, whole["loss"], atol=1e-5, rtol=1e-5)


def _openvla_tokens(action: np.ndarray) -> np.ndarray:
    """OpenVLA's ActionTokenizer, written down again: digitize into 256, counted down from the vocabulary's end."""
    return 32_000 - np.digitize(np.clip(action, -1.0, 1.0), np.linspace(-1.0, 1.0, 256))


def _openvla_actions(tokens: np.ndarray) -> np.ndarray:
    edges = np.linspace(-1.0, 1.0, 256)
    return ((edges[:-1] + edges[1:]) / 2)[np.clip(32_000 - tokens - 1, 0, 254)]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-2, 2, width=32), min_size=1, max_size=20))
def test_bins_are_those_of_openvla(values: list[float]) -> None:
    action = np.array([*values, -1.0, 1.0, 0.0], np.float32)
    bins = to_bins(torch.from_numpy(action), 256)
    assert (32_000 - 1 - bins.numpy() == _openvla_tokens(action)).all()
    np.testing.assert_allclose(from_bins(bins, 256).numpy(), _openvla_actions(_openvla_tokens(action)), atol=1e-7)
    assert (np.abs(from_bins(bins, 256).numpy() - action.clip(-1, 1)) <= 1 / 255 + 1e-6).all()


def test_quantiles_to_unit_and_back_with_the_gripper_left_alone() -> None:
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.normal(size=(1000, 5)), np.zeros((1000, 1)), rng.integers(0, 2, (1000, 1))], axis=1)
    statistics = Statistics.of(values)
    np.testing.assert_allclose(statistics.q99, np.quantile(values, 0.99, axis=0))
    unit = statistics.to_unit(values, as_they_are=(6,))
    assert unit.min() == -1.0
    assert unit.max() == 1.0
    assert (unit[:, 5] == 0.0).all()
    assert (unit[:, 6] == values[:, 6]).all()
    held = values.copy()
    held[:, :5] = values[:, :5].clip(np.array(statistics.q01)[:5], np.array(statistics.q99)[:5])
    np.testing.assert_allclose(statistics.from_unit(unit, as_they_are=(6,)), held, atol=1e-6)


def test_a_checkpoint_from_before_there_were_quantiles_still_loads(tmp_path: Path) -> None:
    import json

    model, processor, _ = _made("flow")
    save_checkpoint(str(tmp_path), model.state_dict(), model.config, processor, {})
    config = json.loads((tmp_path / "config.json").read_text())
    for name in ("kind", "tower", "bins"):
        del config["model"]["head"][name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    words = json.loads((tmp_path / "processor.json").read_text())
    for name in ("q01", "q99"):
        del words["action"][name]
    (tmp_path / "processor.json").write_text(json.dumps(words))
    _, loaded, found = load_model(str(tmp_path))
    assert found == model.config
    action = np.zeros((1, 7), np.float32)
    assert (loaded.normalise_actions(action) == processor.normalise_actions(action)).all()


def test_the_tower_sees_what_dinov2_sees_until_film_has_learned(tmp_path: Path) -> None:
    published = Dinov2Model(Dinov2Config(**DINO)).eval()
    published.save_pretrained(tmp_path)
    head = dataclasses.replace(HEADS["flow"], tower=TowerConfig(str(tmp_path), {}, 28))
    config = prepare(fakes.config(head=head), "specialist")
    model = VLA.create(config, fakes.processor(config), seed=0).eval()
    tower = model.head.tower
    images = torch.randint(0, 256, (2, 1, 28, 28, 3), dtype=torch.uint8)
    latents = torch.randn(2, 3, 32)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pixels = ((images[:, 0] / 255.0 - mean) / std).permute(0, 3, 1, 2)
    expected = tower.out(published(pixels).last_hidden_state[:, 1:])
    torch.testing.assert_close(tower(images, latents), expected, atol=1e-5, rtol=1e-5)
    torch.nn.init.normal_(tower.film[0].weight)
    assert not torch.allclose(tower(images, latents), tower(images, latents + 1))


def test_a_tower_of_a_size_that_no_patch_divides_is_refused() -> None:
    with pytest.raises(CheckpointError, match="image_size 30 is no multiple of its patch size 14"):
        _ = VLA(fakes.config(head=HeadConfig(tower=TowerConfig(None, DINO, 30))))
