"""Data set folders of contract.md: `data/*.parquet` in a fixed row order, `quarantine/*.parquet`, `manifest.json`.

Equal rows give equal bytes: fixed writer settings, no pandas metadata, nothing about time. Knows schema.py and storage.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dualvla.errors import DataError
from dualvla.io import manifest, storage
from dualvla.schema import step_schema

KIND = "dataset"


@dataclass(frozen=True)
class Dataset:
    """A finished data set folder: its manifest and the sorted URLs of its parquet files."""

    folder: str
    manifest: Mapping[str, Any]
    files: tuple[str, ...]

    def read(self, columns: Sequence[str] | None = None) -> pa.Table:
        """All rows, in file order. Raises: DataError naming the file that cannot be read."""
        return pa.concat_tables([read_table(file, columns) for file in self.files])


def open_dataset(folder: str) -> Dataset:
    """Raises: DataError if the folder is missing, unfinished, or files named in its manifest are gone."""
    found = manifest.require(folder, KIND)
    files = storage.list_files(storage.join(folder, "data"), ".parquet")
    missing = sorted(set(found["files"]) - {f.rsplit("/", 1)[-1] for f in files})
    if missing:
        raise DataError(f"'{folder}' lacks data/{missing[0]}, which its manifest names.", "make the data set again")
    return Dataset(folder, found, tuple(files))


def part_url(folder: str, index: int) -> str:
    return storage.join(folder, "data", f"part-{index:05d}.parquet")


def rows_to_table(rows: Iterable[Mapping[str, Any]], labels: bool = False) -> pa.Table:
    """Step rows (missing columns become null, unknown ones are refused) as a table of the schema."""
    schema = step_schema(labels)
    rows = list(rows)
    unknown = {name for row in rows for name in row} - set(schema.names)
    if unknown:
        raise DataError(f"Unknown step columns: {', '.join(sorted(unknown))}.", "see dualvla/schema.py")
    columns = [pa.array([row.get(f.name) for row in rows], type=f.type) for f in schema]
    return pa.table(columns, schema=schema)


def write_table(url: str, table: pa.Table) -> str:
    """Atomic, byte-deterministic parquet. Returns the sha256 of the file."""
    data = to_parquet(table)
    storage.write_bytes(url, data)
    return hashlib.sha256(data).hexdigest()


def to_parquet(table: pa.Table) -> bytes:
    """The file that `write_table` writes."""
    sink = pa.BufferOutputStream()  # a third faster than io.BytesIO
    pq.write_table(
        table.replace_schema_metadata(None),
        sink,
        compression="zstd",
        row_group_size=4096,
        write_statistics=True,
    )
    return sink.getvalue().to_pybytes()


def read_table(url: str, columns: Sequence[str] | None = None, optional: Sequence[str] = ()) -> pa.Table:
    """`columns` (default: all), and those of `optional` that the file has.

    Raises: DataError naming a truncated or foreign file, or a missing column.
    """
    try:
        # All columns take the whole file at once; some of them only their byte ranges, not the images.
        with pa.BufferReader(storage.read_bytes(url)) if columns is None else storage.open_reader(url) as source:
            file = pq.ParquetFile(source)
            names = file.schema_arrow.names
            lacking = set(columns or ()) - set(names)
            if lacking:
                raise DataError(f"'{url}' has no column '{sorted(lacking)[0]}'.", "make the data set with this version")
            return file.read(columns=None if columns is None else [*columns, *(c for c in optional if c in names)])
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(
            f"'{url}' is not a readable parquet file: {error}.",
            "it may be truncated; make the data set again",
        ) from error


@dataclass(frozen=True)
class Part:
    """What the writer of a part file knows of it. episodes: different episode_ids in it, none of which is elsewhere."""

    sha256: str
    rows: int
    episodes: int


def finish_dataset(
    folder: str,
    config: Mapping[str, Any],
    inputs: Mapping[str, str],
    *,
    rows_in: int,
    rows_quarantined: int = 0,
    parts: Mapping[str, Part] | None = None,
    **facts: Any,
) -> dict[str, Any]:
    """Counts what lies in `data/` and writes the manifest. Invariant: rows_in = rows_out + rows_quarantined.

    parts: file name -> what its writer knows, for all of `data/` (default: every file is read to find out).
    """
    if parts is None:
        parts = _read_parts(storage.list_files(storage.join(folder, "data"), ".parquet"))
    rows_out = sum(part.rows for part in parts.values())
    if rows_in != rows_out + rows_quarantined:
        raise DataError(
            f"'{folder}': {rows_in} rows in, but {rows_out} out and {rows_quarantined} quarantined.",
            "report this",
        )
    return manifest.finish(
        folder, KIND, config, inputs,
        files={name: part.sha256 for name, part in parts.items()},
        episodes=sum(part.episodes for part in parts.values()),
        rows_in=rows_in, rows_out=rows_out, rows_quarantined=rows_quarantined,
        **facts,
    )  # fmt: skip


def _read_parts(files: Sequence[str]) -> dict[str, Part]:
    parts: dict[str, Part] = {}
    seen: set[str] = set()
    for file in files:
        ids = read_table(file, ["episode_id"])["episode_id"]
        new = set(ids.unique().to_pylist()) - seen
        seen |= new
        parts[file.rsplit("/", 1)[-1]] = Part(manifest.file_digest(file), len(ids), len(new))
    return parts


def encode_png(image: np.ndarray) -> bytes:
    """uint8 [H, W, 3] -> PNG bytes, deterministic and lossless."""
    from PIL import Image

    sink = io.BytesIO()
    Image.fromarray(image).save(sink, format="PNG", compress_level=1)
    return sink.getvalue()


def decode_image(data: bytes, at_least: int | None = None) -> np.ndarray:
    """PNG or JPEG bytes -> uint8 [H, W, 3]. Raises: DataError.

    at_least: px to a side that are enough; a JPEG is then decoded at 1/2, 1/4 or 1/8 of its size where that suffices,
    at a fraction of the time and memory.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        image = Image.open(io.BytesIO(data))
        if at_least is not None:
            image.draft("RGB", (at_least, at_least))
        return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
    # Pillow reports a damaged chunk of a PNG as a SyntaxError, and a header that claims gigapixels as a "bomb".
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(
            f"An image of {len(data)} bytes cannot be decoded: {error}.", "`dualvla validate` lists such rows"
        ) from error
