"""CKKS parameters: SEAL's own table, refused sets, and the error that choose() promises."""

from __future__ import annotations

import numpy as np
import pytest
import tenseal.sealapi as sealapi

from primia_lite.config import UserError
from primia_lite.encrypted.batch import BatchCNNPacking, BatchLinearPacking
from primia_lite.encrypted.keys import SecretKey
from primia_lite.encrypted.packing import CNNPacking, LinearPacking
from primia_lite.encrypted.parameters import (
    MAX_BITS_128,
    Parameters,
    choose,
    choose_single_product,
    rescaling_error_bits,
)
from primia_lite.encrypted.seal import Context


@pytest.mark.parametrize("n", MAX_BITS_128)
def test_the_table_is_seals(n):
    assert sealapi.CoeffModulus.MaxBitCount(n, sealapi.SEC_LEVEL_TYPE.TC128) == MAX_BITS_128[n]


@pytest.mark.parametrize(
    ("n", "bits", "scale", "word"),
    [
        (4096, (54, 30, 54), 30, "weaker"),
        (3000, (54,), 24, "choose"),
        (8192, (60, 30, 30, 60), 40, "divides"),
        (8192, (60, 30, 30, 40), 30, "largest"),
        (8192, (40, 40, 40), 40, "room"),
        (8192, (61, 30, 61), 30, "primes"),
        (8192, (), 30, "primes"),
    ],
)
def test_sets_that_are_weak_or_wrong_are_refused(n, bits, scale, word):
    with pytest.raises(UserError, match=word):
        Parameters(n, bits, scale)


@pytest.mark.parametrize(("depth", "precision"), [(1, 14), (2, 18), (4, 14)])
def test_chosen_parameters_keep_their_promise(depth, precision):
    """Products, rescaled: the slots' error is that of ``depth`` rescalings."""
    parameters = choose(depth, precision_bits=precision)
    context, fresh, rng = Context(parameters), 2.0**parameters.scale_bits, np.random.default_rng(0)
    key, values = SecretKey(context), rng.uniform(-1, 1, parameters.slots)
    state = context.receive(key.encrypt(context.encode_slots(values, fresh)), scale=fresh)
    for level in range(depth):
        signs = rng.choice([-1.0, 1.0], parameters.slots)  # not all equal: that would divide without rounding
        plain = context.encode_slots(signs, float(context.moduli_at(level)[-1]), level)
        context.evaluator.multiply_plain_inplace(state, plain)
        values = values * signs
        context.evaluator.rescale_to_next_inplace(state)
        state.scale = fresh
    error = np.std(key.decrypt(state).real - values)
    promised = 2.0 ** (rescaling_error_bits(parameters.poly_modulus_degree) - parameters.scale_bits)
    assert promised <= 2.0**-precision
    assert 0.9 < error / (promised * depth**0.5) < 1.1


def test_choose_takes_the_smallest_ring_and_says_when_there_is_none():
    assert [choose(depth).poly_modulus_degree for depth in (0, 1, 2, 5)] == [4096, 4096, 8192, 16384]
    assert rescaling_error_bits(8192) == pytest.approx(np.log2(8192 / 6), abs=0.01)
    with pytest.raises(UserError, match="parameters"):
        choose(60)
    with pytest.raises(UserError, match="least"):
        choose(1, integer_bits=0)


def test_a_single_product_takes_all_bits_of_the_smallest_ring():
    for weight_bits, primes in ((0, 1), (20, 1), (40, 2), (60, 3)):
        found = choose_single_product(weight_bits, primes)
        modulus = sum(found.coeff_mod_bit_sizes[:primes])
        assert found.scale_bits == modulus - 8 - weight_bits >= 20
        smaller = [n for n in MAX_BITS_128 if n < found.poly_modulus_degree]
        assert all(MAX_BITS_128[n] * primes / (primes + (primes > 1)) < 28 + weight_bits for n in smaller)
    with pytest.raises(UserError, match="room"):
        choose_single_product(40)


@pytest.mark.parametrize(
    ("packing", "n", "bits", "scale"),
    [
        (LinearPacking(1280, 3), 2048, (54,), 26),
        (LinearPacking(1280, 3, flooded=True), 4096, (36, 36, 37), 48),
        (CNNPacking(28, 7, 3, 4, 64, 10), 8192, (49, 30, 30, 30, 30, 49), 30),
        (CNNPacking(28, 7, 3, 4, 0, 3), 8192, (52, 30, 30, 52), 30),
        (BatchLinearPacking(1280, 3), 2048, (54,), 26),
        (BatchCNNPacking(28, 7, 3, 4, 64, 10), 8192, (54, 27, 27, 27, 27, 54), 27),
        (BatchCNNPacking(28, 7, 3, 4, 0, 3), 8192, (56, 30, 30, 56), 30),
    ],
)
def test_packings_have_the_sets_that_follow_from_depth_and_precision(packing, n, bits, scale):
    """By choose() and choose_single_product(); the room that was asked for is there."""
    found = packing.parameters
    assert (found.poly_modulus_degree, found.coeff_mod_bit_sizes, found.scale_bits) == (n, bits, scale)
    assert found.levels == packing.reply_level
    assert packing.wrap_limit(Context(found)) > 85
