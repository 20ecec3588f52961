"""Embedders: the built-in ones tell tasks and scenes apart; checkpoints and an API go the same way."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from dualvla.errors import CheckpointError, ServerError, UsageError
from dualvla_eval.embedders import image_embedder, text_embedder

TASKS = ["stack the red cube on the blue cube", "put the red cube on top of the blue cube", "open the top drawer"]


def cosine(vectors):
    return vectors @ vectors.T


def scene(color, corner, noise=0):
    picture = np.full((64, 64, 3), 120, np.uint8)
    y, x = corner
    picture[y : y + 16, x : x + 16] = color
    if noise:
        picture = np.clip(picture + np.random.default_rng(noise).normal(0, 4, picture.shape), 0, 255).astype(np.uint8)
    return picture


def check_unit(vectors, count):
    assert vectors.dtype == np.float32
    assert len(vectors) == count
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


def test_texts_that_share_words_are_near():
    vectors = text_embedder("built-in").embed_texts(TASKS)
    check_unit(vectors, 3)
    near = cosine(vectors)
    assert near[0, 1] > near[0, 2] + 0.2
    assert np.array_equal(vectors, text_embedder("built-in").embed_texts(TASKS))


def test_scenes_alike_in_place_and_colour_are_near():
    red, blue = (220, 40, 40), (40, 60, 220)
    pictures = [scene(red, (8, 8)), scene(red, (8, 8), noise=1), scene(blue, (8, 8)), scene(red, (40, 40))]
    vectors = image_embedder("built-in").embed_images(pictures)
    check_unit(vectors, 4)
    near = cosine(vectors)
    assert near[0, 1] > near[0, 2] + 0.1
    assert near[0, 1] > near[0, 3] + 0.1


@pytest.mark.parametrize("name", ["built", "hf:", "word2vec:x"])
def test_an_unknown_embedder_is_refused(name):
    with pytest.raises(UsageError, match="Unknown text embedder"):
        text_embedder(name)
    with pytest.raises(UsageError, match="Unknown image embedder"):
        image_embedder(name)


def test_a_text_checkpoint_ignores_padding(tmp_path):
    import torch
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=40, **small)).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    embedder = text_embedder(f"hf:{tmp_path}")
    together = embedder.embed_texts(["red cube", "open the top drawer now"])
    check_unit(together, 2)
    assert np.allclose(together[0], embedder.embed_texts(["red cube"])[0], atol=1e-5)


def test_a_clip_checkpoint_puts_texts_and_pictures_into_one_space(tmp_path):
    import torch
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    torch.manual_seed(0)
    part = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    text = {**part, "vocab_size": 40, "max_position_embeddings": 16, "eos_token_id": 3, "bos_token_id": 2}
    vision = {**part, "image_size": 32, "patch_size": 16}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(tmp_path)
    tokenizer = save_tokenizer(tmp_path)
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(images, tokenizer).save_pretrained(tmp_path)
    texts = text_embedder(f"clip:{tmp_path}").embed_texts(TASKS)
    pictures = image_embedder(f"clip:{tmp_path}").embed_images([scene((220, 0, 0), (8, 8)), scene((0, 0, 220), (8, 8))])
    check_unit(texts, 3)
    check_unit(pictures, 2)
    assert texts.shape[1] == pictures.shape[1] == 8


def test_a_checkpoint_that_is_none_is_named(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        text_embedder(f"hf:{tmp_path}")


def save_tokenizer(folder):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = sorted({w for task in TASKS for w in task.split()} | {"now"})
    vocabulary = {w: i for i, w in enumerate(["[PAD]", "[UNK]", "[BOS]", "[EOS]", *words])}
    whole = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    whole.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=whole, pad_token="[PAD]", unk_token="[UNK]", bos_token="[BOS]", eos_token="[EOS]"
    )
    tokenizer.model_max_length = 16
    tokenizer.save_pretrained(folder)
    return tokenizer


def test_an_api_s_vectors_come_back_in_order(monkeypatch):
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            good = request["model"] == "embed"
            data = [
                {"index": i, "object": "embedding", "embedding": [len(t), 1]} for i, t in enumerate(request["input"])
            ]
            found = {
                "object": "list",
                "data": data[::-1],
                "model": "embed",
                "usage": {"prompt_tokens": 1, "total_tokens": 1},
            }
            body = json.dumps(found if good else {"error": {"message": "no"}}).encode()
            self.send_response(200 if good else 404)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{server.server_port}/v1")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    try:
        vectors = text_embedder("api:embed").embed_texts(["aaa", "b"])
        with pytest.raises(ServerError, match="NotFoundError"):
            text_embedder("api:other").embed_texts(["a"])
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    check_unit(vectors, 2)
    assert vectors[0, 0] > vectors[1, 0]
