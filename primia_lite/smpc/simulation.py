"""Dealer and both servers in one process, and what each server sees: for teaching and tests."""

from __future__ import annotations

import io
import queue
import secrets
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from primia_lite.smpc.engines import Dealer, Engine, Online, Preparation, Wire, open_weights, weight_masks
from primia_lite.smpc.keys import Key
from primia_lite.smpc.program import ACTIVATION, Program, Weights, run
from primia_lite.smpc.ring import decode, encode, share

Seeds = tuple[bytes, bytes]


def fresh_seeds() -> Seeds:
    return secrets.token_bytes(16), secrets.token_bytes(16)


@dataclass(frozen=True)
class Transcript:
    """``shares``: of the result, by server; ``opened``: by server, of each exchange what it sent and what it got;
    ``seeds``: of the dealer for this inference; ``key_bytes``: by server."""

    shares: tuple[np.ndarray, np.ndarray]
    opened: tuple[list[tuple[bytes, bytes]], list[tuple[bytes, bytes]]]
    seeds: Seeds
    key_bytes: tuple[int, int]

    def words(self, exchange: int = 0) -> np.ndarray:
        """The uint32 words of one opening, as both servers know them: a value plus its mask."""
        own, other = (np.frombuffer(part, np.uint32) for part in self.opened[0][exchange])
        return own + other


def simulate(
    work: Callable[[Engine, int | None], Wire], seeds: Seeds | None = None, *, program: Program | None = None,
    weights: Weights | None = None, model_seeds: Seeds | None = None,
) -> Transcript:  # fmt: skip
    """Run ``work(engine, server)`` by a dealer and in a server's preparation (``server`` None, wires hold shapes), and
    then by both servers on shares. Seeds are fresh ones; with a pair that served before, one can see why a key must
    serve once."""
    seeds, model_seeds = seeds or fresh_seeds(), model_seeds or fresh_seeds()
    keys = io.BytesIO(), io.BytesIO()
    masks = weight_masks(program.shapes if program else {}, model_seeds)
    work(Dealer(seeds, masks, lambda b, array: keys[b].write(np.ascontiguousarray(array).tobytes())), None)
    held: tuple[dict, dict] = {}, {}
    for name, (weight, bias) in (weights or {}).items():
        bits = program.fractions[name]
        parts = share(encode(weight, bits)), share(encode(bias, ACTIVATION + bits))
        for b in range(2):
            held[b][name] = parts[0][b], parts[1][b]
    lines = queue.SimpleQueue(), queue.SimpleQueue()
    opened: tuple[list, list] = [], []

    def server(b: int) -> Wire:
        def exchange(data: bytes) -> bytes:
            lines[1 - b].put(data)
            got = lines[b].get(timeout=600)
            opened[b].append((data, got))
            return got

        own = open_weights(b, held[b], model_seeds[b], exchange)
        opened[b].clear()  # what a film makes them open comes now
        end = keys[b].tell()
        keys[b].seek(0)
        engine = Preparation(b, own, Key(seeds[b], keys[b], end))
        work(engine, None)
        return work(Online(b, own, engine.ready, exchange), b)

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(server, range(2))
    return Transcript((first.share, second.share), opened, seeds, tuple(len(file.getvalue()) for file in keys))


def simulate_film(
    program: Program, weights: Weights, film: np.ndarray, seeds: Seeds | None = None, model_seeds: Seeds | None = None
) -> tuple[np.ndarray, Transcript]:
    """Logits of films [N, C, H, W] by a program on shares, and the transcript."""
    parts = share(encode(film, ACTIVATION))

    def work(engine: Engine, server: int | None) -> Wire:
        return run(program, engine, Wire(film.shape, None if server is None else parts[server]))

    found = simulate(work, seeds, program=program, weights=weights, model_seeds=model_seeds)
    return decode(found.shares[0] + found.shares[1], program.logit_fraction), found
