"""The model on real (small, random) Hugging Face classes: what a mask, a pruned text, an adapter or a stage means."""

import dataclasses

import numpy as np
import pytest
import torch
from unit import vla_fakes as fakes

from dualvla.distill.step import training_loss
from dualvla.distill.teachers import Teachers
from dualvla.errors import CheckpointError, DataError, UsageError
from dualvla.models.config import LossWeights, ModelConfig
from dualvla.models.processing import IGNORE, Batch
from dualvla.models.stages import STAGES, apply_stage, group_of, prepare
from dualvla.models.vla import LOSS_TERMS, VLA, loss_counts

CLASSES = tuple(fakes.BACKBONES)


def _model(stage: str = "dual", **changes: object) -> tuple[VLA, Batch]:
    config = prepare(fakes.config(**changes), stage)  # type: ignore[arg-type]
    processor = fakes.processor(config)
    model = VLA.create(config, processor, seed=0).eval()
    return model, processor.collate(fakes.mixed(), seed=0, step=0)


def _shake(model: VLA) -> VLA:
    """Gives what starts at zero (adapters, gate, velocity) a value, so that nothing is hidden behind it."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("backbone", CLASSES)
def test_every_class_trains_every_term_on_the_same_path(backbone: str) -> None:
    model, batch = _model(of=backbone)
    apply_stage(model, "specialist", model.config)
    teacher, _ = _model(of=backbone)
    teachers = Teachers.in_process(_shake(teacher), teacher)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(25):
        out = training_loss(model, batch, LossWeights(), teachers=teachers)
        assert set(out) == {"loss", *LOSS_TERMS} - {"bins", "kd_bins"}
        out["loss"].backward()
        losses.append(out["loss"].item())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.8 * losses[0]


def test_two_cameras_and_two_arms() -> None:
    config = prepare(
        fakes.config(cameras=("main", "wrist"), action_space="bimanual_ee_delta_pose+gripper"), "specialist"
    )
    processor = fakes.processor(config)
    model = VLA.create(config, processor, seed=0)
    samples = [fakes.sample(i, cameras=("wrist", "main"), size=14) for i in range(3)]
    batch = processor.collate(samples, seed=0, step=0)
    assert batch["images"].shape == (3, 2, 32, 32, 3)
    assert model(batch, mode="action")["velocity"].shape == (3, 3, 4, 14)
    with pytest.raises(DataError, match="No camera 'main'"):
        processor.collate([fakes.sample(0, cameras=("wrist",), size=14)], seed=0, step=0)


@pytest.mark.parametrize("backbone", CLASSES)
def test_a_pruned_text_is_removed_not_hidden(backbone: str) -> None:
    """A masked text gives what no text gives, whatever stands there; and padding of the batch changes nothing."""
    model, batch = _model(of=backbone)
    _shake(model)
    noise = {**batch, "text_ids": (batch["text_ids"] + 7) % 200, "text_mask": torch.zeros_like(batch["text_mask"])}
    gone = {**batch, "text_ids": batch["text_ids"][:, :0], "text_mask": batch["text_mask"][:, :0]}
    torch.testing.assert_close(model.encode(noise).latents, model.encode(gone).latents, atol=1e-5, rtol=1e-5)
    velocity = model(batch, mode="action")["velocity"]  # the action teacher sees no text
    torch.testing.assert_close(velocity, model(gone, mode="action")["velocity"], atol=1e-5, rtol=1e-5)
    other = model.head.predict(model.head.context(model.encode(batch).latents, batch["proprio"]), batch)
    assert not torch.allclose(velocity[0], other[0], atol=1e-4)


def test_a_sample_gives_the_same_loss_alone_and_in_a_batch() -> None:
    model, batch = _model()
    _shake(model)
    processor = fakes.processor(model.config)
    counts = loss_counts(batch)
    alone = [model(processor.collate([s], 0, 0), counts=counts)["loss"] for s in fakes.mixed()]
    torch.testing.assert_close(sum(alone), model(batch, counts=counts)["loss"], atol=1e-4, rtol=1e-5)


def test_micro_batches_or_workers_sum_to_the_global_loss_and_gradient() -> None:
    model, batch = _model()
    _shake(model)
    model(batch)["loss"].backward()
    whole = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    parts = [{n: t[rows] for n, t in batch.items()} for rows in (slice(0, 1), slice(1, 5))]
    counts = sum(loss_counts(p) for p in parts) / 2
    for part in parts:
        (model(part, counts=counts)["loss"] / 2).backward()
    for name, parameter in model.named_parameters():
        if name in whole:
            torch.testing.assert_close(parameter.grad, whole[name], atol=2e-5, rtol=1e-3)


def test_only_what_is_supervised_has_a_gradient() -> None:
    """Steps past an episode's end, another domain's actions and targets, and unknown targets teach nothing."""
    model, batch = _model()
    _shake(model)
    base = model(batch)["loss"]
    changed = {name: tensor.clone() for name, tensor in batch.items()}
    changed["actions"][1, 3] += 5  # masked: sample 1 ends after 3 steps
    changed["actions"][3:] += 5  # questions
    changed["target_position"][3:] = 1.0
    changed["target_pixel"][3:] = 0.5
    assert torch.equal(model(changed)["loss"], base)
    changed["actions"][0, 0] += 5
    assert not torch.equal(model(changed)["loss"], base)


def test_the_domain_picks_the_teacher() -> None:
    """Eq. 5 and 6: the action teacher reaches robot rows only, the reasoning teacher questions only."""
    model, batch = _model()
    _shake(model)
    teacher, _ = _model()
    teacher.load_state_dict(model.state_dict())
    out = training_loss(model, batch, LossWeights(), teachers=Teachers.in_process(None, teacher))
    assert out["kd_token"].item() == pytest.approx(0.0, abs=1e-6)
    assert "kd_flow" not in out
    targets = Teachers.in_process(teacher, teacher).targets(batch)
    assert (targets["velocity"][3:] == 0).all()
    assert (targets["logits"][:3] == 0).all()
    base = model(batch, targets=targets)
    targets["velocity"][3:] = 9.0
    targets["logits"][:3] = torch.randn_like(targets["logits"][:3])
    assert torch.equal(model(batch, targets=targets)["loss"], base["loss"])


@pytest.mark.parametrize("backbone", CLASSES)
def test_what_is_masked_may_be_anything(backbone: str) -> None:
    """Padded tokens, chunk steps past the end, absent proprioception, and each teacher's targets of the other domain:
    no loss and no gradient depends on them."""
    model, batch = _model(backbone_config=fakes.BACKBONES[backbone])
    _shake(model)
    teacher, _ = _model(backbone_config=fakes.BACKBONES[backbone])
    targets = Teachers.in_process(teacher, teacher).targets(batch)
    other = {name: tensor.clone() for name, tensor in batch.items()}
    generator = torch.Generator().manual_seed(7)
    for name, mask in (("instruction_ids", "instruction_mask"), ("text_ids", "text_mask")):
        anything = torch.randint(5, 200, batch[name].shape, generator=generator)
        other[name] = torch.where(batch[mask], batch[name], anything)
        assert not batch[mask].all()
    gone = ~batch["action_mask"] | ~batch["robot"].unsqueeze(1)
    other["actions"][gone] = 3.0
    other["proprio"][~batch["has_proprio"]] = 5.0
    elsewhere = {name: tensor.clone() for name, tensor in targets.items()}
    elsewhere["velocity"][~batch["robot"]] = 9.0
    elsewhere["logits"][batch["robot"]] = 9.0
    elsewhere["logits"][batch["labels"] == IGNORE] = -9.0
    results = []
    for given, wanted in ((batch, targets), (other, elsewhere)):
        model.zero_grad()
        out = model(given, targets=wanted)
        out["loss"].backward()
        results.append((out, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
    for name, term in results[0][0].items():
        torch.testing.assert_close(results[1][0][name], term, atol=1e-6, rtol=1e-5)
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], gradient, atol=1e-6, rtol=1e-3, msg=name)


def test_the_student_is_compared_with_its_text_and_the_specialist_without() -> None:
    model, _ = _model()
    _shake(model)
    pruned = dataclasses.replace(fakes.sample(0), reasoning=None)
    processor = fakes.processor(model.config)
    teachers = Teachers.in_process(model, None)
    same = training_loss(model, processor.collate([pruned], 0, 0), LossWeights(), teachers=teachers)
    assert same["kd_flow"].item() == pytest.approx(0.0, abs=1e-10)
    spoken = training_loss(
        model, processor.collate([fakes.sample(0, reasoning="move: left.")], 0, 0), LossWeights(), teachers=teachers
    )
    assert spoken["kd_flow"].item() > 1e-8


def test_thinking_or_not_is_a_label_after_the_prompt() -> None:
    model, batch = _model()
    processor = fakes.processor(model.config)
    first = batch["labels"][:, 0].tolist()
    assert first[1] == processor.act_id  # pruned: straight to the queries
    assert first[0] == processor.encode(fakes.TEXTS[2])[0]
    for row, end in enumerate([processor.act_id] * 3 + [processor.eos_id] * 2):
        length = int(batch["text_mask"][row].sum())
        assert batch["labels"][row, length] == end
        assert (batch["labels"][row, length + 1 :] == -100).all()


def test_adapters_and_gate_start_with_no_effect_and_then_have_one() -> None:
    plain, batch = _model("specialist")
    assert plain.config.adapters == ()
    adapted = VLA(prepare(plain.config, "reasoning")).eval()
    adapted.load_state_dict(plain.state_dict(), strict=False)
    for key, value in plain(batch).items():
        torch.testing.assert_close(adapted(batch)[key], value)
    before = adapted(batch)["loss"]
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if ".adapters.language.up." in name:
                parameter.fill_(0.05)
    assert not torch.equal(adapted(batch)["loss"], before)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("pretrained", [False, True])
def test_a_step_moves_the_parameters_of_the_stage_and_no_others(stage: str, pretrained: bool) -> None:
    model, batch = _model()
    _shake(model)
    config = dataclasses.replace(model.config, backbone="some/model" if pretrained else None)
    names = apply_stage(model, stage, config)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model(batch)["loss"].backward()
    optimizer.step()
    moved = {group_of(n) for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    row = STAGES[stage]
    present = {group_of(n) for n, _ in model.named_parameters()}
    assert moved == present & (row.trains if pretrained else row.from_scratch)
    assert {group_of(n) for n in names} == moved
    assert "head" not in moved or stage == "specialist"


def test_unknown_stage_and_unknown_class_name_the_nearest() -> None:
    with pytest.raises(UsageError, match="specialist"):
        prepare(fakes.config(), "speciallist")
    with pytest.raises(CheckpointError, match="idefics9"):
        VLA(ModelConfig(backbone_config={"model_type": "idefics9"}))


def test_batches_are_keyed_by_sample_and_step_not_by_neighbours() -> None:
    model, batch = _model()
    processor = fakes.processor(model.config)
    alone = processor.collate([fakes.mixed()[2]], seed=0, step=0)
    for name in ("tau", "noise", "images", "actions"):
        assert torch.equal(alone[name][0], batch[name][2]), name
    assert not torch.equal(processor.collate([fakes.mixed()[2]], seed=0, step=1)["noise"], alone["noise"])
    assert not torch.equal(processor.collate([fakes.mixed()[2]], seed=1, step=0)["tau"], alone["tau"])


def test_any_text_and_any_action_survive_the_processor() -> None:
    processor = fakes.processor(fakes.config())
    for text in ("touch the red cube", "Größe 7 — 去", "<script>"):
        assert processor.decode(processor.encode(text)) == text
    values = np.random.default_rng(0).normal(size=(5, 7)).astype(np.float32) * 0.1
    np.testing.assert_allclose(processor.action.restore(processor.action.normalise(values)), values, atol=1e-6)
