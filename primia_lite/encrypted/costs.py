"""What each step of an encrypted diagnosis costs."""

from __future__ import annotations

import collections
import time
from typing import NamedTuple


class Cost(NamedTuple):
    """One ``party``'s ``step``: wall clock, KiB that go out of it, and rescalings that remain.

    ``error`` is the standard deviation of a logit where the step is ``compute`` or ``decrypt``: at the server with its
    weights; at the client, which doesn't know them, at most, with flooding and rounding. None of a CNN, where nobody
    knows it beforehand.
    """

    step: str
    party: str
    seconds: float
    kib: float
    levels_left: int
    error: float | None


class Costs(collections.deque):
    """The costs of one party's last 10,000 steps."""

    def __init__(self, party: str, levels: int):
        super().__init__(maxlen=10_000)
        self.party, self.levels = party, levels

    def note(self, step: str, started: float, size: int = 0, level: int = 0, error: float | None = None) -> None:
        seconds = time.perf_counter() - started
        self.append(Cost(step, self.party, seconds, size / 1024, max(0, self.levels - level), error))
