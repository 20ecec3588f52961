"""A teacher's distribution over the vocabulary in few bytes: its likeliest tokens, and draws from all others.

Probabilities are softened by the temperature first: the tail of a softened distribution cannot be had from that of
another temperature. Of k entries a token, `draws` are drawn from the tail in proportion to their probability; the
others are the likeliest tokens. By the chain rule a divergence is that of the likeliest tokens and the tail as a whole,
exactly, plus the tail's mass times the divergence *within* the tail, which draws estimate without bias: a flat
distribution, of which no 50 tokens hold enough, is learned from all the same.

Per token and k = 50 (8 of them draws) of 152,000 words: 160 bytes in plain dtypes; 142 packed, which a file's own
compression takes to less than 120 (most `codes` are small numbers).

    ids, drawn     rising. plain: their low 16 bits (uint16) and how many lie in each block of 65,536 (uint8);
                   packed: Elias-Fano, n (2 + log2(V / n)) bits
    codes          uint8 of 255 x (p / the largest p)^(1/3) (packed: 80 x (p / the largest p)^(1/2))
    drawn_codes    uint8 of log(tail / p) in steps of 1/8 nat
    tail           float32 (packed: float16), the mass of all other tokens; likeliest tokens are scaled to the rest

Knows nothing of samples or files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dualvla.distill.losses import divergence, masked_mean, wide
from dualvla.models.config import Divergence

_BLOCK = 1 << 16
_STEPS = 8.0  # codes a nat, of draws
_LEAST = 1e-12  # a probability of 0 would make a divergence infinite
_MOST_APART = 20.0  # nats; beyond it a ratio would overflow
MAX_K = 255


@dataclass(frozen=True)
class Known:
    """What is known of distributions [...].

    ids int64 [..., k], rising, of the likeliest tokens; p [..., k + 1], the last is the tail's mass. drawn int64
    [..., m], rising, of draws from the tail; log_p [..., m], the log-probability of each within the tail.
    """

    ids: Tensor
    p: Tensor
    drawn: Tensor
    log_p: Tensor

    def targets(self) -> dict[str, Tensor]:
        """As a `Teacher` names them."""
        return {"top_ids": self.ids, "top_p": self.p, "drawn_ids": self.drawn, "drawn_log_p": self.log_p}

    @classmethod
    def of(cls, targets: Mapping[str, Tensor]) -> Known:
        return cls(targets["top_ids"], targets["top_p"], targets["drawn_ids"], targets["drawn_log_p"])


def top_k(logits: Tensor, k: int, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """ids int64 [..., k] in rising order, their softened probabilities [..., k], and the mass of the others [...]."""
    values, ids = logits.float().topk(k, dim=-1)
    log_norm = (logits.float() / temperature).logsumexp(dim=-1, keepdim=True)
    ids, order = ids.sort(dim=-1)
    p = (values.gather(-1, order) / temperature - log_norm).exp()
    return ids, p, _others(logits.float() / temperature, ids).sub(log_norm.squeeze(-1)).exp()


def know(logits: Tensor, k: int, temperature: float, uniform: Tensor) -> Known:
    """uniform [..., m], in [0, 1), rising: where in the tail's cumulative mass the draws lie. float64, for its sums."""
    ids, p, tail = top_k(logits, k, temperature)
    log_p = (logits.double() / temperature).scatter(-1, ids, -torch.inf).log_softmax(dim=-1)
    sums = log_p.exp().cumsum(dim=-1)
    places = torch.searchsorted(sums, (uniform * sums[..., -1:]).contiguous(), right=True)
    drawn = places.clamp_max(logits.shape[-1] - 1)
    return Known(ids, torch.cat([p, tail.unsqueeze(-1)], dim=-1), drawn, log_p.gather(-1, drawn).float())


def unknown(shape: tuple[int, ...], k: int, draws: int) -> Known:
    """For masked positions: any k different tokens, and no mass."""
    ids = torch.arange(k).expand(*shape, k).clone()
    nothing = torch.zeros((*shape, draws))
    return Known(ids, torch.zeros((*shape, k + 1)), nothing.long(), nothing)


def known_kd(
    student_logits: Tensor,
    teacher: Known,
    mask: Tensor,
    temperature: float,
    count: Tensor | None = None,
    kind: Divergence = "forward",
    mix: float = 0.5,
) -> Tensor:
    """`losses.token_kd` of what is known of the teacher. Logits [B, T, V], mask [B, T].

    Without draws less than the divergence over all tokens, by that within the tail, times its mass; with draws the same
    in expectation over them.
    """
    mask = mask.to(torch.bool)
    scaled = wide(student_logits[mask]) / temperature
    teacher = Known(*(field[mask] for field in teacher.targets().values()))
    known = scaled.gather(-1, teacher.ids)
    others = _others(scaled, teacher.ids)
    outcomes = torch.cat([known, others.unsqueeze(-1)], dim=-1)
    p = teacher.p.clamp_min(_LEAST)
    apart_n = divergence(outcomes, p.log(), 1.0, kind, mix)
    if teacher.drawn.shape[-1]:
        log_ratio = scaled.gather(-1, teacher.drawn) - others.unsqueeze(-1) - teacher.log_p
        apart_n = apart_n + _within_tail(log_ratio, outcomes.log_softmax(dim=-1), p / p.sum(-1, True), kind, mix)
    return (temperature**2 * masked_mean(apart_n, mask[mask], count)).to(student_logits.dtype)


def _within_tail(log_ratio: Tensor, log_q: Tensor, p: Tensor, kind: Divergence, mix: float) -> Tensor:
    """The part of a divergence that lies within the tail, from draws of the teacher's tail. [...]

    log_ratio [..., m]: of each draw's probability within the student's tail to that within the teacher's; log_q, p
    [..., k + 1]: student and teacher over the known tokens and the tail. A mean of ratios is 1 in expectation: what is
    added of it removes most of the noise where both are near, and makes the parts other than the forward one >= 0.
    """
    ratio, tail_p, tail_q = log_ratio.clamp_max(_MOST_APART).exp(), p[..., -1], log_q[..., -1].exp()
    if kind == "jensen-shannon":
        tail_m = mix * tail_p + (1.0 - mix) * tail_q
        middle = (mix * tail_p.unsqueeze(-1) + (1.0 - mix) * tail_q.unsqueeze(-1) * ratio) / tail_m.unsqueeze(-1)
        from_p = (middle - 1.0 - middle.log()).mean(dim=-1)
        from_q = (ratio * (log_ratio - middle.log()) - ratio + middle).mean(dim=-1)
        return mix * tail_p * from_p + (1.0 - mix) * tail_q * from_q
    share = {"forward": 1.0, "reverse": 0.0, "mixed": mix}[kind]
    # The best weight of that for lognormal ratios, whose spread the known tokens tell.
    gaps = p.log() - log_q
    spread = (p * gaps.square()).sum(dim=-1) - (p * gaps).sum(dim=-1).square()
    spread = spread.clamp(1e-6, _MOST_APART)
    weight = spread / torch.expm1(spread)
    forward = (weight.unsqueeze(-1) * (ratio - 1.0) - log_ratio).mean(dim=-1)
    reverse = (ratio * log_ratio - ratio + 1.0).mean(dim=-1)
    return share * tail_p * forward + (1.0 - share) * tail_q * reverse


def _others(scaled_logits: Tensor, ids: Tensor) -> Tensor:
    """Log of the summed exponentials of all tokens but `ids`."""
    return scaled_logits.scatter(-1, ids, -torch.inf).logsumexp(dim=-1)


def encode(teacher: Known, vocab_size: int, packed: bool) -> dict[str, bytes]:
    """What `decode` reads, of n tokens: every field of `teacher` is [n, ...]."""
    form = _PACKED if packed else _PLAIN
    ids, p, drawn, log_p = (t.cpu().numpy() for t in (teacher.ids, teacher.p, teacher.drawn, teacher.log_p))
    known, tail = p[:, :-1], p[:, -1]
    codes = np.rint(form.levels * (known / known.max(axis=1, keepdims=True, initial=_LEAST)) ** (1 / form.power))
    drawn_codes = np.rint(np.clip(-_STEPS * log_p, 0.0, 255.0))
    return {
        "ids": form.write_ids(ids, vocab_size),
        "drawn": form.write_ids(drawn, vocab_size),
        "codes": codes.astype(np.uint8).tobytes(),
        "drawn_codes": drawn_codes.astype(np.uint8).tobytes(),
        "tail": tail.astype(form.tail).tobytes(),
    }


def decode(fields: Mapping[str, bytes], k: int, draws: int, vocab_size: int, packed: bool) -> Known:
    """k: entries a token, of which `draws` are drawn. Tensors [n, ...], float32 and int64."""
    form = _PACKED if packed else _PLAIN
    tail = tail_of(fields["tail"], packed)
    codes, drawn_codes = (
        np.frombuffer(fields[name], np.uint8).reshape(len(tail), n)
        for name, n in (("codes", k - draws), ("drawn_codes", draws))
    )
    weights = codes.astype(np.float64) ** form.power
    p = weights * ((1.0 - tail) / np.maximum(weights.sum(axis=1), 1.0))[:, None]
    return Known(
        torch.from_numpy(form.read_ids(fields["ids"], len(tail), k - draws, vocab_size)),
        torch.from_numpy(np.concatenate([p, tail[:, None]], axis=1).astype(np.float32)),
        torch.from_numpy(form.read_ids(fields["drawn"], len(tail), draws, vocab_size)),
        torch.from_numpy((drawn_codes / -_STEPS).astype(np.float32)),
    )


def tail_of(field: bytes, packed: bool) -> np.ndarray:
    """float64 [n]: the tail's mass, from the field of that name."""
    return np.frombuffer(field, (_PACKED if packed else _PLAIN).tail).astype(np.float64)


def bytes_per_token(k: int, draws: int, vocab_size: int, packed: bool) -> int:
    """Before a file's compression."""
    if not packed:
        return 3 * k + (2 if draws else 1) * _blocks(vocab_size) + 4
    return sum((_elias_fano_bits(n, vocab_size) + 7) // 8 for n in (k - draws, draws) if n) + k + 2


def _plain_ids(ids: np.ndarray, vocab_size: int) -> bytes:
    blocks = np.stack([((ids // _BLOCK) == b).sum(axis=1) for b in range(_blocks(vocab_size))], axis=1)
    return (ids % _BLOCK).astype("<u2").tobytes() + blocks.astype(np.uint8).tobytes() if ids.size else b""


def _from_plain_ids(data: bytes, number: int, k: int, vocab_size: int) -> np.ndarray:
    low = np.frombuffer(data, "<u2", count=number * k).reshape(number, k).astype(np.int64)
    if not low.size:
        return low
    counts = np.frombuffer(data, np.uint8, offset=2 * number * k).reshape(number, -1)
    return _BLOCK * (np.arange(k)[None, :, None] >= counts.cumsum(axis=1)[:, None, :]).sum(axis=2) + low


def _blocks(vocab_size: int) -> int:
    return -(-vocab_size // _BLOCK)


def _low_bits(k: int, below: int) -> int:
    return max(0, (below // k).bit_length() - 1)


def _elias_fano_bits(k: int, below: int) -> int:
    low = _low_bits(k, below)
    return k * low + k + (below >> low) + 1


def _elias_fano(rising: np.ndarray, below: int) -> bytes:
    """Each number's low bits as they are; its high bits as a one at place (high bits + rank) of a row of zeros."""
    number, k = rising.shape
    if not rising.size:
        return b""
    low = _low_bits(k, below)
    lows = (rising[:, :, None] >> np.arange(low)) & 1
    highs = np.zeros((number, k + (below >> low) + 1), np.uint8)
    np.put_along_axis(highs, (rising >> low) + np.arange(k), 1, axis=1)
    return np.packbits(np.concatenate([lows.reshape(number, -1).astype(np.uint8), highs], axis=1), axis=1).tobytes()


def _from_elias_fano(data: bytes, number: int, k: int, below: int) -> np.ndarray:
    if not data:
        return np.zeros((number, k), np.int64)
    low, total = _low_bits(k, below), _elias_fano_bits(k, below)
    bits = np.unpackbits(np.frombuffer(data, np.uint8).reshape(number, -1), axis=1, count=total)
    lows = (bits[:, : k * low].reshape(number, k, low).astype(np.int64) << np.arange(low)).sum(axis=2)
    places = np.nonzero(bits[:, k * low :])[1].reshape(number, k)
    return ((places - np.arange(k)) << low) + lows


@dataclass(frozen=True)
class _Form:
    """levels, power: codes are levels x (p / the largest)^(1 / power). tail: a dtype."""

    levels: float
    power: int
    tail: str
    write_ids: Callable[[np.ndarray, int], bytes]
    read_ids: Callable[[bytes, int, int, int], np.ndarray]


# Of codes that all take equally many bits a cube root costs a divergence least; a file's compression makes small codes
# cheap, and then it is a square root.
_PLAIN = _Form(255.0, 3, "<f4", _plain_ids, _from_plain_ids)
_PACKED = _Form(80.0, 2, "<f2", _elias_fano, _from_elias_fano)
