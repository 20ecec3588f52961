"""The bytes on the wire: openpi's convention to the byte, strictness of the decoder, and no message that breaks it."""

import base64
import contextlib
import io
import os
import random

import hypothesis.extra.numpy as hnp
import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dualvla.errors import ServerError, WireError
from dualvla.schema import Observation, PolicyReply, PolicySpec
from dualvla.wire import http_json, messages
from dualvla.wire.openpi import WireLimits, pack, unpack

# Written by hand from the msgpack specification and openpi's convention: bin keys, dtype.str as text.
GOLDEN_ARRAY = bytes.fromhex(
    "84"  # a map of four
    "c40b" + b"__ndarray__".hex() + "c3"  # True
    "c404" + b"data".hex() + "c404" + "01000200"  # bin of 4 bytes
    "c405" + b"dtype".hex() + "a3" + b"<i2".hex() + "c405" + b"shape".hex() + "91" + "02"  # [2]
)
GOLDEN_SCALAR = bytes.fromhex(
    "83"
    "c40d" + b"__npgeneric__".hex() + "c3"
    "c404" + b"data".hex() + "05"
    "c405" + b"dtype".hex() + "a3" + b"|u1".hex()
)  # fmt: skip

SPEC = PolicySpec("ee_delta_pose+gripper", 5.0, ("main", "wrist"), "reasoning", 4, 2)
NUMBERS = st.sampled_from(["|b1", "|u1", "<i2", "<i8", ">i4", "<f2", "<f4", ">f8"])


def test_an_array_has_openpis_bytes() -> None:
    assert pack(np.array([1, 2], "<i2")) == GOLDEN_ARRAY
    np.testing.assert_array_equal(unpack(GOLDEN_ARRAY), np.array([1, 2], "<i2"))


def test_a_scalar_has_openpis_bytes() -> None:
    assert pack(np.uint8(5)) == GOLDEN_SCALAR
    assert unpack(GOLDEN_SCALAR) == np.uint8(5)


@given(NUMBERS.flatmap(lambda d: hnp.arrays(np.dtype(d), hnp.array_shapes(min_dims=0, max_dims=4, min_side=0))))
@settings(max_examples=200, deadline=None)
def test_arrays_survive_whatever_their_shape_and_byte_order(array: np.ndarray) -> None:
    back = unpack(pack({"a": array[...]}))["a"]
    np.testing.assert_array_equal(back, array)
    assert back.shape == array.shape
    assert back.dtype == array.dtype.newbyteorder("=")
    assert back.flags.writeable


@pytest.mark.parametrize("value", [np.array([object()]), np.array([1j]), np.zeros(2, "V4"), np.array(["a"]), object()])
def test_what_has_no_place_on_the_wire_is_not_sent(value: object) -> None:
    with pytest.raises(WireError):
        pack({"a": value})


def _array(**changes: object) -> bytes:
    fields = {b"__ndarray__": True, b"data": bytes(4), b"dtype": "<f4", b"shape": [1]}
    return msgpack.packb({**fields, **{k.encode(): v for k, v in changes.items()}})


@pytest.mark.parametrize(
    "frame",
    [
        _array(dtype="|O"),
        _array(dtype="<c8", data=bytes(8)),
        _array(dtype="|V4"),
        _array(dtype="<U1"),
        _array(dtype="<M8[s]", data=bytes(8)),
        _array(dtype="<f4,<f4", data=bytes(8)),
        _array(dtype=["<f4"]),
        _array(shape=[-1]),
        _array(shape=[2]),
        _array(shape=[1.0]),
        _array(shape=[True]),
        _array(shape=[1] * 5),
        _array(shape=[2**40, 2**40]),
        _array(data="text"),
        msgpack.packb({b"__npgeneric__": True, b"data": 300, b"dtype": "|u1"}),
        msgpack.packb({b"__npgeneric__": True, b"data": [1], b"dtype": "|u1"}),
        msgpack.packb({b"key": 1}),
        msgpack.packb({1: 1}),
        msgpack.packb(msgpack.ExtType(5, b"x")),
        msgpack.packb(msgpack.Timestamp(1, 1)),
        msgpack.packb([0] * 2000),
        msgpack.packb([[0] * 1000] * 30),
        b"\x91" * 5000,  # nested beyond any stack
        b"\xdd\xff\xff\xff\xff",  # a list that claims four billion elements
        b"\xa1\xff",  # text that is not UTF-8
        b"\xc1",
        b"",
        pack(1) + pack(2),
        bytes(9 * 2**20),
    ],
)
def test_what_is_refused(frame: bytes) -> None:
    with pytest.raises(WireError):
        unpack(frame)


def test_no_frame_raises_anything_but_a_wire_error() -> None:
    """Random bytes, and real frames with bytes flipped, cut off or doubled."""
    rng = random.Random(0)
    real = pack(messages.observation_to_wire(_observation()))
    for _ in range(5000):
        frame = bytearray(os.urandom(rng.randrange(40)) if rng.random() < 0.3 else real[: rng.randrange(len(real))])
        for _ in range(rng.randrange(4)):
            if frame:
                frame[rng.randrange(min(len(frame), 200))] = rng.randrange(256)
        with contextlib.suppress(WireError):
            messages.observation_from_wire(unpack(bytes(frame)))


def _observation(**changes: object) -> Observation:
    image = np.arange(5 * 4 * 3, dtype=np.uint8).reshape(5, 4, 3)
    fields = {
        "images": {"main": image, "wrist": image[::-1]},
        "instruction": "touch the red cube",
        "proprio": np.array([0.5, -1.0], np.float32),
        "ee_pose": np.linspace(0, 1, 6),
        "step": 7,
        "id": "e1/7",
    }
    return Observation(**{**fields, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("changes", [{}, {"proprio": None, "ee_pose": None, "id": ""}])
def test_an_observation_arrives_as_it_left(changes: dict[str, object]) -> None:
    sent = _observation(**changes)
    got = messages.observation_from_wire(unpack(pack(messages.observation_to_wire(sent))))
    assert (got.instruction, got.step, got.id, list(got.images)) == (sent.instruction, 7, sent.id, ["main", "wrist"])
    np.testing.assert_array_equal(got.images["wrist"], sent.images["wrist"])
    for name in ("proprio", "ee_pose"):
        ours, theirs = getattr(sent, name), getattr(got, name)
        assert (ours is None) == (theirs is None)
        if ours is not None:
            np.testing.assert_array_equal(theirs, ours)
            assert theirs.dtype == ours.dtype


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("images/main", np.zeros((4, 4, 4), np.uint8), "images/main"),
        ("images/main", np.zeros((4, 4, 3), np.float32), "images/main"),
        ("images/main", np.zeros((0, 4, 3), np.uint8), "images/main"),
        ("prompt", None, "prompt"),
        ("prompt", "x" * 5000, "5000"),
        ("step", -1, "step"),
        ("step", True, "step"),
        ("id", 3, "id"),
        ("observation/state", np.array([np.nan]), "observation/state"),
        ("observation/state", [1.0], "observation/state"),
        ("observation/ee_pose", np.zeros((2, 3)), "observation/ee_pose"),
        ("observation/stat", np.zeros(3), "did you mean 'observation/state'"),
    ],
)
def test_a_bad_field_is_named(key: str, value: object, told: str) -> None:
    with pytest.raises(WireError, match=told):
        messages.observation_from_wire({**messages.observation_to_wire(_observation()), key: value})


def test_a_reply_arrives_as_it_left() -> None:
    sent = PolicyReply(np.eye(4, 7, dtype=np.float32), "plan", True, 5, {"infer_ms": 2.0}, "e1/7")
    got = messages.reply_from_wire(unpack(pack(messages.reply_to_wire(sent, {"infer_ms": 3.0}))))
    np.testing.assert_array_equal(got.actions, sent.actions)
    assert (got.reasoning, got.keyframe, got.reasoning_tokens, got.id) == ("plan", True, 5, "e1/7")
    assert got.timing == {"policy_infer_ms": 2.0, "server_infer_ms": 3.0}


def test_the_greeting_tells_the_spec_and_strangers_are_recognised() -> None:
    assert messages.spec_from_metadata(unpack(pack(messages.metadata(SPEC)))) == SPEC
    with pytest.raises(WireError, match="protocol"):
        messages.spec_from_metadata(messages.metadata(SPEC) | {"protocol": 99})
    with pytest.raises(WireError, match="did not greet"):
        messages.spec_from_metadata({"policy": "pi0"})


def test_errors_keep_their_kind_and_id() -> None:
    refused = messages.error_from_text(messages.Failure("bad_request", "abc", "no image").to_json())
    assert isinstance(refused, WireError)
    assert "abc" in str(refused)
    assert isinstance(messages.error_from_text("Traceback of another server"), ServerError)


@pytest.mark.parametrize("kind", ["PNG", "list"])
def test_json_observations_equal_msgpack_ones(kind: str) -> None:
    sent = _observation()
    body = {
        "images": {name: _encoded(image) if kind == "PNG" else image.tolist() for name, image in sent.images.items()},
        "instruction": sent.instruction,
        "proprio": sent.proprio.tolist(),
        "ee_pose": sent.ee_pose.tolist(),
        "step": 7,
        "id": "e1/7",
    }
    got = http_json.observation_from_json(body)
    for name, image in sent.images.items():
        np.testing.assert_array_equal(got.images[name], image)
    np.testing.assert_array_equal(got.proprio, sent.proprio)
    assert got.proprio.dtype == np.float32


@pytest.mark.parametrize(
    "image",
    [
        "not base64!",
        base64.b64encode(b"GIF89a" + bytes(20)).decode(),
        [[[0, 0, 300]]],
        [[[0, 0, -1]]],
        [[[0, 0], [0, 0, 0]]],
        [[[0.5, 0, 0]]],
        [],
        None,
    ],
)
def test_a_bad_json_image_is_refused(image: object) -> None:
    with pytest.raises(WireError):
        http_json.observation_from_json({"images": {"main": image}, "instruction": "go"})


def test_a_picture_bomb_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = io.BytesIO()
    Image.new("1", (30_000, 30_000)).save(bomb, "PNG")
    monkeypatch.setattr(Image.Image, "convert", lambda *_: pytest.fail("decoded"))
    with pytest.raises(WireError):
        http_json.decode_image("main", base64.b64encode(bomb.getvalue()).decode())


def test_limits_are_per_decoder() -> None:
    frame = pack({"a": np.zeros(1000, np.uint8)})
    with pytest.raises(WireError, match="100"):
        unpack(frame, WireLimits(max_message_bytes=100))


def _encoded(image: np.ndarray) -> str:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()
