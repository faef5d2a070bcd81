"""How two ways to do the same are timed against each other, and the row of the table that tells it."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Bench:
    """How to measure.

    repeats: timed runs of each of a pair, after one that is not timed.
    short: tiny sizes, for a test of the command; its times mean nothing.
    """

    device: torch.device
    repeats: int
    short: bool

    def pair(self, ours: Callable[[], Any], rival: Callable[[], Any]) -> dict[str, float]:
        """Seconds of each, and how many times as long the rival takes: medians over alternate runs."""
        ours(), rival()
        times = [(self.time(ours), self.time(rival)) for _ in range(self.repeats)]
        return {
            "ours_s": statistics.median(a for a, _ in times),
            "rival_s": statistics.median(b for _, b in times),
            "ratio": statistics.median(b / a for a, b in times),
        }

    def time(self, function: Callable[[], Any]) -> float:
        """Seconds of one run, to the end of what it started on a GPU."""
        clock = time.perf_counter if self.device.type == "cuda" else time.process_time
        self._wait()
        start = clock()
        function()
        self._wait()
        return clock() - start

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


@dataclass
class Row:
    """A line of the table: what was compared, in which setting; by how much the rival is slower, and what was hoped.

    difference: between the values of the two, as the comparison defines it; None where they compute different things.
    figures: what else the comparison reports, by name with unit.
    """

    comparison: str
    setting: str
    ours_s: float
    rival_s: float
    ratio: float
    goal: float | None = None
    difference: float | None = None
    figures: dict[str, float] = field(default_factory=dict)
