"""Arithmetic modulo 2³² and comparison keys, against integers of any size and against plain comparison."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from primia_lite.smpc import dcf
from primia_lite.smpc.ring import Factor, Stream, decode, encode, pack, product, share, unpack


def uniform(rng, *shape):
    return rng.integers(0, 2**32, shape, dtype=np.uint32)


def exact(x, w, **options):
    """A convolution modulo 2³² by four of 16-bit halves, whose int64 sums are exact."""
    halves = [
        [torch.from_numpy(((a >> np.uint32(s)) & np.uint32(0xFFFF)).astype(np.int64)) for s in (0, 16)] for a in (x, w)
    ]
    (x0, x1), (w0, w1) = halves
    low = F.conv2d(x0, w0, **options) + ((F.conv2d(x0, w1, **options) + F.conv2d(x1, w0, **options)) << 16)
    return (low.numpy() & 0xFFFFFFFF).astype(np.uint32)


@pytest.mark.parametrize(("stride", "padding", "groups"), [(1, 1, 1), (2, 3, 1), (1, 0, 4)])
def test_convolutions_of_uniform_words_are_exact(stride, padding, groups):
    rng = np.random.default_rng(0)
    x, w = uniform(rng, 2, 8, 9, 9), uniform(rng, 16, 8 // groups, 3, 3)
    options = {"stride": stride, "padding": padding, "groups": groups}
    assert np.array_equal(product(x, Factor(w), **options), exact(x, w, **options))


def test_the_widest_sums_of_resnet18_stay_exact_to_the_last_bit():
    rng = np.random.default_rng(1)
    x, w = uniform(rng, 200, 4608), uniform(rng, 40, 4608)
    want = exact(x[:, :, None, None], w[:, :, None, None])[:, :, 0, 0]
    assert np.abs((product(x, Factor(w)) - want).view(np.int32)).max() <= 1


@pytest.mark.parametrize("bits", [16, 17, 18, 20, 24, 32])
def test_packed_words_come_back(bits):
    x = uniform(np.random.default_rng(2), 1001) & np.uint32(2**bits - 1)
    packed = pack(x, bits)
    assert np.array_equal(unpack(packed, bits, len(x)), x) and len(packed) <= -(-len(x) * bits // 8) + 1


def test_shares_add_up_and_each_alone_is_uniform():
    values = encode(np.linspace(-3, 3, 100_000), 10)
    first, second = share(values)
    assert np.allclose(decode(first + second, 10), np.linspace(-3, 3, 100_000), atol=2**-11)
    for part in (first, second):
        counts = np.bincount(part >> np.uint32(28), minlength=16)
        assert ((counts - 6250) ** 2 / 6250).sum() < 60  # χ² of 15 degrees: beyond once in ten million


def test_a_stream_repeats_from_its_seed_and_goes_on():
    one, again = Stream(b"s" * 16), Stream(b"s" * 16)
    parts = np.concatenate([one.draw(1000), one.draw(70_000)])
    assert np.array_equal(parts[:1000], again.draw(1000)) and np.array_equal(parts[1000:], again.draw(70_000))


def keys(alpha, bits, seed=3):
    rng = np.random.default_rng(seed)
    seeds = tuple(rng.integers(0, 2**64, (len(alpha), 2), dtype=np.uint64) for _ in range(2))
    return seeds, dcf.generate(alpha, bits, seeds)


def compared(alpha, x, bits):
    seeds, words = keys(alpha, bits)
    return dcf.evaluate(0, x, bits, seeds[0], words) ^ dcf.evaluate(1, x, bits, seeds[1], words)


@pytest.mark.parametrize("bits", [3, 7, 8, 9])
def test_every_pair_of_few_bits_is_compared_rightly(bits):
    alpha, x = (grid.ravel().astype(np.uint32) for grid in np.meshgrid(np.arange(2**bits), np.arange(2**bits)))
    assert np.array_equal(compared(alpha, x, bits), x < alpha)


@pytest.mark.parametrize("bits", [15, 17, 31])
def test_comparisons_at_the_edges(bits):
    rng = np.random.default_rng(4)
    alpha = np.concatenate([rng.integers(0, 2**bits, 5000), [0, 0, 2**bits - 1, 2**bits - 1]]).astype(np.uint32)
    x = np.concatenate([alpha[:5000] + rng.integers(-1, 2, 5000), [0, 1, 2**bits - 1, 0]])
    x = np.clip(x, 0, 2**bits - 1).astype(np.uint32)
    assert np.array_equal(compared(alpha, x, bits), x < alpha)
    assert dcf.key_bytes(bits) == keys(alpha[:1], bits)[1].nbytes


def test_a_key_says_nothing_of_its_threshold_to_its_holder():
    """Correction words and one server's outputs for two thresholds far apart: both look uniform. The control, whose
    second seed is all zero, doesn't hide them."""
    n, bits = 20_000, 15
    for alpha in (0, 2**bits - 1):
        seeds, words = keys(np.full(n, alpha, np.uint32), bits)
        ones = np.unpackbits(words.view(np.uint8)).mean()
        assert abs(ones - 0.5) < 0.002
        for x in (0, 1000):
            bit = dcf.evaluate(0, np.full(n, x, np.uint32), bits, seeds[0], words)
            assert abs(bit.mean() - 0.5) < 6 * 0.5 / n**0.5
    same = np.ones((n, 2), np.uint64)
    repeated = dcf.generate(np.zeros(n, np.uint32), bits, (same, same))
    assert len(np.unique(repeated[0], axis=0)) == 1  # constant seeds: every key is the same
