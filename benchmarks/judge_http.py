"""500 trajectories judged through a real local HTTP server that takes 2 s an answer and fails 5 % of the calls.

    python benchmarks/judge_http.py [--trajectories 500] [--latency-s 2] [--concurrency 32] [--failures 0.05]

The server is a process of its own and counts what it answers. Frames lie ready, as after a first look at the films. The
baseline is the fixed schedule: ceil(calls, retries included / concurrency) x latency. Each trajectory must have been
answered exactly once and none may be missing.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import logging
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from dualvla_eval import frames
from dualvla_eval.judges import get_judge
from dualvla_eval.results import Trajectory

_RESULT = Path(__file__).parent / "results" / "judge_http.json"
_VERDICT = {"Thought": "ok", "Result": {"Action": 7, "Intention": 8, "Reasoning": 6, "Alignment": 5, "Success": True}}
_FAILURES = ("429 Too Many Requests", "503 Service Unavailable")
_STEPS = 40
_PICTURE_PX = 320


def trajectory(index: int, folder: str) -> Trajectory:
    """A tool that goes its way, five texts, pictures of an ordinary film's size (a JPEG of about 10 KB each)."""
    rng = np.random.default_rng(index)
    pose = np.zeros((_STEPS + 1, 6))
    pose[:, :3] = np.cumsum(rng.normal(0, 0.01, (_STEPS + 1, 3)), axis=0)
    texts = tuple(f"subtask {t * 5 // _STEPS} of attempt {index}" for t in range(_STEPS))
    recorded = Trajectory(
        row={"instruction": f"pick up object {index}"},
        actions=np.zeros((_STEPS, 7), np.float32),
        ee_pose=pose,
        gripper=np.ones((_STEPS + 1, 1)),
        states=({},) * (_STEPS + 1),
        reasoning=texts,
        keyframe=tuple(t == 0 or texts[t] != texts[t - 1] for t in range(_STEPS)),
        events=((),) * _STEPS,
        frames=frames.Frames("", f"{folder}/{index}.parquet"),
    )
    coarse = rng.integers(0, 255, (_PICTURE_PX // 8, _PICTURE_PX // 8, 3), dtype=np.uint8)
    jpeg = frames.encode(np.kron(coarse, np.ones((8, 8, 1), np.uint8)))
    frames.keep(f"{folder}/{index}.parquet", {step: jpeg for step, _ in frames.choose(recorded, 8)})
    return recorded


# --- the server, in its own process -----------------------------------------------------------------------------------


async def serve(latency_s: float, failures: float) -> None:
    """HTTP/1.1 on a free port, printed first; at the end of stdin prints what was answered, as JSON."""
    answered: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    rng = np.random.default_rng(0)

    async def connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while head := await _head(reader):
            body = await reader.readexactly(int(head["content-length"]))
            asked = hashlib.sha256(body).hexdigest()
            await asyncio.sleep(latency_s)
            failure = rng.random() < failures
            status = str(rng.choice(_FAILURES)) if failure else "200 OK"
            calls[status[:3]] += 1
            answered[asked] += not failure
            data = json.dumps({"error": {"message": "busy"}} if failure else _completion()).encode()
            fields = f"Content-Type: application/json\r\nContent-Length: {len(data)}"
            writer.write(f"HTTP/1.1 {status}\r\n{fields}\r\n\r\n".encode())
            writer.write(data)
            await writer.drain()

    server = await asyncio.start_server(connection, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    print(json.dumps({"calls": calls, "answered": answered}), flush=True)


async def _head(reader: asyncio.StreamReader) -> dict[str, str]:
    """Header fields by lower-case name; empty at the end of a connection."""
    lines = []
    while line := (await reader.readline()).decode().strip():
        lines.append(line)
    return {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}


def _completion() -> dict[str, Any]:
    message = {"role": "assistant", "content": json.dumps(_VERDICT)}
    return {
        "id": "c", "object": "chat.completion", "created": 0, "model": "fixed",
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 1500, "completion_tokens": 60, "total_tokens": 1560},
    }  # fmt: skip


# --- the measurement --------------------------------------------------------------------------------------------------


def measure(count: int, latency_s: float, concurrency: int, failures: float) -> dict[str, Any]:
    command = [sys.executable, __file__, "--serve", "--latency-s", str(latency_s), "--failures", str(failures)]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert server.stdin is not None
    assert server.stdout is not None
    with tempfile.TemporaryDirectory() as folder:
        trajectories = [trajectory(i, f"{folder}/frames") for i in range(count)]
        url = f"http://127.0.0.1:{server.stdout.readline().strip()}/v1"
        settings = [f"openai.base_url={url}", f"concurrency={concurrency}"]
        judge = get_judge("openai:fixed", settings, store=f"{folder}/verdicts")
        started, cpu = time.perf_counter(), time.process_time()
        verdicts = judge.judge(trajectories)
        seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
        kept = len(list(Path(folder, "verdicts").rglob("*.json")))
    report = json.loads(server.communicate()[0])
    calls = sum(report["calls"].values())
    ideal = math.ceil(calls / concurrency) * latency_s
    return {
        "trajectories": count,
        "latency_s": latency_s,
        "concurrency": concurrency,
        "calls": report["calls"],
        "judged": sum(v.action == 7 for v in verdicts),
        "verdicts_kept": kept,
        "answered_once": sum(n == 1 for n in report["answered"].values()),
        "answered_more": sum(n > 1 for n in report["answered"].values()),
        "lost": sum(v.unjudged is not None for v in verdicts),
        "seconds": round(seconds, 2),
        "cpu_s": round(cpu, 2),
        "schedule_s": ideal,
        "ratio": round(seconds / ideal, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trajectories", type=int, default=500)
    parser.add_argument("--latency-s", type=float, default=2.0)
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--failures", type=float, default=0.05)
    parser.add_argument("--out", default=str(_RESULT))
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        asyncio.run(serve(arguments.latency_s, arguments.failures))
        return
    logging.basicConfig(level=logging.WARNING)
    found = measure(arguments.trajectories, arguments.latency_s, arguments.concurrency, arguments.failures)
    machine = f"{os.cpu_count()} cores ({platform.machine()}), {platform.system()}, Python {platform.python_version()}"
    result = {"machine": machine, **found}
    print(json.dumps(result, indent=2))
    Path(arguments.out).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
