"""Teachers behind a socket: what goes over the wire, the same targets as in process, and every way it can go wrong."""

import contextlib
import dataclasses
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import msgpack
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from unit import vla_fakes as fakes
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect
from websockets.sync.server import serve as listen

from dualvla.distill import remote, topk
from dualvla.distill.alignment import token_map
from dualvla.distill.facts import align_teacher, check_teacher
from dualvla.distill.remote import RemoteTeacher
from dualvla.distill.step import training_loss
from dualvla.distill.teacher_server import TeacherService, serving
from dualvla.distill.teachers import ActionTeacher, Aligned, ReasoningTeacher, Teachers
from dualvla.errors import CheckpointError, ServerError, UsageError, WireError
from dualvla.io import manifest
from dualvla.models.checkpoint import load_model, save_checkpoint
from dualvla.models.config import HeadConfig, LossWeights
from dualvla.models.processing import Processor
from dualvla.models.stages import prepare
from dualvla.models.vla import VLA
from dualvla.wire import teacher as wire
from dualvla.wire.openpi import pack
from dualvla.wire.teacher import Ask

KEY = "a key of thirty-two characters.."


def _save(folder: Path, kind: str = "flow", seed: int = 0, tokenizer: Tokenizer | None = None) -> str:
    config = prepare(fakes.config(head=HeadConfig(kind=kind, hidden=32, layers=2, heads=2, draws=3)), "dual")
    processor = fakes.processor(config)
    model = VLA.create(config, processor, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    processor.tokenizer = tokenizer or processor.tokenizer
    manifest.begin(str(folder), "checkpoint", {"seed": seed}, {})
    save_checkpoint(str(folder), model.state_dict(), model.config, processor, {})
    manifest.finish(str(folder), "checkpoint", {"seed": seed}, {})
    return str(folder)


@pytest.fixture(scope="module", params=["flow", "token"])
def school(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """The URL of a served teacher, and its checkpoint."""
    folder = _save(tmp_path_factory.mktemp("teacher") / "c", request.param)
    with _served(TeacherService(folder)) as url:
        yield url, folder


class _served:  # noqa: N801
    """A service on a port of its own, until the block ends."""

    def __init__(self, service: TeacherService, port: int = 0, key: str | None = None):
        self._context = serving(service, port=port, key=key)

    def __enter__(self) -> str:
        self._server = self._context.__enter__()
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        return f"ws://127.0.0.1:{self._server.socket.getsockname()[1]}"

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._thread.join(10)
        self._context.__exit__(None, None, None)


def _student(folder: str) -> Processor:
    return load_model(folder)[1]


def test_a_distant_teacher_gives_the_targets_of_one_in_process(school: tuple[str, str]) -> None:
    url, folder = school
    model, processor, config = load_model(folder)
    batch = processor.collate(fakes.mixed(), seed=1, step=2)
    action = RemoteTeacher(url, "robot", processor)
    reasoning = RemoteTeacher(url, "multimodal", processor, temperature=2.0, top_k=40)
    ours, theirs = action.targets(batch), ActionTeacher(model).targets(batch)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, atol=1e-5, rtol=1e-4)

    words = reasoning.targets(batch)
    exact = ReasoningTeacher(model).targets(batch)["logits"]
    ids, p, tail = topk.top_k(exact, 40, 2.0)
    questions = ~batch["robot"]
    assert torch.equal(words["top_ids"][questions], ids[questions])
    torch.testing.assert_close(words["top_p"][questions][..., :-1], p[questions], atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(words["top_p"][questions][..., -1], tail[questions], atol=1e-6, rtol=1e-4)

    student = VLA.create(config, processor, seed=9)
    whole = Teachers(action, RemoteTeacher(url, "multimodal", processor, temperature=2.0, top_k=250))
    near, far = (
        training_loss(student, batch, LossWeights(), teachers=t) for t in (Teachers.in_process(model, model), whole)
    )
    for name in near:
        torch.testing.assert_close(far[name], near[name], atol=2e-3, rtol=1e-3)
    assert action.targets({n: t[questions] for n, t in batch.items()}) == {}


def test_the_bytes_of_every_message(school: tuple[str, str]) -> None:
    """Read with msgpack alone, as another implementation would."""
    url, folder = school
    processor = _student(folder)
    batch = {n: t.numpy() for n, t in processor.collate(fakes.mixed()[3:], seed=0, step=0).items()}
    with connect(url, proxy=None) as connection:
        greeting = msgpack.unpackb(connection.recv())
        assert (greeting["server"], greeting["protocol"]) == ("dualvla-teacher", 1)
        assert greeting["model"]["cameras"] == ["main"]
        assert greeting["fingerprints"] == processor.fingerprints()
        frame = wire.ask_to_bytes(Ask("words", batch, 5, 2.0))
        asked = msgpack.unpackb(frame)
        assert {k: v for k, v in asked.items() if k != "batch"} == {"ask": "words", "top_k": 5, "temperature": 2.0}
        assert asked["batch"]["images"][b"dtype"] == "|u1"
        assert asked["batch"]["images"][b"data"] == batch["images"].tobytes()
        assert set(asked["batch"]) == set(wire.FIELDS["words"])  # no action leaves the student for a question
        connection.send(frame)
        answer = msgpack.unpackb(connection.recv())
        assert answer["ids"][b"shape"] == [2, batch["text_ids"].shape[1] + 1, 5]
        log_p = np.frombuffer(answer["log_p"][b"data"], "<f4").reshape(answer["log_p"][b"shape"])
        np.testing.assert_allclose(np.exp(log_p).sum(axis=-1), 1.0, atol=1e-5)
        connection.send(pack({"ask": "tokenizer"}))
        assert json.loads(msgpack.unpackb(connection.recv())["tokenizer"]) == json.loads(processor.tokenizer.to_str())


def test_what_a_teacher_cannot_read_is_refused_by_name_and_it_goes_on(school: tuple[str, str]) -> None:
    url, folder = school
    _, processor, config = load_model(folder)
    kind = "bins" if config.head.kind == "token" else "velocity"
    batch = {n: t.numpy() for n, t in processor.collate(fakes.mixed()[:2], seed=0, step=0).items()}
    good = pack({"ask": kind, "batch": {n: batch[n] for n in wire.FIELDS[kind]}})

    def ask(changes: dict) -> bytes:
        return pack({"ask": kind, "batch": {n: {**batch, **changes}[n] for n in wire.FIELDS[kind]}})

    wrong = {
        b"\xc1 garbage": "msgpack",
        pack([1, 2]): "a map of names",
        pack({"ask": "weights"}): "cannot be asked for 'weights'",
        pack({"ask": kind, "batch": {}}): "'images' must be a uint8 array of rank 5",
        ask({"images": batch["images"][:, :, :16]}): r"'images' is .*this teacher reads",
        ask({"images": batch["images"].astype(np.float32)}): "must be a uint8",
        ask({"instruction_ids": batch["instruction_ids"] + 10**6}): "ids beyond",
        ask({"tau": batch["tau"] * np.nan}): "not finite",
        ask({"noise": batch["noise"][:1]}): "has 1 rows",
        pack(
            {"ask": "words", "batch": {n: batch[n] for n in wire.FIELDS["words"]}, "top_k": 9999, "temperature": 1.0}
        ): ("top_k = 9999"),
        pack({"ask": "words", "batch": {n: batch[n] for n in wire.FIELDS["words"]}, "top_k": 5, "temperature": 0.0}): (
            "'temperature'"
        ),
    }
    with connect(url, proxy=None) as connection:
        connection.recv()
        for frame, reason in wrong.items():
            connection.send(frame)
            with pytest.raises(WireError, match=reason):
                wire.answer_from_bytes(connection.recv())
        connection.send(good)
        assert wire.answer_from_bytes(connection.recv())["values"].shape[0] == 2


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=200))
def test_no_bytes_bring_a_decoder_down(frame: bytes) -> None:
    for read in (wire.ask_from_bytes, wire.greeting_from_bytes, wire.answer_from_bytes):
        with contextlib.suppress(WireError, ServerError):
            read(frame)


def test_only_who_has_the_key_and_is_no_page_may_ask(tmp_path: Path) -> None:
    folder = _save(tmp_path / "c")
    service = TeacherService(folder)
    with pytest.raises(UsageError, match="without a key"), serving(service, "0.0.0.0"):
        pass
    with _served(service, key=KEY) as url:
        RemoteTeacher(url, "robot", _student(folder), key=KEY).close()
        with pytest.raises(ServerError, match="refuses this student"):
            RemoteTeacher(url, "robot", _student(folder), key="another")
        for headers, origin in (({"Host": "evil.example"}, None), ({}, "https://evil.example")):
            headers = {**headers, "Authorization": f"Bearer {KEY}"}
            with pytest.raises(InvalidStatus, match="403"):
                _shake(url, headers, origin)


def _shake(url: str, headers: dict[str, str], origin: str | None) -> None:
    """A handshake with a Host of our own choice, which a client library would not send."""
    if "Host" not in headers:
        with connect(url, additional_headers=headers, origin=origin, proxy=None):  # type: ignore[arg-type]
            return
    host, port = url.removeprefix("ws://").split(":")
    with socket.create_connection((host, int(port))) as raw:
        address = f"ws://{headers.pop('Host')}:{port}"
        with connect(address, sock=raw, additional_headers=headers, proxy=None):
            pass


def test_a_teacher_that_went_away_is_asked_again_and_then_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = _save(tmp_path / "c")
    service, processor = TeacherService(folder), _student(folder)
    batch = processor.collate(fakes.mixed(), seed=0, step=0)
    waits: list[float] = []
    monkeypatch.setattr(remote, "time", SimpleNamespace(sleep=waits.append))  # other threads sleep too
    with _served(service) as url:
        teacher = RemoteTeacher(url, "robot", processor)
        expected = teacher.targets(batch)["velocity"]
    port = int(url.rsplit(":", 1)[1])
    with _served(service, port):  # started anew at the same place
        assert torch.equal(teacher.targets(batch)["velocity"], expected)
    assert len(waits) == 1
    with pytest.raises(ServerError, match=r"cannot be reached.*teach --serve"):
        teacher.targets(batch)
    other = TeacherService(_save(tmp_path / "other", seed=1))
    with _served(other, port), pytest.raises(CheckpointError, match="another teacher than before"):
        teacher.targets(batch)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (b"\xc1", "msgpack"),
        ("text", "answered with text"),
        (pack({"values": np.zeros((1, 2), np.float32)}), r"'values' is float32 \(1, 2\)"),
        (pack({"values": np.full((3, 3, 4, 7), np.nan, np.float32)}), "no numbers"),
        (pack({"other": 1}), "'values' is NoneType"),
        (pack({"error": {"kind": "failed", "message": "out of memory"}}), "out of memory"),
    ],
)
def test_an_answer_that_is_none_is_an_error_at_once(tmp_path: Path, answer: bytes | str, reason: str) -> None:
    folder = _save(tmp_path / "c")
    service, processor = TeacherService(folder), _student(folder)

    def lie(connection: object) -> None:
        connection.send(service.greeting())  # type: ignore[attr-defined]
        connection.recv()  # type: ignore[attr-defined]
        connection.send(answer)  # type: ignore[attr-defined]

    with listen(lie, "127.0.0.1", 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        teacher = RemoteTeacher(f"ws://127.0.0.1:{server.socket.getsockname()[1]}", "robot", processor)
        with pytest.raises((WireError, ServerError), match=reason):
            teacher.targets(processor.collate(fakes.mixed(), seed=0, step=0))
        server.shutdown()


def _renumbered(tokenizer: Tokenizer, seed: int) -> Tokenizer:
    """The same words, merges and rules under other numbers."""
    values = json.loads(tokenizer.to_str())
    words = {**values["model"]["vocab"], **{t["content"]: t["id"] for t in values["added_tokens"]}}
    numbers = np.random.default_rng(seed).permutation(len(words)).tolist()
    new = dict(zip(words, numbers, strict=True))
    values["model"]["vocab"] = {w: new[w] for w in values["model"]["vocab"]}
    values["added_tokens"] = sorted(
        ({**t, "id": new[t["content"]]} for t in values["added_tokens"]), key=lambda t: t["id"]
    )
    return Tokenizer.from_str(json.dumps(values))


def test_a_teacher_that_numbers_the_same_words_otherwise_is_aligned(tmp_path: Path) -> None:
    """A copy of a teacher, its rows permuted to another numbering, teaches exactly what the original does."""
    folder = _save(tmp_path / "c")
    model, processor, config = load_model(folder)
    other = Processor(
        config,
        _renumbered(processor.tokenizer, 1),
        processor.action,
        processor.proprio,
        processor.position,
        processor.prompt,
    )
    assert [other.tokenizer.id_to_token(i) for i in other.encode(fakes.TEXTS[2])] == [
        processor.tokenizer.id_to_token(i) for i in processor.encode(fakes.TEXTS[2])
    ]
    mapping = align_teacher(config, other, processor, "/teacher")
    assert mapping is not None
    permuted, _, _ = load_model(folder)
    with torch.no_grad():
        for table in {
            id(e.weight): e.weight
            for e in (permuted.backbone.hf.get_input_embeddings(), permuted.backbone.hf.get_output_embeddings())
        }.values():
            table[torch.from_numpy(mapping)] = table.clone()
    batch = processor.collate(fakes.mixed(), seed=0, step=0)
    expected = Teachers.in_process(model, model).targets(batch)
    aligned = Aligned(permuted, mapping)
    for name, tensor in Teachers.in_process(aligned, aligned).targets(batch).items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-5, rtol=1e-4)

    manifest.begin(str(tmp_path / "p"), "checkpoint", {}, {})
    save_checkpoint(str(tmp_path / "p"), permuted.state_dict(), config, other, {})
    manifest.finish(str(tmp_path / "p"), "checkpoint", {}, {})
    with _served(TeacherService(str(tmp_path / "p"))) as url:
        words = RemoteTeacher(url, "multimodal", processor, top_k=10).targets(batch)
    questions = ~batch["robot"]
    dense = expected["logits"].softmax(dim=-1)
    torch.testing.assert_close(
        words["top_p"][questions][..., :-1], dense.gather(-1, words["top_ids"])[questions], atol=1e-6, rtol=1e-4
    )
    with pytest.raises(CheckpointError, match="numbers the student's words otherwise"):  # a cache keeps ids
        check_teacher(config, other, processor, "/teacher")


def test_a_tokenizer_that_differs_in_more_than_numbers_is_refused_with_the_reason(school: tuple[str, str]) -> None:
    url, folder = school
    processor = _student(folder)
    text = processor.tokenizer.to_str()
    values = json.loads(text)
    assert token_map(text, text, 500, "t") is None
    fewer = json.loads(text)
    fewer["model"]["merges"] = fewer["model"]["merges"][:-1]
    with pytest.raises(CheckpointError, match="another model merges: it cuts texts differently"):
        token_map(json.dumps(fewer), text, 500, "t")
    values["added_tokens"][0]["content"] = "<other>"
    with pytest.raises(CheckpointError, match=r"only one of them has .*'<other>'"):
        token_map(text, json.dumps(values), 500, "t")

    stranger = fakes.processor(dataclasses.replace(processor.config))
    stranger.tokenizer = Processor.fit(
        fakes.config(), ["quite other words"] * 9, np.zeros((2, 7)), np.zeros((2, 3)), np.zeros((2, 3))
    ).tokenizer
    stranger.action, stranger.proprio, stranger.position = processor.action, processor.proprio, processor.position
    with pytest.raises(CheckpointError, match=r"teacher at ws://.* cannot teach here: its tokenizer has \d+ words"):
        RemoteTeacher(url, "multimodal", stranger)
    longer = _student(folder)
    longer.config = dataclasses.replace(longer.config, horizon=8)
    with pytest.raises(CheckpointError, match="its horizon is 4, the student's 8"):
        RemoteTeacher(url, "robot", longer)
    with pytest.raises(UsageError, match="no teacher's address"):
        RemoteTeacher("http://x", "robot", longer)
