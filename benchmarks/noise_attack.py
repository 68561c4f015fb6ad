"""Can the low bits of a noisy step tell whether one patient took part? Float noise as a control, and the library's own.

One step of DP-SGD of a linear head, claimed ε = 0.5 for a patient. The attacker knows every patient and who was
sampled, but for one patient, and computes the step's sum with and without that one. Which of the two can have become
what was released? With floating-point noise (Mironov, CCS 2012) the difference of a released number and the right sum
is one that float32 noise can take; with the wrong sum it often isn't. A play is won where the attacker names the right
world.
"""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from primia_lite import runtime
from primia_lite.apps.bench import Options
from primia_lite.attacks.low_bits import share_consistent
from primia_lite.data.films import Films
from primia_lite.privacy.accounting import calibrate_noise_multiplier
from primia_lite.privacy.dpsgd import ClippedSum, PoissonBatch, Privacy, clipped_step
from primia_lite.privacy.rng import SecureGenerator
from primia_lite.training import Training, private_rows

PATIENTS, FEATURES, CLASSES, BOUND, EPSILON, DELTA = 64, 800, 3, 0.25, 0.5, 1e-4


def float_noise(total: dict, scale: float, rng: SecureGenerator) -> dict:
    """The control: normal noise in float32 on a float32 sum, as DP libraries add it."""
    normal = torch.Generator().manual_seed(rng.seed())
    return {name: t.float() + scale * torch.randn(t.shape, generator=normal) for name, t in total.items()}


def patients(seed: int) -> Films:
    generator = torch.Generator().manual_seed(seed)
    inputs = F.normalize(torch.randn(PATIENTS, 1, FEATURES, generator=generator), dim=2)
    return Films(inputs, torch.randint(CLASSES, (PATIENTS,), generator=generator), np.arange(PATIENTS).astype(str))


def right(noise: str, sample_rate: float, plays: int, seed: int) -> int:
    """How many plays the attacker wins against ``float`` or ``exact`` noise."""
    random, films, won = np.random.default_rng(seed), patients(seed), 0
    sigma = calibrate_noise_multiplier(EPSILON, DELTA, sample_rate, 1)
    privacy, training = Privacy(sigma, BOUND, 1e9), Training(sample_rate=sample_rate)
    adds = privacy.add_noise if noise == "exact" else partial(float_noise, scale=sigma * BOUND)
    for _ in range(plays):
        others = 1 + np.flatnonzero(random.random(PATIENTS - 1) < sample_rate)  # patient 0 is the one in question
        batches = [PoissonBatch(torch.from_numpy(taken), sample_rate) for taken in (others, np.append(0, others))]
        rows = [list(private_rows(films, batch, training, "patient", None, torch.Generator())) for batch in batches]
        model = nn.Linear(FEATURES, CLASSES, bias=False)
        nn.init.zeros_(model.weight)
        summed = ClippedSum(model, BOUND, "patient", films)
        totals = [summed(batch, part)[0]["weight"].float().numpy() for batch, part in zip(batches, rows, strict=True)]
        world = int(random.integers(2))
        # A learning rate and a batch that are powers of two: the weights give the step exactly.
        optimizer, own = torch.optim.SGD(model.parameters(), 1.0), partial(adds, rng=SecureGenerator())
        clipped_step(summed, optimizer, batches[world], rows[world], 32.0, own)
        released = -32 * model.weight.detach().numpy()
        shares = [share_consistent(released, total, privacy) for total in totals]
        guess = int(shares[1] > shares[0]) if shares[0] != shares[1] else int(random.integers(2))
        won += guess == world
    return won


def main() -> None:
    options = Options("noise_attack", __doc__)
    options.add_argument("--plays", type=int, default=1000)
    plays = options.read().plays
    torch.set_num_threads(1)
    found = {}
    for label, rate in (("", 1.0), ("_sampled", 0.5)):
        for name in ("float", "exact"):
            won = right(name, rate, plays, seed=0)
            unit = f"plays won of {plays}, sample rate {rate:g}"
            found[f"{name}_noise_right{label}"] = {"mean": won, "std": math.sqrt(won * (1 - won / plays)), "n": plays,
                                                   "unit": unit}  # fmt: skip
            print(f"{name} noise, sample rate {rate:g}: right in {won} of {plays} plays", flush=True)
    origin = runtime.origin(
        data_source="random numbers", data_fingerprint="drawn from the seed", seeds=[0],
        command="primia-lite bench noise_attack", epsilon=EPSILON, delta=DELTA,
    )  # fmt: skip
    print(f"written to {runtime.write_results('noise_attack', origin, found).name}")


if __name__ == "__main__":
    main()
