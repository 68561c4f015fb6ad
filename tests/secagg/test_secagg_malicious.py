"""A server that lies, alone or with hospitals of its own: what hospitals refuse, and what they then still hold."""

import hashlib
import json

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st
from parties import Round, altered, fork, names, relayed

from primia_lite import secagg
from primia_lite.secagg import STEPS, ProtocolError, Reply, SecAggClient


def refuses(party, name, request, message=None):
    """A hospital refuses a request, sends nothing, forgets the round's secrets and answers nothing more in it."""
    client, kept = party.clients[name], party.clients[name].save()
    with pytest.raises(ProtocolError, match=message):
        party.ask(name, request)
    assert client.secrets is None
    for step in STEPS[1:]:
        with pytest.raises(ProtocolError, match="it is in no round|understood"):
            party.ask(name, secagg.request(step, party.server.session))
    party.clients[name] = SecAggClient(name, party.keys[name], party.agreement).restore(kept)  # for the next try


def at(step, n=4, **options):
    """A round of which one hospital may vanish, where the server asks for a step."""
    return Round(n, threshold=n - 1, **options).until(step)


def without(relayed_replies, name):
    return [text for text in relayed_replies if json.loads(text)[0] != name]


# --- order ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", STEPS)
@pytest.mark.parametrize("now", STEPS)
def test_steps_come_in_their_order(now, wanted):
    if now == wanted:
        return
    requests = {}
    source = Round(3)
    while source.server.step:
        requests[source.server.step] = source.request("A")
        source.step()
    party = Round(before=source, session=2).until(now)
    message = "asked for round 2 after round 2" if wanted == "advertise" else f"asked for {wanted} of round 2, but"
    refuses(party, "A", altered(requests[wanted], session=2), message)


@pytest.mark.parametrize("step", STEPS)
def test_a_step_is_answered_once(step):
    party = Round(3).until(step)
    request = party.request("A")
    party.ask("A", request)
    refuses(party, "A", request)


@pytest.mark.parametrize("session", [1, 0, -1, None, True, 2.0, "2", [2], {}, 1e400])
def test_a_round_is_a_new_whole_number(session):
    party = Round(3).finish()
    request = altered(secagg.request("advertise", 2), session=session)
    with pytest.raises(ProtocolError):
        party.ask("A", request)
    assert party.clients["A"].last_session == 1


# --- keys -------------------------------------------------------------------------------------------------------------


def advertise(party, name, keys, key=None):
    """A message with other keys in a hospital's name, signed by ``key``: its own one if left out."""
    reply = Reply(name, party.server.session, "advertise", {"keys": keys})
    signature = (key or party.keys[name]).sign(reply.signed(party.agreement))
    return relayed(Reply(name, reply.session, "advertise", reply.body, signature))


NEW = ["5a" * 32, "5b" * 32]


def test_keys_can_be_neither_swapped_left_out_nor_made_up():
    party = at("share")
    old = json.loads(Round(before=party, session=2).until("share").request("A"))["advertised"]
    party = Round(before=party, session=3).until("share")
    texts = json.loads(party.request("A"))["advertised"]
    stranger = Ed25519PrivateKey.generate()
    a, b = (json.loads(text)[3]["keys"] for text in texts[:2])
    for advertised, message in [
        (without(texts, "A"), "among"),
        ([*without(texts, "A"), advertise(party, "A", NEW)], "among"),
        ([*without(texts, "A"), advertise(party, "A", a[::-1])], "among"),
        ([*without(texts, "B"), advertise(party, "B", NEW, stranger)], "sign"),
        ([*without(texts, "B"), texts[1].replace(b[0], NEW[0])], "sign"),
        ([*without(texts, "B"), old[1]], "advertise"),
        ([*without(texts, "B"), old[1].replace('"B", 2', '"B", 3')], "sign"),
        ([*texts, advertise(party, "X", NEW, stranger)], "one of"),
        ([*texts, texts[1]], "twice"),
        ([*texts, advertise(party, "B", NEW)], "twice"),
        ([*without(texts, "B"), advertise(party, "B", [a[0], NEW[1]])], "one key"),
        ([*without(texts, "B"), advertise(party, "B", [NEW[0]] * 2)], "one key"),
        ([*without(texts, "B"), advertise(party, "B", [NEW[0].upper(), NEW[1]])], "read"),
        ([*without(texts, "B"), advertise(party, "B", NEW[:1])], "read"),
        (texts[:2], "threshold"),
        ([], "threshold"),
    ]:
        refuses(party, "A", party.request("A", advertised=advertised), message)


# u-coordinates of small order on Curve25519: 0, 1, the two of order 8, p - 1, p, p + 1 (RFC 7748, section 6.1).
SMALL_ORDER = [
    f"{u.to_bytes(32, 'little').hex()}"
    for u in (
        0, 1, 2**255 - 20, 2**255 - 19, 2**255 - 18,
        325606250916557431795983626356110631294008115727848805560023387167927233504,
        39382357235489614581723060781553021112529911719440698176882885853963445705823,
    )
]  # fmt: skip


@pytest.mark.parametrize("point", SMALL_ORDER)
@pytest.mark.parametrize("which", ["masks", "shares"])
def test_points_of_small_order_give_no_key(point, which):
    party = Round(3).until("share")
    texts = json.loads(party.request("A"))["advertised"]
    true = json.loads(texts[2])[3]["keys"]
    keys = [point, true[1]] if which == "masks" else [true[0], point]
    with pytest.raises(ProtocolError, match="advertises"):
        Round(before=party).server.receive(party.resigned(Reply("C", 1, "advertise", {"keys": keys})))
    request = party.request("A", advertised=[*texts[:2], advertise(party, "C", keys)])
    if which == "shares":
        return refuses(party, "A", request, "honest")
    party.ask("A", request)
    hostile = party.clients["C"]
    hostile.secrets.advertised = party.clients["A"].secrets.advertised
    sealed = hostile.cipher("C", "A").encrypt(bytes(12), bytes(secagg.keys.BOTH), None)
    refuses(party, "A", secagg.request("mask", 1, shares={"C": secagg.messages.encode(sealed)}), "honest")


# --- shares -----------------------------------------------------------------------------------------------------------


def test_sealed_shares_serve_their_receiver_in_this_round_only():
    party = at("mask")
    old = json.loads(party.request("A"))["shares"]
    party = Round(before=party, session=2).until("mask")
    mine, bs, theirs = (json.loads(party.request(name))["shares"] for name in "ABC")
    flipped = mine["B"][:40] + ("A" if mine["B"][40] != "A" else "B") + mine["B"][41:]
    for shares, message in [
        *[
            ({"B": sealed, "C": mine["C"]}, "would hide among too few .* the name of B doesn't open")
            for sealed in (
                theirs["B"],
                mine["C"],
                old["B"],
                bs["A"],  # the last one is what A itself sealed, for B
                theirs["A"],
                flipped,
                mine["B"][:-4],
                None,
                "",
            )
        ],
        (mine | {"A": mine["B"]}, "neighbours"),
        (mine | {"X": mine["B"]}, "neighbours"),
        ({"B": mine["B"]}, "few"),
        ({}, "few"),
        (list(mine), None),
    ]:
        refuses(party, "A", party.request("A", shares=shares), message)


def opened_by_nobody(party, sender, receivers):
    """A hospital that lies, and signs it: what it sealed for some others doesn't open."""
    replies = {reply.sender: reply for reply in party.replies()}
    shares = replies[sender].body["shares"]
    body = replies[sender].body | {
        "shares": shares | dict.fromkeys(receivers, secagg.messages.encode(bytes(secagg.keys.SEALED)))
    }
    for reply in (replies | {sender: party.resigned(replies[sender], body=body)}).values():
        party.server.receive(reply)
    party.server.close()
    return party


@pytest.mark.parametrize("late", [False, True])
def test_who_sealed_a_share_that_does_not_open_is_named_and_the_receiver_stays_if_it_came_first(late):
    party = opened_by_nobody(Round(5, threshold=3).until("share"), "B", "A")
    replies = {reply.sender: reply for reply in party.replies()}
    assert {name: reply.body["unopened"] for name, reply in replies.items()} == {"A": ["B"]} | {
        name: [] for name in "BCDE"
    }
    first, second = ("B", "A") if late else ("A", "B")
    party.server.receive(replies[first])
    with pytest.raises(ProtocolError, match=f"{second} is left out"):
        party.server.receive(replies[second])
    for name in "CDE":
        party.server.receive(replies[name])
    party.server.close()
    party.gone.add(second)
    party.finish()
    assert party.server.survivors == tuple(sorted({*"ABCDE"} - {second}))
    assert np.array_equal(party.server.total, party.exact(party.server.survivors))


@pytest.mark.parametrize("n", [3, 4])
def test_without_a_hospital_to_spare_the_receiver_of_a_bad_share_is_left_out_and_the_sender_named(n):
    party = opened_by_nobody(at("share", n), "B", "A")
    refused = secagg.run_round(party.server, party.exchange)
    assert len(refused) == 1 and "B sent A a share that doesn't open" in refused[0]
    assert party.server.survivors == tuple(names(n)[1:])
    assert np.array_equal(party.server.total, party.exact(party.server.survivors))


def test_who_was_sent_bad_shares_and_the_sender_both_vanishing_leave_the_sum_of_the_others():
    party = opened_by_nobody(Round(6, threshold=4).until("share"), "B", "A")
    party.leave = {"mask": "B", "unmask": "A"}
    party.finish()
    assert party.server.survivors == tuple("ACDEF")
    assert np.array_equal(party.server.total, party.exact("ACDEF"))


@pytest.mark.parametrize(
    "body", [{"unopened": ["X"]}, {"unopened": "B"}, {"unopened": ["A"]}, {"question": ["x", "y"]}]
)
def test_a_hospital_that_lies_about_shares_or_the_question_is_left_out(body):
    party = at("mask")
    party.server.receive(party.ask("B", party.request("B")))
    reply = party.ask("A", party.request("A"))
    with pytest.raises(ProtocolError, match="wasn't sent|another round"):
        party.server.receive(party.resigned(reply, body=reply.body | body))


# --- survivors --------------------------------------------------------------------------------------------------------


def test_a_list_of_survivors_must_be_one_that_it_can_unmask():
    party = at("share", 5)
    party.step()
    shares = json.loads(party.request("A"))["shares"]
    del shares["E"]  # the server withholds what E sent
    party.server.receive(party.ask("A", party.request("A", shares=shares)))
    for name in "BCDE":
        party.server.receive(party.ask(name, party.request(name)))
    party.server.close()
    for survivors, message in [
        (list("ABCDE"), "no mask"),
        (list("BCDE"), "isn't one"),
        (list("ABC"), "threshold"),
        (list("AABC"), "isn't one"),
        (list("ABCX"), "isn't one"),
        ("ABCD", "isn't one"),
        (dict.fromkeys("ABCD"), "isn't one"),
        ([["A"], "B", "C", "D"], None),
        (None, "isn't one"),
    ]:
        refuses(party, "A", party.request("A", survivors=survivors), message)
    signed = party.ask("A", party.request("A", survivors=list("ABCD"))).body["survivors"]
    assert signed == hashlib.sha256(b'["A", "B", "C", "D"]').hexdigest()


def test_different_survivors_for_different_hospitals_are_caught_before_a_share_leaves():
    party = at("confirm")
    told = {"A": "ABC", "B": "ABC", "C": "ABC", "D": "BCD"}
    confirmed = [relayed(party.ask(n, party.request(n, survivors=list(told[n])))) for n in "ABCD"]
    for name in "ABCD":
        for texts, message in [
            (confirmed, "signed"),
            ([t for t in confirmed if told[json.loads(t)[0]] == told[name]][:2], "needed"),
        ]:
            refuses(party, name, secagg.request("unmask", 1, confirmed=texts), message)
    assert not any(step == "unmask" for step, *_ in party.seen)


def test_confirmations_that_do_not_do():
    party = at("confirm")
    old = json.loads(party.until("unmask").request("A"))["confirmed"]
    party = Round(before=party, session=2).until("unmask")
    texts = json.loads(party.request("A"))["confirmed"]
    stranger = Ed25519PrivateKey.generate()
    body = json.loads(texts[3])[3]
    unknown = Reply("X", 2, "confirm", body)
    unknown = relayed(Reply("X", 2, "confirm", body, stranger.sign(unknown.signed(party.agreement))))
    for confirmed, message in [
        (texts[:2], "needed"),
        ([texts[0], texts[1], texts[1]], "hospitals"),
        (texts[1:], "among"),
        ([*texts[:2], old[2]], "confirm"),
        ([*texts[:2], old[2].replace('"C", 1', '"C", 2')], "sign"),
        ([*texts[:2], unknown], "one of"),
        ([*texts, *texts], "confirmations"),
        ([*texts[:2], relayed(fork(party).replies()[2])], "unmask"),
        ([], "hospitals"),
        (["{"], "read"),
        ([None], None),
        (None, None),
    ]:
        refuses(party, "A", party.request("A", confirmed=confirmed), message)


def test_a_hospital_that_did_not_survive_cannot_confirm():
    party = at("confirm", leave={"mask": "D"})
    replies = [party.ask(name, party.request(name)) for name in "ABC"]
    forced = party.resigned(Reply("D", 1, "confirm", replies[0].body))  # D works with the server
    texts = [relayed(reply) for reply in (*replies[:2], forced)]
    refuses(party, "A", secagg.request("unmask", 1, confirmed=texts), "needed")


def test_hospitals_that_were_given_other_keys_do_not_unmask():
    """Else a server could give each hospital another graph of neighbours."""
    party = at("share")
    # B hears of three hospitals, the others of four; all four lists are signed and at or above the threshold.
    party = at("share")
    replies = {n: party.ask(n, party.request(n)) for n in "ACD"}
    replies["B"] = party.ask("B", party.request("B", advertised=lambda texts: without(texts, "D")))
    sealed = {n: reply.body["shares"] for n, reply in replies.items()}
    for name in "ABC":
        shares = {o: sealed[o][name] for o in "ABC" if o != name}
        party.ask(name, secagg.request("mask", 1, shares=shares))
    request = secagg.request("confirm", 1, survivors=list("ABC"))
    confirmed = [relayed(party.ask(name, request)) for name in "ABC"]
    for name in "ABC":
        refuses(party, name, secagg.request("unmask", 1, confirmed=confirmed), "signed")


def test_confirmations_of_a_run_before_with_the_same_number_do_not_do():
    """A hospital that lost its state starts anew at 1 with the same identity: the round's keys tell the runs apart."""
    first = at("unmask")
    old = json.loads(first.request("A"))["confirmed"]
    again = Round(before=first, session=1)
    again.clients = {n: SecAggClient(n, key, again.agreement) for n, key in again.keys.items()}
    again.until("confirm")
    texts = [relayed(again.ask("A", again.request("A")))]
    refuses(again, "A", secagg.request("unmask", 1, confirmed=[*texts, *old[1:]]), "signed")


# --- nonsense ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("request_", [
    b"", b"null", b"[]", b"7", b'"advertise"', b"{}", b"\xff\xfe\xfa", b"[" * 100_000, b'{"a":' * 100_000,
    b'{"step": "advertise"}', b'{"step": [], "session": 2}', b'{"step": "sum", "session": 2}',
    b'{"step": null, "session": 2}', b'{"step": "_masked", "session": 2}', b'{"session": 2}',
    b'{"step": "advertise", "session": ' + b"9" * 5000 + b"}", b'{"step": "advertise", "session": 2, "x": 1}',
    b'{"step": "advertise", "session": 2, "self": 1}', b'{"step": "mask", "session": 1, "update": 1}',
    b'{"step": "mask", "session": 1, "shares": {}, "update": 1}', b'{"step": "mask", "session": 1}',
], ids=lambda content: f"{content[:40]!r}")  # fmt: skip
def test_requests_that_make_no_sense_end_the_round(request_):
    party = Round(3).until("mask")
    refuses(party, "A", request_)


STATES = {}
for _step in STEPS:
    _party = Round(3, 4, leave={"mask": "C"}).until(_step)
    STATES[_step] = (_party, _party.clients["A"].save(), _party.request("A"))

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda part: st.lists(part, max_size=3) | st.dictionaries(st.sampled_from(["A", "B", "x"]) | st.text(), part),
    max_leaves=6,
)


def answers(step, request):
    """A hospital's reply to a request, or None where it refuses in the one way that is allowed."""
    party, state, _ = STATES[step]
    client = SecAggClient("A", party.keys["A"], party.agreement).restore(state)
    try:
        return client.answer(request, lambda: party.updates["A"])
    except ProtocolError:
        assert client.secrets is None
        return None


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(STEPS), st.data())
def test_requests_with_other_values_are_refused_in_one_way(step, data):
    content = json.loads(STATES[step][2])
    field = data.draw(st.sampled_from([*content, "more"]))
    value = data.draw(JSON)
    if isinstance(content.get(field), list) and content[field] and data.draw(st.booleans()):
        content[field][data.draw(st.integers(0, len(content[field]) - 1))] = value
    elif isinstance(content.get(field), dict) and content[field] and data.draw(st.booleans()):
        content[field][data.draw(st.sampled_from(list(content[field])))] = value
    else:
        content[field] = value
    reply = answers(step, json.dumps(content).encode())
    # Only a greater number of the round is as good as the true one, where a round begins.
    # A share that doesn't open is as good as none, and said to be so.
    same = content == json.loads(STATES[step][2])
    assert reply is None or (step, field) == ("advertise", "session") or same or reply.body["unopened"]


@pytest.mark.parametrize("step", STEPS[1:])
def test_a_request_of_another_round_is_refused(step):
    party = Round(3).until(step)
    refuses(party, "A", party.request("A", session=2), f"asked for {step} of round 2, but .* of round 1 was last")


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(STEPS), st.integers(0, 5000), st.binary(min_size=1, max_size=3), st.booleans())
def test_requests_with_other_bytes_are_refused_in_one_way(step, where, noise, insert):
    request = STATES[step][2]
    where %= len(request)
    changed = request[:where] + noise + request[where if insert else where + len(noise) :]
    reply = answers(step, changed)
    if reply and step != "advertise":
        # The same content written otherwise, or a list of fewer that are still enough.
        party = STATES[step][0]
        reply.check(party.agreement, 1, step)
