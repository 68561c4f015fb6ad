"""CKKS aggregation: right within a bound set beforehand, and what each party can and can't read."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from ckks_parties import holds_key
from scipy.stats import kstest

from primia_lite.config import UserError
from primia_lite.encrypted.encrypted_sum import PARAMETERS, CkksAggregation, SumHospital, SumServer, Terms, read_upload
from primia_lite.encrypted.flooding import flooding_std
from primia_lite.encrypted.keys import SecretKey
from primia_lite.encrypted.packing import NOISE_STD
from primia_lite.encrypted.parameters import MAX_BITS_128
from primia_lite.encrypted.seal import CiphertextError, Context
from primia_lite.federation.aggregation import WeightedMean
from primia_lite.federation.hospital import Update
from primia_lite.secagg import TooFewSurvivors

SIZES = {"a": 100, "b": 220, "c": 50}
LIKE = {"weight": torch.zeros(3, 1400), "bias": torch.zeros(3)}  # 4,203 entries: two ciphertexts
LENGTH = 4203
FULL = 2.0**PARAMETERS.scale_bits
# Box and Muller's samples of 53-bit uniforms end there.
MOST_STDS = 8.6


def updates(names=SIZES, like=LIKE, spread=0.5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {h: {k: spread * torch.randn(v.shape, generator=generator) for k, v in like.items()} for h in names}


def asks(deltas):
    return {h: lambda d=d: Update(d, 1, False) for h, d in deltas.items()}


def vector(delta) -> np.ndarray:
    return torch.cat([value.flatten() for value in delta.values()]).numpy()


@pytest.fixture(scope="module")
def key():
    return SecretKey(Context(PARAMETERS))


@pytest.fixture(scope="module")
def terms():
    return Terms(SIZES, LENGTH)


def encrypted(name: str, key, terms, values=None) -> list[bytes]:
    """What a hospital sends in round 1; zeros if left out."""
    values = np.zeros(terms.length, np.float32) if values is None else values
    return list(SumHospital(name, key, terms).encrypt(1, lambda: values))


def served(terms, sent: dict[str, list[bytes]]) -> SumServer:
    server = SumServer(terms, 1)
    for name, parts in sent.items():
        for data in parts:
            server.receive(name, data)
    return server


def test_parameters_have_128_bits():
    assert sum(PARAMETERS.coeff_mod_bit_sizes) <= MAX_BITS_128[PARAMETERS.poly_modulus_degree]


@pytest.mark.parametrize("clip", [3.0, 32.0])
def test_the_mean_is_the_plain_one_within_the_floodings_bound(clip):
    deltas, way = updates(), CkksAggregation(clip=clip)
    plain = WeightedMean().aggregate(asks(deltas), SIZES, LIKE, 1)
    for number in (1, 2):
        found = way.aggregate(asks(deltas), SIZES, LIKE, number)
        assert found.survivors == ("a", "b", "c")
        assert {k: v.shape for k, v in found.value.items()} == {k: v.shape for k, v in LIKE.items()}
        bound = MOST_STDS * way.terms.flooding_std(*SIZES)
        assert bound < 1e-6 * clip
        difference = vector(found.value) - vector(plain.value)
        assert np.abs(difference).max() <= bound + 2.0**-23 * np.abs(vector(plain.value)).max()


def test_entries_at_the_clip_do_not_wrap_round():
    ones = {h: {"w": torch.full((4096,), 2.0)} for h in SIZES}
    found = CkksAggregation(clip=2.0).aggregate(asks(ones), SIZES, {"w": torch.zeros(4096)}, 1)
    torch.testing.assert_close(found.value["w"], ones["a"]["w"], atol=1e-6, rtol=0)


@pytest.mark.parametrize("gone", SIZES)
def test_any_one_may_vanish_and_any_survivor_decrypts(gone, key, terms):
    deltas, stay = updates(), [h for h in SIZES if h != gone]
    server = served(terms, {h: encrypted(h, key, terms, vector(deltas[h])) for h in stay})
    assert server.survivors == tuple(stay)
    plain = WeightedMean().aggregate(asks({h: deltas[h] for h in stay}), {h: SIZES[h] for h in stay}, LIKE, 1)
    for name in stay:
        found = server.finish(SumHospital(name, key, terms).decrypt(1, server.survivors, server.sums()))
        assert np.abs(found - vector(plain.value)).max() <= MOST_STDS * terms.flooding_std(*stay) + 1e-6


def test_one_survivor_ends_the_round(key, terms):
    with pytest.raises(TooFewSurvivors, match="threshold"):
        served(terms, {"a": encrypted("a", key, terms)}).sums()
    with pytest.raises(UserError, match="threshold"):
        CkksAggregation(threshold=1).aggregate(asks(updates()), SIZES, LIKE, 1)


# --- who can read what ------------------------------------------------------------------------------------------------


def test_the_servers_side_holds_no_key_and_no_message_has_one(key, terms):
    sent = {name: encrypted(name, key, terms, vector(delta)) for name, delta in updates().items()}
    server = served(terms, sent)
    assert not holds_key(server, key) and not holds_key([sent, *server.sums()], key)
    assert holds_key(SumHospital("a", key, terms), key)


def test_the_server_reads_nothing_without_the_key(key, terms):
    """With a key of its own, it finds numbers all over the modulus; with the hospitals', the update."""
    update = vector(updates()["a"])
    first, again = (encrypted(h, key, terms, update) for h in "ab")
    assert not any(a[200:] == b[200:] for a, b in zip(first, again, strict=True))  # never alike
    own = SecretKey(Context(PARAMETERS))
    guess = own.polynomial(own.context.receive(first[0], scale=FULL))
    assert kstest(guess / own.context.moduli[0] + 0.5, "uniform").pvalue > 1e-6
    found = key.polynomial(key.context.receive(first[0], scale=FULL))
    assert kstest(found / key.context.moduli[0] + 0.5, "uniform").pvalue < 1e-12
    assert abs(np.corrcoef(guess, update[:4096])[0, 1]) < 0.1 < 0.99 < np.corrcoef(found, update[:4096])[0, 1]


def test_the_server_and_one_hospital_see_everything():
    """Said plainly in the module: here is how. The server passes on b's upload; any hospital has the key."""
    tape, deltas = [], updates()
    way = CkksAggregation(listen=lambda *message: tape.append(message))
    way.aggregate(asks(deltas), SIZES, LIKE, 1)
    seen = [data for _, *what, data in tape if what == ["encrypt", "reply", "b"]]
    np.testing.assert_allclose(read_upload(way.key, way.terms, "b", seen), vector(deltas["b"]), atol=1e-6)


# --- flooding ---------------------------------------------------------------------------------------------------------


def test_flooding_has_the_claimed_deviation_and_is_drawn_anew(key):
    terms = Terms({"a": 1, "b": 1}, 40_000, clip=1.0)
    sums = list(served(terms, {name: encrypted(name, key, terms) for name in "ab"}).sums())
    means = [
        np.frombuffer(b"".join(SumHospital(h, key, terms).decrypt(1, "ab", sums)), "<f4").astype(float) for h in "ab"
    ]
    std = terms.flooding_std("a", "b")
    for mean in (*means, (means[0] - means[1]) / np.sqrt(2)):  # two decryptions' noises are independent
        assert kstest(mean / std, "norm").pvalue > 1e-6
        assert mean.std() == pytest.approx(std, rel=0.025)  # 7 standard errors
    # As the guarantee has it: for all rounds of a key, all ciphertexts, and each hospital decrypting.
    queries = 1000 * 2 * 10
    assert std == pytest.approx(flooding_std(terms.noise_bound, queries, 30.0) / FULL)
    noise = [np.linalg.norm(key.polynomial(key.context.receive(data, scale=FULL, seeded=False))) for data in sums]
    assert 0.8 * NOISE_STD * np.sqrt(2 * 4096) < min(noise) <= max(noise) < terms.noise_bound


def test_precision_that_flooding_leaves_nothing_of_is_refused():
    assert Terms(SIZES, 11_000_000).flooding_std(*SIZES) < 1e-6 * 32
    with pytest.raises(UserError, match="precision"):
        Terms(SIZES, 11_000_000, statistical_bits=50.0)


def test_a_hospital_decrypts_once_a_round_and_for_so_many_rounds(key):
    terms = Terms(SIZES, 10, rounds=2)
    hospital = SumHospital("a", key, terms)
    hospital.decrypt(1, "abc", [])
    with pytest.raises(UserError, match="round"):
        hospital.decrypt(1, "abc", [])
    with pytest.raises(UserError, match="serves"):
        hospital.decrypt(3, "abc", [])
    with pytest.raises(TooFewSurvivors, match="fewest"):
        hospital.decrypt(2, "b", [])


def test_a_new_key_when_the_rounds_of_one_are_used_up():
    way, deltas, keys = CkksAggregation(rounds=2), updates(), []
    for number in range(1, 6):
        way.aggregate(asks(deltas), SIZES, LIKE, number)
        keys.append(way.key)
    assert [keys.index(k) for k in keys] == [0, 0, 2, 2, 4]


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: d | {"bias": torch.zeros(4)}, "holds"),
        (lambda d: {k: v.double() for k, v in d.items()}, "float64"),
        (lambda d: d | {"bias": torch.tensor([0.0, np.nan, 0.0])}, "finite"),
        (lambda d: d | {"bias": torch.tensor([0.0, -np.inf, 0.0])}, "finite"),
        (lambda d: d | {"bias": torch.tensor([0.0, 0.0, -33.0])}, "clip"),
    ],
)
def test_bad_updates_are_refused_before_anything_is_sent(spoil, message):
    tape, deltas = [], updates()
    deltas["b"] = spoil(deltas["b"])
    with pytest.raises(UserError, match=message):
        CkksAggregation(listen=lambda *message: tape.append(message)).aggregate(asks(deltas), SIZES, LIKE, 1)
    assert not any(what[1:3] == ["reply", "b"] for _, *what, _ in tape)


def test_sizes_and_updates_must_name_the_same_and_sums_are_refused():
    with pytest.raises(UserError, match="they"):
        CkksAggregation().aggregate(asks(updates("ab")), SIZES, LIKE, 1)
    with pytest.raises(UserError, match="SecureAggregation"):
        CkksAggregation().aggregate(asks(updates()), SIZES, LIKE, 1, integer_sum=True)


def test_an_update_goes_out_once_a_round(key, terms):
    hospital, update = SumHospital("a", key, terms), np.zeros(LENGTH, np.float32)
    hospital.encrypt(2, lambda: update)
    for session in (1, 2):
        with pytest.raises(UserError, match="each"):
            hospital.encrypt(session, lambda: update)


def test_garbage_is_refused_by_the_server_and_its_sender_counts_as_gone(key, terms):
    sent = {h: encrypted(h, key, terms) for h in SIZES}
    server = served(terms, {"c": sent["c"][:1]})
    for bad in (b"", b"garbage" * 100, sent["c"][1][:-5], sent["c"][1] + b"x"):
        with pytest.raises(CiphertextError, match="hospital"):
            server.receive("c", bad)
    for name in "ab":
        for data in sent[name]:
            server.receive(name, data)
    assert server.survivors == ("a", "b")
    with pytest.raises(CiphertextError, match="update"):
        server.receive("a", sent["a"][0])
    with pytest.raises(UserError, match="which"):
        server.receive("z", sent["a"][0])
    # What c sent before is in no sum: the others' are still one.
    found = server.finish(SumHospital("b", key, terms).decrypt(1, server.survivors, server.sums()))
    assert np.abs(found).max() <= MOST_STDS * terms.flooding_std("a", "b") + 1e-6


@pytest.mark.parametrize("length", [LENGTH, 4096])
def test_a_ciphertext_of_another_key_is_noticed_by_who_decrypts(key, length):
    terms, other = Terms(SIZES, length), SecretKey(Context(PARAMETERS))
    server = served(terms, {name: encrypted(name, key if name != "c" else other, terms) for name in SIZES})
    with pytest.raises(CiphertextError, match="another"):
        list(SumHospital("a", key, terms).decrypt(1, server.survivors, server.sums()))


def test_one_made_up_sum_gives_the_key_away(key):
    """What the docstring says of a server that lies: from a sum it makes one that decrypts to the key."""
    terms, context = Terms(SIZES, PARAMETERS.poly_modulus_degree), Context(PARAMETERS)
    (honest,) = served(terms, {name: encrypted(name, key, terms) for name in SIZES}).sums()
    integers = context.integers(honest, scale=FULL, ntt=True).copy()
    integers[0] = 0
    integers[1] = 2**56  # the constant polynomial times the key
    made_up = context.compose(integers, scale=FULL, ntt=True)
    mean = np.frombuffer(b"".join(SumHospital("a", key, terms).decrypt(1, SIZES, [made_up])), "<f4")
    ternary = np.rint(mean / terms.clip * 4)
    assert set(ternary.tolist()) == {-1.0, 0.0, 1.0}
    assert key.is_inside(ternary.astype(np.int8).tobytes())


def test_what_comes_back_must_fit(key, terms):
    with pytest.raises(CiphertextError, match="entries"):
        SumServer(terms, 1).finish([b"1234"])
    with pytest.raises(CiphertextError):
        list(SumHospital("a", key, terms).decrypt(1, "ab", [b"garbage"]))


# --- bytes ------------------------------------------------------------------------------------------------------------


def test_bytes_are_about_twice_float32_up_and_four_times_down_to_one_hospital():
    like, tape = {"w": torch.zeros(4096 * 5)}, []
    CkksAggregation(listen=lambda *message: tape.append(message)).aggregate(asks(updates(like=like)), SIZES, like, 1)
    assert {hospital for _, step, _, hospital, _ in tape if step == "decrypt"} == {"a"}
    assert ["decrypt", 1, ["a", "b", "c"]] in [json.loads(data) for *_, data in tape if data.startswith(b"[")]

    def share(*what) -> float:
        return sum(len(data) for _, step, kind, _, data in tape if (step, kind) == what) / (4 * 4096 * 5)

    assert 3 * 2 <= share("encrypt", "reply") < 3 * 2.05
    assert 4 <= share("decrypt", "request") < 4.05
    assert share("decrypt", "reply") == 1
