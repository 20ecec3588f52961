"""From a data set's parquet rows to training samples, in an order that is a pure function of (seed, step, data).

Rows stay in Arrow; an image is decoded when its sample is drawn. Knows nothing of models, tensors or workers: a worker
is a slice of the global batch, so the number of workers, or a restart, changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dualvla.errors import DataError
from dualvla.io import dataset
from dualvla.models.processing import Sample
from dualvla.schema import ACTION_SPACES, DOMAINS, step_schema

_COLUMNS = (
    "episode_id", "step", "control_hz", "split", "domain", "instruction", "images", "proprio", "action",
    "action_space", "reasoning", "target_pixel", "target_position",
)  # fmt: skip
_KEEP = "keep_reasoning"
_BUCKETS = 2  # beside the domains' keys
_DOMAIN_KEYS = {"robot": 0, "multimodal": 1}


@dataclass(frozen=True)
class RobotFacts:
    """What the robot rows of a data set are of; a model is checked against it. image_size: height, width in pixels."""

    action_space: str
    control_hz: float
    cameras: tuple[str, ...]
    image_size: tuple[int, int]
    proprio_dim: int


class TrainRows:
    """The rows of split "train" of a data set: robot steps and multimodal questions, each numbered from 0.

    A sample's key, which its noise is drawn from, is its row number: multimodal rows come after the robot's.
    """

    def __init__(self, folder: str, robot: pa.Table, multimodal: pa.Table):
        if not len(robot):
            raise DataError(f"'{folder}' has no robot rows in split 'train'.", "collect demonstrations first")
        self.folder = folder
        self._robot, self._multimodal = robot, multimodal
        self._episode_end = _episode_ends(robot)
        self.actions = _dense(robot, "action", folder)
        has_proprio = robot["proprio"].null_count == 0
        self.proprio = _dense(robot, "proprio", folder) if has_proprio else np.zeros((len(robot), 0), np.float32)

    @classmethod
    def load(cls, folder: str, sample: bool = False) -> TrainRows:
        """All training rows, or (`sample`) those of the first file that has robot rows.

        Raises: DataError naming what is missing, unreadable or inconsistent.
        """
        parts: dict[str, list[pa.Table]] = {domain: [step_schema(labels=True).empty_table()] for domain in DOMAINS}
        for file in dataset.open_dataset(folder).files:
            table = dataset.read_table(file, _COLUMNS, optional=(_KEEP,))
            if _KEEP not in table.column_names:  # not pruned
                table = table.append_column(_KEEP, pa.array(np.ones(len(table), bool)))
            table = table.filter(pc.equal(table["split"], "train"))
            for domain, rows in parts.items():
                rows.append(table.filter(pc.equal(table["domain"], domain)))
            if sample and len(parts["robot"][-1]):
                break
        columns = [*_COLUMNS, _KEEP]
        robot, multimodal = (pa.concat_tables(t.select(columns) for t in parts[domain]) for domain in DOMAINS)
        return cls(folder, robot, multimodal)

    @property
    def counts(self) -> dict[str, int]:
        return {"robot": len(self._robot), "multimodal": len(self._multimodal)}

    @property
    def keep_ratio(self) -> float:
        """Share of the robot rows whose reasoning pruning kept; 1 if there was no pruning."""
        return float(np.mean(self._robot[_KEEP].to_numpy()))

    @cached_property
    def facts(self) -> RobotFacts:
        """Raises: DataError if the rows do not agree with each other."""
        spaces, rates = (pc.unique(self._robot[name]).to_pylist() for name in ("action_space", "control_hz"))
        if len(spaces) != 1 or len(rates) != 1:
            raise DataError(
                f"'{self.folder}' mixes action spaces {spaces} and control rates {rates} Hz.",
                "train on one robot's data at a time",
            )
        if spaces[0] not in ACTION_SPACES or ACTION_SPACES[spaces[0]].size != self.actions.shape[1]:
            raise DataError(
                f"'{self.folder}' has actions of {self.actions.shape[1]} numbers in action space '{spaces[0]}'.",
                f"known action spaces: {', '.join(ACTION_SPACES)}",
            )
        images = _images(self._robot, 0)
        return RobotFacts(
            action_space=spaces[0],
            control_hz=rates[0],
            cameras=tuple(images),
            image_size=next(iter(images.values())).shape[:2],
            proprio_dim=self.proprio.shape[1],
        )

    def texts(self) -> list[str]:
        """Every distinct instruction, question, reasoning text and answer, in file order: to train a tokenizer on."""
        columns = [table[name] for table in (self._robot, self._multimodal) for name in ("instruction", "reasoning")]
        return list(dict.fromkeys(text for column in columns for text in pc.unique(column).to_pylist() if text))

    def lengths(self, with_reasoning: bool) -> dict[str, np.ndarray]:
        """Of every row of each domain, what sorts it among samples of its length: bytes of text, then of instruction.

        Bytes stand for tokens: no tokenizer is needed to know the order of samples. int64 [rows].
        """
        found = {}
        for domain, table in (("robot", self._robot), ("multimodal", self._multimodal)):
            text, instruction = (_byte_lengths(table[name]) for name in ("reasoning", "instruction"))
            if domain == "robot":
                text = text * (table[_KEEP].to_numpy() & with_reasoning)
            found[domain] = text * (1 << 32) + instruction
        return found

    def target_positions(self) -> np.ndarray:
        """Target positions where there are any, float32 [M, 3] (m, base frame)."""
        flat = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in self._robot["target_position"].chunks]
        return np.concatenate(flat).reshape(-1, 3).astype(np.float32)

    def sample(self, domain: str, row: int, horizon: int, with_reasoning: bool) -> Sample:
        return self.robot(row, horizon, with_reasoning) if domain == "robot" else self.multimodal(row)

    def robot(self, row: int, horizon: int, with_reasoning: bool) -> Sample:
        """Robot step `row` with the next `horizon` actions; past the end of its episode they are masked out."""
        count = min(horizon, int(self._episode_end[row]) - row)
        actions = np.zeros((horizon, self.actions.shape[1]), np.float32)
        actions[:count] = self.actions[row : row + count]
        table = self._robot
        keep = with_reasoning and table[_KEEP][row].as_py()
        return Sample(
            key=row,
            domain="robot",
            images=_images(table, row),
            instruction=table["instruction"][row].as_py(),
            reasoning=table["reasoning"][row].as_py() if keep else None,
            proprio=self.proprio[row],
            actions=actions,
            action_mask=np.arange(horizon) < count,
            target_pixel=_vector(table["target_pixel"][row]),
            target_position=_vector(table["target_position"][row]),
        )

    def multimodal(self, row: int) -> Sample:
        table = self._multimodal
        return Sample(
            key=len(self._robot) + row,
            domain="multimodal",
            images=_images(table, row),
            instruction=table["instruction"][row].as_py(),
            reasoning=table["reasoning"][row].as_py(),
        )


@dataclass(frozen=True)
class Sampler:
    """Which samples make the global batch of a step.

    Each domain is walked in epochs, every epoch in its own order keyed by (seed, domain, epoch); every batch holds the
    same number of each. With `bucket`, the samples of that many steps are dealt out anew: sorted by length within
    each domain, so that a step gets neighbours, its longest questions beside its longest robot texts; which step gets
    which is keyed by (seed, steps before). Knows row numbers only.

    lengths: domain -> a number per row to sort by; needed with `bucket` > 1 (steps).
    """

    counts: dict[str, int]
    batch_size: int
    multimodal_fraction: float
    seed: int
    bucket: int = 0
    lengths: Mapping[str, np.ndarray] = field(default_factory=dict)

    @property
    def share(self) -> dict[str, int]:
        """Samples of each domain in a batch. A data set without multimodal rows gives robot samples only."""
        if not self.counts["multimodal"]:
            return {"robot": self.batch_size, "multimodal": 0}
        multimodal = round(self.batch_size * self.multimodal_fraction)
        return {"robot": self.batch_size - multimodal, "multimodal": multimodal}

    def batch(self, step: int) -> list[tuple[str, int]]:
        """(domain, row) of step 0, 1, ...; robot samples first, so that `[rank::world]` gives each worker of both."""
        if self.bucket <= 1:
            rows = {domain: self._rows(domain, step * share, share) for domain, share in self.share.items()}
        else:
            block, within = divmod(step, self.bucket)
            slot = int(np.random.default_rng([self.seed, _BUCKETS, block]).permutation(self.bucket)[within])
            rows = {
                domain: self._sorted(domain, block)[slot * share : (slot + 1) * share]
                for domain, share in self.share.items()
            }
        return [(domain, row) for domain, numbers in rows.items() for row in numbers]

    def _sorted(self, domain: str, block: int) -> list[int]:
        """The rows of all steps of a block, by length; equally long ones stay in their order."""
        size = self.bucket * self.share[domain]
        rows = np.array(self._rows(domain, block * size, size), dtype=np.int64)
        return rows[np.argsort(self.lengths[domain][rows], kind="stable")].tolist()

    def _rows(self, domain: str, first: int, number: int) -> list[int]:
        """`number` rows of the domain's endless walk."""
        count, key = self.counts[domain], _DOMAIN_KEYS[domain]
        rows: list[int] = []
        while number > len(rows):
            epoch, within = divmod(first + len(rows), count)
            rows += _order(count, self.seed, key, epoch)[within : within + number - len(rows)].tolist()
        return rows


@lru_cache(maxsize=4)
def _order(count: int, seed: int, domain_key: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, domain_key, epoch]).permutation(count)


def _episode_ends(robot: pa.Table) -> np.ndarray:
    """For every row, the number of the first row after it that does not follow on from it in the same episode."""
    episode = robot["episode_id"].combine_chunks().dictionary_encode().indices.to_numpy(zero_copy_only=False)
    step = robot["step"].to_numpy()
    breaks = np.flatnonzero((episode[1:] != episode[:-1]) | (step[1:] != step[:-1] + 1)) + 1
    starts = np.concatenate([[0], breaks, [len(step)]])
    return np.repeat(starts[1:], np.diff(starts))


def _dense(table: pa.Table, name: str, folder: str) -> np.ndarray:
    """A column of equally long lists as float32 [N, D]."""
    column = table[name]
    lengths = pc.unique(pc.list_value_length(column)).to_pylist()
    if len(lengths) != 1 or lengths[0] is None:
        raise DataError(f"'{folder}': column '{name}' has rows of lengths {lengths}.", "all rows need the same length")
    flat = np.concatenate([chunk.flatten().to_numpy(zero_copy_only=False) for chunk in column.chunks])
    if not np.isfinite(flat).all():
        raise DataError(f"'{folder}': column '{name}' has values that are not finite.", "run `dualvla prune` first")
    return flat.reshape(len(table), lengths[0]).astype(np.float32)


def _byte_lengths(column: pa.ChunkedArray) -> np.ndarray:
    return pc.fill_null(pc.binary_length(column), 0).to_numpy().astype(np.int64)


def _images(table: pa.Table, row: int) -> dict[str, np.ndarray]:
    return {camera: dataset.decode_image(data) for camera, data in table["images"][row].as_py()}


def _vector(cell: pa.ListScalar) -> np.ndarray | None:
    return np.asarray(cell.values, np.float32) if cell.is_valid else None
