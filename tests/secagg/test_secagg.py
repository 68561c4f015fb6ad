"""Secure aggregation: exact sums, drop-outs, bad input at the hospital and at the server, what is agreed on."""

import json
import threading
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from parties import Round, fork, identities, names, relayed

from primia_lite import secagg
from primia_lite.config import UserError
from primia_lite.data.films import Films
from primia_lite.federation.aggregation import SecureAggregation, WeightedMean
from primia_lite.federation.hospital import Hospital
from primia_lite.federation.rounds import Schedule, federate
from primia_lite.privacy.dpsgd import Privacy
from primia_lite.secagg import (
    STEPS,
    Agreement,
    ProtocolError,
    Reply,
    SecAggClient,
    SecAggServer,
    TooFewSurvivors,
    run_round,
)
from primia_lite.secagg.shares import SHARE_BYTES
from primia_lite.training import Training

# --- exactness --------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_the_sum_is_exactly_that_of_the_integers_and_the_mean_within_its_error(data):
    n, length = data.draw(st.integers(2, 6), "n"), data.draw(st.integers(1, 9), "length")
    clip = data.draw(st.sampled_from([1e-3, 0.1, 1.0, 32.0, 1e20]), "clip")
    sizes = data.draw(st.lists(st.integers(1, 10**6), min_size=n, max_size=n), "sizes")
    entry = st.sampled_from([-1.0, 1.0, 0.0]) | st.floats(-1, 1, width=32)
    vectors = data.draw(st.lists(st.lists(entry, min_size=length, max_size=length), min_size=n, max_size=n), "updates")
    updates = {name: np.float32(v) * np.float32(clip) for name, v in zip(names(n), vectors, strict=True)}
    party = Round(n, length, updates=updates, sizes=sizes, clip=clip).finish()
    assert party.server.survivors == tuple(names(n))
    assert np.array_equal(party.server.total, party.exact(names(n)))

    total = sum(sizes)
    true = [
        float(sum(Fraction(s, total) * Fraction(float(u[i])) for s, u in zip(sizes, updates.values(), strict=True)))
        for i in range(length)
    ]
    rounding = np.abs(party.server.mean) * 2.0**-23  # of the mean to float32
    assert (np.abs(party.server.mean - true) <= party.agreement.fixed_point.error + rounding).all()


def test_whole_numbers_are_summed_as_they_are():
    updates = {name: np.array([2**30 - i, -(2**30), 7 * i, -1]) for i, name in enumerate("AB")}
    party = Round(2, 4, updates=updates, weighted=False).finish()
    assert party.server.total.tolist() == [2**31 - 1, -(2**31), 7, -2]


# --- drop-outs --------------------------------------------------------------------------------------------------------


def survivors(n, gone, step):
    """Whose updates are in the sum: also those who vanish after their masked update arrived."""
    return [name for name in names(n) if name not in gone or STEPS.index(step) > STEPS.index("mask")]


@pytest.mark.parametrize(("n", "threshold"), [(3, None), (5, 3), (9, None), (24, 13)])
def test_as_many_as_the_threshold_allows_may_vanish_at_each_step(n, threshold):
    """From one start; which ones differs by step."""
    start, order = Round(n, 4, threshold=threshold), np.random.default_rng(n)
    for step in STEPS:
        if step != STEPS[0]:
            start.step()
        gone = order.choice(names(n), n - start.agreement.threshold, replace=False)
        party = fork(start)
        party.leave = {step: gone}
        party.finish()
        assert list(party.server.survivors) == survivors(n, gone, step)
        assert np.array_equal(party.server.total, party.exact(party.server.survivors))


@pytest.mark.parametrize("step", STEPS)
def test_fewer_than_the_threshold_leave_no_sum(step):
    party = Round(4, threshold=3, leave={step: "BD"})
    with pytest.raises(TooFewSurvivors, match=step):
        run_round(party.server, party.exchange)
    server = party.server
    assert server.step is None and server.total is None and server.masked_sum is None
    assert not any(server.replies.values())
    with pytest.raises(ProtocolError, match="after"):
        server.receive(Reply("B", 1, step, {}))
    again = Round(before=party, session=2).finish()
    assert np.array_equal(again.server.total, again.exact("ABCD"))


# --- drop-outs in federated training ----------------------------------------------------------------------------------


def hospital(name, n, seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 2
    inputs = torch.randn(n, 1, 4, generator=generator) + labels[:, None, None]
    return Hospital(name, Films(inputs, labels, np.array([f"{name}{i}" for i in range(n)])))


PRIVACY = Privacy(2.0, 0.5, target_epsilon=100.0)
TRAINING = Training(n_classes=2, sample_rate=0.5, learning_rate=0.5)


def train(folder, rounds=3, aggregator=None, privacy=PRIVACY, **options):
    group = [hospital(name, n, i) for i, (name, n) in enumerate(zip("ABC", (30, 40, 50), strict=True))]
    result = federate(
        group, TRAINING, Schedule(rounds), privacy, folder=folder, aggregator=aggregator, progress=None, **options
    )
    return group, result


def charged(group, folder):
    return [len(h.ledger(folder, PRIVACY).charges()) for h in group]


def gone(number, step, who):
    return lambda at, when: who if (at, when) == (number, step) else ()


@pytest.mark.parametrize(("step", "charges"), [("share", 1), ("confirm", 2), ("unmask", 2)])
def test_too_few_survivors_stop_a_run_which_can_be_taken_up_and_what_was_charged_stays_charged(tmp_path, step, charges):
    group = [hospital(name, n, i) for i, (name, n) in enumerate(zip("ABC", (30, 40, 50), strict=True))]
    with pytest.raises(TooFewSurvivors, match=step):
        train(tmp_path, 2, SecureAggregation(absent=gone(2, step, "AC")))
    assert charged(group, tmp_path) == [charges] * 3
    group, result = train(tmp_path, 2)  # the same update isn't charged again
    assert result.history == [{"round": 1}, {"round": 2}]
    assert charged(group, tmp_path) == [2, 2, 2]


def test_a_run_with_absents_is_taken_up_and_its_ledgers_fit(tmp_path):
    train(tmp_path, 3, SecureAggregation(absent=gone(1, "advertise", "B")))
    group, result = train(tmp_path, 3)
    assert [r.get("absent") for r in result.history] == [["B"], None, None]
    assert charged(group, tmp_path) == [3, 2, 3]
    (tmp_path / "ledger-B.sqlite").unlink()
    with pytest.raises(UserError, match="deleted"):
        train(tmp_path, 3)


def test_training_equals_training_in_the_clear_within_quantisation(tmp_path):
    secure, clear = (
        train(tmp_path / a.name, aggregator=a, privacy=None)[1].state for a in (SecureAggregation(), WeightedMean())
    )
    for name in clear:
        torch.testing.assert_close(secure[name], clear[name], atol=1e-6, rtol=1e-5)


# --- bad input at the hospital ----------------------------------------------------------------------------------------

GOOD = np.zeros(8, np.float32)


def with_entry(value):
    return np.where(np.arange(8) == 5, np.float32(value), GOOD)


@pytest.mark.parametrize(
    ("update", "message"),
    [
        (GOOD[:7], "agreed"),
        (GOOD[None], "agreed"),
        (GOOD.astype(np.float64), "float64"),
        (np.zeros(8, np.int64), "int64"),
        (with_entry(np.nan), "finite"),
        (with_entry(-np.inf), "finite"),
        (with_entry(np.nextafter(np.float32(32), np.float32(99))), "declared"),
        (with_entry(-33), "value"),
    ],
)
def test_a_bad_update_never_leaves(update, message):
    party = Round(3).until("mask")
    party.updates["B"] = update
    with pytest.raises(UserError, match=message):
        party.ask("B", party.request("B"))
    assert party.clients["B"].secrets is None and all(step != "mask" for step, *_ in party.seen)


@pytest.mark.parametrize("error", [ValueError, KeyError, TypeError, AttributeError, KeyboardInterrupt])
def test_an_error_of_the_training_is_not_blamed_on_the_server(error):
    party = Round(3).until("mask")

    def update():
        raise error("in the training")

    with pytest.raises(error, match="training"):
        party.clients["A"].answer(party.request("A"), update)
    assert party.clients["A"].secrets is None


def test_the_update_is_asked_for_in_one_step_only():
    party, calls = Round(3), []
    while party.server.step:
        step = party.server.step
        for name, request in party.server.requests().items():
            party.server.receive(
                party.clients[name].answer(request, lambda step=step, name=name: calls.append((step, name)) or GOOD)
            )
        party.server.close()
    assert calls == [("mask", name) for name in "ABC"]


# --- bad input at the server ------------------------------------------------------------------------------------------


def refused(party, reply, message):
    """The server refuses it, and its state stays as it was."""
    before = {step: dict(replies) for step, replies in party.server.replies.items()}
    with pytest.raises(ProtocolError, match=message):
        party.server.receive(reply)
    assert party.server.replies == before


@pytest.mark.parametrize("step", STEPS)
def test_a_message_sent_twice_counts_once(step):
    party = Round(3).until(step)
    replies = party.replies()
    for reply in replies:
        party.server.receive(reply)
    refused(party, replies[1], "counts")
    party.server.close()
    if step != "unmask":
        refused(party, replies[1], "round")
        party.finish()
    assert np.array_equal(party.server.total, party.exact("ABC"))


@pytest.mark.parametrize("step", STEPS)
def test_a_message_from_another_round_is_refused(step):
    old = Round(3).until(step)
    late = old.replies()[0]
    party = Round(before=old, session=2).until(step)
    refused(party, late, "round")
    refused(party, replace(late, session=2), "sign")


@pytest.mark.parametrize("step", STEPS)
def test_a_forged_message_is_refused_and_the_true_one_still_counts(step):
    party = Round(3).until(step)
    replies = party.replies()
    for fake in (
        replace(replies[0], signature=b""),
        replace(replies[0], signature=replies[1].signature),
        replace(replies[0], sender="B"),
        replace(replies[0], body=replies[0].body | {"odd": "1"}),
    ):
        refused(party, fake, "sign")
    if step == "mask":
        refused(party, replace(replies[0], vector=replies[0].vector + 1), "sign")
    for reply in replies:
        party.server.receive(reply)


@pytest.mark.parametrize("step", STEPS)
def test_an_unknown_hospital_is_refused(step):
    party = Round(3).until(step)
    stranger = Ed25519PrivateKey.generate()
    reply = replace(party.replies()[0], sender="X")
    refused(party, replace(reply, signature=stranger.sign(reply.signed(party.agreement))), "one of")


@pytest.mark.parametrize("step", STEPS[1:])
def test_a_hospital_that_missed_a_step_stays_out(step):
    missed = STEPS[STEPS.index(step) - 1]
    party = Round(4, threshold=3, leave={missed: "D"}).until(step)
    vector = np.zeros(8, np.uint32) if step == "mask" else None
    reply = party.resigned(Reply("D", 1, step, {}, vector=vector))
    refused(party, reply, "answers")


VECTORS = [
    None, np.zeros(7, np.uint32), np.zeros(9, np.uint32), np.zeros((1, 8), np.uint32), np.zeros(0, np.uint32),
    np.zeros(8, np.int32), np.zeros(8, ">u4"), np.zeros(8, np.float32), np.zeros(4, np.uint64), np.zeros(8, object),
    [0] * 8,
]  # fmt: skip


@pytest.mark.parametrize("vector", VECTORS, ids=lambda v: f"{getattr(v, 'dtype', type(v).__name__)}{np.shape(v)}")
def test_a_vector_of_another_form_is_refused(vector):
    party = Round(3).until("mask")
    refused(party, replace(party.replies()[0], vector=vector), "entries")


@pytest.mark.parametrize("step", [s for s in STEPS if s != "mask"])
def test_a_vector_in_another_step_is_refused(step):
    party = Round(3).until(step)
    reply = party.resigned(party.replies()[0], vector=np.zeros(8, np.uint32))
    refused(party, reply, "vector")


KEY, OTHER, SHARE = "5a" * 32, "5b" * 32, "5a" * SHARE_BYTES
SEALED = "AAAA" * 49 + "AA=="  # 148 bytes, base64
BODIES = {
    "advertise": [
        {}, {"keys": []}, {"keys": [KEY]}, {"keys": [KEY, KEY]}, {"keys": [KEY, OTHER, KEY]}, {"keys": {KEY: OTHER}},
        {"keys": "KK"}, {"keys": [KEY, "zz" * 32]}, {"keys": [KEY, KEY.upper()]}, {"keys": [KEY, " " * 64]},
        {"keys": [KEY, "00" * 32]}, {"keys": [KEY, OTHER], "count": "1"},
    ],
    "share": [
        {}, {"shares": {}}, {"shares": {"B": SEALED}}, {"shares": {"A": SEALED, "B": SEALED}}, {"shares": [SEALED] * 2},
        {"shares": {"B": SEALED, "C": "AAAA"}}, {"shares": {"B": SEALED, "C": "?" * 200}},
        {"shares": {"B": SEALED, "C": SEALED, "X": SEALED}}, {"shares": {"B": SEALED, "C": SEALED}},
    ],
    "mask": [{"count": "1"}],
    "confirm": [{}, {"survivors": ["A", "B"]}, {"survivors": ["A", "B", "C"], "keys": KEY}, {"survivors": "ABC"}],
    "unmask": [
        {}, {"keys": {}}, {"keys": {}, "seeds": {}}, {"keys": {}, "seeds": {"A": SHARE}}, {"keys": [], "seeds": []},
        {"keys": {"A": SHARE}, "seeds": {"A": SHARE, "B": SHARE, "C": SHARE}},
        {"keys": {}, "seeds": {"A": SHARE, "B": SHARE, "C": "zz" * SHARE_BYTES}},
        {"keys": {}, "seeds": {"A": SHARE, "B": SHARE, "C": SHARE[2:]}},
        {"keys": {}, "seeds": {"A": SHARE, "B": SHARE, "X": SHARE}},
    ],
}  # fmt: skip


@pytest.mark.parametrize("step", STEPS)
def test_signed_messages_of_another_form_are_refused(step):
    party = Round(3).until(step)
    reply = party.replies()[0]
    for body in BODIES[step]:
        if step == "share":
            body = body | {"commitment": KEY.upper() if body == BODIES[step][-1] else KEY}
        refused(party, party.resigned(reply, body=body), "A")
    party.server.receive(reply)


@pytest.mark.parametrize(("kind", "leave", "message"), [
    ("seeds", {}, "own mask|fit together"), ("keys", {"mask": "D"}, "D's key|fit together")
])  # fmt: skip
def test_shares_that_lie_end_the_round_without_a_sum(kind, leave, message):
    party = Round(4, threshold=3, leave=leave).until("unmask")
    for reply in party.replies():
        body = json.loads(json.dumps(reply.body))
        name = "B" if kind == "seeds" else "D"
        if reply.sender == "A":
            body[kind][name] = f"{int(body[kind][name], 16) ^ 1:0{2 * SHARE_BYTES}x}"
        party.server.receive(party.resigned(reply, body=body))
    with pytest.raises(ProtocolError, match=message):
        party.server.close()
    assert party.server.total is None and party.server.masked_sum is None and party.server.step is None


def test_a_hospital_that_shared_something_else_than_it_masked_with_spoils_the_round_only():
    party = Round(3).until("share")
    replies = party.replies()
    party.server.receive(party.resigned(replies[0], body=replies[0].body | {"commitment": KEY}))
    for reply in replies[1:]:
        party.server.receive(reply)
    party.server.close()
    with pytest.raises(ProtocolError, match="committed"):
        run_round(party.server, party.exchange)
    assert party.server.total is None and party.server.masked_sum is None


# --- messages ---------------------------------------------------------------------------------------------------------


def test_a_vector_travels_as_little_endian_words_after_the_head():
    reply = Reply("A", 1, "mask", {}, b"s" * 64, np.array([1, 2**31, 0xDEADBEEF], np.uint32))
    assert reply.to_bytes().endswith(bytes.fromhex("01000000 00000080 efbeadde"))
    again = Reply.from_bytes(reply.to_bytes())
    assert again.vector.tolist() == reply.vector.tolist() and replace(again, vector=None) == replace(reply, vector=None)


@pytest.mark.parametrize("content", [
    b"", b"\x00", b"\x05\x00\x00\x00[]", b"\xff\xff\xff\xff", b"\x02\x00\x00\x00[]\x00",
    *(len(head).to_bytes(4, "little") + head for head in (
        b"", b"[]", b"{}", b"null", b"\xff\xfe", b"[" * 50_000, b'["A",1,"mask",{},"zz"]', b'["A",1,"mask",[],""]',
        b'["A",true,"mask",{},""]', b'["A",1.0,"mask",{},""]', b'[7,1,"mask",{},""]', b'["A",1,[],{},""]',
        b'["A",1,"mask",{"x":1},""]', b'["A",1,"mask",{"x":[[]]},""]', b'["A",1,"mask",{"x":{"y":{}}},""]',
        b'["A",1,"mask",{"x":null},""]', b'["A",1,"mask",{"x":NaN},""]', b'["A",1,"mask",{},7]',
        b'["A",' + b"9" * 5000 + b',"mask",{},""]',
    )),
], ids=lambda content: f"{content[:24]!r}")  # fmt: skip
def test_bytes_that_are_no_message_are_refused(content):
    with pytest.raises(ProtocolError):
        Reply.from_bytes(content)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=60), st.integers(0, 400), st.booleans())
def test_altered_messages_never_crash_the_server(noise, at, insert):
    party = ALTERED
    for step, reply in party.items():
        content = reply[1].to_bytes()
        changed = content[:at] + noise + content[at if insert else at + len(noise) :]
        server = reply[0].server
        before = dict(server.replies[step])
        try:
            server.receive(Reply.from_bytes(changed))
        except ProtocolError:
            assert server.replies[step] == before
        else:  # other bytes for the same content
            assert server.replies[step][reply[1].sender] == replace(reply[1], vector=None)
            server.replies[step] = before
            server.masked_sum = None


ALTERED = {step: (party := Round(2, 2).until(step), party.replies()[0]) for step in STEPS}


# --- what is agreed on ------------------------------------------------------------------------------------------------

KEYS = identities(4)
PUBLIC = {name: key.public_key().public_bytes_raw() for name, key in KEYS.items()}
SIZES = dict.fromkeys(PUBLIC, 10)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"identities": {"A": PUBLIC["A"]}, "sizes": {"A": 1}}, "hospital"),
        ({"identities": {}, "sizes": {}}, "hospital"),
        ({"sizes": {"A": 1}}, "identities"),
        ({"sizes": SIZES | {"A": 0}}, "sizes"),
        ({"sizes": SIZES | {"A": 10.5}}, "declared"),
        ({"sizes": SIZES | {"A": True}}, "declared"),
        ({"length": 0}, "length"),
        ({"length": 2**40}, "length"),
        ({"length": 1.5}, "length"),
        ({"identities": PUBLIC | {"A": PUBLIC["B"]}}, "key of its own"),
        ({"identities": PUBLIC | {"A": b"short"}}, "bytes"),
        ({"identities": PUBLIC | {"A": "x" * 32}}, "bytes"),
        ({"identities": {f"{k}\n": v for k, v in PUBLIC.items()}, "sizes": {f"{k}\n": 1 for k in PUBLIC}}, "name"),
        ({"identities": dict(enumerate(PUBLIC.values())), "sizes": dict.fromkeys(range(4), 1)}, "name"),
        ({"threshold": 2}, "threshold"),
        ({"threshold": 5}, "most"),
        ({"threshold": 3.0}, "threshold"),
        ({"clip": 0.0}, "clip"),
        ({"clip": -1.0}, "clip"),
        ({"clip": float("nan")}, "clip"),
        ({"clip": float("inf")}, "clip"),
        ({"clip": 1e-320}, "clip"),
        ({"degree": 1, "share_threshold": 2}, "degree"),
        ({"degree": 2}, "share_threshold"),
        ({"degree": 2, "share_threshold": 1}, "share_threshold"),
        ({"degree": 2, "share_threshold": 4}, "share_threshold"),
        ({"degree": 0, "share_threshold": 1}, "degree"),
        ({"degree": -2, "share_threshold": 1}, "degree"),
    ],
)
def test_agreements_that_do_not_hold_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        Agreement(**{"identities": PUBLIC, "sizes": SIZES, "length": 8} | changes)


def test_an_agreement_survives_json_and_what_was_handed_in_may_change():
    sizes = dict(SIZES)
    agreement = Agreement(PUBLIC, sizes, 8)
    sizes["A"] = 99
    again = Agreement.from_dict(json.loads(json.dumps(agreement.as_dict())))
    assert again == agreement and again.digest == agreement.digest and agreement.sizes["A"] == 10
    alike = Agreement(dict(reversed(PUBLIC.items())), {k: np.int64(v) for k, v in SIZES.items()}, np.int32(8), 32, 3, 1)
    assert alike == agreement and alike.digest == agreement.digest


P = 2**255 - 19
# y of the points of order 1, 2, 4 and 8; then as a number above the prime, which stands for the same point.
ORDER_8 = [int.from_bytes(bytes.fromhex(text), "little") for text in (
    "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05",
    "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a",
)]  # fmt: skip
WEAK = [1, P - 1, 0, *ORDER_8, P, P + 1, P + 2, 2**255 - 1]


@pytest.mark.parametrize("sign", [0, 1])
@pytest.mark.parametrize("y", WEAK)
def test_identities_that_others_could_sign_for_are_refused_where_an_agreement_is_read(y, sign):
    weak = (y | sign << 255).to_bytes(32, "little")
    with pytest.raises(UserError, match="public"):
        Agreement(PUBLIC | {"A": weak}, SIZES, 8)
    content = Agreement(PUBLIC, SIZES, 8).as_dict()
    content["identities"]["A"] = weak.hex()
    with pytest.raises(UserError, match="public"):
        Agreement.from_dict(content)


@pytest.mark.parametrize("content", [{}, [], None, {"identities": {"A": 1}}, {"identities": {"A": "zz"}}, {"x": 1}])
def test_what_is_no_agreement_is_refused(content):
    with pytest.raises(UserError, match="agreement"):
        Agreement.from_dict(content)


ANOTHER = Ed25519PrivateKey.generate().public_key().public_bytes_raw()
CHANGES = {
    "identities": PUBLIC | {"D": ANOTHER}, "sizes": SIZES | {"D": 11}, "length": 9, "clip": 16.0, "threshold": 4,
    "weighted": False, "degree": 2, "share_threshold": 3,
}  # fmt: skip


@pytest.mark.parametrize("field", CHANGES)
def test_parties_that_agreed_on_something_else_do_not_understand_each_other(field):
    assert set(CHANGES) == set(Agreement.__dataclass_fields__)
    base = Agreement(PUBLIC, SIZES, 8, degree=2, share_threshold=2) if field == "share_threshold" else None
    base = base or Agreement(PUBLIC, SIZES, 8)
    other = replace(base, **{field: CHANGES[field]} | ({"share_threshold": 2} if field == "degree" else {}))
    assert other.digest != base.digest
    client, server = SecAggClient("A", KEYS["A"], other), SecAggServer(base, 1)
    reply = client.answer(server.requests()["A"], lambda: GOOD)
    with pytest.raises(ProtocolError, match="didn"):
        server.receive(reply)
    reply = SecAggClient("B", KEYS["B"], base).answer(server.requests()["B"], lambda: GOOD)
    with pytest.raises(ProtocolError, match="didn"):
        client.answer(secagg.request("share", 1, advertised=[relayed(reply)]), lambda: GOOD)


def test_a_hospital_with_another_identity_is_refused():
    with pytest.raises(UserError, match="identity"):
        SecAggClient("A", KEYS["B"], Agreement(PUBLIC, SIZES, 8))
    with pytest.raises(UserError, match="identity"):
        SecAggClient("X", KEYS["A"], Agreement(PUBLIC, SIZES, 8))


# --- a hospital's state -----------------------------------------------------------------------------------------------


def test_a_hospital_may_be_a_new_process_at_each_step():
    party = Round(3, leave={"mask": "C"})
    while party.server.step:
        party.step()
        for name, client in party.clients.items():
            party.clients[name] = SecAggClient(name, party.keys[name], party.agreement).restore(client.save())
    assert np.array_equal(party.server.total, party.exact("AB"))
    with pytest.raises(ProtocolError, match="asked"):
        party.clients["A"].answer(secagg.request("advertise", 1), lambda: GOOD)


def test_a_state_is_not_restored_over_a_later_one():
    party = Round(3).until("mask")
    states = {name: client.save() for name, client in party.clients.items()}
    party.finish()
    client = party.clients["A"]
    with pytest.raises(ProtocolError, match="doesn"):
        client.restore(states["A"])
    with pytest.raises(ProtocolError, match="doesn"):
        SecAggClient("A", party.keys["A"], party.agreement, last_session=1).restore(states["A"])
    assert client.restore(client.save()).last_session == 1


def test_secrets_go_as_soon_as_they_have_served():
    party = Round(3).until("confirm")
    for client in party.clients.values():
        kept = client.secrets
        assert kept.mask_key == kept.share_key == kept.own_seed == b""
    party.finish()
    assert all(client.secrets is None for client in party.clients.values())
    assert json.loads(party.clients["A"].save()) == {"last_session": 1, "round": None}


def test_two_requests_at_once_are_answered_once():
    party = Round(3).until("mask")
    client, request = party.clients["A"], party.request("A")
    begun, go_on, replies, errors = threading.Event(), threading.Event(), [], []

    def slow():
        begun.set()
        assert go_on.wait(60)
        return GOOD

    def ask(update):
        try:
            replies.append(client.answer(request, update))
        except ProtocolError as error:
            errors.append(error)

    threads = [threading.Thread(target=ask, args=[update]) for update in (slow, lambda: GOOD)]
    threads[0].start()
    assert begun.wait(60)
    threads[1].start()
    go_on.set()
    for thread in threads:
        thread.join(60)
    assert len(replies) == len(errors) == 1
