"""The exact discrete Gaussian: against its definition and an independent sampler, with controls that must fail."""

import ast
import inspect
from fractions import Fraction

import numpy as np
import pytest
from scipy import stats

from primia_lite.config import UserError
from primia_lite.privacy import discrete
from primia_lite.privacy.discrete import MAX_SIGMA, discrete_gaussian
from primia_lite.privacy.rng import SecureGenerator

N = 200_000


def pmf(sigma, variance=None, width=40):
    """The definition, on -width σ..width σ."""
    k = np.arange(-width * sigma, width * sigma + 1)
    p = np.exp(-(k**2) / (2 * (variance or sigma**2)))
    return k, p / p.sum()


def fits(x, sigma):
    """p-value of the chi-square test against the definition; tails with under 10 expected are put together."""
    k, p = pmf(sigma)
    expected = p * len(x)
    bulk = expected >= 10
    seen = np.bincount(x - k[0], minlength=len(k))
    return stats.chisquare(
        np.append(seen[bulk], seen[~bulk].sum()), np.append(expected[bulk], expected[~bulk].sum())
    ).pvalue  # fmt: skip


@pytest.mark.parametrize("sigma", [1, 2, 3, 7, 50])
def test_probabilities_are_those_of_the_definition(sigma):
    assert fits(discrete_gaussian(N, sigma, SecureGenerator.from_seed(sigma)), sigma) > 1e-3


def test_the_chi_square_test_tells_rounded_and_wrong_noise_apart():
    normal = np.random.default_rng(0).normal
    assert fits(np.rint(normal(scale=1.0, size=N)).astype(int), 1) < 1e-10
    assert fits(discrete_gaussian(N, 50, SecureGenerator.from_seed(0)), 53) < 1e-10
    x = discrete_gaussian(N, 3, SecureGenerator.from_seed(0))
    extra = np.random.default_rng(1).random(N) < 0.02
    assert fits(np.where(extra, 0, x), 3) < 1e-10  # a heavier zero
    assert fits(np.abs(x), 3) < 1e-10


@pytest.mark.parametrize("sigma", [1 << 20, (1 << 40) + 12345, MAX_SIGMA])
def test_large_sigma_is_normal_to_the_eye(sigma):
    x = discrete_gaussian(N, sigma, SecureGenerator.from_seed(1))
    assert stats.kstest(x / sigma, "norm").pvalue > 1e-3
    assert abs((x / sigma).std() - 1) < 4 / np.sqrt(2 * N)
    assert stats.kstest(x / sigma * 1.02, "norm").pvalue < 1e-3  # the test can tell


def test_low_bits_are_uniform_where_a_float_has_none():
    """At 2^56 a float64 is a multiple of 8 at least: rounded floats have three zeros at the end."""
    x = discrete_gaussian(100_000, MAX_SIGMA - 1, SecureGenerator.from_seed(2))
    assert stats.chisquare(np.bincount(x & 255, minlength=256)).pvalue > 1e-3
    floats = np.random.default_rng(0).normal(scale=2.0**56, size=100_000).astype(np.int64)
    assert stats.chisquare(np.bincount(floats & 255, minlength=256)).pvalue < 1e-10


def test_samples_are_independent_across_blocks():
    x = discrete_gaussian(N, 5, SecureGenerator.from_seed(3)).astype(float)
    for lag in (1, 2, 31_000):
        for y in (x, np.abs(x)):
            assert abs(np.corrcoef(y[:-lag], y[lag:])[0, 1]) < 4 / np.sqrt(N - lag)


def test_a_seed_repeats_and_the_operating_system_does_not():
    one, two = (discrete_gaussian(1000, 1 << 30, SecureGenerator.from_seed(4)) for _ in range(2))
    assert one.dtype == np.int64 and np.array_equal(one, two)
    assert not np.array_equal(one, discrete_gaussian(1000, 1 << 30, SecureGenerator()))
    for n in (0, 1, 70_000):
        assert len(discrete_gaussian(n, 9, SecureGenerator())) == n


def test_words_are_all_that_is_drawn_and_no_float_is_made():
    class Words:
        def words(self, n):
            return SecureGenerator.words(generator, n)

    generator = SecureGenerator.from_seed(5)
    got = discrete_gaussian(500, 77, Words())
    assert np.array_equal(got, discrete_gaussian(500, 77, SecureGenerator.from_seed(5)))
    for node in ast.walk(ast.parse(inspect.getsource(discrete))):
        assert not isinstance(node, ast.Div)
        assert not (isinstance(node, ast.Constant) and isinstance(node.value, float))
        assert not (isinstance(node, ast.Attribute) and ("float" in node.attr or node.attr in ("exp", "log", "sqrt")))


@pytest.mark.parametrize("m", [3, 10, (1 << 63) - 25])
def test_uniform_numbers_have_no_modulo_bias(m):
    """Near 2^63 a plain remainder would give the lower numbers two words of three."""
    x = discrete._uniform(100_000, m, SecureGenerator.from_seed(6))
    bins = np.bincount((x // ((m + 9) // 10)), minlength=10)
    width = np.diff(np.minimum(np.arange(11, dtype=object) * ((m + 9) // 10), m)).astype(float)
    assert stats.chisquare(bins[width > 0], width[width > 0] / m * len(x)).pvalue > 1e-3
    each = discrete._uniform(100_000, np.full(100_000, m), SecureGenerator.from_seed(6))
    assert np.array_equal(x, each)


def test_words_that_would_bias_a_remainder_are_drawn_again():
    m = (1 << 63) + 1  # 2^64 = m + (m - 2): words from m on are too many, nearly half

    class Words:
        calls = 0

        def words(self, n):
            self.calls += 1
            return np.full(n, m if self.calls == 1 else m - 1, np.uint64)

    words = Words()
    discrete._uniform(4, m, words)
    assert words.calls == 2


def test_fewest_proposals_are_kept_as_theory_has_it():
    kept = len(discrete._proposals(N, 1 << 30, SecureGenerator.from_seed(7)))
    # Karney (2016): sum over k of (1 - e^-1/2) exp(-k²/2) times the mean of exp(-x (2k + x) / 2).
    theory = (1 - np.exp(-0.5)) * np.sqrt(np.pi / 2)
    assert stats.binomtest(kept, N, theory).pvalue > 1e-3


class Textbook:
    """Canonne, Kamath and Steinke (2020), algorithms 1 to 3, one sample at a time in fractions."""

    def __init__(self, seed):
        self.random = np.random.default_rng(seed)

    def bernoulli(self, p: Fraction) -> bool:
        return int(self.random.integers(p.denominator)) < p.numerator

    def exp(self, gamma: Fraction) -> bool:
        if gamma > 1:
            return all(self.exp(Fraction(1)) for _ in range(int(gamma))) and self.exp(gamma - int(gamma))
        k = 1
        while self.bernoulli(gamma / k):
            k += 1
        return k % 2 == 1

    def laplace(self, t: int) -> int:
        while True:
            u = int(self.random.integers(t))
            if not self.exp(Fraction(u, t)):
                continue
            v = 0
            while self.exp(Fraction(1)):
                v += 1
            negative, size = self.bernoulli(Fraction(1, 2)), u + t * v
            if not (negative and size == 0):
                return -size if negative else size

    def gaussian(self, sigma: int) -> int:
        t = sigma + 1
        while True:
            y = self.laplace(t)
            if self.exp((abs(y) - Fraction(sigma**2, t)) ** 2 / (2 * sigma**2)):
                return y


@pytest.mark.parametrize("sigma", [2, 11])
def test_an_independent_sampler_gives_the_same(sigma):
    textbook = Textbook(sigma)
    theirs = np.array([textbook.gaussian(sigma) for _ in range(2000)])
    assert fits(theirs, sigma) > 1e-3
    ours = discrete_gaussian(2000, sigma, SecureGenerator.from_seed(8))
    edges = np.arange(-2 * sigma, 2 * sigma + 2, max(1, sigma // 4))
    table = [np.bincount(np.digitize(x, edges), minlength=len(edges) + 1) for x in (ours, theirs)]
    assert stats.chi2_contingency(table).pvalue > 1e-3


@pytest.mark.parametrize("sigma", [0, -3, 1.0, 2.5, True, MAX_SIGMA + 1, None])
def test_a_sigma_that_is_not_whole_is_refused(sigma):
    with pytest.raises(UserError, match="whole number from 1 to 2.56; round it up"):
        discrete_gaussian(3, sigma, SecureGenerator())
