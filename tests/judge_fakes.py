"""A real HTTP server that answers like a chat API, as well or badly as a test asks for; and trajectories to judge."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
from eval_fakes import FakePolicy, fake_suite, run_items_here

from dualvla_eval import frames, results, sweep
from dualvla_eval.judges.models import openai_judge
from dualvla_eval.policies import PolicyRef

KEY = "sk-test-0123456789"


def answer(action=7, intention=8, reasoning=6, alignment=5, success=True, thought="It moved well."):
    marks = {"Action": action, "Intention": intention}
    if reasoning is not None:
        marks |= {"Reasoning": reasoning, "Alignment": alignment}
    return json.dumps({"Thought": thought, "Result": {**marks, "Success": success}})


@dataclass(frozen=True)
class Response:
    """text: the model's words; body: instead of a completion, these bytes. drop: hang up without an answer."""

    text: str = answer()
    status: int = 200
    delay_s: float = 0.0
    headers: dict = field(default_factory=dict)
    body: bytes | None = None
    drop: bool = False


class FakeEndpoint:
    """behave(request, nth) -> Response: nth counts how often this very conversation has come (1, 2, ...)."""

    def __init__(self, behave=lambda request, nth: Response()):
        self.behave = behave
        self.requests, self.keys, self.paths = [], [], []
        self.in_flight = self.most_in_flight = 0
        self.seen = Counter()
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    @property
    def url(self):
        return f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def serve(self, request):
        with self._lock:
            digest = hashlib.sha256(json.dumps(request["messages"]).encode()).hexdigest()
            self.seen[digest] += 1
            self.requests.append(request)
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
            response = self.behave(request, self.seen[digest])
        time.sleep(response.delay_s)
        with self._lock:
            self.in_flight -= 1
        return response

    def _handler(self):
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                endpoint.keys.append(self.headers.get("Authorization"))
                endpoint.paths.append(self.path)
                response = endpoint.serve(request)
                if response.drop:
                    self.close_connection = True
                    self.connection.close()
                    return
                body = response.body if response.body is not None else completion(response.text, response.status)
                self.send_response(response.status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                for name, value in response.headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_):
                pass

        return Handler


def completion(text, status=200):
    if status != 200:
        return json.dumps({"error": {"message": text, "type": "test"}}).encode()
    message = {"role": "assistant", "content": text}
    return json.dumps(
        {
            "id": "c", "object": "chat.completion", "created": 0, "model": "m",
            "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110},
        }
    ).encode()  # fmt: skip


def make_judge(endpoint, store, *settings, retriever=None):
    """A judge of the endpoint that hardly waits between attempts."""
    quick = [f"openai.base_url={endpoint.url}", "backoff_s=0.001", *settings]
    return openai_judge("fake", quick, str(store), retriever)


def trajectory(episode_id=0, texts=("go left", "go down"), steps=12, *, folder, kind="reasoning", instruction="touch"):
    """A tool that goes straight; its pictures lie ready in `folder`, so that no film is needed."""
    rng = np.random.default_rng(episode_id)
    pose = np.zeros((steps + 1, 6))
    pose[:, 0] = np.linspace(0.4, 0.5, steps + 1) + 0.001 * episode_id
    kept = f"{folder}/{episode_id}.parquet"
    picture = rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)
    frames.keep(kept, dict.fromkeys(range(steps + 1), frames.encode(picture)))
    said = [texts[min(len(texts) - 1, t * len(texts) // steps)] if texts else None for t in range(steps)]
    row = {
        "suite": "fake", "policy": "p", "task": "touch", "variant": "base", "episode_id": episode_id,
        "seed": episode_id, "instruction": instruction, "policy_kind": kind, "success": True,
    }  # fmt: skip
    return results.Trajectory(
        row=row,
        actions=np.zeros((steps, 7), np.float32),
        ee_pose=pose,
        gripper=np.where(np.arange(steps + 1) < steps // 2, 1.0, 0.0)[:, None],
        states=({},) * (steps + 1),
        reasoning=tuple(said),
        keyframe=tuple(t == 0 or said[t] != said[t - 1] for t in range(steps)),
        events=tuple(("grasp:cube",) if t == 5 else () for t in range(steps)),
        frames=frames.Frames("no film", kept),
    )


def evaluation(folder, monkeypatch, policies=None, episodes=3, videos=3, tasks=("touch",)):
    """A finished, filmed evaluation of fake policies."""
    monkeypatch.setattr(sweep, "_run_items", run_items_here)
    policies = policies or {"p": FakePolicy()}
    sweep.run_sweep(
        str(folder),
        fake_suite(),
        [PolicyRef(name, "expert") for name in policies],
        sweep.SweepConfig(dict.fromkeys(tasks, episodes), videos_per_task=videos),
        load_policy=lambda ref, **_: policies[ref.name],
    )
    return str(folder)
