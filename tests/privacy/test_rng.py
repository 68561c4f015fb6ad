"""The cryptographic generator: its distributions, its independence, and that it never reaches a disk."""

import copy
import pickle

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from scipy import stats

from primia_lite.privacy.rng import SecureGenerator


def test_stream_is_chacha20_of_the_key():
    key = bytes(range(32))
    expected = Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor().update(bytes(64))
    assert SecureGenerator(key).bytes(64) == expected


@pytest.mark.parametrize("probability", [0.0, 0.01, 0.25, 0.9, 1.0])
def test_coins_have_their_probability(probability):
    n = 200_000
    heads = SecureGenerator.from_seed(2).bernoulli(n, probability).sum()
    assert stats.binomtest(int(heads), n, probability).pvalue > 1e-3


def test_operating_system_keys_differ_and_seeds_repeat():
    assert not np.array_equal(SecureGenerator().words(4), SecureGenerator().words(4))
    assert np.array_equal(SecureGenerator.from_seed(3).words(4), SecureGenerator.from_seed(3).words(4))
    assert SecureGenerator.from_seed(3).seeded and not SecureGenerator().seeded
    assert not SecureGenerator.for_seed(None).seeded and SecureGenerator.for_seed(0).seeded


def test_children_are_independent_of_each_other_and_of_what_was_drawn():
    parent = SecureGenerator.from_seed(4)
    first = parent.child("round", 1, "A").words(1000)
    parent.words(17)
    assert np.array_equal(parent.child("round", 1, "A").words(1000), first)
    other = parent.child("round", 1, "B").words(1000)
    assert abs(np.corrcoef(first.astype(float), other.astype(float))[0, 1]) < 0.13
    assert parent.child("x").seeded


@pytest.mark.parametrize("write", [pickle.dumps, copy.copy, copy.deepcopy])
def test_state_is_never_written(write):
    with pytest.raises(TypeError, match="never"):
        write(SecureGenerator())


def test_wrong_key_length():
    with pytest.raises(ValueError, match="bytes"):
        SecureGenerator(b"short")
