"""Masks are uniform in R_q, cancelled where the result is, and used once; what replies tell of the weights."""

from __future__ import annotations

import numpy as np
import pytest
from ckks_parties import head, pair, weights_of
from scipy.stats import binomtest, chisquare

from primia_lite.config import UserError
from primia_lite.encrypted.client import CkksClient
from primia_lite.encrypted.parameters import Parameters
from primia_lite.encrypted.reply_masks import Blind, Mask, uniform
from primia_lite.encrypted.seal import Context, dump

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


def centred(draws: np.ndarray, modulus: int) -> np.ndarray:
    """Residues as int64 in (-q/2, q/2]."""
    draws = draws.ravel().astype(np.int64)
    return np.where(draws > modulus // 2, draws - modulus, draws)


def uniformity(draws: np.ndarray, modulus: int) -> dict[str, float]:
    """p-values: parity and lowest byte of the centred numbers; of the range [0, modulus) 64 equal parts, and how many
    lie in the 2e-4 of it where centred numbers are largest."""
    parts = (draws.ravel().astype(object) * 64 // modulus).astype(int)
    signed = centred(draws, modulus)
    edge = int((np.abs(signed) > (0.5 - 1e-4) * modulus).sum())
    return {
        "parity": chisquare(np.bincount(signed & 1, minlength=2)).pvalue,
        "low": chisquare(np.bincount(signed & 255, minlength=256)).pvalue,
        "range": chisquare(np.bincount(parts, minlength=64)).pvalue,
        "edge": binomtest(edge, signed.size, 2e-4).pvalue,
    }


def looks_uniform(draws: np.ndarray, modulus: int) -> None:
    for name, p in uniformity(draws, modulus).items():
        assert p > 1e-5, (name, p)


def float_mask(context) -> np.ndarray:
    """The control, uint64 [N]: floats over not quite half of the modulus, and then doubled."""
    modulus = context.moduli[0]
    half = np.rint((np.random.default_rng().random(context.n) - 0.5) * (0.4999 * modulus)).astype(np.int64)
    half[KEEP] = 0
    return (2 * half % modulus).astype(np.uint64)


def test_masks_are_uniform_modulo_each_prime_and_independently(context):
    drawn = values(context)
    others = np.setdiff1d(np.arange(context.n), KEEP)
    for place, modulus in enumerate(context.moduli_at(0)):
        assert drawn[:, place].max() < modulus
        looks_uniform(drawn[:, place][:, others], modulus)
    first, second = (drawn[:, place].ravel() & np.uint64(15) for place in (0, 1))
    assert chisquare(np.bincount((first * np.uint64(16) + second).astype(int), minlength=256)).pvalue > 1e-5


@pytest.fixture(scope="module")
def wide():
    """One prime of 54 bits: wider than a float."""
    return Context(Parameters(4096, (54,), 24))


def test_parity_low_bits_and_range_tell_a_mask_from_the_control(wide):
    """The control's centred numbers are even, empty in the bits that a float has none for, and never near q/2."""
    modulus, others = wide.moduli[0], np.setdiff1d(np.arange(wide.n), KEEP)
    looks_uniform(values(wide, 50)[:, 0][:, others], modulus)
    control = uniformity(np.stack([float_mask(wide) for _ in range(50)])[:, others], modulus)
    assert max(control[look] for look in ("parity", "low", "edge")) < 1e-9


def test_parity_shows_products_through_the_control(wide):
    """What a product's low bit is, a reply tells; through a mask it doesn't."""
    modulus, others = wide.moduli[0], np.setdiff1d(np.arange(wide.n), KEEP)
    product = uniform(1 << 40, wide.n)
    for reply, least, most in (
        ((float_mask(wide) + product) % np.uint64(modulus), 0.99, 1.0),
        (Mask([modulus], wide.n, KEEP).hide(product[None])[0], 0.4, 0.6),
    ):
        same = (centred(reply, modulus)[others] & 1) == (product[others] & np.uint64(1)).astype(int)
        assert least <= same.mean() <= most


def test_reuse_shows_products_through_the_control(wide):
    """The difference of two replies: that of the products if they have one mask, which a Mask refuses."""
    modulus, others = wide.moduli[0], np.setdiff1d(np.arange(wide.n), KEEP)
    products, control = [uniform(1 << 40, wide.n) for _ in range(2)], float_mask(wide)

    def difference(first, second) -> np.ndarray:
        return (first.astype(np.int64) - second.astype(np.int64))[others] % modulus

    shown = difference(*((control + product) % np.uint64(modulus) for product in products))
    np.testing.assert_array_equal(shown, difference(*products))
    masks = [Mask([modulus], wide.n, KEEP) for _ in products]
    looks_uniform(difference(*(m.hide(p[None])[0] for m, p in zip(masks, products, strict=True))), modulus)
    with pytest.raises(UserError, match="reply"):
        masks[0].hide(products[1][None])


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


# --- uploads and replies ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parties():
    """Client, server, session, and the prime of a head of 40 features."""
    client, server, session = pair(head(40), (40,))
    return client, server, session, server.context.moduli[0]


def replied(server, data: bytes) -> np.ndarray:
    """Integers of a reply, uint64 [2, 1, N]."""
    return server.context.integers(data, scale=server.packing.reply_scale(server.context))


def uploaded(client, server, film, *, ntt=True) -> np.ndarray:
    """Integers of an upload, uint64 [2, 1, N]."""
    (data,), scale = client.encrypt(film), server.packing.fresh_scale
    ciphertext = server.context.receive(data, scale=scale)
    if not ntt:
        server.context.evaluator.transform_from_ntt_inplace(ciphertext)
    return server.context.integers(dump(ciphertext), scale=scale, ntt=ntt)


@pytest.mark.parametrize("ntt", [True, False])
def test_uploads_are_uniform_and_differ_everywhere(parties, ntt):
    client, server, _, modulus = parties
    drawn = np.stack([uploaded(client, server, np.ones(40) / 40, ntt=ntt)[:, 0] for _ in range(16)])
    assert (drawn[0] == drawn[1]).mean() < 1e-3
    for polynomial in (0, 1):
        looks_uniform(drawn[:, polynomial], modulus)


def test_an_upload_is_noise_under_another_key(parties):
    client, server, _, modulus = parties
    film = np.linspace(-0.2, 0.2, 40)
    integers = [uploaded(client, server, film, ntt=False) for _ in range(3)]
    own = np.array(client.key.coefficients(integers[0], range(40)), float) / server.packing.fresh_scale
    np.testing.assert_allclose(own, film, atol=1e-6)
    other, places = CkksClient(server.packing).key, range(0, server.context.n, 3)
    looks_uniform(np.array([v % modulus for each in integers for v in other.coefficients(each, places)]), modulus)


def test_replies_to_one_upload_share_nothing_and_say_the_same(parties):
    client, server, session, modulus = parties
    film = np.linspace(-0.2, 0.2, 40)
    upload = client.encrypt(film)
    session.prepare()  # one mask from before, one made now
    one, two = session.diagnose(upload), session.diagnose(upload)
    assert session.prepared == 0
    a, b = (replied(server, reply[0]).astype(np.int64) for reply in (one, two))
    for polynomial in ((a - b) % modulus).astype(np.uint64):
        looks_uniform(polynomial, modulus)
    np.testing.assert_array_equal(client.decrypt(one), client.decrypt(two))
    assert np.abs(client.decrypt(one) - weights_of(head(40)) @ film).max() < 1e-3


def test_all_but_the_kept_coefficients_decrypt_to_noise(parties):
    client, server, session, modulus = parties
    (reply,) = session.diagnose(client.encrypt(np.ones(40) / 40))
    others = [k for k in range(0, server.context.n, 3) if k not in server.packing.logit_places[0]]
    read = client.key.coefficients(replied(server, reply), others)
    looks_uniform(np.array([v % modulus for v in read], np.uint64), modulus)


def test_a_blind_is_used_once(parties):
    client, server, session, _ = parties
    blind = Blind(server.context, session.encryptor, 0, server.packing.logit_places[0])
    blind.seal(*server.receive(client.encrypt(np.zeros(40))))
    with pytest.raises(UserError, match="used"):
        blind.seal(*server.receive(client.encrypt(np.zeros(40))))
