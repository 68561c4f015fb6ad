"""Masks are uniform in R_q, cancelled where the result is, and used once; what replies tell of the weights."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from torch import nn

from primia_lite.config import UserError
from primia_lite.encrypted.ckks import Client, Server
from primia_lite.encrypted.masks import Mask, uniform
from primia_lite.encrypted.parameters import Parameters
from primia_lite.encrypted.seal import Context

KEEP = [7, 100, 4095]


@pytest.fixture(scope="module")
def context():
    return Context(Parameters(4096, (39, 30, 39), 30))


def values(context, draws=8) -> np.ndarray:
    """Masks themselves, uint64 [draws, primes, N]: what is added to nothing."""
    moduli = context.moduli_at(0)
    return np.stack(
        [Mask(moduli, context.n, KEEP).hide(np.zeros((len(moduli), context.n), np.uint64)) for _ in range(draws)]
    )


def uniformity(draws: np.ndarray, modulus: int) -> dict[str, float]:
    """p-values: parity, the lowest byte, and 64 equal parts of [0, modulus)."""
    draws = draws.ravel().astype(np.uint64)
    parts = (draws.astype(object) * 64 // modulus).astype(int)
    return {
        "parity": chisquare(np.bincount((draws & np.uint64(1)).astype(int), minlength=2)).pvalue,
        "low": chisquare(np.bincount((draws & np.uint64(255)).astype(int), minlength=256)).pvalue,
        "range": chisquare(np.bincount(parts, minlength=64)).pvalue,
    }


def float_mask(context, keep, scale) -> np.ndarray:
    """The control: a mask drawn by floats, doubled to reach over the modulus. Each of its three faults must show."""
    modulus = context.moduli[0]
    draws = np.frombuffer(os.urandom(8 * context.n), np.uint64).astype(np.float64) / 2**64 - 0.5
    draws = draws * modulus * 0.4999
    draws[keep] = 0
    doubled = 2 * np.round(draws).astype(object)
    return np.array([int(v) % (2 * modulus) % modulus if v >= 0 else int(v) + modulus for v in doubled], object).astype(
        np.uint64
    )


def test_masks_are_uniform_modulo_each_prime(context):
    drawn = values(context)
    others = np.setdiff1d(np.arange(context.n), KEEP)
    for place, modulus in enumerate(context.moduli_at(0)):
        assert drawn[:, place].max() < modulus
        for name, p in uniformity(drawn[:, place][:, others], modulus).items():
            assert p > 1e-5, (name, p)


def test_the_control_fails_the_same_test():
    context = Context(Parameters(4096, (54,), 24))
    drawn = np.stack([float_mask(context, KEEP, 2.0**44) for _ in range(8)])
    others = np.setdiff1d(np.arange(context.n), KEEP)
    drawn = drawn[:, others]
    # Positive ones are even; and 54 bits of a float leave the lowest bits empty.
    positive = drawn[drawn < context.moduli[0] // 2]
    assert uniformity(positive, context.moduli[0])["parity"] < 1e-9
    assert uniformity(drawn, context.moduli[0])["low"] < 1e-9


def test_primes_are_masked_independently(context):
    """Uniform modulo q is uniform modulo each prime, independently."""
    drawn = values(context)
    first, second = (drawn[:, place].ravel() & np.uint64(15) for place in (0, 1))
    assert chisquare(np.bincount((first * np.uint64(16) + second).astype(int), minlength=256)).pvalue > 1e-5


@pytest.mark.parametrize("modulus", [3, 1000, (1 << 20) + 7])
def test_small_moduli_are_drawn_evenly(modulus):
    draws = uniform(modulus, 60_000)
    assert draws.max() < modulus
    assert chisquare(np.bincount((draws.astype(int) * min(modulus, 50)) // modulus)).pvalue > 1e-5


def test_kept_coefficients_are_untouched_and_the_rest_moves(context):
    moduli = context.moduli_at(0)
    polynomial = np.stack([uniform(modulus, context.n) for modulus in moduli])
    hidden = Mask(moduli, context.n, KEEP).hide(polynomial)
    np.testing.assert_array_equal(hidden[:, KEEP], polynomial[:, KEEP])
    assert (hidden != polynomial).sum() >= hidden.size - len(moduli) * len(KEEP) - 5


def test_a_mask_is_used_once(context):
    moduli = context.moduli_at(0)
    mask, zeros = Mask(moduli, context.n, KEEP), np.zeros((len(moduli), context.n), np.uint64)
    mask.hide(zeros)
    with pytest.raises(UserError, match="draw a new one for each reply"):
        mask.hide(zeros)


# --- replies ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parties():
    torch.manual_seed(0)
    model = nn.Linear(40, 3, bias=False)
    server = Server(model, (40,))
    client = Client(server.packing)
    return model, client, server, server.open(client.public())


def parts(server, data, *, ntt, scale) -> np.ndarray:
    return server.context.integers(data, scale=scale, level=0, ntt=ntt)


def test_replies_to_one_upload_differ_everywhere_and_say_the_same(parties):
    _, client, server, session = parties
    upload = client.encrypt(np.ones(40) / 40)
    one, two = session.diagnose(upload), session.diagnose(upload)
    scale = server.packing.reply_scale(server.context)
    a, b = (parts(server, reply[0], ntt=False, scale=scale) for reply in (one, two))
    assert (a == b).mean() < 1e-3
    np.testing.assert_array_equal(client.decrypt(one), client.decrypt(two))


def test_all_but_the_kept_coefficients_decrypt_to_noise(parties):
    _, client, server, session = parties
    (reply,) = session.diagnose(client.encrypt(np.ones(40) / 40))
    scale, modulus = server.packing.reply_scale(server.context), server.context.moduli[0]
    integers = parts(server, reply, ntt=False, scale=scale)
    keep = server.packing.keep[0]
    others = [k for k in range(0, server.context.n, 3) if k not in keep]
    read = np.array([v % modulus for v in client._key.coefficients(integers, others, 0)], object)
    for name, p in uniformity(read.astype(np.uint64), modulus).items():
        assert p > 1e-5, (name, p)
