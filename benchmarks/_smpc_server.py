"""A server's part of ``primia-lite bench smpc``, in a process of its own that imports what a server needs."""

from __future__ import annotations

import resource
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from primia_lite.smpc.engines import Online, Preparation, Wire, open_weights
from primia_lite.smpc.keys import Key
from primia_lite.smpc.program import Program, run


def server(b: int, pipe, peer, text: str, weights, model_seed: bytes, keys: Path, seed: bytes, film) -> None:
    """Sends logits and costs of one inference through ``pipe``."""
    torch.set_num_threads(1)
    program, pool, sent = Program.from_json(text), ThreadPoolExecutor(1), [0, 0]

    def exchange(data: bytes) -> bytes:
        sending = pool.submit(peer.send_bytes, data)
        got = peer.recv_bytes()
        sending.result()
        sent[0], sent[1] = sent[0] + len(data), sent[1] + 1
        return got

    own = open_weights(b, weights, model_seed, exchange)
    sent[:] = 0, 0
    marks = [time.process_time()]
    engine = Preparation(b, own, Key(seed, keys.open("rb"), keys.stat().st_size))
    run(program, engine, Wire(film.shape))
    marks.append(time.process_time())
    exchange(b"ready")
    sent[:] = 0, 0
    began = time.perf_counter()
    logits = run(program, Online(b, own, engine.ready, exchange), Wire(film.shape, film)).share
    pipe.send({
        "logits": logits, "preparation": marks[1] - marks[0], "online": time.process_time() - marks[1],
        "wall": time.perf_counter() - began, "bytes": sent[0], "rounds": sent[1],
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    })  # fmt: skip
