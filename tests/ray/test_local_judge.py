"""A Hugging Face model as judge in Ray actors: the real loading path, with a random model that gives no verdict."""

import base64
import json
import os
import signal

import numpy as np
import pytest
import ray
from judge_fakes import trajectory

from dualvla.errors import CheckpointError
from dualvla_eval import frames
from dualvla_eval.judges import get_judge
from dualvla_eval.judges.local_chat import LocalModelImpl, LocalOptions, checkpoint_digest

TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: "
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %} {% endfor %}assistant: "
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A random LLaVA of a few thousand weights that writes single characters."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )

    folder = tmp_path_factory.mktemp("judge")
    words = ["<pad>", "<unk>", "<image>", *(chr(c) for c in range(32, 127))]
    whole = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    whole.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=whole, pad_token="<pad>", unk_token="<unk>", additional_special_tokens=["<image>"]
    )
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            text_config=LlamaConfig(vocab_size=len(words), max_position_embeddings=16384, **small),
            vision_config=CLIPVisionConfig(image_size=28, patch_size=14, projection_dim=16, **small),
            image_token_index=2,
        )
    )
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    images = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    LlavaProcessor(
        images, tokenizer, patch_size=14, vision_feature_select_strategy="default", chat_template=TEMPLATE,
        image_token="<image>", num_additional_image_tokens=1,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def settings(*more):
    return ["local.max_reply_tokens=12", "frames=3", *more]


@pytest.mark.slow
def test_a_random_model_is_asked_twice_and_leaves_everything_unjudged(tmp_path, checkpoint, ray_cluster):
    some = [trajectory(i, folder=tmp_path / "frames") for i in range(3)]
    judge = get_judge(f"local:{checkpoint}", settings("local.workers=2"), store=str(tmp_path / "v"))
    verdicts = judge.judge(some)
    assert all(v.unjudged.startswith("no valid answer: it is not JSON") for v in verdicts)
    assert all(v.action is None for v in verdicts)
    assert judge.usage()["calls"] == 6
    assert judge.usage()["completion_tokens"] == 6 * 12
    again = get_judge(f"local:{checkpoint}", settings(), store=str(tmp_path / "v"))
    assert again.judge(some) == verdicts
    assert again.usage()["calls"] == 0
    kept = json.loads(next((tmp_path / "v").rglob("*.json")).read_text())
    assert len(kept["answers"]) == 2


@pytest.mark.slow
def test_a_worker_that_dies_is_replaced_and_its_question_asked_again(tmp_path, checkpoint, ray_cluster):
    some = [trajectory(i, folder=tmp_path / "frames") for i in range(4)]
    judge = get_judge(f"local:{checkpoint}", settings("backoff_s=0.01"), store=str(tmp_path / "v"))
    judge.judge(some[:1])
    (actor,) = judge.chat._actors
    pid = ray.get(actor.__ray_call__.remote(lambda self: os.getpid()))
    os.kill(pid, signal.SIGKILL)
    verdicts = judge.judge(some)
    assert all(v.unjudged.startswith("no valid answer") for v in verdicts)
    assert judge.chat._actors != [actor]


@pytest.mark.slow
def test_pictures_reach_the_model(checkpoint):
    model = LocalModelImpl(str(checkpoint), LocalOptions(max_reply_tokens=4))
    jpeg = frames.encode(np.full((28, 28, 3), 10, np.uint8))
    url = f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"
    parts = [{"type": "text", "text": "look"}, {"type": "image_url", "image_url": {"url": url}}]
    reply = model.answer([{"role": "system", "content": "be fair"}, {"role": "user", "content": parts}])
    assert reply.completion_tokens == 4
    # 2 x 2 patches stand for the one picture.
    assert reply.prompt_tokens == len("system: be fair user: look assistant: ") + 4


@pytest.fixture
def weights(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    return tmp_path


def test_a_folder_that_is_no_checkpoint_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        get_judge("local:/no/such", store=str(tmp_path))
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(CheckpointError, match=r"no \*\.safetensors"):
        get_judge(f"local:{tmp_path}", store=str(tmp_path))
    assert checkpoint_digest("someone/model") == "someone/model"


def test_other_weights_are_another_judge(weights):
    before = checkpoint_digest(str(weights))
    assert checkpoint_digest(str(weights)) == before
    (weights / "model.safetensors").write_bytes(b"weightz")
    assert checkpoint_digest(str(weights)) != before
