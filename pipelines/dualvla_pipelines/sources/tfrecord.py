"""TFRecord files and the tf.train.Example messages in them, read without TensorFlow or protobuf.

A record is: length (uint64), its masked CRC-32C, the data, its masked CRC-32C, all little-endian. Every checksum is
checked. Knows bytes only: nothing of robots.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import BinaryIO

import google_crc32c
import numpy as np

from dualvla.errors import DataError

Feature = list[bytes] | np.ndarray  # bytes_list; float_list as float32, int64_list as int64
_MASK_DELTA = 0xA282EAD8
_LONGEST_RECORD = 1 << 32  # beyond it a length that happens to pass its checksum is still nonsense
_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5


def read_records(file: BinaryIO, name: str) -> Iterator[bytes]:
    """The data of each record. Raises: DataError naming the file and record at the first truncation or bad checksum."""
    index = 0
    while header := file.read(12):
        where = f"'{name}', record {index}"
        if len(header) < 12:
            raise DataError(f"{where} is cut off.", "fetch the file again")
        length, crc = struct.unpack("<QI", header)
        if _masked_crc(header[:8]) != crc or length > _LONGEST_RECORD:
            raise DataError(f"{where}: its length does not fit its checksum.", "fetch the file again")
        data = file.read(length)
        footer = file.read(4)
        if len(data) < length or len(footer) < 4:
            raise DataError(f"{where} is cut off.", "fetch the file again")
        if _masked_crc(data) != struct.unpack("<I", footer)[0]:
            raise DataError(f"{where}: its data does not fit its checksum.", "fetch the file again")
        yield data
        index += 1


def _masked_crc(data: bytes) -> int:
    crc = google_crc32c.value(data)
    return (((crc >> 15) | (crc << 17)) + _MASK_DELTA) & 0xFFFFFFFF


def parse_example(data: bytes) -> dict[str, Feature]:
    """The features of a serialized tf.train.Example. Raises: DataError if it is not one."""
    features: dict[str, Feature] = {}
    try:
        for number, features_message in _fields(memoryview(data)):
            if number != 1:
                continue
            for field, entry in _fields(features_message):
                if field != 1:
                    continue
                key, value = "", memoryview(b"")
                for part, content in _fields(entry):
                    if part == 1:
                        key = bytes(content).decode()
                    elif part == 2:
                        value = content
                features[key] = _feature(value)
    except (IndexError, ValueError, UnicodeDecodeError) as error:
        raise DataError(f"A record is not a tf.train.Example: {error}.", "check the format of the source") from error
    return features


def _feature(message: memoryview) -> Feature:
    """The last of the oneof in the message, as protobuf has it; an empty one is an empty list of bytes."""
    found: Feature = []
    for kind, content in _fields(message):
        if kind == 1:
            found = [bytes(value) for number, value in _fields(content) if number == 1]
        elif kind == 2:
            found = np.concatenate([np.zeros(0, np.float32), *_floats(content)])
        elif kind == 3:
            found = np.array(_integers(content), dtype=np.int64)
    return found


def _floats(message: memoryview) -> list[np.ndarray]:
    """Packed values come as one run of bytes, unpacked ones as 4 bytes each."""
    return [np.frombuffer(value, dtype="<f4") for number, value in _fields(message) if number == 1]


def _integers(message: memoryview) -> list[int]:
    values: list[int] = []
    for number, content in _fields(message, varints_as_bytes=True):
        at = 0
        while number == 1 and at < len(content):
            value, at = _varint(content, at)
            values.append(value - (1 << 64) if value >= 1 << 63 else value)
    return values


def _fields(message: memoryview, varints_as_bytes: bool = False) -> Iterator[tuple[int, memoryview]]:
    """(field number, content) of a protobuf message; varint fields are skipped unless asked for."""
    at, end = 0, len(message)
    while at < end:
        tag, at = _varint(message, at)
        number, wire = tag >> 3, tag & 7
        if wire == _VARINT:
            start = at
            _, at = _varint(message, at)
            if varints_as_bytes:
                yield number, message[start:at]
            continue
        if wire == _LENGTH:
            length, at = _varint(message, at)
        elif wire in (_FIXED64, _FIXED32):
            length = 8 if wire == _FIXED64 else 4
        else:
            raise ValueError(f"wire type {wire}")
        if at + length > end:
            raise ValueError("a field is longer than its message")
        yield number, message[at : at + length]
        at += length


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    """(unsigned value, position after it)."""
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at += 1
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("a number is too long")
