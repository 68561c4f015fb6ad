"""Careless use gives key and weights away; flooding, its price, and what is left of a logit."""

from __future__ import annotations

import math

import ckks_parties as parties
import numpy as np
import pytest
import tenseal.sealapi as sealapi
from ckks_parties import unit, weights_of
from scipy.stats import chisquare, kstest

from primia_lite.attacks.ciphertexts import SENT, recover_key, weights_from_replies
from primia_lite.config import UserError
from primia_lite.encrypted.client import CkksClient
from primia_lite.encrypted.flooding import Flooding, flooding_std, wide_gaussian
from primia_lite.encrypted.packing import CNNPacking, LinearPacking
from primia_lite.encrypted.seal import CiphertextError, Context, dump
from primia_lite.encrypted.server import CkksServer
from primia_lite.encrypted.wire import packing_from, spec_of
from primia_lite.models.networks import ckksnet

FEATURES = 40


@pytest.mark.parametrize("features", [FEATURES, 1500])  # of one upload, and of several
@pytest.mark.parametrize("shared", ["whole", "logits", "flooded"])
def test_a_whole_decryption_gives_the_key_away_and_rounded_logits_and_flooding_do_not(features, shared):
    found = recover_key(unit(3, features, seed=1), unit(features), shared)
    assert found == 1 if shared == "whole" else found < 0.01


@pytest.mark.parametrize("features", [FEATURES, 1000])
@pytest.mark.parametrize(("attack", "works_on"), [("ratio", {"bare"}), ("division", {"bare", "re-randomised"})])
def test_weights_fall_out_of_replies_that_are_not_sealed(features, attack, works_on):
    """Each of the two defences stops one attack: re-randomising the first, the mask the second."""
    weights, films = unit(3, features, seed=1), unit(8, features, seed=2)
    for sent in SENT:
        found = weights_from_replies(weights, films, sent, attack)
        if sent in works_on:
            np.testing.assert_allclose(found, weights, atol=2.0**-20 if attack == "ratio" else 1e-4)
        else:
            assert np.median(np.abs(found)) > 1  # weights are 0.03 to 0.2
            assert abs(np.corrcoef(found.ravel(), weights.ravel())[0, 1]) < 0.5


def test_the_attacks_refuse_what_they_are_not_for():
    weights = unit(3, FEATURES)
    with pytest.raises(UserError, match="flooded"):
        recover_key(weights, weights[0], "everything")
    with pytest.raises(UserError, match="uploads"):
        weights_from_replies(np.ones((3, 2000)) / 50, np.zeros((2, 2000)), "bare", "ratio")
    with pytest.raises(UserError, match="randomised"):
        weights_from_replies(weights, weights[:1], "naked", "ratio")


# --- flooding ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server():
    return CkksServer(parties.head(FEATURES), (FEATURES,), flooded=True)


def logits(server, client, films: int) -> tuple[np.ndarray, np.ndarray]:
    """Decrypted but not rounded, plain; each [films, classes]."""
    session, inputs = server.open(client.public()), unit(films, FEATURES)
    read = [client.decrypt_exact(session.diagnose(client.encrypt(x))) for x in inputs]
    return np.array(read), inputs @ weights_of(parties.head(FEATURES)).T


def test_the_formula():
    assert flooding_std(2.0, 3, 10) == pytest.approx(6 * 32 * 2)
    assert Flooding(1000, 30).cost_bits == pytest.approx(0.5 * math.log2(12_000) + 15)
    # τ decryptions, bound t: τ t² / 2σ² = 2^-bits / 24.
    assert 1000 / (2 * flooding_std(1.0, 1000, 30) ** 2) == pytest.approx(2.0**-30 / 24)
    for bad in ((0.0, 1, 30), (math.inf, 1, 30), (math.nan, 1, 30), (1.0, 0, 30), (1.0, 1, 0)):
        with pytest.raises(UserError, match="flooding"):
            flooding_std(*bad)


def largest_std() -> float:
    """Of what a client accepts, in integers of a reply: of one whole logit."""
    packing = LinearPacking(FEATURES, 3, flooded=True)
    return packing.reply_scale(Context(packing.parameters))


@pytest.mark.parametrize("std", [10.0, 2.0**40, 1.1 * 2.0**41, largest_std(), 2.0**100], ids="{:.3g}".format)
def test_the_noise_is_gaussian_whole_and_new_each_time(std):
    """Also in its low bits, where a float of that size has none."""
    draws = wide_gaussian(4000, std)
    assert all(isinstance(value, int) for value in draws)
    smooth = np.random.default_rng(0).uniform(-0.5, 0.5, 4000) if std < 1e6 else 0.0
    assert kstest((np.array(draws, float) + smooth) / std, "norm").pvalue > 1e-5
    if std > 1e6:
        for shift in (0, 4, 20, 28, 32):  # also around where the two parts meet
            low = np.array([value >> shift & 15 for value in draws])
            assert chisquare(np.bincount(low, minlength=16)).pvalue > 1e-5
    assert draws != wide_gaussian(4000, std)


def test_flooded_logits_have_the_noise_that_was_promised(server):
    client = CkksClient(server.packing, flooding=Flooding(1000, 30))
    read, plain = logits(server, client, 40)
    assert client.flooding_std == pytest.approx(1.44e-4, rel=0.01)
    assert 0.75 < np.std(read - plain) / client.flooding_std < 1.3
    assert client.queries_left == 960
    exact, plain = logits(server, CkksClient(server.packing), 3)
    np.testing.assert_allclose(exact, plain, atol=1e-5)


def encoded(client, x: np.ndarray) -> list[int]:
    """The integers [N] that a film is encoded as: SEAL's plaintext as a ciphertext with nothing else."""
    context = client.context
    (plaintext,) = client.packing.encode(context, x)
    values = context.ntt_values(plaintext)
    data = context.compose(np.stack([values, values]), scale=1.0, ntt=True)
    holder = context.load(data, sealapi.Ciphertext)
    context.evaluator.transform_from_ntt_inplace(holder)
    low, high = context.integers(dump(holder), scale=1.0)[0].astype(object)
    first, second = context.moduli_at(0)
    whole = low + first * ((high - low) * pow(first, -1, second) % second)
    return [int(v) if v <= first * second // 2 else int(v) - first * second for v in whole]


def test_the_noise_of_replies_is_what_the_bound_is_made_of(server):
    """A reply's kept integers, less the exact product of what was encoded: floats leave errors of a few units in it, in
    all coefficients, but anybody can compute those."""
    client, context, packing, found = CkksClient(server.packing), server.context, server.packing, []
    session, places = server.open(client.public()), packing.logit_places[0]
    weights = np.rint(weights_of(parties.head(FEATURES)) * 2.0**packing.weight_bits)
    rows = [int(v) for v in weights[:, ::-1].ravel()]
    for x in unit(30, FEATURES):
        (reply,) = session.diagnose(client.encrypt(x))
        film = encoded(client, x)
        got = client.key.coefficients(context.integers(reply, scale=packing.reply_scale(context)), places)
        exact = [sum(w * film[k - j] * (1 if k >= j else -1) for j, w in enumerate(rows)) for k in places]
        found.append([float(a - b) for a, b in zip(got, exact, strict=True)])
    std = np.sqrt(np.mean(np.array(found) ** 2))
    expected = 3.24 * math.hypot(np.linalg.norm(weights), math.sqrt(4 / 3 * context.n + 1))
    assert 0.6 < std / expected < 1.4
    assert np.linalg.norm(found, axis=1).max() < packing.noise_bound(context)


def test_queries_beyond_the_covered_are_refused(server):
    client = CkksClient(server.packing, 3, Flooding(2, 30))
    logits(server, client, 2)
    with pytest.raises(UserError, match="decryptions"):
        logits(server, client, 1)


def test_flooding_where_there_is_no_room_is_refused(server):
    for packing in (LinearPacking(FEATURES, 3), CNNPacking(12, 5, 3, 2, 0, 3)):
        with pytest.raises(UserError, match="flooding"):
            CkksClient(packing, flooding=Flooding())
    with pytest.raises(UserError, match="nothing"):
        CkksClient(LinearPacking(FEATURES, 3, flooded=True), flooding=Flooding(10**9, 60))
    with pytest.raises(UserError, match="flooding"):
        CkksServer(ckksnet(3, (1, 28, 28), channels=4, hidden=0), (1, 28, 28), flooded=True)
    assert packing_from(spec_of(server.packing)) == server.packing
    with pytest.raises(CiphertextError, match="another"):  # the flooded packing isn't the plain one
        server.open(CkksClient(LinearPacking(FEATURES, 3)).public())
