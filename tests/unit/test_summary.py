"""What summary.json says of rows: rates by task and variant, named means, seeds, pairs, published rows."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from eval_fakes import fake_suite
from hypothesis import given, settings
from hypothesis import strategies as st

from dualvla_eval import reference, statistics
from dualvla_eval.conventions import Conventions
from dualvla_eval.policies import PolicyRef
from dualvla_eval.suites import TaskSpec
from dualvla_eval.summary import paired, summarise

SUITE = replace(
    fake_suite(),
    tasks=(TaskSpec("touch", 30, 4), TaskSpec("touch", 30, 4, "dark"), TaskSpec("tap", 30, 4)),
    means={"all": ("touch", "tap"), "one": ("tap",), "more": ("tap", "push")},
    robustness_variants=("dark",),
)


def row(policy: str, task: str, episode: int, success: bool, **changes: Any) -> dict[str, Any]:
    return {
        "policy": policy, "task": task, "variant": "base", "episode_id": episode, "seed": 0, "success": success,
        "first_success": 3 if success else None, "steps": 5, "replies": 5, "infer_ms": 2.0, "policy_kind": "specialist",
        "reasoning_tokens": 0, "reasoning_steps": 0, "stop_reason": "success" if success else "step_limit",
        "wall_s": 1.0, **changes,
    }  # fmt: skip


def test_robustness_variants_have_rates_of_their_own_and_count_nowhere_else() -> None:
    rows = [row("p", "touch", i, i < 2) for i in range(4)]
    rows += [row("p", "touch", i, True, variant="dark") for i in range(4)]
    found = summarise(SUITE, [PolicyRef("p", "expert")], rows, Conventions())
    policy = found["policies"]["p"]
    assert found["tasks"]["touch"] == policy["tasks"]["touch"]
    assert (policy["tasks"]["touch"]["successes"], policy["tasks"]["touch"]["n"]) == (2, 4)
    assert policy["variants"]["touch"]["dark"]["rate"] == 1.0
    assert policy["means"]["mean of tasks"]["value"] == 0.5


def test_a_named_mean_is_over_tasks_and_only_where_all_were_run() -> None:
    rows = [row("p", "touch", 0, True), *(row("p", "tap", i, i == 0) for i in range(4))]
    means = summarise(SUITE, [PolicyRef("p", "expert")], rows, Conventions())["policies"]["p"]["means"]
    assert means["all"]["value"] == (1 + 1 / 4) / 2
    assert means["one"]["value"] == 1 / 4
    assert "more" not in means


def test_the_spread_over_seeds_is_that_of_their_rates() -> None:
    rates = {0: 4, 1: 2, 2: 0}
    rows = [row("p", "tap", i, i < solved, seed=seed) for seed, solved in rates.items() for i in range(4)]
    found = summarise(SUITE, [PolicyRef("p", "expert")], rows, Conventions())["policies"]["p"]["seeds"]["tap"]
    assert found["rates"] == {"0": 1.0, "1": 0.5, "2": 0.0}
    assert (found["mean"], found["standard_deviation"]) == (0.5, 0.5)


def test_what_held_at_any_step_stands_beside_what_held_at_the_end() -> None:
    rows = [row("p", "tap", 0, True), row("p", "tap", 1, False, first_success=2), row("p", "tap", 2, False)]
    policy = summarise(SUITE, [PolicyRef("p", "expert")], rows, Conventions(termination="original"))["policies"]["p"]
    assert policy["tasks"]["tap"]["successes"] == 1
    assert policy["tasks_first_success"]["tap"]["successes"] == 2


@settings(deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=20))
def test_a_pair_is_compared_on_the_episodes_that_both_ran(outcomes: list[tuple[bool, bool]]) -> None:
    rows = [row(name, "tap", i, both[k]) for i, both in enumerate(outcomes) for k, name in enumerate("ab")]
    rows += [row("a", "touch", 0, True)]
    (pair,) = paired(rows)
    only_a = sum(a and not b for a, b in outcomes)
    only_b = sum(b and not a for a, b in outcomes)
    assert (pair["episodes"], pair["only_a"], pair["only_b"]) == (len(outcomes), only_a, only_b)
    assert pair["difference"] == pytest.approx((only_a - only_b) / len(outcomes))
    assert pair["p"] == pair["p_holm"] == statistics.mcnemar(only_a, only_b)
    assert pair["low"] <= pair["difference"] + 1e-12
    assert pair["high"] >= pair["difference"] - 1e-12


def test_published_rows_stand_beside_ours_with_recomputed_means() -> None:
    solved = {"widowx_spoon_on_towel": 24, "widowx_carrot_on_plate": 12, "widowx_stack_cube": 0}
    rows = [row("p", task, i, i < n) for task, n in solved.items() for i in range(24)]
    found = reference.beside("simpler-widowx", rows)
    assert found is not None
    assert found["ours"]["p"] == {"wx_spoon": 100.0, "wx_carrot": 50.0, "wx_stack": 0.0, "mean": 50.0}
    assert found["mean_of"] == ["wx_spoon", "wx_carrot", "wx_stack"]
    ours = next(r for r in found["published"] if r["model"] == "DualVLA")
    printed = [ours["values"][cell] for cell in found["mean_of"]]
    assert ours["values"]["mean"] == pytest.approx(np.mean(printed))
    assert reference.beside("blocks", rows) is None


def test_the_nine_and_the_twelve_cells_are_those_of_three_suites() -> None:
    tasks = {
        "simpler-widowx": ["spoon_on_towel", "carrot_on_plate", "stack_cube", "put_eggplant_in_basket"],
        **dict.fromkeys(
            ("simpler-google-vm", "simpler-google-va"),
            ("pick_coke_can", "move_near", "open_drawer", "close_drawer", "place_apple_in_closed_top_drawer"),
        ),
    }
    cells = {reference.cell_of(suite, task) for suite, names in tasks.items() for task in names}
    assert cells == set(reference.published()["cells"])
    assert len(cells) == 12
    assert set(reference.published()["nine_cell_definition"]) < cells
    assert all(reference.cell_of("blocks", task) is None for task in itertools.chain(*tasks.values()))
