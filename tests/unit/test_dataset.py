"""Data sets: equal rows give equal bytes, counts add up, and a damaged file is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dualvla.errors import DataError
from dualvla.io import dataset, manifest

MakeDataset = Callable[..., str]
MakeRows = Callable[..., list[dict[str, Any]]]


def test_equal_rows_give_equal_bytes(make_dataset: MakeDataset) -> None:
    one, two, other = make_dataset("one"), make_dataset("two"), make_dataset("other", steps=11)
    data = [{p.name: p.read_bytes() for p in sorted((Path(f) / "data").iterdir())} for f in (one, two, other)]
    assert data[0] == data[1] != data[2]
    assert Path(one, "manifest.json").read_bytes() == Path(two, "manifest.json").read_bytes()


def test_rows_come_back_as_they_went_in(tmp_path: Path, make_rows: MakeRows) -> None:
    rows = make_rows("a")
    url = dataset.part_url(str(tmp_path), 0)
    dataset.write_table(url, dataset.rows_to_table(rows))
    back = dataset.read_table(url).to_pylist()
    for sent, found in zip(rows, back, strict=True):
        for name in ("episode_id", "step", "ee_pose", "gripper", "reasoning", "events"):
            assert found[name] == sent[name]
        assert np.array_equal(
            dataset.decode_image(dict(found["images"])["main"]), dataset.decode_image(sent["images"]["main"])
        )


def test_unknown_columns_are_refused(make_rows: MakeRows) -> None:
    with pytest.raises(DataError, match="Unknown step columns: speed"):
        dataset.rows_to_table([make_rows("a")[0] | {"speed": 1.0}])


def test_lost_rows_stop_the_manifest(make_dataset: MakeDataset) -> None:
    folder = make_dataset()
    rows = manifest.require(folder, dataset.KIND)["rows_out"]
    with pytest.raises(DataError, match=f"{rows + 1} rows in, but {rows} out and 0 quarantined"):
        dataset.finish_dataset(folder, {}, {}, rows_in=rows + 1)


@pytest.mark.parametrize("keep", [0, 4, 1000])
def test_truncated_file_is_named(make_dataset: MakeDataset, keep: int) -> None:
    folder = make_dataset()
    part = Path(dataset.part_url(folder, 1))
    part.write_bytes(part.read_bytes()[:keep])
    with pytest.raises(DataError, match=r"part-00001\.parquet' is not a readable parquet file"):
        dataset.open_dataset(folder).read()


def test_lost_file_is_named(make_dataset: MakeDataset) -> None:
    folder = make_dataset()
    Path(dataset.part_url(folder, 0)).unlink()
    with pytest.raises(DataError, match=r"lacks data/part-00000\.parquet"):
        dataset.open_dataset(folder)


def test_missing_column_is_named(make_dataset: MakeDataset) -> None:
    with pytest.raises(DataError, match="no column 'keep_reasoning'"):
        dataset.open_dataset(make_dataset()).read(["episode_id", "keep_reasoning"])


@pytest.mark.parametrize("data", [b"", b"no image", b"\x89PNG\r\n\x1a\n"])
def test_broken_image_is_a_data_error(data: bytes) -> None:
    with pytest.raises(DataError, match="cannot be decoded"):
        dataset.decode_image(data)
