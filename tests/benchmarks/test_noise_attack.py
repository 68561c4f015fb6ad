"""The attack on floating-point noise wins against the control and guesses against the library's step."""

import importlib.util

import pytest
import torch
from scipy import stats

from primia_lite.config import repo_root
from primia_lite.privacy.accounting import calibrate_noise_multiplier


@pytest.fixture(scope="module")
def attack():
    spec = importlib.util.spec_from_file_location("noise_attack", repo_root() / "benchmarks" / "noise_attack.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("sample_rate", [1.0, 0.5])
def test_float_noise_gives_one_patient_away_and_whole_numbers_do_not(attack, sample_rate):
    """With the sampled patients known, whoever reads the numbers as a DP attacker may wins by Φ(1 / 2σ)."""
    plays = 60
    assert attack.right("float", sample_rate, plays, seed=1) > 0.9 * plays
    best = stats.norm.cdf(0.5 / calibrate_noise_multiplier(attack.EPSILON, attack.DELTA, sample_rate, 1))
    won = attack.right("exact", sample_rate, plays, seed=2)
    assert best < 0.65 and stats.binomtest(won, plays, best, alternative="greater").pvalue > 1e-4


def test_what_leaves_a_step_is_whole_numbers_over_a_public_scale(attack):
    """Whatever the data: the released weights of neighbours lie on one grid, and share it with their difference."""
    films, sigma = attack.patients(0), 2.0
    privacy = attack.Privacy(sigma, attack.BOUND, 1e9)
    scale = 2.0 ** torch.tensor(2**12 * (attack.FEATURES * attack.CLASSES) ** 0.5 / attack.BOUND).log2().ceil()
    for units in (torch.arange(64), torch.arange(1, 64), torch.arange(0)):
        model = torch.nn.Linear(attack.FEATURES, attack.CLASSES, bias=False).double()
        torch.nn.init.zeros_(model.weight)
        batch = attack.PoissonBatch(units, 1.0)
        rows = attack.private_rows(films, batch, attack.Training(), "patient", None, torch.Generator())
        total = attack.ClippedSum(model.float(), attack.BOUND, "patient", films)(batch, rows)[0]
        assert (privacy.add_noise(total, attack.SecureGenerator())["weight"] * scale).frac().eq(0).all()
