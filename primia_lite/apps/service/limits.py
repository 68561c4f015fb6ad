"""What one client of the service may cost, and how it is told no."""

from __future__ import annotations

import collections
import math
import time
from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """What one client may cost; ``math.inf`` switches a limit off. Addresses aren't accounts: who has many, or keeps
    opening sessions, can still crowd out others.

    Attributes
    ----------
    sessions : kept at a time; opening one more closes the one that wasn't used for longest
    session_s : seconds without a query after which a session is closed
    queries : films asked for in a session. A linear head of d features without bias is known after d chosen queries or
        fewer, in whatever sessions; so this and ``per_minute`` slow extraction down, and do not prevent it
    per_minute : films from one address in a minute, over all its sessions. Behind a proxy all clients have one address
    opened_per_minute : sessions opened from one address in a minute
    timeout_s : seconds that a body may take to come, again those that a request may wait for a worker, and again those
        that one may compute before it is replaced
    waiting : requests that one worker has or that wait for it; more are sent away
    head_s : seconds after which a connection is closed that hasn't brought a request's whole head
    key_bytes : of the public keys of all sessions; beyond it those are closed that weren't used for longest
    body_bytes : of the bodies of all requests that are under way; what comes beyond it is sent away
    """

    sessions: float = 64
    session_s: float = 3600.0
    queries: float = 1000
    per_minute: float = 120
    opened_per_minute: float = 12
    timeout_s: float = 60.0
    waiting: float = 64
    head_s: float = 10.0
    key_bytes: float = 1 << 30
    body_bytes: float = 1 << 29


NO_LIMITS = Limits(*[math.inf] * 5, 600.0, math.inf, key_bytes=math.inf, body_bytes=math.inf)


class Refused(Exception):
    """An answer other than success: status, sentence, seconds to wait."""

    def __init__(self, status: int, sentence: str, wait_s: float | None = None):
        super().__init__(sentence)
        self.status, self.sentence = status, sentence
        self.headers = {} if wait_s is None else {"Retry-After": str(max(1, round(wait_s)))}


class Rate:
    """Events in the last minute, by key."""

    def __init__(self, most: float):
        self.most, self.events = most, collections.OrderedDict()

    def check(self, key: str) -> None:
        if self.most == math.inf:
            return
        now = time.monotonic()
        times = self.events.setdefault(key, collections.deque())
        self.events.move_to_end(key)
        if len(self.events) > 4096:  # many addresses: the oldest is forgotten
            self.events.popitem(last=False)
        while times and times[0] < now - 60:
            times.popleft()
        if len(times) >= self.most:
            wait = 60 - (now - times[0])
            raise Refused(429, f"more than {self.most} requests in a minute: wait {wait:.0f} s", wait)
        times.append(now)
