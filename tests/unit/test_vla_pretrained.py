"""A backbone with published weights: the same path, its own words, and a checkpoint that needs it no more."""

import copy
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    Gemma3Processor,
    Idefics3Processor,
    PaliGemmaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from unit import vla_fakes as fakes

from dualvla.models.checkpoint import load_model, save_checkpoint
from dualvla.models.stages import apply_stage, group_of, prepare
from dualvla.models.vla import VLA

WORDS = 60


def _publish(folder: Path) -> dict[str, torch.Tensor]:
    """A random Idefics3 with a tokenizer of its own, as a Hugging Face folder; returns its weights."""
    hf = _random("idefics3", image_token_id=1)
    hf.save_pretrained(folder)
    _tokenizer().save_pretrained(folder)
    return hf.state_dict()


def _random(of: str, **changes: Any) -> Any:
    settings = copy.deepcopy(fakes.BACKBONES[of])
    settings["text_config"] |= {"vocab_size": WORDS, "pad_token_id": 0}
    settings["vision_config"]["image_size"] = 32
    return AutoModelForImageTextToText.from_config(
        AutoConfig.for_model(settings.pop("model_type"), **{**settings, **changes})
    )


def _tokenizer(**special: str) -> PreTrainedTokenizerFast:
    letters = {c: i for i, c in enumerate(["?", *"abcdefghijklmnopqrstuvwxyz .:?_<>|RQ"])}
    tokenizer = Tokenizer(models.BPE(letters, [], unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="?", extra_special_tokens=special)
    made.add_special_tokens({"additional_special_tokens": list(special.values())})
    return made


def _published_processor(of: str) -> Any:
    """As a publisher would save it. Those of Qwen-VL and InternVL need torchvision, for videos."""
    if of == "idefics3":
        seen = {"do_image_splitting": False, "size": {"longest_edge": 32}, "max_image_size": {"longest_edge": 32}}
        return Idefics3Processor(Idefics3ImageProcessorPil(**seen), _tokenizer(), image_seq_len=16)
    if of == "paligemma":
        images = SiglipImageProcessorPil(size={"height": 32, "width": 32})
        images.image_seq_length = 16
        return PaliGemmaProcessor(images, _tokenizer())
    special = {"boi_token": "<boi>", "eoi_token": "<eoi>", "image_token": "<img>"}
    images = Gemma3ImageProcessorPil(size={"height": 32, "width": 32})
    return Gemma3Processor(images, _tokenizer(**special), image_seq_length=16)


@pytest.mark.parametrize("of", sorted(fakes.BACKBONES))
def test_a_published_folder_is_seen_and_read_as_its_own_auto_classes_do(of: str, tmp_path: Path) -> None:
    """Weights by AutoModelForImageTextToText and a processor by AutoProcessor, from one folder: the same pixels, image
    states and token ids as ours."""
    _random(of).save_pretrained(tmp_path)
    _published_processor(of).save_pretrained(tmp_path)
    hf = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    theirs = AutoProcessor.from_pretrained(tmp_path)
    config = prepare(fakes.config(backbone_config={}, backbone=str(tmp_path)), "specialist")
    processor = fakes.processor(config)
    model = VLA.create(config, processor, seed=0).eval()
    assert processor.encode("touch the red cube") == theirs.tokenizer("touch the red cube").input_ids
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    pixels = theirs.image_processor(image, return_tensors="pt")["pixel_values"]
    ours = torch.from_numpy(image)[None, None]
    torch.testing.assert_close(
        model.backbone.pixels(ours[0]).reshape(pixels.shape), pixels.float(), atol=1e-5, rtol=1e-5
    )
    with torch.no_grad():
        states = hf.get_image_features(pixels).pooler_output
        torch.testing.assert_close(model.backbone.image_states(ours)[0], states[0], atol=1e-5, rtol=1e-4)


def test_published_weights_are_used_frozen_and_then_no_longer_needed(tmp_path: Path) -> None:
    published = _publish(tmp_path / "published")
    config = prepare(fakes.config(backbone_config={}, backbone=str(tmp_path / "published")), "specialist")
    assert config.adapters == ("action",)
    processor = fakes.processor(config)
    assert processor.decode(processor.encode("touch the red cube")).replace(" ", "") == "touchtheredcube"
    model = VLA.create(config, processor, seed=0)
    state = model.state_dict()
    for name, tensor in published.items():
        ours = state[f"backbone.hf.{name}"]
        assert torch.equal(ours[: len(tensor)], tensor), name  # the vocabulary grew by our special tokens
    trained = {group_of(n) for n in apply_stage(model, "specialist", model.config)}
    assert trained == {"queries", "grounding", "head", "action"}
    batch = processor.collate(fakes.mixed(), 0, 0)
    model(batch)["loss"].backward()

    save_checkpoint(str(tmp_path / "checkpoint"), state, model.config, processor, {})
    shutil.rmtree(tmp_path / "published")
    loaded, loaded_processor, _ = load_model(str(tmp_path / "checkpoint"))
    assert torch.equal(loaded(batch)["loss"], model.eval()(batch)["loss"])
    assert loaded_processor.encode("touch") == processor.encode("touch")
