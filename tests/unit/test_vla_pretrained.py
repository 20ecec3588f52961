"""A backbone with published weights: the same path, its own words, and a checkpoint that needs it no more."""

import shutil
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedTokenizerFast
from unit import vla_fakes as fakes

from dualvla.models.checkpoint import load_model, save_checkpoint
from dualvla.models.stages import apply_stage, group_of, prepare
from dualvla.models.vla import VLA

WORDS = 60


def _publish(folder: Path) -> dict[str, torch.Tensor]:
    """A random Idefics3 with a tokenizer of its own, as a Hugging Face folder; returns its weights."""
    settings = {**fakes.BACKBONES["idefics3"]}
    settings["text_config"] = {**settings["text_config"], "vocab_size": WORDS, "pad_token_id": 0}
    settings["vision_config"] = {**settings["vision_config"], "image_size": 32}
    settings["image_token_id"] = 1
    hf = AutoModelForImageTextToText.from_config(AutoConfig.for_model(settings.pop("model_type"), **settings))
    hf.save_pretrained(folder)
    letters = {c: i for i, c in enumerate(["?", *"abcdefghijklmnopqrstuvwxyz .:?_<>|RQ"])}
    tokenizer = Tokenizer(models.BPE(letters, [], unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return hf.state_dict()


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
