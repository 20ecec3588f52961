"""The msgpack codec of the openpi protocol, with a strict decoder. Knows numpy and msgpack only; no message is code.

An array travels as a map with *bytes* keys, `{b"__ndarray__": True, b"data", b"dtype": dtype.str, b"shape"}`, a numpy
scalar as `{b"__npgeneric__": True, b"data", b"dtype"}`, so that openpi's own client and server understand us. Our
decoder takes less than openpi's: numbers and booleans only (no text, time, object, void or complex arrays), in bounds.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import msgpack
import numpy as np

from dualvla.errors import WireError

# b: bool, i/u: integers, f: floats of at most 8 bytes a number.
_DTYPE = re.compile(r"[<>|=]?(b1|[iu][1248]|f[248])")


@dataclass(frozen=True)
class WireLimits:
    """What a decoder accepts from the other side of a wire.

    max_entries: elements of one list and keys of one map. max_values: of all lists and maps of a message together.
    """

    max_message_bytes: int = 8 * 2**20
    max_rank: int = 4
    max_entries: int = 1024
    max_values: int = 20_000


def pack(message: Any) -> bytes:
    """One frame of plain values, arrays and numpy scalars.

    Raises: WireError for a value that has no place on the wire, such as an array of objects.
    """
    try:
        return msgpack.packb(message, default=_pack_numpy)
    except (TypeError, ValueError, OverflowError) as error:
        raise WireError(f"This message cannot be sent: {error}.", "send numbers, text, lists, maps, arrays") from error


def unpack(frame: bytes, limits: WireLimits = WireLimits()) -> Any:
    """The inverse of `pack`; arrays are writable and in native byte order.

    Raises: WireError for anything malformed, beyond the limits, or of a refused type. Nothing else.
    """
    return unpack_plain(frame, limits, lambda value: _unpack_numpy(value, limits))


def unpack_plain(frame: bytes, limits: WireLimits, hook: Callable[[dict[Any, Any]], Any]) -> Any:
    """One msgpack message within the limits, its maps passed through `hook`. Raises: WireError. Nothing else."""
    if len(frame) > limits.max_message_bytes:
        raise WireError(f"A message of {len(frame)} bytes is over the limit of {limits.max_message_bytes}.")
    try:
        message = msgpack.unpackb(
            frame,
            object_hook=hook,
            ext_hook=_refuse_extension,
            strict_map_key=True,
            max_array_len=limits.max_entries,
            max_map_len=limits.max_entries,
        )
    # msgpack raises its own ValueErrors, StackError, ExtraData and UnicodeDecodeError: all of them ValueErrors.
    except (ValueError, msgpack.UnpackException) as error:
        raise WireError(f"This is not one msgpack message: {type(error).__name__}: {error}.") from error
    _check_plain(message, limits)
    return message


def _pack_numpy(value: Any) -> dict[bytes, Any]:
    if isinstance(value, np.ndarray | np.generic) and not _DTYPE.fullmatch(value.dtype.str):
        raise TypeError(f"a value of dtype {value.dtype} is refused on the wire")
    if isinstance(value, np.ndarray):
        shape = list(value.shape)
        return {b"__ndarray__": True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": shape}
    if isinstance(value, np.generic):
        return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}
    raise TypeError(f"{type(value).__name__} has no place on the wire")


def _unpack_numpy(value: dict[Any, Any], limits: WireLimits) -> Any:
    if b"__ndarray__" in value:
        return array_of(value.get(b"data"), value.get(b"dtype"), value.get(b"shape"), limits)
    if b"__npgeneric__" in value:
        return _unpack_scalar(value)
    return value


def array_of(data: Any, dtype_text: Any, shape: Any, limits: WireLimits) -> np.ndarray:
    """A writable array in native byte order, every part checked. Raises: WireError."""
    dtype = _dtype(dtype_text)
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
        raise WireError(f"An array's shape must be a list of sizes, not {_short(shape)}.")
    if len(shape) > limits.max_rank:
        raise WireError(f"An array of rank {len(shape)} is over the limit of {limits.max_rank}.")
    if not isinstance(data, bytes) or len(data) != math.prod(shape) * dtype.itemsize:
        raise WireError(f"An array of shape {_short(shape)} and dtype {dtype.str} does not match its data.")
    array = np.frombuffer(data, dtype).reshape(shape)
    return array.astype(dtype.newbyteorder("="))  # copies: the frame's own buffer is read-only


def _unpack_scalar(value: Mapping[Any, Any]) -> np.generic:
    dtype, data = _dtype(value.get(b"dtype")), value.get(b"data")
    if not isinstance(data, bool | int | float):
        raise WireError(f"A scalar of dtype {dtype.str} cannot be {_short(data)}.")
    try:
        return dtype.type(data)
    except (OverflowError, ValueError) as error:
        raise WireError(f"A scalar of dtype {dtype.str} cannot be {_short(data)}.") from error


def _dtype(text: Any) -> np.dtype:
    if not isinstance(text, str) or not _DTYPE.fullmatch(text):
        raise WireError(f"Arrays of dtype {_short(text)} are refused.", "send bool, integers or floats up to 64 bit")
    return np.dtype(text)


def _refuse_extension(code: int, data: bytes) -> Any:
    raise WireError(f"msgpack extension type {code} is refused.")


def _check_plain(message: Any, limits: WireLimits) -> None:
    """Only plain values are left, and not too many of them (msgpack's own timestamps are turned away here)."""
    waiting, seen = [message], 0
    while waiting:
        value = waiting.pop()
        seen += 1
        if seen > limits.max_values:
            raise WireError(f"A message of more than {limits.max_values} values is refused.", "send numbers as arrays")
        if isinstance(value, dict):
            if not all(isinstance(key, str) for key in value):
                raise WireError("Keys of maps must be text.")
            waiting.extend(value.values())
        elif isinstance(value, list):
            waiting.extend(value)
        elif value is not None and not isinstance(value, bool | int | float | str | bytes | np.ndarray | np.generic):
            raise WireError(f"A value of type {type(value).__name__} is refused.")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
