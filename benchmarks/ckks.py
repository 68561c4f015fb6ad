"""How fast, precise and large encrypted inference is, beside TenSEAL, orion-v2 and CrypTen on the same networks.

One core, the contenders in turns, the same random networks and inputs for all of them, errors against plain float64.
TenSEAL's own tensors as its tutorials use them (`dot`, `mm`, `conv2d_im2col`, batched tensors); orion-v2 takes and
gives bytes, so its server time has reading and writing in it (ours: receive + server, and writing is in mask). CrypTen
is another kind of thing: two servers that don't talk behind the client's back share film and weights and send each
other messages, here without a network in between; it runs by itself, both parties on the one core.

Times are CPU time of the process, which on a core of one's own is what a clock on the wall shows. Other jobs on the
machine lengthen it less than they do the wall clock's, but they do (caches, shared cores): read the least, too, and the
load in the results' origin. CrypTen's is that of one party.

"server" is the product alone, without masks; "mask" is what re-randomising and masking the reply adds. "prepared" is
with what hides a reply made before the film came. Errors are before the client rounds.

Peers are no dependencies of the package: they are installed the first time, into folders of their own under the cache
(PRIMIA_LITE_CACHE). One that doesn't install or run is named with its reason.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = os.environ["GOMAXPROCS"] = "1"

import statistics
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np
import tenseal
import torch
from _ckks_contenders import CONTENDERS, Clock, Ours, Row, Sample, crypten, head, rows
from _peers import PEERS
from _service_load import load_test

from primia_lite import runtime
from primia_lite.apps.bench import Options
from primia_lite.apps.service import running
from primia_lite.config import UserError
from primia_lite.encrypted.model_card import ModelCard

# --- measuring --------------------------------------------------------------------------------------------------------


@dataclass
class Scores:
    """Of one contender on one network; a list entry for each run, ``rounds`` says in which round it was."""

    ms: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    errors: list[float] = field(default_factory=list)
    rounds: list[int] = field(default_factory=list)
    up_kib: float = 0.0
    down_kib: float = 0.0
    key_kib: float = 0.0

    def take(self, sample: Sample, plain: np.ndarray, number: int) -> None:
        for step, ms in sample.ms.items():
            self.ms[step].append(ms)
        self.errors.append(float(np.abs(sample.logits - plain).max()))
        self.rounds.append(number)
        self.up_kib, self.down_kib = sample.up / 1024, sample.down / 1024

    def by_round(self, step: str | None = None) -> list[float]:
        """Median of each round; of the errors without a step."""
        values = self.errors if step is None else self.ms[step]
        return [
            statistics.median(v for v, r in zip(values, self.rounds, strict=True) if r == number)
            for number in sorted(set(self.rounds))
        ]


def duel(row: Row, rounds: int, reasons: dict[str, str]) -> dict[str, Scores]:
    players, scores = {}, {}
    for name in row.contenders:
        try:
            players[name] = CONTENDERS[name](row)
            if name not in row.slow:
                players[name](row.film(0))  # the first run of anything is slow, by milliseconds
        except Exception as error:  # a peer may fail in any way, and the others still count
            if name.startswith("ours"):
                raise
            players.pop(name, None)
            reasons[name] = f"{type(error).__name__}: {error}"[:300]
            continue
        scores[name] = Scores(key_kib=players[name].key_kib)
    for number in range(rounds):
        for name, player in players.items():
            for repeat in range(1 if name in row.slow else 10):
                film = row.film(number * 10 + repeat)
                scores[name].take(player(film), row.plain(film), number)
    return scores


def batch_duel(features: int, rounds: int) -> dict[str, Scores]:
    """Full batches of a linear head: 2,048 films of ours, 4,096 of TenSEAL's batched tensor. ms for a film."""
    row = Row(head(features), (features,), ())
    ours, scores = Ours(row, batch_size=2048), {"ours": Scores(), "tenseal batched": Scores()}
    context = tenseal.context(tenseal.SCHEME_TYPE.CKKS, 8192, coeff_mod_bit_sizes=[40, 30, 40], n_threads=1)
    context.global_scale = 2.0**30
    weights = row.model.weight.detach().double().numpy().T
    plain_weights = tenseal.plain_tensor(weights.ravel().tolist(), list(weights.shape))
    for number in range(rounds):
        films = np.random.default_rng(number).normal(size=(4096, features))
        films /= np.linalg.norm(films, axis=1, keepdims=True)
        plain = films @ weights
        scores["ours"].take(_per_film(ours(films[:2048]), 2048), plain[:2048], number)
        values = tenseal.plain_tensor(films.ravel().tolist(), [4096, 1, features])
        clock = Clock()
        tensor = tenseal.ckks_tensor(context, values, batch=True)
        ms = {"encrypt": clock()}
        out = tensor.mm(plain_weights)
        ms["server"] = clock()
        logits = np.array(out.decrypt().raw).reshape(4096, -1)
        ms["decrypt"] = clock()
        sample = Sample(ms, logits, len(tensor.serialize()), len(out.serialize()))
        scores["tenseal batched"].take(_per_film(sample, 4096), plain, number)
    return scores


def batch_network(row: Row) -> dict[str, Scores]:
    """Once: a batch of the tutorial's network. ms for a film."""
    ours, scores = Ours(row, batch_size=4096), Scores()
    films = np.stack([row.film(n) for n in range(4096)])
    with torch.no_grad():
        plain = row.model.double()(torch.from_numpy(films)[:, None]).numpy()
    scores.take(_per_film(ours(films), 4096), plain, 0)
    return {"ours": scores}


def _per_film(sample: Sample, films: int) -> Sample:
    ms = {step: value / films for step, value in sample.ms.items()}
    return Sample(ms, sample.logits, sample.up / films, sample.down / films)


def service(requests: int, features: int = 1280, label: str = "service") -> dict[str, dict]:
    """p50 and p99 of the service as another process: eight clients, a linear head, masks, no limits. What is sent is
    encrypted beforehand."""
    card = ModelCard("litenet", {}, ("a", "b", "c"), 64, (features,), head(features).state_dict(), "random weights")
    with running({"head": card}, limits=False) as (url, process):
        load_test(url, requests=min(200, requests))
        alone = load_test(url, clients=1, requests=min(200, requests))
        found = load_test(url, clients=8, requests=requests, pid=process.pid)
    plain = found["films"] @ card.state["weight"].double().numpy().T
    if found["errors"] or np.abs(found["logits"] - plain).max() > 1e-3:
        raise UserError(f"the service failed: {(found['errors'] or ['wrong logits'])[0]}")
    ms, rss = found["ms"], found["rss_mib"]
    unit = f"ms, {features:,} features, 8 clients at once, masks included, no limits, all on {runtime.cores()} cores"
    rows = {
        f"{label}_p{share}_ms": {"median": float(np.percentile(ms, share)), "n": requests, "unit": unit}
        for share in (50, 99)
    }
    rows[f"{label}_one_client_p50_ms"] = {
        "median": float(np.percentile(alone["ms"], 50)), "n": len(alone["ms"]), "unit": "ms, 1 client",
    }  # fmt: skip
    rows[f"{label}_errors"] = {"median": float(len(found["errors"])), "n": requests, "unit": "requests"}
    rows[f"{label}_memory_growth_mib"] = {
        "median": rss[-1] - rss[0], "n": requests, "unit": f"MiB of service and workers, from {rss[0]:.0f}",
    }  # fmt: skip
    return rows


# --- results ----------------------------------------------------------------------------------------------------------


def spread(values: list[float], unit: str) -> dict:
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "n": len(values), "unit": unit}


def ratios(above: list[float], below: list[float], unit: str) -> dict:
    return spread([a / b for a, b in zip(above, below, strict=True)], unit)


def metrics(found: dict[str, dict[str, Scores]]) -> dict[str, dict]:
    out = {}
    linear, quadratic, tutorial = (found.get(name, {}) for name in ("linear_1280", "quadratic", "tutorial"))
    if linear:
        ms = linear["ours"].ms
        out["linear_head_server_ms"] = spread(ms["server"], "ms, product only, 1,280 features")
        out["linear_head_masked_ms"] = spread(ms["masked"], "ms, product, fresh mask and re-randomisation")
        out["linear_head_end_to_end_ms"] = spread(ms["end to end"], "ms, encrypt to decrypt in process")
        out["linear_head_upload_kib"] = spread([linear["ours"].up_kib], "KiB")
        ready = linear["ours prepared"].ms
        out["linear_head_masked_prepared_ms"] = spread(ready["masked"], "ms, re-randomisation and mask made before")
        out["linear_head_end_to_end_prepared_ms"] = spread(ready["end to end"], "ms, the same")
    if quadratic:
        out["quadratic_cnn_server_ms"] = spread(quadratic["ours"].ms["server"], "ms, 64 px, kernel 8, stride 8")
    if "tenseal" in tutorial:
        theirs, ours = tutorial["tenseal"], tutorial["ours"]
        unit = "server time, TenSEAL's tutorial / ours, median of each round"
        out["speedup_tutorial_network"] = ratios(theirs.by_round("server"), ours.by_round("server"), unit)
        out["speedup_tutorial_network_masked"] = ratios(
            theirs.by_round("server"), ours.by_round("masked"), f"{unit}, ours with mask"
        )
        out["error_ratio_tutorial_network"] = ratios(
            theirs.by_round(), ours.by_round(), "largest error of a logit, TenSEAL's tutorial / ours, before rounding"
        )
    if "batch" in found:
        theirs, ours = found["batch"]["tenseal batched"], found["batch"]["ours"]
        out["speedup_batch_per_film"] = ratios(
            theirs.by_round("server"), ours.by_round("server"), "server time of a film, TenSEAL's batched tensor / ours"
        )
    for name, scores in found.items():
        for contender, s in scores.items():
            label = f"{name}_{contender.replace(' ', '_')}"
            each = ", for a film of a full batch" if name.startswith("batch") else ""
            for step, values in s.ms.items():
                out[f"{step.replace(',', '').replace(' ', '_')}_{label}_ms"] = spread(
                    values, f"ms{each}" if "wall" in step else f"ms of CPU time{each}"
                )
            out[f"error_{label}"] = spread(s.errors, "largest error of a logit")
            out[f"upload_{label}_kib"] = spread([s.up_kib], f"KiB{each}")
            out[f"reply_{label}_kib"] = spread([s.down_kib], f"KiB{each}")
            if s.key_kib:
                out[f"keys_{label}_kib"] = spread([s.key_kib], "KiB, once for a session")
    return out


def table(found: dict[str, dict[str, Scores]]) -> str:
    steps = ("encrypt", "receive", "server", "mask", "decrypt")
    head = f"{'network':<22}{'who':<17}" + "".join(f"{step:>10}" for step in steps)
    lines = ["median ms; of a batch: for a film", f"{head}{'error':>10}{'KiB up':>9}{'KiB down':>9}   n"]
    for name, scores in found.items():
        for contender, s in scores.items():
            times = "".join(f"{statistics.median(s.ms[k]):>10.3f}" if k in s.ms else f"{'':>10}" for k in steps)
            lines.append(
                f"{name:<22}{contender:<17}{times}{statistics.median(s.errors):>10.1e}{s.up_kib:>9.1f}{s.down_kib:>9.1f}"
                f"{len(s.errors):>4}"
            )
    return "\n".join(lines)


def main() -> None:
    parser = Options("ckks", __doc__)
    known = rows()
    parser.add_argument("--rounds", type=int, default=5, help="of each network (default 5)")
    parser.add_argument("--rows", nargs="+", choices=[*known, "batch"], default=[*known, "batch"], help="default all")
    parser.add_argument("--requests", type=int, default=10_000, help="to the service (default 10000)")
    parser.add_argument("--quick", action="store_true", help="one round, a small batch, no results file")
    options = parser.read()
    if min(options.rounds, options.requests) < 1:
        parser.error("--rounds and --requests must be at least 1")
    rounds, reasons, found, core = 1 if options.quick else options.rounds, {}, {}, None
    cores, load = runtime.cores(), os.getloadavg() if hasattr(os, "getloadavg") else ()
    # Before, for it takes both cores. The second is litenet's head as it is.
    requests = 100 if options.quick else options.requests
    service_metrics = service(requests) | service(max(1, requests // 5), 2369, "service_litenet")
    if hasattr(os, "sched_setaffinity"):
        core = max(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {core})  # threads and processes that are started from here on stay there, too
    torch.set_num_threads(1)
    started = time.perf_counter()
    for name in options.rows:
        if name == "batch":
            found["batch"] = batch_duel(64 if options.quick else 1280, min(rounds, 3))
            if not options.quick:
                found["batch_tutorial"] = batch_network(known["tutorial"])
        else:
            found[name] = duel(known[name], rounds, reasons_of := {})
            reasons |= {f"{who}, {name}": why for who, why in reasons_of.items()}
            if known[name].crypten:
                try:
                    there = crypten(known[name], 3 * rounds)
                    found[name]["crypten"] = Scores(
                        {"server": there["ms"]}, [there["error"]], [0], there["kib"], there["kib"]
                    )
                except (UserError, subprocess.TimeoutExpired, ValueError) as error:
                    reasons[f"crypten, {name}"] = str(error)[:300]
        print(f"{name}: done after {time.perf_counter() - started:.0f} s\n{table({name: found[name]})}", flush=True)
    out = metrics(found) | service_metrics
    print(f"\n{table(found)}\n")
    for name in ("speedup_tutorial_network", "error_ratio_tutorial_network", "linear_head_server_ms",
                 "linear_head_masked_ms", "linear_head_end_to_end_ms", "linear_head_upload_kib",
                 "quadratic_cnn_server_ms", "speedup_batch_per_film", "service_p50_ms", "service_p99_ms"):  # fmt: skip
        if name in out:
            print(f"{name:<30} {out[name]['median']:10.3f}  {out[name]['unit']}")
    for who, why in reasons.items():
        print(f"{who}: {why}")
    if options.quick or set(options.rows) != {*known, "batch"}:
        print("no results file: a part only")
        return
    origin = runtime.origin(
        data_source="random numbers", data_fingerprint="drawn from the seeds", seeds=list(range(10 * rounds)),
        command=" ".join(["primia-lite bench ckks", *sys.argv[1:]]), threads=1, core=core, cores_there=cores,
        load_average_before=list(load), load_average_after=list(os.getloadavg()) if load else [],
        peers=[f"tenseal=={tenseal.__version__}", *(p for wanted in PEERS.values() for p in wanted)],
        peers_that_failed=reasons, crypten="two parties on one core, run by itself; KiB that each party sends",
    )  # fmt: skip
    path = runtime.write_results("ckks", origin, out)
    print(f"written to {path.name}")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
