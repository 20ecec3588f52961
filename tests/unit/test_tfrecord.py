"""TFRecord files and tf.train.Example, against protobuf's own writer and a checksum written from its definition."""

from __future__ import annotations

import contextlib
import io
import itertools

import google_crc32c
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from robot_sources import crc32c, serialize, tfrecord

from dualvla.errors import DataError
from dualvla_pipelines.sources.tfrecord import parse_example, read_records

VALUES = st.one_of(
    st.lists(st.binary(max_size=40), min_size=1, max_size=4),
    st.lists(st.integers(-(1 << 63), (1 << 63) - 1), min_size=1, max_size=4).map(lambda v: np.array(v, dtype=np.int64)),
    st.lists(st.floats(width=32), min_size=1, max_size=6).map(lambda v: np.array(v, dtype=np.float32)),
)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.text(max_size=12), VALUES, max_size=5))
def test_examples_come_back_as_protobuf_wrote_them(features: dict[str, object]) -> None:
    found = parse_example(serialize(features))
    assert set(found) == set(features)
    for key, values in features.items():
        np.testing.assert_array_equal(found[key], values)


def test_unpacked_numbers_are_read_too() -> None:
    """As proto2 writers lay them out: a tag before every number."""
    floats = b"\x0d" + np.float32(1.5).tobytes() + b"\x0d" + np.float32(-2).tobytes()
    feature = b"\x12" + bytes([len(floats)]) + floats
    entry = b"\x0a\x01k\x12" + bytes([len(feature)]) + feature
    features = b"\x0a" + bytes([len(entry)]) + entry
    found = parse_example(b"\x0a" + bytes([len(features)]) + features)
    np.testing.assert_array_equal(found["k"], [1.5, -2.0])


def test_the_two_checksums_agree() -> None:
    for data in (b"", b"123456789", bytes(range(256)) * 3):
        assert crc32c(data) == google_crc32c.value(data)
    assert crc32c(b"123456789") == 0xE3069283  # the check value of CRC-32C


@given(st.lists(st.binary(min_size=1, max_size=30), min_size=1, max_size=4), st.data())
def test_any_damage_is_noticed_at_its_record(records: list[bytes], data: st.DataObject) -> None:
    whole = bytearray(tfrecord(records))
    assert list(read_records(io.BytesIO(bytes(whole)), "file")) == records
    at = data.draw(st.integers(0, len(whole) - 1))
    whole[at] ^= 1 << data.draw(st.integers(0, 7))
    ends = np.cumsum([len(record) + 16 for record in records])
    hit = int(np.searchsorted(ends, at, side="right"))
    reader = read_records(io.BytesIO(bytes(whole)), "file")
    assert list(itertools.islice(reader, hit)) == records[:hit]
    with pytest.raises(DataError, match=rf"'file', record {hit}"):
        next(reader)


@given(st.binary(min_size=1, max_size=20), st.data())
def test_a_cut_is_noticed(record: bytes, data: st.DataObject) -> None:
    whole = tfrecord([b"first", record])
    cut = data.draw(st.integers(len(tfrecord([b"first"])) + 1, len(whole) - 1))
    with pytest.raises(DataError, match="record 1"):
        list(read_records(io.BytesIO(whole[:cut]), "file"))


@given(st.binary(max_size=60))
def test_nonsense_raises_nothing_but_a_data_error(data: bytes) -> None:
    with contextlib.suppress(DataError):
        parse_example(data)
