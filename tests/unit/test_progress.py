"""What a stage tells of its progress to whoever watches."""

from __future__ import annotations

import pytest

from dualvla import console


def test_what_an_error_left_undone_waits_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[str, str, float]] = []
    monkeypatch.setattr(console, "_watchers", [lambda *figures: told.append(figures)])

    def fail_after_two_of_five() -> None:
        with console.progress("pruning (parts)", 5) as advance:
            advance(2)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_after_two_of_five()
    assert [amount for _, figure, amount in told if figure == "remaining"] == [5, 3, 0]
