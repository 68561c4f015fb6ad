"""What secure aggregation costs: hospital, server, bytes; beside a plain mean, CKKS and Flower's SecAgg+; as n grows.

Four ways to the same mean of the same three vectors of 11 million float32, in turns, in one process on one thread:
FedAvg's mean in the clear, ours, CKKS under TenSEAL, and Flower's SecAgg+ (flwr 1.41.0, its own code; no transport).
Threshold 2 of 3 and a clip of 8 for those who have them; Flower quantises to 22 bits of 32, its default, ours to 31.
Times are CPU time of the process, by party; a hospital's has all its steps in it, bytes out included, the server's
bytes in. Long-lived keys are made before: Ed25519 identities here, the CKKS key.

Then a round of a hundred hospitals with a million parameters, all parties in one process one after the other; and one
hospital and the server by themselves as hospitals become 1,000. There the others' messages are real (keys, shares,
signatures), but they check nothing and their vectors are zeros without a mask: the hospital's and the server's work is
what it is in earnest, only the sum is of no use. Last a law on paper: operations counted, times what each takes here.

Rounds of PySyft and Flower over TLS come from syft.py and flower.py of this folder. What is missing is named, and left
out of the results.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"

import importlib.util
import itertools
import random
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from unittest import mock

import _secaggplus
import numpy as np
import tenseal
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from primia_lite import runtime, secagg
from primia_lite.apps.bench import Options
from primia_lite.config import UserError
from primia_lite.encrypted import encrypted_sum as ckks_sum
from primia_lite.encrypted.keys import SecretKey
from primia_lite.encrypted.seal import Context
from primia_lite.federation.aggregation import WeightedMean
from primia_lite.federation.hospital import Update
from primia_lite.secagg import shares as shamir
from primia_lite.secagg.fixed_point import FixedPoint
from primia_lite.secagg.graph import COMPLETE_UP_TO, choose_degree
from primia_lite.secagg.masks import add_masks

HERE = Path(__file__).resolve().parent
SIZES, CLIP = {"a": 100, "b": 220, "c": 50}, _secaggplus.SETTINGS["clipping_range"]
GROWTH, GONE, FAR = (3, 10, 30, 100, 300, 1000), 0.1, (1_000, 10_000, 100_000)
FLOWER_PART = "flower_secaggplus"


class Meter:
    """CPU seconds and bytes sent, by party; seconds on the wall of all of them, who work one after the other."""

    def __init__(self):
        self.cpu, self.bytes = defaultdict(float), defaultdict(int)
        self.wall, self.error, self._inside = 0.0, 0.0, []

    @contextmanager
    def of(self, party: str) -> Iterator[None]:
        """Where one party's work calls another's, each has its own."""
        self._inside.append(0.0)
        started = time.process_time(), time.perf_counter()
        yield
        cpu = time.process_time() - started[0]
        self.cpu[party] += cpu - self._inside.pop()
        if self._inside:
            self._inside[-1] += cpu
        else:
            self.wall += time.perf_counter() - started[1]

    def each(self, party: str, things: Iterable) -> Iterator:
        """As they come, with the time that each takes."""
        things = iter(things)
        while True:
            with self.of(party):
                thing = next(things, None)
            if thing is None:
                return
            yield thing

    @property
    def total(self) -> float:
        return sum(self.cpu.values())

    @property
    def hospital(self) -> float:
        """The one that took most."""
        return max(seconds for party, seconds in self.cpu.items() if party not in ("server", "decrypting"))


# --- four ways to a mean ----------------------------------------------------------------------------------------------


def plain(vectors: dict[str, np.ndarray], meter: Meter) -> np.ndarray:
    came = {}
    for name, vector in vectors.items():
        with meter.of(name):
            came[name] = vector.tobytes()
        meter.bytes[name] += len(came[name])
    with meter.of("server"):
        ask = {
            name: lambda data=data: Update({"w": torch.frombuffer(bytearray(data), dtype=torch.float32)}, 1, False)
            for name, data in came.items()
        }
        like = {"w": torch.zeros(len(next(iter(vectors.values()))))}
        return WeightedMean().aggregate(ask, SIZES, like, 1).value["w"].numpy()


class Ours:
    """Rounds of :mod:`primia_lite.secagg`."""

    def __init__(self, sizes: dict[str, int], length: int, threshold: int | None = None):
        self.identities = identities = {name: Ed25519PrivateKey.generate() for name in sizes}
        public = {name: key.public_key().public_bytes_raw() for name, key in identities.items()}
        self.agreement = secagg.Agreement(public, sizes, length, CLIP, threshold)
        self.clients = {name: secagg.SecAggClient(name, key, self.agreement) for name, key in identities.items()}
        self.session, self.server = 0, None

    def __call__(self, vectors: dict[str, np.ndarray], meter: Meter) -> np.ndarray:
        self.session += 1
        self.server = server = secagg.SecAggServer(self.agreement, self.session)
        while server.step is not None:
            with meter.of("server"):
                requests = server.requests()
            for name, request in requests.items():
                with meter.of(name):
                    data = self.clients[name].answer(request, lambda name=name: vectors[name]).to_bytes()
                meter.bytes[name] += len(data)
                with meter.of("server"):
                    server.receive(secagg.Reply.from_bytes(data))
            with meter.of("server"):
                server.close()
        with meter.of("server"):
            return server.mean


class Ckks:
    """Rounds of :mod:`primia_lite.encrypted.encrypted_sum`. The mean's decryption counts as "decrypting"."""

    def __init__(self, length: int):
        self.terms = ckks_sum.Terms(SIZES, length, CLIP)
        key = SecretKey(Context(ckks_sum.PARAMETERS))
        self.hospitals = {name: ckks_sum.SumHospital(name, key, self.terms) for name in SIZES}
        self.session = 0

    def __call__(self, vectors: dict[str, np.ndarray], meter: Meter) -> np.ndarray:
        self.session += 1
        with meter.of("server"):
            server = ckks_sum.SumServer(self.terms, self.session)
        for name, hospital in self.hospitals.items():
            with meter.of(name):
                coming = hospital.encrypt(self.session, lambda name=name: vectors[name])
            for data in meter.each(name, coming):
                meter.bytes[name] += len(data)
                with meter.of("server"):
                    server.receive(name, data)
        with meter.of("server"):
            sums = list(server.sums())
        meter.bytes["sums"] = sum(map(len, sums))
        coming = self.hospitals["a"].decrypt(self.session, server.survivors, sums)
        parts = list(meter.each("decrypting", coming))
        with meter.of("server"):
            return server.finish(parts)


def flower(vectors: dict[str, np.ndarray], meter: Meter) -> np.ndarray:
    ids = {1000 + i: name for i, name in enumerate(vectors)}

    def client(node, call):
        with meter.of(ids[node]):
            return call()

    def server(call):
        with meter.of("server"):
            call()

    by_id = {i: vectors[name] for i, name in ids.items()}
    mean, sent = _secaggplus.round_of(by_id, {i: SIZES[name] for i, name in ids.items()}, 2, client, server)
    for i, count in sent.items():
        meter.bytes[ids[i]] += count
    return mean


def duel(length: int, rounds: int, ckks_rounds: int, left_out: dict[str, str]) -> dict[str, list[Meter]]:
    """Meters of each way, a round of each in turns."""
    rng = np.random.default_rng(0)
    vectors = {name: 0.01 * rng.standard_normal(length, np.float32) for name in SIZES}
    exact = sum(SIZES[name] / sum(SIZES.values()) * vector.astype(np.float64) for name, vector in vectors.items())
    ways = {"plain": plain, "secagg": Ours(SIZES, length, 2), "ckks": Ckks(length), FLOWER_PART: flower}
    try:
        _secaggplus.check()
    except UserError as error:
        left_out[FLOWER_PART] = str(error)
        del ways[FLOWER_PART]
    else:
        flower({name: vector[:1000] for name, vector in vectors.items()}, Meter())  # imports
    found: dict[str, list[Meter]] = defaultdict(list)
    for number in range(rounds):
        for name, way in ways.items():
            if name == "ckks" and number >= ckks_rounds:
                continue
            meter = Meter()
            mean = way(vectors, meter)
            meter.error = float(np.abs(mean - exact).max())
            # Nobody may be quick by being wrong: rounding to 22 bits of the range here, flooding there.
            if not meter.error < 1e-4:
                raise UserError(f"{name} is {meter.error:.1e} off the mean")
            found[name].append(meter)
            print(f"  {name}: {meter.total:.2f} CPU s, {meter.wall:.2f} s, {meter.error:.1e} off", flush=True)
    return found


def duel_metrics(found: dict[str, list[Meter]], length: int) -> dict[str, dict]:
    out, millions = {}, f"3 hospitals, {length:,} parameters"
    for way, meters in found.items():
        unit = f"CPU s a round, {way}, {millions}"
        out[f"{way}_total_cpu_s"] = spread([m.total for m in meters], f"{unit}, all parties")
        out[f"{way}_total_s"] = spread([m.wall for m in meters], f"s a round, {way}, {millions}, all parties")
        out[f"{way}_hospital_cpu_s"] = spread([m.hospital for m in meters], f"{unit}, the hospital that took most")
        out[f"{way}_server_cpu_s"] = spread([m.cpu["server"] for m in meters], f"{unit}, server")
        out[f"{way}_hospital_bytes"] = spread([max(m.bytes[h] for h in SIZES) for m in meters], "bytes one sends")
        out[f"{way}_bytes_ratio"] = spread(
            [max(m.bytes[h] for h in SIZES) / (4 * length) for m in meters], "bytes one hospital sends / float32's"
        )
        out[f"{way}_error"] = spread([m.error for m in meters], "largest difference to the mean in float64")
    ours = found["secagg"]
    out["hospital_cpu_s_11m"], out["server_cpu_s_11m"] = out["secagg_hospital_cpu_s"], out["secagg_server_cpu_s"]
    out["bytes_ratio_to_float32"] = out["secagg_bytes_ratio"]
    if "ckks" in found:
        meters = found["ckks"]
        out["ckks_decrypting_cpu_s"] = spread([m.cpu["decrypting"] for m in meters], "CPU s of the one that decrypts")
        out["ckks_sums_bytes"] = spread([m.bytes["sums"] for m in meters], "bytes to the one that decrypts")
    for way, name in (("plain", "secagg_cpu_over_plain"), ("ckks", "speedup_over_ckks"),
                      (FLOWER_PART, "speedup_over_flower_secaggplus")):  # fmt: skip
        pairs = list(zip(found.get(way, []), ours, strict=False))
        if pairs:
            values = [m.total / o.total for m, o in pairs]
            out[name] = spread(
                [1 / v for v in values] if way == "plain" else values,
                "CPU s of a round, all parties: " + ("ours / plain" if way == "plain" else f"{way} / ours"),
            )
    if FLOWER_PART in found:
        out["speedup_over_flower_secaggplus_wall"] = spread(
            [m.wall / o.wall for m, o in zip(found[FLOWER_PART], ours, strict=True)], "the same, s on the wall"
        )
    return out


# --- a hundred hospitals ----------------------------------------------------------------------------------------------


def crowd(hospitals: int, length: int, repeats: int) -> dict[str, dict]:
    names = {f"h{i:03}": 50 + i for i in range(hospitals)}
    # Different stretches of one vector: no memory for a hundred.
    base = 0.01 * np.random.default_rng(1).standard_normal(length + hospitals, np.float32)
    vectors = {name: base[i : i + length] for i, name in enumerate(names)}
    ours, meters = Ours(names, length), []
    for _ in range(repeats):
        meter = Meter()
        ours(vectors, meter)
        meters.append(meter)
        print(f"  {hospitals} hospitals: {meter.wall:.1f} s, {meter.total:.1f} CPU s", flush=True)
    expected = np.zeros(length, np.uint32)
    for name, vector in vectors.items():
        expected += ours.agreement.fixed_point.quantise(vector, ours.agreement.weight(name))
    if not np.array_equal(ours.server.total, expected.view(np.int32)):
        raise UserError("the unmasked sum isn't the sum of what hospitals quantised")
    what = f"{hospitals} hospitals, {length:,} parameters, each sharing masks with all"
    return {
        "round_100x1m_s": spread([m.wall for m in meters], f"s a round, all parties one after the other, {what}"),
        "round_100x1m_hospital_cpu_s": spread([m.hospital for m in meters], "CPU s of the hospital that took most"),
        "round_100x1m_server_cpu_s": spread([m.cpu["server"] for m in meters], "CPU s of the server"),
        "round_100x1m_bytes_ratio": spread(
            [max(m.bytes.values()) / (4 * length) for m in meters], "bytes one hospital sends / float32's"
        ),
    }


# --- one hospital and the server, as hospitals become many ------------------------------------------------------------


class Unsealed:
    """In place of a cipher between two of the others: of the same length."""

    def encrypt(self, nonce: bytes, content: bytes, more: None) -> bytes:
        return content + bytes(16)

    def decrypt(self, nonce: bytes, content: bytes, more: None) -> bytes:
        return content[:-16]


@contextmanager
def light(memo: dict, zeros: np.ndarray, real: str) -> Iterator[None]:
    """The others' side without what neither the server nor the real hospital sees: checks of signatures, masks, and
    sealing among themselves. The graph, what was advertised, and what is relayed, are the same for all of them."""
    relayed, cipher = secagg.messages.relayed_reply, secagg.SecAggClient.cipher

    def read(text: str) -> secagg.Reply:
        if text not in memo:
            memo[text] = relayed(text)
        return memo[text]

    def once(name: str, function: Callable) -> Callable:
        def call(*arguments):
            if name not in memo:
                memo[name] = function(*arguments)
            return memo[name]

        return call

    changes = (
        (secagg.client, "advertised_keys", once("advertised", secagg.messages.advertised_keys)),
        (secagg.Agreement, "neighbours", once("neighbours", secagg.Agreement.neighbours)),
        (secagg.client, "relayed_reply", read),
        (secagg.SecAggClient, "cipher", lambda self, *pair: cipher(self, *pair) if real in pair else Unsealed()),
        (secagg.Reply, "check", lambda self, *_: self),
        (secagg.client, "mask_seed", lambda *_: b""),
        (secagg.client, "add_masks", lambda *_: None),
        (FixedPoint, "quantise", lambda *_: zeros),
    )
    with ExitStack() as stack:
        for place, name, change in changes:
            stack.enter_context(mock.patch.object(place, name, change))
        yield


def alone(hospitals: int, length: int, gone: int) -> Meter:
    """A round in which the first hospital and the server do all their work; ``gone`` of the others vanish after they
    have handed out shares."""
    names = {f"h{i:04}": 100 for i in range(hospitals)}
    ours, meter, memo = Ours(names, length), Meter(), {}
    real, *others = names
    away = set(random.Random(0).sample(others, gone))
    vector = 0.01 * np.random.default_rng(2).standard_normal(length, np.float32)
    zeros = np.zeros(length, np.uint32)
    server = secagg.SecAggServer(ours.agreement, 1)
    while server.step is not None:
        with meter.of("server"):
            requests = server.requests()
        for name, request in requests.items():
            if server.step == "mask" and name in away:
                continue
            if name == real:
                with meter.of(real):
                    data = ours.clients[name].answer(request, lambda: vector).to_bytes()
                meter.bytes[real] += len(data)
                meter.bytes["to the hospital"] += len(request)
                with meter.of("server"):
                    server.receive(secagg.Reply.from_bytes(data))
            else:
                with light(memo, zeros, real):
                    reply = ours.clients[name].answer(request, lambda: vector)
                with meter.of("server"):
                    server.receive(reply)
        with meter.of("server"):
            server.close()
    with meter.of("server"):
        _ = server.mean
    return meter


def growth(hospitals: Iterable[int], length: int) -> tuple[dict[str, dict], dict[int, dict[str, Meter]]]:
    out, meters = {}, {}
    for n in hospitals:
        gone = {"": 0, "_dropouts": max(1, round(GONE * n))}
        meters[n] = {label: alone(n, length, count) for label, count in gone.items()}
        for label, meter in meters[n].items():
            what = f"CPU s, {n} hospitals, {length:,} parameters" + (f", {gone[label]} vanish" if label else "")
            out[f"growth_hospital_cpu_s_{n}{label}"] = spread([meter.hospital], f"{what}, one hospital")
            out[f"growth_server_cpu_s_{n}{label}"] = spread([meter.cpu["server"]], f"{what}, server")
            print(f"  {what}: {meter.hospital:.3f} a hospital, {meter.cpu['server']:.2f} the server", flush=True)
        meter = meters[n][""]
        sent = meter.bytes["h0000"] / (4 * length)
        out[f"growth_bytes_ratio_{n}"] = spread([sent], "bytes one hospital sends / float32's")
        out[f"growth_received_kib_{n}"] = spread([meter.bytes["to the hospital"] / 1024], "KiB one hospital is sent")
    return out, meters


def degree(n: int) -> tuple[int, int]:
    """Neighbours, and shares that give a secret, by default."""
    return (n - 1, -(-2 * n // 3)) if n <= COMPLETE_UP_TO else choose_degree(n)


class Law:
    """CPU seconds of a hospital and of the server from counts of operations and what each takes on this machine.

    With n hospitals, k neighbours, t shares to a secret, L parameters, g hospitals that vanish after sharing:

    - a hospital: L (k + 1) masks, and L once to quantise, hash and copy; 3 k key exchanges (to seal shares, to open
      them, for masks); 2 secrets split among k + 1; 2 n signatures checked (advertise, confirm); n k to draw the graph;
    - the server: L (n + g k) masks, L n to add and hash; n of each step's signatures, those over k shares the longest;
      2 n trials of keys; n secrets from t shares; g k exchanges; n k to draw the graph.
    """

    def __init__(self, length: int = 1_000_000, n: int = 300):
        seeds = [(os.urandom(32), 1 - 2 * (i % 2)) for i in range(10)]
        vector, values = np.zeros(length, np.uint32), np.zeros(length, np.float32)
        ours = Ours({f"h{i:04}": 100 for i in range(n)}, length)
        self.agreement, k = ours.agreement, ours.agreement.degree
        ask = secagg.request("advertise", 1)
        replies = {name: client.answer(ask, lambda: values) for name, client in ours.clients.items()}
        advertised = secagg.messages.advertised_keys(
            [r.split()[0].decode() for r in replies.values()], self.agreement, 1
        )
        client = ours.clients["h0000"]
        client.secrets.advertised = advertised
        reply = replies["h0001"]
        self.identity, self.text = ours.identities["h0000"], reply.split()[0].decode()
        masked = secagg.Reply("h0000", 1, "mask", {}, b"", vector)
        point = FixedPoint(CLIP, n)
        self.mask = usual(lambda: add_masks(vector, seeds)) / (10 * length)
        self.hash = usual(lambda: masked.signed(self.agreement)) / length
        self.quantise = usual(lambda: point.quantise(values, 0.1)) / length
        self.copy = usual(masked.to_bytes) / length
        self.add = usual(lambda: np.add(vector, vector, out=vector)) / length
        self.verify = usual(lambda: secagg.messages.relayed_reply(self.text).check(self.agreement, 1, "advertise"))
        self.exchange = usual(lambda: client.cipher("h0000", "h0001").encrypt(bytes(12), bytes(132), None))
        self.graph = usual(lambda: self.agreement.neighbours(advertised)) / (n * k)
        # Each timed once, so that one n has one law.
        self._shares, self._split, self._combine = map(cache, (self._shares, self._split, self._combine))

    def _shares(self, k: int) -> float:
        """Seconds to take a message of k sealed shares."""
        sealed = {f"h{i:04}": secagg.messages.encode(bytes(secagg.keys.SEALED)) for i in range(k)}
        reply = secagg.Reply("h0000", 1, "share", {"shares": sealed, "commitment": ""})
        signature = self.identity.sign(reply.signed(self.agreement))
        signed = secagg.Reply(reply.sender, 1, "share", reply.body, signature)
        return usual(lambda: signed.check(self.agreement, 1, "share"))

    def _split(self, k: int, t: int) -> float:
        """Seconds to split a secret among k + 1."""
        return usual(lambda: shamir.split(bytes(32), t, range(1, k + 2)))

    def _combine(self, n: int) -> float:
        """Seconds to have a secret back."""
        k, t = degree(n)
        shares, turn = shamir.split(os.urandom(32), t, range(1, 2000)), itertools.count(1)

        def combine():
            # In a graph all have other neighbours, so Lagrange's coefficients are computed for each anew.
            first = next(turn) if k < n - 1 else 1
            shamir.combine({point: shares[point] for point in range(first, first + t)}, t)

        return usual(combine)

    def hospital(self, n: int, length: int) -> float:
        k, t = degree(n)
        each = (k + 1) * self.mask + self.quantise + self.hash + self.copy
        return length * each + 3 * k * self.exchange + 2 * self._split(k, t) + 2 * n * self.verify + n * k * self.graph

    def server(self, n: int, length: int, gone: int) -> float:
        k, _ = degree(n)
        stay = n - gone
        masks = stay + gone * k * stay / n
        return (
            length * (masks * self.mask + stay * (self.add + self.hash))
            + 3 * n * self.verify + 2 * n * self._shares(k) + n * self._combine(n)
            + (2 * n + gone * k) * self.exchange + n * k * self.graph
        )  # fmt: skip

    def metrics(self, meters: dict[int, dict[str, Meter]], length: int) -> dict[str, dict]:
        out = {
            f"law_{name}_{unit}": spread([getattr(self, name) * factor], what)
            for name, unit, factor, what in (
                ("mask", "ns", 1e9, "ns an entry and mask"), ("hash", "ns", 1e9, "ns an entry to hash and sign"),
                ("quantise", "ns", 1e9, "ns an entry"), ("add", "ns", 1e9, "ns an entry at the server"),
                ("copy", "ns", 1e9, "ns an entry to write the message"),
                ("verify", "us", 1e6, "us a signature"), ("exchange", "us", 1e6, "us a key exchange"),
                ("graph", "ns", 1e9, "ns an edge, to draw who shares with whom"),
            )
        }  # fmt: skip
        for n, found in meters.items():
            for label, meter in found.items():
                gone = max(1, round(GONE * n)) if label else 0
                both = (self.hospital(n, length) / meter.hospital, self.server(n, length, gone) / meter.cpu["server"])
                for party, value in zip(("hospital", "server"), both, strict=True):
                    out[f"law_over_measured_{party}_{n}{label}"] = spread([value], "CPU s by the law / measured")
        for n in FAR:
            k, t = degree(n)
            what = f"CPU s by the law, {n:,} hospitals, {length:,} parameters, {k} neighbours, {t} shares"
            out[f"law_hospital_cpu_s_{n}"] = spread([self.hospital(n, length)], what)
            for label, gone in (("", 0), ("_dropouts", round(GONE * n))):
                out[f"law_server_cpu_s_{n}{label}"] = spread(
                    [self.server(n, length, gone)], what + (f", {gone:,} vanish" if gone else "")
                )
        return out


def usual(call: Callable[[], object], least_s: float = 0.02) -> float:
    """CPU seconds of a call, median of five turns of calls."""
    call()
    calls, times = 1, []
    while len(times) < 5:
        started = time.process_time()
        for _ in range(calls):
            call()
        took = time.process_time() - started
        if took < least_s and not times:
            calls *= 2
            continue
        times.append(took / calls)
    return statistics.median(times)


# --- results ----------------------------------------------------------------------------------------------------------


def spread(values: list[float], unit: str) -> dict:
    values = [float(v) for v in values]
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "n": len(values), "unit": unit}


def other(name: str, wanted: str, left_out: dict[str, str]) -> dict[str, dict]:
    """Metrics from ``<name>.py`` in this folder: its ``measure()`` returns entries of a results file by name."""
    path = HERE / f"{name}.py"
    try:
        if not path.exists():
            raise UserError(f"benchmarks/{name}.py is missing")
        # By path, under another name: ``import syft`` in there is to find the package.
        spec = importlib.util.spec_from_file_location(f"bench_{name}", path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        found = module.measure()
        if wanted not in found:
            raise UserError(f"benchmarks/{name}.py measured {sorted(found)}, not {wanted}")
        return found
    except (UserError, ImportError) as error:
        left_out[wanted] = str(error)
        return {}


PARTS = ("duel", "crowd", "growth", "syft", "flower")
HEADLINES = (
    "hospital_cpu_s_11m", "server_cpu_s_11m", "bytes_ratio_to_float32", "speedup_over_flower_secaggplus",
    "speedup_over_flower_secaggplus_wall", "speedup_over_ckks", "secagg_cpu_over_plain", "secagg_total_s",
    "flower_secaggplus_total_s", "ckks_total_s", "ckks_bytes_ratio", "flower_secaggplus_bytes_ratio",
    "round_100x1m_s", "syft_round_s", "flower_tls_round_s",
)  # fmt: skip


def main() -> None:
    parser = Options("secagg", __doc__)
    parser.add_argument("--rounds", type=int, default=7, help="of each way in the duel (default 7; CKKS at most 3)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="default all; else no results file")
    parser.add_argument("--quick", action="store_true", help="short vectors, few hospitals, no results file")
    options = parser.read()
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")
    # Python puts a script's folder first: syft.py in there would hide the package.
    sys.path[:] = [place for place in sys.path if Path(place or ".").resolve() != HERE]
    torch.set_num_threads(1)
    load = os.getloadavg() if hasattr(os, "getloadavg") else ()
    length, crowd_size, many, few = 11_000_000, (100, 1_000_000), 1_000_000, GROWTH
    if options.quick:
        length, crowd_size, many, few = 200_000, (20, 50_000), 50_000, GROWTH[:4]
    left_out: dict[str, str] = {}
    out: dict[str, dict] = {}
    for part in (p for p in PARTS if p in options.parts):
        print(f"== {part}", flush=True)
        if part == "duel":
            rounds = 1 if options.quick else options.rounds
            out |= duel_metrics(duel(length, rounds, min(rounds, 3), left_out), length)
        elif part == "crowd":
            out |= crowd(*crowd_size, repeats=1 if options.quick else 2)
        elif part == "growth":
            rows, meters = growth(few, many)
            out |= rows | Law(many).metrics(meters, many)
        else:
            out |= other(part, {"syft": "syft_round_s", "flower": "flower_tls_round_s"}[part], left_out)
    for name in HEADLINES if len(options.parts) == len(PARTS) else out:
        if name in out:
            print(f"{name:<40} {out[name]['median']:12.4g}  {out[name]['unit']}")
    for name, why in left_out.items():
        print(f"left out, so results are incomplete: {name}: {why}")
    if options.quick or set(options.parts) != set(PARTS):
        print("no results file: a part only")
        return
    origin = runtime.origin(
        data_source="random numbers", data_fingerprint="drawn from the seeds", seeds=[0, 1, 2],
        command=" ".join(["primia-lite bench secagg", *sys.argv[1:]]), threads=1, left_out=left_out,
        load_average_before=list(load), load_average_after=list(os.getloadavg()) if load else [],
        peers=[f"tenseal=={tenseal.__version__}", f"flwr=={_secaggplus.WANTED}"],
        flower_secaggplus={**_secaggplus.SETTINGS, "num_shares": 3, "reconstruction_threshold": 2,
                           "max_weight": sum(SIZES.values())},
    )  # fmt: skip
    print(f"written to {runtime.write_results('secagg', origin, out).name}")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
