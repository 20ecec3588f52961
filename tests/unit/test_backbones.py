"""Every backbone class that is driven, on small random models: the same numbers as the class's own forward pass."""

import copy
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from unit import vla_fakes as fakes

from dualvla.config import from_dict
from dualvla.errors import CheckpointError, UsageError
from dualvla.models import backbone as backbones
from dualvla.models.checkpoint import load_model, save_checkpoint
from dualvla.models.config import ModelConfig
from dualvla.models.processing import Batch
from dualvla.models.stages import apply_stage, group_of, prepare
from dualvla.models.vla import VLA
from dualvla_pipelines.fit import check_architecture

CLASSES = sorted(fakes.BACKBONES | fakes.MORE_BACKBONES)
PATCHES = ("qwen2_5_vl", "qwen2_vl")
BIDIRECTIONAL = ("gemma3", "paligemma")  # over the image in their own prompts; here a sequence is causal throughout
PROCESSORS = {
    "idefics3": (
        Idefics3ImageProcessorPil,
        {"do_image_splitting": False, "do_pad": False, "max_image_size": {"longest_edge": 32}},
    ),
    "paligemma": (SiglipImageProcessorPil, {}),
    "llava": (CLIPImageProcessorPil, {"do_center_crop": False}),
    "qwen2_vl": (Qwen2VLImageProcessorPil, {"patch_size": 4, "merge_size": 2}),
}


def _made(of: str, stage: str = "specialist", **changes: object) -> tuple[VLA, Batch]:
    config = prepare(fakes.config(of, **changes), stage)
    processor = fakes.processor(config)
    model = VLA.create(config, processor, seed=0).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    samples = [
        fakes.sample(0, reasoning="move: left.", cameras=config.cameras),
        fakes.sample(1, cameras=config.cameras),
    ]
    samples.append(fakes.sample(2, "multimodal", cameras=config.cameras))
    return model, processor.collate(samples, seed=0, step=0)


def test_the_table_holds_what_is_tested_here() -> None:
    assert set(CLASSES) == set(backbones.FAMILIES)


@pytest.mark.parametrize("of", [c for c in CLASSES if c not in BIDIRECTIONAL])
def test_image_and_text_are_read_as_the_class_itself_reads_them(of: str) -> None:
    """[image | text] through our embeddings and positions, and through input_ids with its own placeholders."""
    model, _ = _made(of)
    backbone, hf = model.backbone, model.backbone.hf
    images = torch.randint(0, 256, (2, 1, 32, 32, 3), dtype=torch.uint8)
    text = torch.randint(5, 200, (2, 6))
    states = backbone.image_states(images)
    embeds = torch.cat([states, backbone.embed(text)], dim=1)
    ours = backbone.decode(embeds, torch.ones(embeds.shape[:2], dtype=torch.bool))

    image_token = 240
    hf.config.image_token_id = hf.model.config.image_token_id = image_token
    hf.model.image_token_id = image_token
    ids = torch.cat([torch.full((2, states.shape[1]), image_token), text], dim=1)
    pixels = backbone.pixels(images.flatten(0, 1))
    given: dict[str, torch.Tensor] = {"pixel_values": pixels}
    if of in PATCHES:
        patches, grid = backbones._cut(pixels, hf.config.vision_config)
        kinds = (ids == image_token).int()
        given = {"pixel_values": patches, "image_grid_thw": grid, "mm_token_type_ids": kinds}
    elif of in ("idefics3", "smolvlm"):
        given = {"pixel_values": pixels.unsqueeze(1)}
    theirs = hf.model(input_ids=ids, attention_mask=torch.ones_like(ids), **given).last_hidden_state
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("of", sorted(PROCESSORS))
def test_pixels_are_those_of_the_classs_own_processor(of: str) -> None:
    kind, settings = PROCESSORS[of]
    model, _ = _made(of)
    image = torch.randint(0, 256, (32, 32, 3), dtype=torch.uint8)
    theirs = kind(do_resize=False, **settings)(image.numpy(), return_tensors="pt")["pixel_values"]
    ours = model.backbone.pixels(image.unsqueeze(0))
    if of in PATCHES:
        ours, _ = backbones._cut(ours, model.backbone.hf.config.vision_config)
    torch.testing.assert_close(ours.reshape(theirs.shape), theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("of", sorted(fakes.MORE_BACKBONES))
def test_every_class_learns_and_its_checkpoint_is_whole(of: str, tmp_path: Path) -> None:
    model, batch = _made(of, cameras=("main",))
    trained = {group_of(n) for n in apply_stage(model, "specialist", model.config)}
    assert {"backbone", "vision", "words", "head"} <= trained
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(10):
        losses.append(model(batch)["loss"])
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.9 * losses[0]
    save_checkpoint(str(tmp_path), model.state_dict(), model.config, fakes.processor(model.config), {})
    loaded, _, _ = load_model(str(tmp_path))
    assert torch.equal(loaded(batch)["loss"], model.eval()(batch)["loss"])


@pytest.mark.parametrize("of", CLASSES)
def test_cached_decoding_agrees_with_one_pass_over_two_cameras(of: str) -> None:
    model, _ = _made(of, stage="dual", cameras=("main", "wrist"))
    processor = fakes.processor(model.config)
    samples = [fakes.sample(i, reasoning=t, cameras=("main", "wrist")) for i, t in enumerate(("move: left.", "go"))]
    batch = processor.collate(samples, seed=0, step=0)
    with torch.no_grad():
        whole = model.encode(batch)
        prefix = model.read_prompt(batch)
        torch.testing.assert_close(prefix.logits, model.backbone.logits(whole.text[:, 0]), atol=1e-4, rtol=1e-4)
        model.read_text(prefix, batch["text_ids"], batch["text_mask"])
        noise = torch.randn(2, 4, 7)
        expected = model.head.sample(model.head.context(whole.latents, batch["proprio"]), noise, 3)
        torch.testing.assert_close(model.act(prefix, batch, noise, 3), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("of", CLASSES)
def test_whole_models_run_in_bf16_near_fp32(of: str) -> None:
    model, batch = _made(of, stage="dual")
    exact = model(batch)["loss"].item()
    narrow = model.to(torch.bfloat16)(batch)["loss"].item()
    assert narrow == pytest.approx(exact, rel=0.03)
    assert narrow != exact


@pytest.mark.parametrize("of", ["idefics3", "qwen2_vl"])
def test_attention_and_checkpointing_are_settings_that_change_no_result(of: str) -> None:
    gradients = []
    for changes in ({}, {"attention": "sdpa"}, {"gradient_checkpointing": True}):
        model, batch = _made(of, stage="dual", **changes)
        model.train()
        model(batch)["loss"].backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert model.backbone.hf.is_activation_checkpointing
    for other in gradients[1:]:
        assert other.keys() == gradients[0].keys()
        for name, gradient in other.items():
            torch.testing.assert_close(gradient, gradients[0][name], atol=1e-5, rtol=1e-3)


def test_gradient_checkpointing_keeps_fewer_bytes_for_the_backward_pass() -> None:
    kept = []
    for checkpointing in (False, True):
        model, batch = _made("idefics3", gradient_checkpointing=checkpointing)
        model.train()
        total = [0]

        def note(tensor: torch.Tensor, total: list[int] = total) -> torch.Tensor:
            total[0] += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            model(batch)
        kept.append(total[0])
    assert kept[1] < 0.7 * kept[0]


def test_groups_freeze_and_thaw_by_configuration(tmp_path: Path) -> None:
    model, _ = _made("idefics3", frozen=("vision", "words"))
    assert not {"vision", "words"} & {group_of(n) for n in apply_stage(model, "specialist", model.config)}
    processor = fakes.processor(model.config)
    save_checkpoint(str(tmp_path), model.state_dict(), model.config, processor, {})
    model, _, config = load_model(
        str(tmp_path), "dual", like=fakes.config(tuned=("head",), gradient_checkpointing=True)
    )
    assert model.backbone.hf.is_activation_checkpointing
    check_architecture(config, prepare(fakes.config(attention="sdpa"), "dual"), "c")
    assert "head" in {group_of(n) for n in apply_stage(model, "dual", model.config)}
    with pytest.raises(UsageError, match="vison"):
        from_dict(ModelConfig, {"frozen": ["vison"]})


def test_a_class_that_is_not_driven_is_refused_naming_those_that_are(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mllama"}))
    for config in (ModelConfig(backbone=str(tmp_path)), ModelConfig(backbone_config={"model_type": "mllama"})):
        with pytest.raises(CheckpointError, match=r"'mllama' is not supported.*gemma3, idefics3.*qwen2_vl"):
            backbones.resolve(config, 100)
    with pytest.raises(CheckpointError, match=r"'/nowhere/model' is no Hugging Face model"):
        backbones.resolve(ModelConfig(backbone="/nowhere/model"), 100)


@pytest.mark.parametrize("of", ["paligemma", "qwen2_5_vl"])
def test_published_weights_in_bf16_and_of_another_picture_size_are_loaded_whole(of: str, tmp_path: Path) -> None:
    values = copy.deepcopy((fakes.BACKBONES | fakes.MORE_BACKBONES)[of])
    values["text_config"] |= {"vocab_size": 100, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
    if of not in PATCHES:
        values["vision_config"]["image_size"] = 64
    published = AutoModelForImageTextToText.from_config(
        AutoConfig.for_model(values.pop("model_type"), **values), dtype=torch.bfloat16
    )
    published.save_pretrained(tmp_path / "hf")
    config = prepare(fakes.config(backbone_config={}, backbone=str(tmp_path / "hf")), "specialist")
    processor = fakes.processor(fakes.config())
    resolved = backbones.resolve(config, processor.vocab_size)
    model = VLA(ModelConfig(**{**config.__dict__, "backbone_config": resolved}), pretrained=True).eval()
    for name, tensor in published.state_dict().items():
        ours = model.state_dict()[f"backbone.hf.{name}"]
        assert ours.dtype == torch.float32
        assert torch.equal(ours[: len(tensor)], tensor.float()), name
    batch = processor.collate(fakes.mixed(), 0, 0)
    expected = model(batch)["loss"]
    save_checkpoint(str(tmp_path / "c"), model.state_dict(), model.config, processor, {})
    assert torch.equal(load_model(str(tmp_path / "c"))[0](batch)["loss"], expected)
