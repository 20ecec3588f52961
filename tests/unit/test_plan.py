"""The plan's estimates against what small models really hold and keep."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from unit import vla_fakes as fakes

from dualvla import cli
from dualvla.models.config import ModelConfig, tiny_backbone
from dualvla.models.processing import IGNORE, Sample
from dualvla.models.stages import apply_stage, prepare
from dualvla.models.vla import VLA
from dualvla_pipelines import flops
from dualvla_pipelines import plan as planning
from dualvla_pipelines.recipes import TrainConfig, ZeroConfig


def _wide() -> dict:
    settings = copy.deepcopy(tiny_backbone())
    settings["text_config"] |= {
        "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6, "num_key_value_heads": 2, "head_dim": 64,
    }  # fmt: skip
    return settings


MODELS = {
    "tiny": ModelConfig(backbone_config=tiny_backbone(), proprio_dim=4),
    "wide": ModelConfig(backbone_config=_wide(), proprio_dim=4, max_text_tokens=128),
}


def _real(config: ModelConfig, stage: str) -> tuple[VLA, object]:
    config = prepare(config, stage)
    processor = fakes.processor(config)
    model = VLA.create(config, processor, seed=0).train()
    apply_stage(model, stage, model.config)
    return model, processor


def _samples(config: ModelConfig, number: int) -> list[Sample]:
    image = np.full((config.image_size, config.image_size, 3), 7, np.uint8)
    return [
        Sample(
            i, "robot", {"main": image}, fakes.TEXTS[0], "touch the red cube move left plan " * 40,
            np.zeros(4, np.float32), np.zeros((config.horizon, 7), np.float32),
        )
        for i in range(number)
    ]  # fmt: skip


def _kept_bytes(model: VLA, processor: object, number: int, dtype: str) -> int:
    """Of everything that the forward pass of `number` samples keeps for the backward pass, each storage once."""
    batch = processor.collate(_samples(model.config, number), 0, 0)  # type: ignore[attr-defined]
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages: dict[int, torch.UntypedStorage] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage
        return tensor

    with (
        torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"),
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
    ):
        _ = model(batch)["loss"]
        return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", ["specialist", "dual"])
@pytest.mark.parametrize("name", MODELS)
def test_activations_are_within_a_third_of_what_was_measured(name: str, stage: str, dtype: str) -> None:
    model, processor = _real(MODELS[name], stage)
    measured = _kept_bytes(model, processor, 3, dtype) - _kept_bytes(model, processor, 2, dtype)  # of one more sample
    config = dataclasses.replace(MODELS[name], vocab_size=processor.vocab_size)  # type: ignore[attr-defined]
    estimate = planning.activation_bytes(planning.meta_model(config, stage), TrainConfig(zero=ZeroConfig(dtype=dtype)))
    assert 0.75 * measured < estimate < 1.34 * measured


@pytest.mark.parametrize("stage", ["specialist", "dual"])
def test_what_the_optimiser_keeps_is_counted_to_the_byte(stage: str) -> None:
    model, processor = _real(MODELS["tiny"], stage)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    model(processor.collate(_samples(model.config, 1), 0, 0))["loss"].backward()  # type: ignore[attr-defined]
    optimizer.step()
    moments = sum(t.nbytes for s in optimizer.state.values() for n, t in s.items() if n != "step")
    weights = sum(p.nbytes for p in model.parameters())
    gradients = sum(p.grad.nbytes for p in trained if p.grad is not None)

    config = dataclasses.replace(MODELS["tiny"], vocab_size=processor.vocab_size)  # type: ignore[attr-defined]
    whole = TrainConfig(zero=ZeroConfig(stage=0))
    found = planning.sizes(planning.meta_model(config, stage), whole)
    state = planning.state_bytes(found, whole, gpus=4)
    assert state["weights"] == weights
    assert state["gradients"] >= gradients  # all of them, once every term of the loss has been seen
    unused = sum(p.nbytes for p in trained if p.grad is None)
    assert state["gradients"] == gradients + unused
    # DeepSpeed keeps master weights beside the two moments of Adam.
    assert state["optimiser"] == 3 * state["gradients"] == moments * 1.5 + 3 * unused


def test_shards_shrink_with_gpus_and_stages_and_a_cache_frees_the_teachers() -> None:
    one, four = (planning.plan("tiny", gpus=n, gpu_memory_gb=24) for n in (1, 4))
    assert four["state_gb"]["optimiser"] == pytest.approx(one["state_gb"]["optimiser"] / 4)
    assert four["samples_per_s"] == pytest.approx(4 * one["samples_per_s"])
    cached = planning.plan("tiny", gpus=1, gpu_memory_gb=24, teacher_cache=True)
    assert cached["state_gb"]["teachers"] == 0.0 < one["state_gb"]["teachers"]
    assert cached["batch_per_gpu"] >= one["batch_per_gpu"]
    offloaded = planning.plan("tiny", gpus=1, gpu_memory_gb=24, assignments=("dual.zero.offload=cpu",))
    assert offloaded["state_gb"]["optimiser"] == 0.0
    thrifty = planning.plan("tiny", gpus=1, gpu_memory_gb=24, assignments=("model.gradient_checkpointing=true",))
    assert thrifty["activation_gb_per_sample"] < 0.7 * one["activation_gb_per_sample"]
    assert thrifty["samples_per_s"] < one["samples_per_s"]


def test_a_billion_parameters_are_planned_without_allocating_them(capsys: pytest.CaptureFixture[str]) -> None:
    text = '{"model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24, '
    text += '"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64}'
    vision = '{"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12, '
    vision += '"patch_size": 16}'
    backbone = f'{{"model_type": "idefics3", "scale_factor": 2, "text_config": {text}, "vision_config": {vision}}}'
    options = ["--set", f"model.backbone_config={backbone}", "--set", "model.image_size=224", "--stage", "specialist"]
    assert cli.main(["plan", "--recipe", "tiny", "--gpus", "8", "--gpu-memory", "80", *options]) == 0
    shown = capsys.readouterr().out
    assert "samples that fit on a GPU" in shown
    large = planning.plan(
        "tiny", gpus=1, gpu_memory_gb=8, stage="specialist", assignments=tuple(o for o in options if "=" in o)
    )
    assert large["parameters"] > 1.4e9
    assert not large["fits"]
    assert "does not fit" in planning.render(large)


@pytest.mark.parametrize("stage", ["specialist", "dual"])
@pytest.mark.parametrize("name", MODELS)
def test_a_steps_arithmetic_is_what_pytorch_counts(name: str, stage: str) -> None:
    model, processor = _real(MODELS[name], stage)
    batch = processor.collate(_samples(model.config, 3), 0, 0)  # type: ignore[attr-defined]
    with FlopCounterMode(display=False) as forward:
        loss = model(batch)["loss"]
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    arithmetic = flops.Arithmetic.of(model)
    fixed = flops.image_tokens(model) + model.config.num_queries + 1
    tokens = float(batch["instruction_mask"].sum() + batch["text_mask"].sum() + 3 * fixed)
    texts = float((batch["labels"] != IGNORE).sum())
    counted = forward.get_total_flops()
    assert arithmetic.forward(3, tokens, texts) == pytest.approx(counted, rel=0.03)
    assert arithmetic.training(3, tokens, texts) == pytest.approx(counted + backward.get_total_flops(), rel=0.03)
