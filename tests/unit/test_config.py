"""Configurations: `--set` reaches every field, and a slip is answered with the nearest key."""

from dataclasses import dataclass, field
from typing import Literal

import pytest

from dualvla.config import from_dict, override, to_dict
from dualvla.errors import UsageError


@dataclass(frozen=True)
class Inner:
    rate: float = 0.1
    steps: int = 10
    name: str = "adam"
    flag: bool = False
    sizes: tuple[int, ...] = (1, 2)
    limit: int | None = None
    mode: Literal["fast", "exact"] = "fast"


@dataclass(frozen=True)
class Outer:
    train: Inner = field(default_factory=Inner)
    seed: int = 0


@pytest.mark.parametrize(
    ("assignment", "expected"),
    [
        ("train.rate=3", Inner(rate=3.0)),
        ("train.steps=20", Inner(steps=20)),
        ("train.name=sgd", Inner(name="sgd")),
        ("train.name=12", Inner(name="12")),
        ("train.flag=true", Inner(flag=True)),
        ("train.sizes=[3,4,5]", Inner(sizes=(3, 4, 5))),
        ("train.limit=7", Inner(limit=7)),
        ("train.limit=null", Inner(limit=None)),
        ("train.mode=exact", Inner(mode="exact")),
    ],
)
def test_override_reaches_nested_fields_of_every_type(assignment: str, expected: Inner) -> None:
    base = Outer()
    assert override(base, [assignment]) == Outer(train=expected)
    assert base == Outer()


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("train.stepz=3", "did you mean 'steps'"),
        ("trian.steps=3", "did you mean 'train'"),
        ("train=3", "is a group"),
        ("seed.x=3", "'seed' has no keys of its own"),
        ("seed", "has no '='"),
        ("train.steps=many", "is not a int"),
        ("train.steps=1.5", "is not a int"),
        ("train.steps=true", "is not a int"),
        ("train.flag=1", "is not a bool"),
        ("train.mode=exat", "did you mean 'exact'"),
        ('train.sizes=["a"]', r"sizes = 'a'"),
    ],
)
def test_slips_are_refused_with_a_fix(assignment: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        override(Outer(), [assignment])
    assert caught.value.fix


def test_dict_round_trip_is_strict() -> None:
    config = override(Outer(), ["train.sizes=[9]", "train.limit=4"])
    assert from_dict(Outer, to_dict(config)) == config
    with pytest.raises(UsageError, match=r"Unknown key 'config\.train\.rat'"):
        from_dict(Outer, {"train": {"rat": 1}})
