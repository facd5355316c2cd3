"""Calls that are timed take turns, and short ones are repeated; no time is asserted."""

from __future__ import annotations

import time

from ptq4cuda.bench.timing import take_turns


def test_calls_take_turns() -> None:
    order: list[str] = []
    seconds = take_turns({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 3)
    assert order == ["a", "b"] * 4  # the first of each does not count
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3}


def test_short_calls_are_repeated() -> None:
    seconds = take_turns({"a": lambda: time.sleep(0.01), "b": lambda: None}, 2, least_seconds=0.05)["a"]
    assert all(s >= 0.01 for s in seconds)
    assert 2 < len(seconds) <= 5
