"""Noise that hospitals share: its accounting, its numbers, and what hospitals and server make of it."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

from primia_lite.config import BudgetError, TrainingError, UserError
from primia_lite.data.films import Films
from primia_lite.federation.hospital import Hospital, local_update
from primia_lite.federation.optimizer import shared_step
from primia_lite.models import build
from primia_lite.privacy.accounting import Release, epsilon
from primia_lite.privacy.dpsgd import ClippedSum, PoissonBatch, Privacy
from primia_lite.privacy.noise import FLOAT32_MARGIN, discrete_gaussian
from primia_lite.privacy.rng import SecureGenerator
from primia_lite.privacy.shared import Quantizer, SharedNoise, total_variation_distance
from primia_lite.training import Training, private_rows

# --- the accounting ---------------------------------------------------------------------------------------------------


def both(sigma, width=12):
    """Discrete Gaussian and rounded normal, by their definitions, on whole numbers [-width σ, width σ]."""
    x = np.arange(-width * sigma, width * sigma + 1)
    p = np.exp(-(x**2) / (2 * sigma**2))
    upper = stats.norm.sf((np.abs(x) - 0.5) / sigma) - stats.norm.sf((np.abs(x) + 0.5) / sigma)
    return x, p / p.sum(), upper


@pytest.mark.parametrize(("sigma", "d"), [(1, 1), (2, 1), (5, 1), (20, 1), (1, 2), (5, 2), (20, 2), (1, 3), (3, 3)])
def test_total_variation_is_within_its_bound_and_near_it(sigma, d):
    _, p, r = both(sigma, 10)
    joint_p, joint_r = p, r
    for _ in range(d - 1):
        joint_p, joint_r = np.multiply.outer(joint_p, p), np.multiply.outer(joint_r, r)
    true = np.abs(joint_p - joint_r).sum() / 2
    assert true < total_variation_distance(sigma, d) < 4 * true


@pytest.mark.parametrize("eps", [0.5, 2.0])
@pytest.mark.parametrize("q", [0.3, 1.0])
def test_slack_covers_the_subsampled_mechanism_both_ways(eps, q):
    """δ(ε) of one step with discrete noise, summed up, against that with rounded normal noise plus the slack."""
    sigma, shift = 2, 2
    _, p, r = both(sigma)

    def delta(noise, removed):
        with_unit = (1 - q) * np.append(noise, np.zeros(shift)) + q * np.append(np.zeros(shift), noise)
        without = np.append(noise, np.zeros(shift))
        a, b = (with_unit, without) if removed else (without, with_unit)
        return np.maximum(a - np.exp(eps) * b, 0).sum()

    slack = (1 + np.exp(eps)) * total_variation_distance(sigma, 1)
    for removed in (True, False):
        exact, rounded = delta(p, removed), delta(r, removed)
        assert exact <= rounded + slack
    # Rounding is post-processing: no more δ than the normal noise itself.
    x = np.linspace(-40, 40, 400_001)
    density = [stats.norm.pdf(x, scale=sigma), stats.norm.pdf(x - shift, scale=sigma)]
    normal = np.maximum((1 - q) * density[0] + q * density[1] - np.exp(eps) * density[0], 0).sum() * (x[1] - x[0])
    assert delta(r, True) <= normal + 1e-6
    release = Release(sigma / shift, q, 1)
    assert epsilon(release, normal) == pytest.approx(eps, abs=0.02)  # the accountant counts the same mechanism


def test_slack_counts_steps_and_epsilon():
    quantizer = Quantizer(SharedNoise(2, 1, 3840, (900, 1000)), 1.0, 0.5)
    one = quantizer.delta_slack(1, 8.0)
    assert one == pytest.approx((1 + math.exp(8)) * math.sqrt(3840) / 24 / quantizer.total_sigma**2, rel=1e-3)
    assert quantizer.delta_slack(50, 8.0) == pytest.approx(50 * one)
    assert quantizer.delta_slack(1, 1e9) == 1.0 and quantizer.delta_slack(10**30, 8.0) == 1.0
    assert total_variation_distance(1.0, 10**12) == 1.0


# --- the quantizer ----------------------------------------------------------------------------------------------------

QUANTIZERS = [
    Quantizer(SharedNoise(3, 0, 24, (60, 40, 100)), 2.0, 0.5),
    Quantizer(SharedNoise(2, 1, 3840, (900, 1000, 900)), 1.0, 0.5),
    Quantizer(SharedNoise(7, 3, 11_170_000, (500,) * 10), 0.7, 1.5),
    Quantizer(SharedNoise(1, 0, 24, (2800,)), 30.0, 1e-5),
]


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_the_scale_is_the_finest_that_does_not_wrap(quantizer):
    shared, bound = quantizer.shared, quantizer.max_grad_norm
    n, d, root = shared.hospitals, shared.parameters, math.sqrt(shared.hospitals)

    def wraps(scale):
        moved = scale * bound * (1 + FLOAT32_MARGIN) + math.sqrt(d)
        share = quantizer.noise_multiplier * moved / math.sqrt(shared.threshold - shared.colluding)
        left = 2.0**31 - n - sum(shared.declared) * scale * bound
        return 2 * d * math.exp(-((left / (root * math.ceil(share))) ** 2) / 2) if left > 0 else 1.0

    assert 2.0**-42 < wraps(quantizer.scale) < 2.0**-40
    assert wraps(quantizer.scale + max(1, quantizer.scale // 10**6)) > 2.0**-40 * 0.999
    # The largest sum, all at the clamp, and noise of all hospitals seven deviations out.
    assert sum(shared.declared) * bound * quantizer.scale + n / 2 + 7 * root * quantizer.share_sigma < 2**31 - 1


def test_wrap_probability_bounds_what_noise_does():
    """On numbers that can be counted: the tail of a sum of three shares is within the bound, and not far below."""
    noise = sum(discrete_gaussian(300_000, 200, SecureGenerator.from_seed(i)) for i in range(3))
    for z in (1.5, 2.5, 3.5):
        assert 0.02 * 2 * math.exp(-(z**2) / 2) < (np.abs(noise) > z * 200 * math.sqrt(3)).mean() < 2 * math.exp(
            -(z**2) / 2)  # fmt: skip


@pytest.mark.parametrize("quantizer", [*QUANTIZERS, Quantizer(SharedNoise(2, 1, 24, (60, 40, 100)), 2.0, 0.5)])
def test_the_fewest_honest_survivors_keep_the_noise_multiplier(quantizer):
    """t survivors, c of them colluding: what is left is σ times the sensitivity, rounded up and no more."""
    shared, sigma = quantizer.shared, quantizer.noise_multiplier
    for survivors in range(shared.threshold, shared.hospitals + 1):
        deviation = math.sqrt(survivors - shared.colluding) * quantizer.share_sigma
        assert deviation / quantizer.sensitivity >= sigma
        if survivors == shared.threshold:
            assert deviation / quantizer.sensitivity < sigma * 1.01
            assert quantizer.total_sigma == pytest.approx(deviation)
    assert quantizer.sensitivity >= quantizer.scale * quantizer.max_grad_norm + math.sqrt(shared.parameters)


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ((4, 0, 24, (60, 40, 100)), "threshold"),
        ((2, 2, 24, (60, 40, 100)), "threshold"),
        ((0, 0, 24, (60,)), "threshold"),
        ((2, -1, 24, (60, 40)), "colluding"),
        ((2, 0, 0, (60, 40)), "parameters"),
        ((1, 0, 24, ()), "declared"),
        ((1, 0, 24, (60, 0)), "declared"),
        ((1, 0.5, 24, (60,)), "whole"),
    ],
)
def test_agreements_that_contradict_themselves_are_refused(values, word):
    with pytest.raises(UserError, match=word):
        SharedNoise(*values)


@pytest.mark.parametrize(
    ("sigma", "bound", "declared", "word"),
    [
        (1e-6, 0.5, (60, 40), "share"),
        (1.0, 1.0, (10**8, 10**8), "share"),
        (1e9, 0.5, (60, 40), "too large"),
        (1.0, 1e9, (60, 40), "too large"),
    ],
)
def test_what_32_bits_do_not_hold_is_refused(sigma, bound, declared, word):
    with pytest.raises(UserError, match=word):
        Privacy(sigma, bound, 8.0, shared=SharedNoise(2, 0, 24, declared))


# --- a hospital's numbers ---------------------------------------------------------------------------------------------


def noise_of(n, sigma, seed, *labels):
    """What a generator of that seed makes: to be taken off again."""
    rng = SecureGenerator.from_seed(seed)
    return torch.from_numpy(discrete_gaussian(n, sigma, rng.child(*labels) if labels else rng))


def test_rounding_and_clamping_move_two_sums_no_further_apart_than_the_sensitivity():
    quantizer, d = Quantizer(SharedNoise(1, 0, 50_000, (100_000,)), 2.0, 0.5), 50_000
    noise, worst = noise_of(d, quantizer.share_sigma, 0), 0.0
    generator = torch.Generator().manual_seed(0)
    for kind in ("random", "edge", "clamped"):
        old = torch.randn(d, generator=generator, dtype=torch.float64)
        move = torch.randn(d, generator=generator, dtype=torch.float64)
        if kind == "edge":  # just below the half, all of them, and the unit moves each over it
            old = (torch.randint(-50, 50, (d,), generator=generator) + 0.4999999) / quantizer.scale
            move = torch.ones(d, dtype=torch.float64)
        if kind == "clamped":
            old *= d
        move *= 0.5 / move.norm()
        one, two = (
            quantizer.share({"w": x}, 100_000, SecureGenerator.from_seed(0))["w"] - noise for x in (old, old + move)
        )
        moved = float((one - two).double().norm())
        assert moved <= quantizer.sensitivity
        worst = max(worst, moved / (quantizer.scale * 0.5))
        assert int(one.abs().max()) <= 0.5 * 100_000 * quantizer.scale + 1
    assert worst > 1 + FLOAT32_MARGIN  # without √d the bound would be broken
    with pytest.raises(FloatingPointError):
        quantizer.share({"w": torch.full((d,), math.nan)}, 60, SecureGenerator())


def tabular(n, seed=0, d=8, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (n,), generator=generator)
    inputs = scale * torch.randn(n, 1, d, generator=generator)
    return Films(inputs, labels, np.array([f"{seed}-{i}" for i in range(n)]))


def exact_sum(films, model, bound):
    """The clipped sum of a linear head's gradients in float64, written out."""
    x = films.inputs[:, 0].double()
    error = torch.softmax(x @ model.weight.detach().double().T, 1)
    error[torch.arange(len(x)), films.labels] -= 1
    norm = error.norm(dim=1) * x.norm(dim=1)
    return (error * (bound / norm).clamp(max=1)[:, None]).T @ x


def summed(model, films, privacy):
    batch = PoissonBatch(torch.arange(len(films)), 1.0)
    rows = private_rows(films, batch, Training(sample_rate=1.0), privacy.unit, None, torch.Generator())
    return ClippedSum(model, privacy.max_grad_norm, privacy.unit, films)(batch, rows)[0]


@pytest.mark.parametrize("alike", [False, True])
@pytest.mark.parametrize(("name", "shape", "n"), [("litenet", (1280,), 5000), ("ckksnet", (1, 28, 28), 1500)])
def test_one_unit_moves_a_computed_sum_by_far_less_than_the_margin_beyond_the_clip(name, shape, n, alike):
    """Also where all gradients are alike, so that the sum is as large as it gets and its rounding too."""
    torch.manual_seed(0)
    inputs, model = 3 * torch.randn(n, 1, *shape), build(name, 3, shape, seed=1)
    if alike:
        inputs = inputs[:1].repeat(n, 1, *[1] * len(shape))
    with torch.no_grad():
        for p in model.parameters():
            p += 0.005 * torch.randn_like(p)
        labels = model(inputs[:, 0]).argmin(1)  # what the model is wrong about has a gradient above the clip
    films = Films(inputs, labels, np.arange(n).astype(str))
    d = sum(p.numel() for p in model.parameters())
    privacy = Privacy(1.0, 0.5, 8, shared=SharedNoise(1, 0, d, (n,)))
    whole, less = (summed(model, f, privacy) for f in (films, films.subset(np.delete(np.arange(n), 7))))
    assert {value.dtype for value in whole.values()} == {torch.float64}
    moved = math.sqrt(sum(float((whole[name] - less[name]).square().sum()) for name in whole)) / 0.5
    assert 0.999 < moved < 1 + FLOAT32_MARGIN / 100


SHARED = SharedNoise(threshold=3, colluding=1, parameters=24, declared=(60, 40, 100))
PRIVACY = Privacy(2.0, 0.5, target_epsilon=100.0, shared=SHARED)
TRAINING = Training(sample_rate=0.5, learning_rate=0.5)


def state(seed=0):
    torch.manual_seed(seed)
    return {"weight": torch.randn(3, 8) / 3}


def hospitals():
    return [Hospital(name, tabular(n, seed)) for seed, (name, n) in enumerate(zip("ABC", (60, 40, 100), strict=True))]


def test_an_update_is_the_rounded_clipped_sum_plus_the_share():
    """Exactly: with a seed the noise is known, and the sampled patients too."""
    films, weights = tabular(60), state()
    rng = SecureGenerator.from_seed(1)
    update = local_update(weights, films, TRAINING, PRIVACY, rng, declared_size=60)
    noise = noise_of(24, PRIVACY.quantizer.share_sigma, 1, "noise")
    taken = np.unique(films.patient_id)[SecureGenerator.from_seed(1).child("sampling").bernoulli(60, 0.5)]
    model = build("litenet", 3, (8,))
    model.load_state_dict(weights)
    wanted = exact_sum(films.subset(np.isin(films.patient_id, taken)), model, 0.5) * PRIVACY.quantizer.scale
    got = update.delta["weight"] - noise.view(3, 8)
    assert update.delta["weight"].dtype == torch.int64 and update.steps == 1 and update.seeded
    assert float((got - wanted).abs().max()) < 2e-6 * float(wanted.abs().max())
    assert 10 < len(taken) < 50
    again = local_update(weights, films, TRAINING, PRIVACY, SecureGenerator.from_seed(1), declared_size=60)
    other = local_update(weights, films, TRAINING, PRIVACY, SecureGenerator.from_seed(2), declared_size=60)
    assert torch.equal(again.delta["weight"], update.delta["weight"])
    assert not torch.equal(other.delta["weight"], update.delta["weight"])


def test_sums_of_shares_have_the_plain_sums_mean_and_the_stated_variance():
    """Noise of t = 3 survivors with c = 1: variance (σ sensitivity)² t / (t - c)."""
    weights, training, quantizer = state(), TRAINING.changed(sample_rate=1.0), PRIVACY.quantizer
    group = hospitals()
    model = build("litenet", 3, (8,))
    model.load_state_dict(weights)
    plain = sum(exact_sum(h.films, model, 0.5) for h in group).flatten() * quantizer.scale
    sums = []
    for seed in range(60):
        rngs = [SecureGenerator.from_seed(seed).child(h.name) for h in group]
        sums.append(sum(local_update(weights, h.films, training, PRIVACY, rng, declared_size=h.declared_size).delta[
            "weight"] for h, rng in zip(group, rngs, strict=True)).flatten())  # fmt: skip
    noise = torch.stack(sums).double() - plain
    deviation = 2.0 * quantizer.sensitivity * math.sqrt(3 / 2)
    assert abs(float(noise.mean(0).mul(math.sqrt(60) / deviation).square().sum()) - 24) < 4 * math.sqrt(48)
    assert float(noise.std()) == pytest.approx(deviation, rel=4 / math.sqrt(2 * noise.numel()))
    assert stats.kstest(noise.flatten().numpy() / deviation, "norm").pvalue > 1e-3


def test_a_step_of_the_server_is_the_mean_of_the_hospitals_steps():
    weights, group = state(), hospitals()
    training = TRAINING.changed(sample_rate=1.0, weight_decay=0.3)
    quiet = replace(PRIVACY, noise_multiplier=1e-9, shared=None)
    noise = noise_of(24, PRIVACY.quantizer.share_sigma, 0, "noise").view(3, 8)
    total, wanted = torch.zeros(3, 8, dtype=torch.int64), torch.zeros(3, 8)
    for h in group[::2]:  # B dropped out
        shared, plain = (
            local_update(weights, h.films, training, p, SecureGenerator.from_seed(0), declared_size=h.declared_size)
            for p in (PRIVACY, quiet)
        )
        total += shared.delta["weight"] - noise
        wanted += plain.delta["weight"] * h.declared_size / 160
    loose = replace(PRIVACY, shared=replace(SHARED, threshold=2))
    scaled = {"weight": (total.double() * loose.quantizer.scale / PRIVACY.quantizer.scale).round().long()}
    got = shared_step(scaled, weights, training, loose, 160)
    assert got["weight"].dtype == torch.float32
    torch.testing.assert_close(got["weight"], wanted, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("training", "privacy", "declared", "message"),
    [
        ({"local_steps": 2}, {}, 60, "local_steps"),
        ({"local_steps": None, "local_epochs": 1}, {}, 60, "local_steps"),
        ({"momentum": 0.5}, {}, 60, "momentum"),
        ({}, {"shared": replace(SHARED, parameters=25)}, 60, "parameters"),
        ({}, {}, 70, "declared_size"),
        ({}, {}, None, "declared_size"),
        ({"augmentation": ("mixup",)}, {}, 60, "mixup"),
    ],
)
def test_what_contradicts_shared_noise_is_refused_and_not_charged(tmp_path, training, privacy, declared, message):
    training, privacy = TRAINING.changed(**training), replace(PRIVACY, **privacy)
    rng = SecureGenerator()
    with pytest.raises(UserError, match=message):
        local_update(state(), tabular(60), training, privacy, rng, declared_size=declared)
    if declared is not None:
        hospital = Hospital("A", tabular(60), declared_patients=declared)
        with pytest.raises(UserError, match=message):
            hospital.update(1, state(), training, privacy, rng, tmp_path)
        assert not hospital.ledger(tmp_path, privacy).charges()


# --- a hospital's ledger ----------------------------------------------------------------------------------------------


def test_a_share_is_never_stored_nor_sent_twice(tmp_path):
    hospital, rng = hospitals()[0], SecureGenerator()
    one, two = (hospital.update(1, state(), TRAINING, PRIVACY, rng, tmp_path).delta["weight"] for _ in range(2))
    assert float((one - two).double().std()) > PRIVACY.quantizer.share_sigma / 2
    assert not list(tmp_path.glob("update-*"))
    assert hospital.ledger(tmp_path, PRIVACY).charges() == [Release(2.0, 0.5, 1)] * 2
    # The control: an update that isn't shared is kept, and comes again.
    plain = replace(PRIVACY, shared=None)
    one, two = (hospital.update(1, state(), TRAINING, plain, rng, tmp_path).delta["weight"] for _ in range(2))
    assert torch.equal(one, two) and list(tmp_path.glob("update-*"))


def test_a_share_is_charged_before_it_is_computed(tmp_path):
    hospital, training = hospitals()[0], TRAINING.changed(sample_rate=1.0)
    hospital.films.inputs[:] = 3e38  # finite films, logits that aren't
    weights = {"weight": torch.full((3, 8), 2.0)}
    with pytest.raises(TrainingError, match="refused"):
        hospital.update(1, weights, training, PRIVACY, SecureGenerator(), tmp_path)
    assert len(hospital.ledger(tmp_path, PRIVACY).charges()) == 1  # and stays charged
    poor = replace(PRIVACY, target_epsilon=0.3)
    with pytest.raises(BudgetError):  # before anybody sees that the gradient isn't finite
        hospital.update(1, weights, training, poor, SecureGenerator(), tmp_path / "poor")


# --- a budget ---------------------------------------------------------------------------------------------------------


def test_a_budget_keeps_room_for_whole_numbers():
    shared = SharedNoise(2, 1, 11_170_000, (900, 1000, 900))
    asked = {"sample_rate": 0.25, "steps": 30, "max_grad_norm": 0.5, "target_delta": 1e-4, "spare_steps": 2}
    plain, private = Privacy.for_budget(8.0, **asked), Privacy.for_budget(8.0, **asked, shared=shared)
    slack = private.quantizer.delta_slack(32, 8.0)
    assert slack > 1e-6 and private.promised_delta(32) == private.target_delta + slack <= 1e-4
    assert private.promised_delta(32) > 0.99e-4
    assert private.noise_multiplier > plain.noise_multiplier
    assert private.plan == (Release(private.noise_multiplier, 0.25, 32),)
    assert epsilon(private.plan, 1e-4 - slack) <= 8.0
    assert plain.target_delta == plain.promised_delta(32) == 1e-4
    with pytest.raises(UserError, match="delta"):
        Privacy.for_budget(14.0, **asked, shared=shared)


def test_a_plain_privacy_says_nothing_of_sharing_and_a_shared_one_reads_as_json():
    plain = Privacy(1.0, 0.5, 8.0).as_dict()
    assert list(plain)[:5] == ["noise_multiplier", "max_grad_norm", "target_epsilon", "target_delta", "unit"]
    assert plain.keys() == {*list(plain)[:5], "planned", "also"}
    assert json.loads(json.dumps(PRIVACY.as_dict()))["shared"] == {
        "threshold": 3, "colluding": 1, "parameters": 24, "declared": [60, 40, 100],
    }  # fmt: skip
    assert SharedNoise(1, 0, 24, [60]) == SharedNoise(1, 0, 24, (60,)) and hash(PRIVACY)
