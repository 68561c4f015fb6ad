"""Whole-number noise: against its definition, with controls that must fail."""

import math

import mpmath
import numpy as np
import pytest
import torch
from scipy import special, stats

from primia_lite.config import UserError
from primia_lite.privacy.noise import MAX_SIGMA, discrete_gaussian, l2_sensitivity, local_noise, rounded_gaussian
from primia_lite.privacy.rng import SecureGenerator

N = 200_000


def pmf(sigma, variance=None, width=40):
    """The definition, on -width σ..width σ."""
    k = np.arange(-width * sigma, width * sigma + 1)
    p = np.exp(-(k**2) / (2 * (variance or sigma**2)))
    return k, p / p.sum()


def rounded_pmf(sigma, width=40):
    """Of a normal of σ, rounded."""
    k = np.arange(-math.ceil(width * sigma), math.ceil(width * sigma) + 1)
    return k, stats.norm.sf((np.abs(k) - 0.5) / sigma) - stats.norm.sf((np.abs(k) + 0.5) / sigma)


def fits(x, sigma, definition=pmf):
    """p-value of the chi-square test against the definition; tails with under 10 expected are put together."""
    k, p = definition(sigma)
    expected = p * len(x)
    bulk = expected >= 10
    seen = np.bincount(x - k[0], minlength=len(k))
    return stats.chisquare(
        np.append(seen[bulk], seen[~bulk].sum()), np.append(expected[bulk], expected[~bulk].sum())
    ).pvalue  # fmt: skip


@pytest.mark.parametrize("sigma", [1, 2, 3, 7, 50])
def test_probabilities_are_those_of_the_definition(sigma):
    n = N if sigma > 5 else N // 10  # few are settled by float where sigma is small
    assert fits(discrete_gaussian(n, sigma, SecureGenerator.from_seed(sigma)), sigma) > 1e-3


def test_the_chi_square_test_tells_rounded_and_wrong_noise_apart():
    normal = np.random.default_rng(0).normal
    assert fits(np.rint(normal(scale=1.0, size=N)).astype(int), 1) < 1e-10
    assert fits(discrete_gaussian(N, 50, SecureGenerator.from_seed(0)), 53) < 1e-10
    x = discrete_gaussian(N, 20, SecureGenerator.from_seed(0))
    extra = np.random.default_rng(1).random(N) < 0.02
    assert fits(np.where(extra, 0, x), 20) < 1e-10  # a heavier zero
    assert fits(np.abs(x), 20) < 1e-10


SAMPLERS = pytest.mark.parametrize("sampler", [discrete_gaussian, rounded_gaussian])


@pytest.mark.parametrize("sigma", [0.3, 1.0, 2.5, 50.0])
def test_a_rounded_gaussian_is_a_normal_rounded(sigma):
    x = rounded_gaussian(N, sigma, SecureGenerator.from_seed(int(10 * sigma)))
    assert fits(x, sigma, rounded_pmf) > 1e-3
    if sigma >= 1:
        assert fits(np.abs(x), sigma, rounded_pmf) < 1e-10 and fits(x, 1.05 * sigma, rounded_pmf) < 1e-3
    if sigma == 1:
        assert fits(x, 1) < 1e-10  # the discrete Gaussian is another distribution


@SAMPLERS
@pytest.mark.parametrize("sigma", [1 << 20, (1 << 33) + 12345, MAX_SIGMA])
def test_large_sigma_is_normal_to_the_eye(sampler, sigma):
    x = sampler(20_000, sigma, SecureGenerator.from_seed(1))
    assert stats.kstest(x / sigma, "norm").pvalue > 1e-3
    assert abs((x / sigma).std() - 1) < 4 / np.sqrt(40_000)
    assert stats.kstest(x / sigma * 1.05, "norm").pvalue < 1e-3  # the test can tell
    assert stats.chisquare(np.bincount(x & 255, minlength=256)).pvalue > 1e-3  # and down to the lowest bit


class Words:
    """Gives the first words it is told, then those of a seed."""

    def __init__(self, *first, seed=0):
        self.first, self.then, self.drawn = list(first), SecureGenerator.from_seed(seed), 0

    def words(self, n):
        self.drawn += n
        told, self.first = self.first[:n], self.first[n:]
        return np.append(np.array(told, np.uint64), self.then.words(n - len(told)))


def inverted(word, sigma):
    """The same inversion in 300 bits, for a word whose further bits don't matter."""
    with mpmath.workprec(300):
        tail = (mpmath.mpf(word >> 1) + mpmath.mpf(1) / 2) / mpmath.mpf(2) ** 64
        z = mpmath.sqrt(2) * mpmath.erfinv(1 - 2 * tail)
        return (-1 if word & 1 else 1) * int(mpmath.nint(z * sigma))


@pytest.mark.parametrize("sigma", [0.7, 1e4, 2.0**30, 2.0**40])
def test_words_become_what_inversion_in_300_bits_makes_of_them(sigma):
    drawn = [int(w) for w in np.random.default_rng(0).integers(2**64, size=60, dtype=np.uint64)]
    tails = [w >> k % 40 for k, w in enumerate(drawn)]  # far out, too
    middle = [2**64 - 1 - w % 2**30 for w in drawn[:10]]
    settled = 0
    for word in (*tails, *middle):
        words = Words(word)
        found = rounded_gaussian(1, sigma, words)[0]
        open_bits = words.drawn > 1  # further bits were asked for, and may have made one more or less
        assert abs(found - inverted(word, sigma)) <= open_bits * (1 + 2 * sigma / max(1, word >> 1))
        settled += not open_bits
    assert settled > 35


def test_the_float_is_as_exact_as_counted():
    """What is taken for granted of scipy's inverse, measured where its formula changes and far out."""
    edges = [math.exp(-2), 1 - math.exp(-2), math.exp(-32), 0.5]
    p = [e * (1 + k * 1e-6) for e in edges for k in range(-20, 21) if e * (1 + k * 1e-6) <= 0.5]
    p += list(np.exp(-np.random.default_rng(0).uniform(0.7, 44, 300)))
    for value in p:
        with mpmath.workprec(200):
            z = -mpmath.sqrt(2) * mpmath.erfinv(1 - 2 * mpmath.mpf(value))
            assert abs(special.ndtri(value) - z) <= 4e-15 * abs(z) + mpmath.mpf(2) ** -60


@pytest.mark.parametrize("sigma", [1.5, 2.0**20, 2.0**36])
def test_what_float_does_not_settle_is_settled_by_more_bits(sigma):
    """Words on both sides of a half-integer: both results come, in the proportion that their further bits have."""
    k = int(0.8 * sigma)
    with mpmath.workprec(200):
        edge = mpmath.erfc((k + mpmath.mpf(1) / 2) / (sigma * mpmath.sqrt(2))) / 2 * mpmath.mpf(2) ** 64
        word, share = 2 * int(edge), float(edge - int(edge))  # of the word's numbers, those below the edge are beyond
    words = [Words(word, seed=seed) for seed in range(300)]
    found = np.array([rounded_gaussian(1, sigma, w)[0] for w in words])
    assert set(found) <= {k, k + 1} and all(w.drawn > 1 for w in words)
    assert stats.binomtest(int((found == k + 1).sum()), 300, share).pvalue > 1e-3
    far = rounded_gaussian(1, sigma, Words(0))[0]  # the first 63 bits of the probability are 0
    assert far > 9 * sigma and rounded_gaussian(1, sigma, Words(1))[0] < -9 * sigma


def test_a_rejection_that_float_does_not_settle_is_settled_by_more_bits():
    """A share of 128: one in 200,000 proposals is refused; the uniform that decides lies at the edge itself."""
    sigma, x = 128, 200
    with mpmath.workprec(400):
        s = mpmath.mpf(sigma)
        r = mpmath.quad(lambda t: mpmath.exp(-(t**2) / (2 * s**2)), [x - 0.5, x + 0.5])
        accept = mpmath.exp(-(mpmath.mpf(x) ** 2) / (2 * s**2) - 1 / (24 * s**2)) / r
    with mpmath.workprec(200):
        word = 2 * int(mpmath.erfc(mpmath.mpf(x) / (sigma * mpmath.sqrt(2))) / 2 * mpmath.mpf(2) ** 64)
        edge = int(accept * 2**64)
    assert 1 - 1 / (24 * sigma**2) * (1 + (x / sigma) ** 2) <= accept < 1
    below, above = edge - 10, edge + 10
    assert discrete_gaussian(1, sigma, Words(word, below))[0] == x
    assert discrete_gaussian(1, sigma, Words(word, above, word, below))[0] == x
    drawn = Words(word, above)
    discrete_gaussian(1, sigma, drawn)
    assert drawn.drawn > 2  # proposed anew


@SAMPLERS
def test_samples_are_independent_across_blocks(sampler):
    x = sampler(N, 50, SecureGenerator.from_seed(3)).astype(float)
    for lag in (1, 2, 31_000):
        for y in (x, np.abs(x)):
            assert abs(np.corrcoef(y[:-lag], y[lag:])[0, 1]) < 4 / np.sqrt(N - lag)


@SAMPLERS
def test_a_seed_repeats_and_the_operating_system_does_not(sampler):
    one, two = (sampler(1000, 1 << 30, SecureGenerator.from_seed(4)) for _ in range(2))
    assert one.dtype == np.int64 and np.array_equal(one, two)
    assert not np.array_equal(one, sampler(1000, 1 << 30, SecureGenerator()))
    for n in (0, 1, 70_000):
        assert len(sampler(n, 900, SecureGenerator())) == n


def test_a_sigma_of_numpy_is_the_same_number():
    one, two = (discrete_gaussian(500, s, SecureGenerator.from_seed(1)) for s in (12, np.int8(12)))
    assert np.array_equal(one, two)
    rng = Words(0)
    discrete_gaussian(2000, np.int8(12), rng)
    assert rng.drawn > 4000  # some are settled by more bits: the rejection is at work


@pytest.mark.parametrize("sigma", [0, -3, 1.0, 2.5, True, MAX_SIGMA + 1, None])
def test_a_sigma_that_is_not_whole_is_refused(sigma):
    with pytest.raises(UserError, match="whole"):
        discrete_gaussian(3, sigma, SecureGenerator())


@pytest.mark.parametrize("sigma", [0, -1.0, math.nan, math.inf, 2 * MAX_SIGMA])
def test_a_sigma_out_of_range_is_refused(sigma):
    with pytest.raises(UserError, match="sigma"):
        rounded_gaussian(3, sigma, SecureGenerator())


# --- a sum and its noise ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("d", "bound", "sigma"), [(1, 0.25, 2.0), (7107, 0.25, 1.0), (100_000, 3.0, 0.6)])
def test_a_noisy_sum_lies_on_the_grid_and_has_the_counted_deviation(d, bound, sigma):
    total = {"a": torch.randn(d, dtype=torch.float64), "b": torch.randn(2, 3)}
    noisy = local_noise(total, sigma, bound, SecureGenerator.from_seed(d))
    scale = 2.0 ** math.ceil(math.log2(2**12 * math.sqrt(d + 6) / bound / min(1, sigma)))
    assert all((value * scale).frac().eq(0).all() and value.dtype == torch.float64 for value in noisy.values())
    assert noisy["b"].shape == (2, 3)
    wanted = sigma * l2_sensitivity(scale, bound, d + 6) / scale
    assert sigma * bound * (1 + 2**-8) < wanted < sigma * bound * (1 + 2**-8 + 2**-11)
    draws = torch.cat([(local_noise(total, sigma, bound, SecureGenerator.from_seed(s))["a"] - total["a"])[:1000]
                       for s in range(10 if d > 1 else 500)]) / wanted  # fmt: skip
    assert stats.kstest(draws.numpy(), "norm").pvalue > 1e-3


def test_rounding_moves_two_sums_no_further_apart_than_counted():
    """Each of d numbers just below a half, and a unit that moves them all over it."""
    d, bound = 20_000, 0.5
    quiet = 1e-15  # noise that rounds to nothing
    scale = 2.0 ** math.ceil(math.log2(2**36 * math.sqrt(d) / bound))
    old = (torch.randint(-50, 50, (d,)) + 0.4999) / scale
    one, two = (local_noise({"w": x.double()}, quiet, bound, SecureGenerator())["w"] * scale
                for x in (old.double(), old.double() + bound / math.sqrt(d)))  # fmt: skip
    moved = float((one - two).norm())
    assert scale * bound < moved <= scale * bound + math.sqrt(d) < l2_sensitivity(scale, bound, d)


def test_noise_too_large_for_64_bits_is_refused():
    with pytest.raises(UserError, match="sigma"):
        local_noise({"w": torch.zeros(10)}, 1e12, 1.0, SecureGenerator())
