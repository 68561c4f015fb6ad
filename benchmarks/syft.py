"""Governed federation on PySyft: seconds of a round of three hospitals, from request to sum.

Hospitals and researcher share this machine and syft's in-memory drive; the three jobs are processes of their own, side
by side on its cores. Each trains litenet's head (7,107 numbers, features random) for ten private steps.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
# Python puts a script's folder first: this file would hide the package of its name.
sys.path[:] = [place for place in sys.path if Path(place or ".").resolve() != HERE]

import numpy as np  # noqa: E402
import torch  # noqa: E402

from primia_lite import runtime  # noqa: E402
from primia_lite.apps.bench import Options  # noqa: E402
from primia_lite.apps.syft.memory import in_memory  # noqa: E402
from primia_lite.data.films import Films  # noqa: E402
from primia_lite.federation.hospital import Hospital  # noqa: E402
from primia_lite.federation.rounds import Schedule, ServerOptimizer  # noqa: E402
from primia_lite.federation.study import Study  # noqa: E402
from primia_lite.privacy.dpsgd import Privacy  # noqa: E402
from primia_lite.privacy.ledger import Ledger  # noqa: E402
from primia_lite.secagg import Agreement  # noqa: E402
from primia_lite.training import Training  # noqa: E402

FEATURES, FILMS, ROUNDS = 2369, 300, 3


def films(seed: int) -> Films:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(FILMS, 1, FEATURES, generator=generator)
    patient = np.array([f"{seed}-{i // 2}" for i in range(FILMS)])
    return Films(inputs, torch.arange(FILMS) % 3, patient, model="litenet")


def syft_rounds_s(rounds: int = ROUNDS) -> tuple[list[float], list[float]]:
    """Seconds of each round, and of the slowest of its three jobs."""
    training, privacy = Training(local_steps=10, sample_rate=0.5), Privacy(2.0, 0.25, 1000.0)
    with tempfile.TemporaryDirectory() as folder:
        hospitals = [
            Hospital(name, films(k), lasting_ledger=Ledger(Path(folder) / f"ledger-{name}.sqlite", 1000.0, 1e-4))
            for k, name in enumerate("ABC")
        ]
        federation = in_memory(Path(folder) / "federation", hospitals, films(9))
        sites, researcher = federation.sites, federation.researcher
        keys = {name: site.public_key for name, site in sites.items()}
        sizes = {h.name: h.declared(privacy) for h in hospitals}
        study = Study("bench", "chest-xray", training, privacy, rounds, Agreement(keys, sizes, 3 * FEATURES))
        researcher.propose(study)
        federation.sync()
        for site in sites.values():
            site.approve(site.review("bench"))
        weights = ServerOptimizer.start(training, Schedule(1), (FEATURES,), 0).state
        took = []
        for number in range(1, rounds + 1):
            researcher.spans.clear()
            server = researcher.round(study, weights, number)
            if server.survivors != tuple("ABC"):
                raise RuntimeError(f"hospitals are missing: {researcher.refused}")
            took.append(max(s.end_s for s in researcher.spans) - min(s.start_s for s in researcher.spans))
        jobs = [max(site.seconds[job] for site in sites.values()) for job in sites["A"].seconds]
    return took, jobs


def syft_round_s() -> float:
    """Median seconds of a round of three hospitals."""
    return statistics.median(syft_rounds_s()[0])


def measure(rounds: int = ROUNDS) -> dict[str, dict]:
    """``syft_round_s`` and ``syft_job_s``, as entries of a results file."""
    names = ("syft_round_s", "syft_job_s")
    units = ("s a round, three hospitals on one machine", "s, the slowest of the round's three processes")
    return {
        name: {"median": statistics.median(values), "min": min(values), "max": max(values), "n": rounds, "unit": unit}
        for name, values, unit in zip(names, syft_rounds_s(rounds), units, strict=True)
    }


if __name__ == "__main__":
    Options("syft", __doc__).read()
    load = os.getloadavg() if hasattr(os, "getloadavg") else ()
    out = measure()
    for name, entry in out.items():
        print(f"{name:<14} {entry['median']:6.1f} ({entry['min']:.1f} to {entry['max']:.1f})  {entry['unit']}")
    origin = runtime.origin(
        data_source="random numbers", data_fingerprint="drawn from the seeds", seeds=[0, 1, 2],
        command="primia-lite bench syft", load_average_before=list(load),
    )  # fmt: skip
    print(f"written to {runtime.write_results('syft', origin, out).name}")
