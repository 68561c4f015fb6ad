"""Shamir's sharing: what shares give, and that fewer tell nothing."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from primia_lite.secagg import shares as shamir
from primia_lite.secagg.shares import PRIME, SHARE_BYTES, combine, split

SECRET = bytes(range(32))


@given(st.data())
def test_any_threshold_of_shares_give_the_secret(data):
    secret = data.draw(st.binary(min_size=32, max_size=32))
    points = data.draw(st.lists(st.integers(1, 2000), min_size=1, max_size=12, unique=True))
    threshold = data.draw(st.integers(1, len(points)))
    shares = split(secret, threshold, points)
    assert list(shares) == points and all(len(share) == SHARE_BYTES for share in shares.values())
    chosen = data.draw(st.permutations(points))[: data.draw(st.integers(threshold, len(points)))]
    assert combine({p: shares[p] for p in chosen}, threshold) == secret
    if threshold > 1:
        with pytest.raises(ValueError, match="needed"):
            combine({p: shares[p] for p in chosen[: threshold - 1]}, threshold)


def test_the_modulus_is_a_prime_larger_than_any_secret():
    # Lucas and Lehmer's test of Mersenne numbers.
    s = 4
    for _ in range(519):
        s = (s * s - 2) % PRIME
    assert s == 0 and PRIME > 2**256


@pytest.mark.parametrize("call", [
    lambda: split(bytes(31), 2, [1, 2]), lambda: split(bytes(33), 2, [1, 2]), lambda: split(SECRET, 0, [1]),
    lambda: split(SECRET, 3, [1, 2]), lambda: split(SECRET, 2, [1, 1, 2]), lambda: split(SECRET, 1, [0]),
    lambda: combine(split(SECRET, 2, [1, 2]), 0), lambda: combine(split(SECRET, 2, [1, 2]), 3),
    lambda: combine(split(SECRET, 2, [1, 2]), -1),
    lambda: combine(split(SECRET, 2, [1, 2]) | {2: bytes(65)}, 2),
])  # fmt: skip
def test_what_does_not_fit_is_refused(call):
    with pytest.raises(ValueError, match="secret|points|needed|share"):
        call()


def test_a_share_that_lies_never_gives_the_secret():
    shares = split(SECRET, 2, [1, 2])
    for bit in (0, 7, 263):  # a change at one point moves the value at 0 by a multiple of a field element
        lie = (int.from_bytes(shares[2], "big") ^ 1 << bit).to_bytes(SHARE_BYTES, "big")
        try:
            assert combine(shares | {2: lie}, 2) != SECRET
        except ValueError as error:
            assert "one of them is false" in str(error)


def tiny(monkeypatch, prime=11):
    monkeypatch.setattr(shamir, "PRIME", prime)
    monkeypatch.setattr(shamir, "SECRET_BYTES", 1)
    monkeypatch.setattr(shamir, "SHARE_BYTES", 1)


def test_fewer_shares_than_the_threshold_are_uniform_whatever_the_secret(monkeypatch):
    tiny(monkeypatch)
    for secret in (0, 1, 7):
        pairs = np.zeros((11, 11))
        for _ in range(6000):
            shares = split(bytes([secret]), 3, [1, 2, 3])
            pairs[shares[1][0], shares[3][0]] += 1
        assert stats.chisquare(pairs.ravel()).pvalue > 1e-10


def test_control_enough_shares_are_not(monkeypatch):
    tiny(monkeypatch)
    pairs = np.zeros((11, 11))
    for _ in range(2000):
        shares = split(b"\x07", 2, [1, 2, 3])
        pairs[shares[1][0], shares[3][0]] += 1
    assert stats.chisquare(pairs.ravel()).pvalue < 1e-10


def test_fewer_shares_fit_every_secret_once(monkeypatch):
    """Exhaustively in a field of 7: two shares of a threshold of three, all coefficients."""
    tiny(monkeypatch, 7)
    coefficients = iter(())
    monkeypatch.setattr(shamir.secrets, "randbelow", lambda _: next(coefficients))
    seen = {}
    for secret, a, b in itertools.product(range(7), repeat=3):
        coefficients = iter((a, b))
        shares = split(bytes([secret]), 3, [1, 2, 4])
        seen.setdefault((shares[1], shares[2]), []).append(secret)
    assert len(seen) == 49 and all(sorted(secrets) == list(range(7)) for secrets in seen.values())


def test_real_shares_look_uniform():
    words = np.concatenate([np.frombuffer(split(bytes(32), 2, [1, 2])[1][2:], "u1") for _ in range(1500)])
    assert stats.chisquare(np.bincount(words, minlength=256)).pvalue > 1e-10
