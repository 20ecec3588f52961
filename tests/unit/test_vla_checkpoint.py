"""Checkpoints: bit-equal round trips, and one clear error for each way a folder can be wrong."""

import json
from pathlib import Path

import pytest
import torch
from unit import vla_fakes as fakes

from dualvla.errors import CheckpointError
from dualvla.models.checkpoint import load_model, save_checkpoint
from dualvla.models.stages import prepare
from dualvla.models.vla import VLA


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    config = prepare(fakes.config(), "specialist")
    processor = fakes.processor(config)
    model = VLA.create(config, processor, seed=0)
    save_checkpoint(str(tmp_path / "c"), model.state_dict(), model.config, processor, {"stage": "specialist"})
    return tmp_path / "c"


@pytest.mark.parametrize("backbone", sorted(fakes.BACKBONES))
def test_save_and_load_are_bit_equal(backbone: str, tmp_path: Path) -> None:
    config = prepare(fakes.config(backbone), "dual")
    processor = fakes.processor(config)
    model = VLA.create(config, processor, seed=5)
    save_checkpoint(str(tmp_path), model.state_dict(), model.config, processor, {})
    loaded, loaded_processor, loaded_config = load_model(str(tmp_path))
    assert loaded_config == model.config
    own, theirs = model.state_dict(), loaded.state_dict()
    assert own.keys() == theirs.keys()
    assert all(torch.equal(own[name], theirs[name]) for name in own)
    samples = fakes.mixed()
    for name, tensor in processor.collate(samples, 0, 0).items():
        assert torch.equal(tensor.nan_to_num(), loaded_processor.collate(samples, 0, 0)[name].nan_to_num()), name


def test_equal_seeds_give_equal_weights_and_leave_the_global_generator_alone(folder: Path) -> None:
    config = prepare(fakes.config(), "specialist")
    processor = fakes.processor(config)
    torch.manual_seed(1)
    first = VLA.create(config, processor, seed=3).state_dict()
    drawn = torch.rand(1)
    torch.manual_seed(2)
    second = VLA.create(config, processor, seed=3).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), drawn)
    a, b = (load_model(str(folder), stage="reasoning", seed=7)[0].state_dict() for _ in range(2))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_later_stage_adds_adapters_and_changes_nothing_else(folder: Path) -> None:
    plain, processor, _ = load_model(str(folder))
    adapted, _, config = load_model(str(folder), stage="reasoning")
    assert (config.kind, config.adapters) == ("reasoning", ("action", "language"))
    batch = processor.collate(fakes.mixed(), 0, 0)
    assert torch.equal(plain(batch)["loss"], adapted.eval()(batch)["loss"])


def test_the_files_are_those_of_the_contract_and_none_is_a_pickle(folder: Path) -> None:
    names = {p.name for p in folder.iterdir()}
    assert names == {"config.json", "model.safetensors", "processor.json", "tokenizer.json", "README.md"}
    assert "specialist" in (folder / "README.md").read_text()


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _edit(path: Path, key: str, value: object, inside: str | None = None) -> None:
    values = json.loads(path.read_text())
    (values[inside] if inside else values)[key] = value
    path.write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda f: (f / "config.json").unlink(), r"no config\.json"),
        (lambda f: (f / "config.json").write_text("{"), "not valid JSON"),
        (lambda f: _edit(f / "config.json", "architecture", "LlamaForCausalLM"), "'LlamaForCausalLM'"),
        (lambda f: _edit(f / "config.json", "architektur", 1, "model"), "architektur"),
        (lambda f: _edit(f / "config.json", "num_queries", 5, "model"), "queries.weight"),
        (lambda f: _edit(f / "config.json", "adapters", ["action"], "model"), "lacks"),
        (lambda f: (f / "model.safetensors").unlink(), "no model.safetensors"),
        (lambda f: _truncate(f / "model.safetensors"), "damaged or truncated"),
        (lambda f: (f / "model.safetensors").write_bytes(b""), "damaged or truncated"),
        (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json"),
        (lambda f: _truncate(f / "tokenizer.json"), "processor files"),
        (lambda f: (f / "processor.json").write_text("{}"), "processor files"),
    ],
)
def test_a_wrong_folder_is_refused_by_name(folder: Path, break_it: object, message: str) -> None:
    break_it(folder)  # type: ignore[operator]
    with pytest.raises(CheckpointError, match=message) as raised:
        load_model(str(folder))
    assert str(folder) in str(raised.value)
    assert raised.value.fix


def test_a_missing_folder_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        load_model("/nowhere")
