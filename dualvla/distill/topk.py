"""A teacher's distribution over the vocabulary as its k likeliest tokens and the mass of all others, in few bytes.

Probabilities are softened by the temperature first: the tail of a softened distribution cannot be had from that of
another temperature. Per token and k = 50 of 152,000 words: 157 bytes in plain dtypes; 137 packed, which a file's own
compression takes to less than 120 (most `codes` are small numbers).

    ids    plain: sorted, their low 16 bits (uint16), and how many lie in each block of 65,536 (uint8);
           packed: Elias-Fano, k (2 + log2(V / k)) bits
    codes  uint8 of 255 (packed: 80) x sqrt(p / the largest p): finest where p is large, where errors weigh most
    tail   float32 (packed: float16), the mass of all other tokens; the k probabilities are scaled to the rest

Knows nothing of samples or files.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from dualvla.distill.losses import divergence, masked_mean, wide
from dualvla.models.config import Divergence

_BLOCK = 1 << 16
_LEVELS, _PACKED_LEVELS = 255.0, 80.0
_LEAST = 1e-12  # a probability of 0 would make a divergence infinite
MAX_K = 255


def top_k(logits: Tensor, k: int, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """ids int64 [..., k] in rising order, their softened probabilities [..., k], and the mass of the others [...]."""
    values, ids = logits.float().topk(k, dim=-1)
    log_norm = (logits.float() / temperature).logsumexp(dim=-1, keepdim=True)
    ids, order = ids.sort(dim=-1)
    p = (values.gather(-1, order) / temperature - log_norm).exp()
    return ids, p, _others(logits.float() / temperature, ids).sub(log_norm.squeeze(-1)).exp()


def top_k_kd(
    student_logits: Tensor,
    ids: Tensor,
    teacher_p: Tensor,
    mask: Tensor,
    temperature: float,
    count: Tensor | None = None,
    kind: Divergence = "forward",
    mix: float = 0.5,
) -> Tensor:
    """`losses.token_kd` over k + 1 outcomes: the teacher's k likeliest tokens, and any other.

    Logits [B, T, V], ids [B, T, k], teacher_p [B, T, k + 1] (the last is the tail). Never more than the forward or
    reverse divergence over all tokens; less by what student and teacher differ in *within* the tail, times its mass.
    """
    scaled = wide(student_logits) / temperature
    known = scaled.gather(-1, ids)
    outcomes = torch.cat([known, _others(scaled, ids).unsqueeze(-1)], dim=-1)
    apart_BT = divergence(outcomes, teacher_p.clamp_min(_LEAST).log(), 1.0, kind, mix)
    return (temperature**2 * masked_mean(apart_BT, mask, count)).to(student_logits.dtype)


def _others(scaled_logits: Tensor, ids: Tensor) -> Tensor:
    """Log of the summed exponentials of all tokens but `ids`."""
    return scaled_logits.scatter(-1, ids, -torch.inf).logsumexp(dim=-1)


def encode(ids: np.ndarray, p: np.ndarray, tail: np.ndarray, vocab_size: int, packed: bool) -> dict[str, bytes]:
    """What `decode` reads. ids [n, k] in rising order, p [n, k], tail [n]."""
    largest = p.max(axis=1, keepdims=True, initial=_LEAST)
    levels = _PACKED_LEVELS if packed else _LEVELS
    fields = {
        "codes": np.rint(levels * np.sqrt(p / largest)).astype(np.uint8).tobytes(),
        "tail": tail.astype("<f2" if packed else "<f4").tobytes(),
    }
    if packed:
        return {**fields, "ids": _elias_fano(ids, vocab_size)}
    blocks = np.stack([((ids // _BLOCK) == b).sum(axis=1) for b in range(_blocks(vocab_size))], axis=1)
    return {**fields, "ids": (ids % _BLOCK).astype("<u2").tobytes(), "blocks": blocks.astype(np.uint8).tobytes()}


def decode(fields: Mapping[str, bytes], k: int, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """ids int64 [n, k] and p float32 [n, k + 1], the last of which is the tail."""
    packed = "blocks" not in fields
    tail = np.frombuffer(fields["tail"], "<f2" if packed else "<f4").astype(np.float64)
    codes = np.frombuffer(fields["codes"], np.uint8).reshape(-1, k).astype(np.float64)
    p = codes**2 * ((1.0 - tail) / np.maximum((codes**2).sum(axis=1), 1.0))[:, None]
    if not packed:
        low = np.frombuffer(fields["ids"], "<u2").reshape(-1, k).astype(np.int64)
        counts = np.frombuffer(fields["blocks"], np.uint8).reshape(len(low), -1)
        high = (np.arange(k)[None, :, None] >= counts.cumsum(axis=1)[:, None, :]).sum(axis=2)
        ids = high * _BLOCK + low
    else:
        ids = _from_elias_fano(fields["ids"], k, vocab_size)
    return ids, np.concatenate([p, tail[:, None]], axis=1).astype(np.float32)


def bytes_per_token(k: int, vocab_size: int, packed: bool) -> int:
    """Before a file's compression."""
    ids = (_elias_fano_bits(k, vocab_size) + 7) // 8 if packed else 2 * k + _blocks(vocab_size)
    return ids + k + (2 if packed else 4)


def _blocks(vocab_size: int) -> int:
    return -(-vocab_size // _BLOCK)


def _low_bits(k: int, vocab_size: int) -> int:
    return max(0, (vocab_size // k).bit_length() - 1)


def _elias_fano_bits(k: int, vocab_size: int) -> int:
    low = _low_bits(k, vocab_size)
    return k * low + k + (vocab_size >> low) + 1


def _elias_fano(ids: np.ndarray, vocab_size: int) -> bytes:
    """Each id's low bits as they are; its high bits as a one at place (high bits + rank) of a row of zeros."""
    number, k = ids.shape
    low = _low_bits(k, vocab_size)
    lows = (ids[:, :, None] >> np.arange(low)) & 1
    highs = np.zeros((number, k + (vocab_size >> low) + 1), np.uint8)
    np.put_along_axis(highs, (ids >> low) + np.arange(k), 1, axis=1)
    return np.packbits(np.concatenate([lows.reshape(number, -1).astype(np.uint8), highs], axis=1), axis=1).tobytes()


def _from_elias_fano(data: bytes, k: int, vocab_size: int) -> np.ndarray:
    low, total = _low_bits(k, vocab_size), _elias_fano_bits(k, vocab_size)
    rows = np.frombuffer(data, np.uint8).reshape(-1, (total + 7) // 8)
    bits = np.unpackbits(rows, axis=1, count=total)
    lows = (bits[:, : k * low].reshape(len(rows), k, low).astype(np.int64) << np.arange(low)).sum(axis=2)
    places = np.nonzero(bits[:, k * low :])[1].reshape(-1, k)
    return ((places - np.arange(k)) << low) + lows
