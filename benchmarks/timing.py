"""Timing that stands a noisy machine: contenders take turns, A B C A B C ..., and medians are compared."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

Run = Callable[[], Any]
# Threads of a runtime go on spinning for a while after a run; whoever comes next would share the cores with them.
PAUSE = 0.15  # seconds before each run


class Skip(Exception):
    """A contender cannot be measured here; the message says why."""


def alternate(contenders: Mapping[str, Run], rounds: int, *, warm: bool = True) -> dict[str, list[float]]:
    """Seconds of every run of every contender, `rounds` each, in turns, after one each that does not count."""
    if warm:
        for run in contenders.values():
            run()
    times: dict[str, list[float]] = {name: [] for name in contenders}
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for name, run in contenders.items():
                time.sleep(PAUSE)
                start = time.perf_counter()
                run()
                times[name].append(time.perf_counter() - start)
    finally:
        gc.enable()
    return times


def summary(times: list[float], statistic: str = "median") -> float:
    """One number, in seconds: the median, or the shortest, which the rest of the machine disturbs least."""
    return median(times) if statistic == "median" else min(times)
