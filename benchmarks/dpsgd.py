"""How much a step of DP-SGD costs beside a plain step and beside Opacus, and how tight and fast ε's bracket is.

Same model, same batch, one thread, steps of all ways interleaved; medians, and medians of the paired ratios. Every
private step is whole: clipping, sum, noise (ours from ChaCha20, Opacus's from torch's generator), update. The linear
head is notebook 02's on real films: 1,060 patients with 1 to 30 films, four views, 2,369 features, half of the
patients in a step, unit patient; gathering the batch is counted. The networks see 64 random films of 64 px, unit film.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"

import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from opacus import GradSampleModule
from opacus.grad_sample import GradSampleModuleFastGradientClipping
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping
from torch import nn
from torch.nn import functional as F

from primia_lite import models, runtime
from primia_lite.apps.bench import Options
from primia_lite.data.films import Films
from primia_lite.privacy.accounting import Release, calibrate_noise_multiplier, epsilon_bracket
from primia_lite.privacy.clipping import clipped_sum
from primia_lite.privacy.dpsgd import ClippedSum, PhysicalBatch, PoissonBatch, Privacy, clipped_step, poisson_batches
from primia_lite.privacy.rng import SecureGenerator
from primia_lite.training import CACHE_BYTES, Training, private_rows

SIDE, BATCH, BOUND, SIGMA, RATE = 64, 64, 1.0, 1.0, 1e-4
REPEATS = {"head": 200, "cnn": 21, "ckksnet": 41, "resnet18": 5}
Step = Callable[[], None]


# --- networks that are trained whole ----------------------------------------------------------------------------------


def cnn() -> nn.Module:
    """490,699 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(),
        nn.MaxPool2d(2), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(4096, 114), nn.ReLU(), nn.Linear(114, 3),
    )  # fmt: skip


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return cnn() if name == "cnn" else models.build(name, 3, (1, SIDE, SIDE))


def plain(name: str, x: torch.Tensor, y: torch.Tensor) -> Step:
    model = build(name)
    optimizer = torch.optim.SGD(model.parameters(), RATE)

    def step():
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


def ours(name: str, x: torch.Tensor, y: torch.Tensor) -> Step:
    model = build(name)
    everyone = torch.arange(BATCH)
    rows = PhysicalBatch(x, everyone, torch.ones(BATCH, dtype=torch.int64), F.one_hot(y, 3).float())
    noise = partial(Privacy(SIGMA, BOUND, 8.0).add_noise, rng=SecureGenerator())
    return partial(
        clipped_step, ClippedSum(model, BOUND, "patient"), torch.optim.SGD(model.parameters(), RATE),
        PoissonBatch(everyone, 1.0), [rows], BATCH, noise,
    )  # fmt: skip


def opacus_options() -> dict:
    return {"noise_multiplier": SIGMA, "max_grad_norm": BOUND, "expected_batch_size": BATCH}


def hooks(name: str, x: torch.Tensor, y: torch.Tensor, **options) -> Step:
    model = GradSampleModule(build(name), loss_reduction="sum", **options)
    optimizer = DPOptimizer(torch.optim.SGD(model.parameters(), RATE), **opacus_options())

    def step():
        optimizer.zero_grad()
        F.cross_entropy(model(x), y, reduction="sum").backward()
        optimizer.step()

    return step


def functorch(name: str, x: torch.Tensor, y: torch.Tensor) -> Step:
    return hooks(name, x, y, force_functorch=True)


def ghost(name: str, x: torch.Tensor, y: torch.Tensor) -> Step:
    model = GradSampleModuleFastGradientClipping(
        build(name), loss_reduction="sum", max_grad_norm=BOUND, use_ghost_clipping=True
    )
    optimizer = DPOptimizerFastGradientClipping(
        torch.optim.SGD(model.parameters(), RATE), loss_reduction="sum", **opacus_options()
    )
    loss = DPLossFastGradientClipping(model, optimizer, nn.CrossEntropyLoss(reduction="sum"), loss_reduction="sum")

    def step():
        optimizer.zero_grad()
        loss(model(x), y).backward()
        optimizer.step()

    return step


def films() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(BATCH, 1, SIDE, SIDE, generator=generator), torch.randint(3, (BATCH,), generator=generator)


def difference_to_opacus(name: str) -> float:
    """Largest difference of the clipped sums, over the length of the sum."""
    x, y = films()
    sums, _, _ = clipped_sum(
        build(name), lambda model: F.cross_entropy(model(x), y, reduction="none"), torch.arange(BATCH), BATCH, BOUND
    )
    peer = GradSampleModule(build(name), loss_reduction="sum")
    optimizer = DPOptimizer(torch.optim.SGD(peer.parameters(), RATE), **opacus_options() | {"noise_multiplier": 0.0})
    F.cross_entropy(peer(x), y, reduction="sum").backward()
    optimizer.clip_and_accumulate()
    theirs = torch.cat([p.summed_grad.flatten() for p in peer.parameters()])
    own = torch.cat([value.flatten() for value in sums.values()])
    return float((own - theirs).abs().max() / theirs.norm())


# --- the linear head --------------------------------------------------------------------------------------------------


def hospital_films(patients: int = 1060, views: int = 4, d: int = 2369) -> Films:
    """Random features; as many films a patient as in the real set (mean 1.4, at most 30)."""
    count = np.minimum(30, np.random.default_rng(0).geometric(0.7, size=patients))
    owner = np.repeat(np.arange(patients), count)
    generator = torch.Generator().manual_seed(0)
    inputs = F.normalize(torch.randn(len(owner), views, d, generator=generator), dim=2)
    return Films(inputs, torch.randint(3, (len(owner),), generator=generator), owner.astype(str), model="litenet")


def head_steps(sample_rate: float = 0.5) -> dict[str, Step]:
    hospital = hospital_films()
    units, views = hospital.units("patient"), hospital.inputs.shape[1]
    training = Training(sample_rate=sample_rate, label_smoothing=0.1)
    batches = list(poisson_batches(len(units), sample_rate, 40, SecureGenerator()))
    turn = {"plain": 0, "ours": 0}
    nets = {name: models.build("litenet", 3, hospital.inputs.shape[2:]) for name in turn}
    optimizers = {name: torch.optim.SGD(net.parameters(), 0.1) for name, net in nets.items()}
    clipped = ClippedSum(nets["ours"], 0.25, "patient", hospital)
    noise = partial(Privacy(SIGMA, 0.25, 8.0).add_noise, rng=SecureGenerator())
    nothing = torch.Generator()

    def batch(name: str) -> PoissonBatch:
        turn[name] += 1
        return batches[turn[name] % len(batches)]

    def plain_step():
        # In the same parts as ours: nothing but DP makes the difference.
        index = units.films(batch("plain").units)
        optimizers["plain"].zero_grad()
        for part in index.split(CACHE_BYTES // hospital.inputs[0].nbytes):
            x = torch.index_select(hospital.inputs, 0, part).flatten(0, 1)
            y = hospital.labels[part].repeat_interleave(views)
            loss = F.cross_entropy(nets["plain"](x), y, label_smoothing=0.1, reduction="sum")
            (loss / (views * len(index))).backward()
        optimizers["plain"].step()

    def private_step():
        chosen = batch("ours")
        parts = private_rows(hospital, chosen, training, "patient", None, nothing)
        clipped_step(clipped, optimizers["ours"], chosen, parts, sample_rate * len(units), noise)

    return {"plain": plain_step, "ours": private_step}


# --- measuring --------------------------------------------------------------------------------------------------------


def interleaved(steps: dict[str, Step], repeats: int) -> dict[str, list[float]]:
    """Milliseconds of each step, in turns."""
    for step in steps.values():
        step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            times[name].append(1e3 * (time.perf_counter() - started))
    return times


def spread(values: list[float], unit: str) -> dict:
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "n": len(values), "unit": unit}


def ratio(over: list[float], under: list[float], unit: str) -> dict:
    values = sorted(a / b for a, b in zip(over, under, strict=True))
    tenth = len(values) // 10  # of 200 steps a few are hit by whatever else the machine does
    return spread(values, unit) | {"p10": values[tenth], "p90": values[-1 - tenth]}


def main() -> None:
    Options("dpsgd", __doc__).read()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    found = {}
    times = interleaved(head_steps(), REPEATS["head"])
    found["ratio_head_to_plain"] = ratio(times["ours"], times["plain"], "DP step / plain step, litenet's head")
    for way, values in times.items():
        found[f"head_{way}_ms"] = spread(values, "ms a step")
    for name in ("cnn", "ckksnet", "resnet18"):
        ways = {"plain": plain, "ours": ours, "opacus_hooks": hooks, "opacus_ghost": ghost}
        if name != "resnet18":
            ways["opacus_functorch"] = functorch  # takes most of a minute for a step of resnet18
        x, y = films()
        times = interleaved({way: make(name, x, y) for way, make in ways.items()}, REPEATS[name])
        for way, values in times.items():
            found[f"{name}_{way}_ms"] = spread(values, "ms a step, batch of 64")
        found[f"ratio_{name}_to_plain"] = ratio(times["ours"], times["plain"], f"DP step / plain step, {name}")
        for way in ways:
            if way.startswith("opacus"):
                found[f"speedup_{name}_over_{way}"] = ratio(times[way], times["ours"], f"{way} / ours, {name}")
        found[f"clipped_sum_difference_{name}"] = spread(
            [difference_to_opacus(name)], "largest difference to Opacus / length of the sum"
        )
    for target in (8.0, 1.0, 0.5):
        release = Release(calibrate_noise_multiplier(target, 1e-4, 0.5, 41), 0.5, 41)
        started = time.perf_counter()
        bracket = epsilon_bracket(release, 1e-4)
        label = f"{target:g}".replace(".", "")
        found[f"bracket_gap_eps{label}"] = spread([bracket.gap], "(upper - lower) / upper")
        found[f"bracket_s_eps{label}"] = spread([time.perf_counter() - started], "s")
    origin = runtime.origin(
        data_source="random numbers", data_fingerprint="drawn from the seeds", seeds=[0, 1],
        command="primia-lite bench dpsgd", threads=1,
    )  # fmt: skip
    path = runtime.write_results("dpsgd", origin, found)
    for name, entry in found.items():
        print(f"{name:<36} {entry['median']:11.4g}  {entry['unit']}")
    print(f"written to {path.name}")


if __name__ == "__main__":
    main()
