"""What a teacher cache leaves out of a divergence, and what a token costs, at a real vocabulary.

    python benchmarks/top_k.py [--tokens 192] [--out benchmarks/results/top_k.json]

Teachers over 152,000 words with tails of three weights: the r-th likeliest word has about r^-s, softened by T = 2 (a
language model's s is above 1 before softening; the steeper, the less lies outside the top k). Students are the teacher
with noise on every logit, from none to one that leaves it far behind. The bound of the issue is |KL_k - KL| <= 0.01
max(KL, 0.1 nat) for the mean over tokens; the baseline is the dense divergence, in float32, of the same logits. Beside
the cache's form (42 likeliest tokens, 8 draws from the tail) stands the one that takes the tail as a single outcome.
Bytes: what is encoded, and what a part file takes a token, entries of ever other words.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dualvla.distill import cache, topk
from dualvla.distill.losses import token_kd
from dualvla.distill.topk import Known

VOCABULARY, K, DRAWS, TEMPERATURE = 152_000, 50, 8, 2.0
TAILS = {"language model (r^-6 before T)": 6.0, "flat (r^-4 before T)": 4.0, "very flat (r^-3 before T)": 3.0}
FORMS = {"plain": (DRAWS, False), "packed": (DRAWS, True), "plain, no draws": (0, False)}
NOISES = (0.0, 0.1, 0.5, 1.0, 2.0, 4.0)
BOUND, FLOOR_NAT = 0.01, 0.1
DENSE_BYTES = 2 * VOCABULARY  # float16 logits
AT_ONCE = 32


def teacher(tokens: int, slope: float, seed: int = 0) -> torch.Tensor:
    """Logits [1, tokens, V]: rank r has about -slope log(r), a few words about equally likely at the top."""
    generator = torch.Generator().manual_seed(seed)
    rank = torch.arange(1, VOCABULARY + 1).float()
    rows = torch.empty(1, tokens, VOCABULARY)
    for row in rows[0]:
        heights = -slope * torch.log(rank + 3 * torch.rand(1, generator=generator))
        row[torch.randperm(VOCABULARY, generator=generator)] = heights
    return rows + 0.3 * torch.randn(rows.shape, generator=generator)


def known_of(logits: torch.Tensor, draws: int, seed: int) -> Known:
    """As a cache keeps it. logits [1, T, V] -> [T, ...]."""
    starts = np.random.default_rng(seed).random((logits.shape[1], 1))
    places = torch.from_numpy((starts + np.arange(draws)) / max(1, draws))
    return topk.know(logits[0], K - draws, TEMPERATURE, places)


def error(tokens: int, slope: float) -> dict[str, Any]:
    """Over all noises: the dense divergence, and of each form the cache's and how much of the allowed error is used."""
    sums = {noise: dict.fromkeys(("exact", *FORMS), 0.0) for noise in NOISES}
    tail = dict.fromkeys(FORMS, 0.0)
    for start in range(0, tokens, AT_ONCE):
        logits = teacher(AT_ONCE, slope, seed=start)
        mask = torch.ones(1, AT_ONCE, dtype=torch.bool)
        read = {}
        for name, (draws, packed) in FORMS.items():
            fields = topk.encode(known_of(logits, draws, start), VOCABULARY, packed)
            known = topk.decode(fields, K, draws, VOCABULARY, packed)
            read[name] = Known(*(t.unsqueeze(0) for t in known.targets().values()))
            tail[name] += float(known.p[:, -1].sum())
        for noise, found in sums.items():
            student = logits + noise * torch.randn(logits.shape, generator=torch.Generator().manual_seed(start + 1))
            found["exact"] += AT_ONCE * token_kd(student, logits, mask, TEMPERATURE).item() / TEMPERATURE**2
            for name, known in read.items():
                found[name] += AT_ONCE * topk.known_kd(student, known, mask, TEMPERATURE).item() / TEMPERATURE**2
    result: dict[str, Any] = {}
    for name in FORMS:
        rows = []
        for noise, found in sums.items():
            exact, near = found["exact"] / tokens, found[name] / tokens
            share = abs(near - exact) / (BOUND * max(exact, FLOOR_NAT))
            rows.append({"noise": noise, "kl": exact, "kl_k": near, "share_of_the_bound": round(share, 3)})
        result[name] = {
            "tail_mass": tail[name] / tokens,
            "worst_share_of_the_bound": max(r["share_of_the_bound"] for r in rows),
            "students": rows,
        }
    return result


def size(tokens: int, packed: bool) -> dict[str, float]:
    known = known_of(teacher(tokens, TAILS["language model (r^-6 before T)"]), DRAWS, 0)
    rng = np.random.default_rng(0)
    parts = []
    for i in range(30):
        words = torch.from_numpy(rng.permutation(VOCABULARY))
        (ids, order), (drawn, drawn_order) = words[known.ids].sort(), words[known.drawn].sort()
        p = torch.cat([known.p.gather(-1, order), known.p[:, -1:]], dim=-1)
        fields = topk.encode(Known(ids, p, drawn, known.log_p.gather(-1, drawn_order)), VOCABULARY, packed)
        parts.append(cache.Entries(np.array([i]), np.array([0]), np.array([0]), {n: [v] for n, v in fields.items()}))
    with tempfile.TemporaryDirectory() as folder:
        url = Path(folder) / "part.parquet"
        cache.write_part(str(url), parts)
        stored = url.stat().st_size / (len(parts) * tokens)
    encoded = topk.bytes_per_token(K, DRAWS, VOCABULARY, packed)
    return {"encoded_bytes": encoded, "stored_bytes": round(stored, 1), "dense_to_stored": round(DENSE_BYTES / stored)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=192, help=f"a multiple of {AT_ONCE}")
    parser.add_argument("--out", type=Path, help="write the result there as JSON")
    arguments = parser.parse_args()
    errors = {tail: error(arguments.tokens, slope) for tail, slope in TAILS.items()}
    sizes = {name: size(AT_ONCE, packed) for name, packed in (("plain", False), ("packed", True))}
    result: dict[str, Any] = {
        "machine": "2 x86-64 cores, no GPU, Debian 12 (these figures depend on no machine)",
        "vocabulary": VOCABULARY,
        "k": K,
        "draws": DRAWS,
        "temperature": TEMPERATURE,
        "tokens": arguments.tokens,
        "bytes_per_token": sizes,
        "error": errors,
        "met": {
            "plain: at most 160 bytes, encoded": sizes["plain"]["encoded_bytes"] <= 160,
            "packed: at most 120 bytes, as stored": sizes["packed"]["stored_bytes"] <= 120,
            **{
                f"{tail}, {name}: |KL_k - KL| <= 0.01 max(KL, 0.1)": found[name]["worst_share_of_the_bound"] <= 1
                for tail, found in errors.items()
                for name in FORMS
            },
        },
    }
    text = json.dumps(result, indent=2)
    if arguments.out:
        arguments.out.write_text(text + "\n")
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    main()
