"""What each party sees of a round, from transcripts: tests that hold, and the same tests failing where they must.

``parties.strip`` takes off all masks that the server was given the secrets of. What is left of each hospital's vector
must look like noise; of all vectors together only the sum is left. A test fails by chance once in about 10^8 times.
"""

import json

import numpy as np
import pytest
import torch
from parties import Round, altered, fork, is_update, relayed, strip
from scipy import stats

from primia_lite import secagg
from primia_lite.data.films import Films
from primia_lite.federation.aggregation import SecureAggregation
from primia_lite.federation.hospital import Hospital
from primia_lite.federation.rounds import Schedule, federate
from primia_lite.secagg import ProtocolError
from primia_lite.secagg import shares as shamir
from primia_lite.secagg.masks import add_masks
from primia_lite.training import Training

LENGTH = 1 << 15
CHANCE = 1e-10


def is_noise(vector, update):
    """Whether words look uniform and independent of the update: each byte, the top bits of the words' differences and
    the correlation with the update."""
    words = vector.astype("<u4")
    p = [stats.chisquare(np.bincount(words.view("u1")[i::4], minlength=256)).pvalue for i in range(4)]
    p.append(stats.chisquare(np.bincount(np.diff(words) >> 26, minlength=64)).pvalue)
    return min(p) > CHANCE and abs(np.corrcoef(words.view("<i4"), update)[0, 1]) < 6.5 / np.sqrt(len(words))


def are_alike(a, b):
    """Whether two vectors of words have one distribution."""
    return (
        min(stats.ks_2samp(x.astype(float), y.astype(float)).pvalue for x, y in ((a, b), (a >> 28, b >> 28))) > CHANCE
    )


def big(n=3, **options):
    return Round(n, LENGTH, **options)


@pytest.fixture(scope="module")
def ended():
    """A round in which D's masked update arrived and D counts as a survivor although it vanished then; E vanished
    before sending its own, so that its key is known."""
    return big(5, threshold=3, leave={"mask": "E", "confirm": "D"}).finish()


# --- the server -------------------------------------------------------------------------------------------------------


def test_what_the_server_sees_of_a_hospital_is_noise(ended):
    for name, vector in ended.masked().items():
        assert is_noise(vector, ended.updates[name])


def test_given_the_sum_it_is_still_noise_after_all_known_masks_are_off(ended):
    left = strip(ended)
    assert set(left) == set("ABCD")
    assert np.array_equal(sum(left.values()).view(np.int32), ended.server.total)
    # All but one are noise together; the last one follows from the sum.
    for name in "ABC":
        assert is_noise(left[name], ended.updates[name])
    for group in ("AB", "AC", "BC", "ABC", "CD"):
        assert is_noise(sum(left[name] for name in group), sum(ended.updates[name] for name in group))


def test_other_updates_with_the_same_sum_look_alike(ended):
    first = big()
    turned = {"A": first.updates["A"] * 0, "B": first.updates["B"] * 0 + 1, "C": first.updates["C"] * 0}
    second = big(updates=turned)
    a, b = strip(first.finish()), strip(second.finish())
    assert all(are_alike(a[name], b[name]) for name in "ABC")
    assert not are_alike(first.quantised("B").astype(np.uint32), second.quantised("B").astype(np.uint32))


def test_the_difference_of_two_rounds_is_noise():
    first = big().finish()
    second = Round(before=first, session=2).finish()
    a, b = strip(first), strip(second)
    for name in "ABC":
        assert is_noise(a[name] - b[name], first.updates[name] - second.updates[name])


def without(kind):
    """``add_masks`` with some masks left out; the own one comes first."""
    keep = {"own": slice(1, None), "others'": slice(0, 1), "all": slice(0, 0), "one": slice(0, -1)}[kind]
    return lambda vector, seeds: add_masks(vector, list(seeds)[keep])


def masking(party, how, monkeypatch):
    """The round to the end of step mask, with another way of masking at A."""
    party.until("mask")
    for name, request in party.server.requests().items():
        with monkeypatch.context() as patch:
            if name == "A":
                patch.setattr(secagg.client, "add_masks", how)
            party.server.receive(party.ask(name, request))
    party.server.close()
    return party


def test_control_without_the_others_masks_the_end_of_a_round_unmasks(monkeypatch):
    party = masking(big(), without("others'"), monkeypatch)
    assert is_noise(party.masked()["A"], party.updates["A"])  # for now
    secagg.run_round(party.server, party.exchange)
    left = strip(party)["A"]
    assert not is_noise(left, party.updates["A"]) and is_update(party, "A", left)


@pytest.mark.parametrize("kind", ["own", None])
def test_control_without_its_own_mask_a_hospital_called_gone_is_unmasked(kind, monkeypatch):
    party = masking(big(), without(kind) if kind else add_masks, monkeypatch)
    # The server has A's vector, but says that it came too late: the others give away A's key.
    party.server.survivors = ("B", "C")
    for _ in range(2):
        for name in "BC":
            party.server.receive(party.ask(name, party.request(name)))
        if party.server.step == "confirm":
            party.server.close()
    left = strip(party)["A"]
    assert is_update(party, "A", left) == bool(kind)
    assert is_noise(left, party.updates["A"]) != bool(kind)


def test_control_a_mask_that_comes_again_gives_the_difference_away(monkeypatch):
    def again(vector, seeds):
        add_masks(vector, [(bytes([i]) * 32, sign) for i, (_, sign) in enumerate(seeds)])

    first = masking(big(), again, monkeypatch)
    second = masking(Round(before=first, session=2), again, monkeypatch)
    a, b = (party.masked()["A"] for party in (first, second))
    assert is_noise(a, first.updates["A"])
    assert not is_noise(a - b, first.updates["A"] - second.updates["A"])
    assert np.array_equal((a - b).view(np.int32), first.quantised("A") - second.quantised("A"))


def test_control_a_server_that_knows_keys_unmasks_a_hospital():
    party = big().until("mask")
    kept = party.clients["A"].secrets
    secrets = {("keys", "A"): kept.mask_key, ("seeds", "A"): kept.own_seed}
    party.finish()
    assert is_update(party, "A", strip(party, secrets)["A"])
    # Its key for masks is enough once its own mask is known, as at the end of a round.
    assert is_update(party, "A", strip(party, {("keys", "A"): secrets["keys", "A"]})["A"])


def test_the_server_object_holds_no_secret_and_no_update():
    party = Round(4, 64, threshold=3, leave={"mask": "D"})
    secret = set()
    while party.server.step:
        step = party.server.step
        for name, client in party.clients.items():
            if kept := client.secrets:
                secret |= {bytes(v) for v in (kept.mask_key, kept.share_key, kept.own_seed) if v}
                secret |= {bytes.fromhex(v) for v in kept.shares.values()}
            secret.add(party.quantised(name).astype("<u4").tobytes())
            secret.add(party.updates[name].tobytes())
        for reply in party.replies():
            party.server.receive(reply)
        held = b"\n".join(everything(party.server))
        found = [s for s in secret if s in held or s.hex().encode() in held]
        assert not found, step
        party.server.close()
    assert b"".join(everything(party.server)).count(party.server.total.tobytes()) == 1
    assert not any(share in b"".join(everything(party.server)) for share in secret)
    party.server.planted = [{"x": party.updates["A"]}]  # the search does find what is there
    assert party.updates["A"].tobytes() in b"".join(everything(party.server))


def everything(thing, seen=None):
    """All bytes, texts and arrays that can be reached from an object, as bytes."""
    seen = seen if seen is not None else {}
    if id(thing) in seen:
        return
    seen[id(thing)] = thing
    if isinstance(thing, bytes):
        yield thing
    elif isinstance(thing, str):
        yield thing.encode()
    elif isinstance(thing, np.ndarray):
        yield thing.tobytes()
    elif isinstance(thing, dict):
        for pair in thing.items():
            yield from everything(pair, seen)
    elif isinstance(thing, (list, tuple, set, frozenset)):
        for part in thing:
            yield from everything(part, seen)
    elif hasattr(thing, "__dict__"):
        yield from everything(vars(thing), seen)


# --- hospitals --------------------------------------------------------------------------------------------------------


def test_with_two_survivors_each_learns_the_others_update():
    party = Round(3, leave={"mask": "C"}).finish()
    assert np.array_equal(party.server.total - party.quantised("A"), party.quantised("B"))


@pytest.mark.parametrize("leave", [{}, {"mask": "C"}, {"confirm": "C"}])
def test_the_server_and_one_of_three_do_not_learn_the_others_apart(leave):
    party = big(leave=leave).until("mask")
    kept = party.clients["C"].secrets
    secrets = {("keys", "C"): kept.mask_key, ("seeds", "C"): kept.own_seed}
    party.finish()
    left = strip(party, secrets)
    if "C" in left:
        assert is_update(party, "C", left["C"])
    for name in "AB":
        assert is_noise(left[name], party.updates[name])
    assert np.array_equal((left["A"] + left["B"]).view(np.int32), party.exact("AB"))


def test_one_of_three_holds_one_share_of_each_secret_which_is_not_enough():
    party = Round(3).until("confirm")
    held = party.clients["C"].secrets.shares
    assert set(held) == set("ABC") and party.agreement.share_threshold == 2
    for share in held.values():
        assert len(share) == 4 * shamir.SHARE_BYTES
        with pytest.raises(ValueError, match="shares"):
            shamir.combine({3: bytes.fromhex(share)[: shamir.SHARE_BYTES]}, 2)


def test_two_of_three_is_as_little_as_a_lying_server_with_one_hospital_needs():
    """The bound that the module states: 2 threshold - n hospitals. Here that is one."""
    party = big().until("confirm")
    kept = party.clients["C"].secrets
    shares = {("seeds", "A"): {3: kept.shares["A"][2 * shamir.SHARE_BYTES :]},
              ("keys", "A"): {3: kept.shares["A"][: 2 * shamir.SHARE_BYTES]}}  # fmt: skip
    for victim in "AB":  # each hears that it survived with C alone
        listed = fork(party)
        request = altered(party.request(victim), survivors=[victim, "C"])
        confirmed = [relayed(listed.ask(name, request)) for name in (victim, "C")]
        reply = listed.ask(victim, secagg.request("unmask", 1, confirmed=confirmed))
        for kind in ("keys", "seeds"):
            if "A" in reply.body[kind]:
                shares[kind, "A"][party.agreement.point[victim]] = reply.body[kind]["A"]
    secrets = {
        what: shamir.combine({p: bytes.fromhex(s) for p, s in parts.items()}, 2) for what, parts in shares.items()
    }
    assert is_update(party, "A", strip(party, secrets)["A"])


@pytest.mark.parametrize("step", ["mask", "confirm"])
def test_control_a_state_that_comes_back_twice_gives_a_hospital_away(step):
    """Why ``SecAggClient.save`` says that a state must not come back."""
    if step == "mask":
        party = big().until("mask")
        other = fork(party)
        other.updates = party.updates | {"A": -party.updates["A"]}
        a, b = (p.ask("A", party.request("A")).vector for p in (party, other))
        assert np.array_equal((a - b).view(np.int32), party.quantised("A") - other.quantised("A"))
        return
    party = big(4, threshold=3).until("confirm")
    second = fork(party)
    for branch, listed in ((party, "ABC"), (second, "BCD")):
        confirmed = [relayed(branch.ask(n, altered(party.request(n), survivors=list(listed)))) for n in listed]
        for name in listed:
            branch.ask(name, secagg.request("unmask", 1, confirmed=confirmed))
    party.seen += second.seen
    assert is_update(party, "A", strip(party)["A"])


# --- what Flower 1.41's SecAgg+ gets wrong ----------------------------------------------------------------------------


def test_mask_seeds_keep_all_their_256_bits(monkeypatch):
    """SecAgg+ folds each seed to 32 bits, which can be searched."""
    seeds = set()

    def record(vector, pairs):
        seeds.update(seed for seed, _ in pairs)
        add_masks(vector, pairs)

    for side in (secagg.client, secagg.server):
        monkeypatch.setattr(side, "add_masks", record)
    Round(5).finish()
    assert len(seeds) == 5 + 10 and {len(seed) for seed in seeds} == {32}  # own masks, and pairs'
    seed = next(iter(seeds))
    flipped = [(int.from_bytes(seed, "big") ^ 1 << bit).to_bytes(32, "big") for bit in range(256)]
    masks = np.zeros((257, 4), np.uint32)
    for mask, key in zip(masks, [seed, *flipped], strict=True):
        add_masks(mask, [(key, 1)])
    assert len(np.unique(masks[:, 0])) == 257


def test_a_hospital_never_answers_with_both_shares_of_another():
    """SecAgg+ answers with both if the server lists a hospital as active and as dead."""
    party = Round(4, threshold=3, leave={"mask": "D"}).until("unmask")
    for name in "ABC":
        copy = fork(party)
        body = copy.ask(name, party.request(name)).body
        assert body["seeds"].keys() == set("ABC") and body["keys"].keys() == {"D"}
        with pytest.raises(ProtocolError, match="round"):
            copy.ask(name, party.request(name))
        for asked in ({"seeds": ["D"], "keys": ["A"]}, {"survivors": list("ABCD")}):
            with pytest.raises(ProtocolError):
                fork(party).ask(name, altered(party.request(name), **asked))


def films(n, name, seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 2
    return Films(torch.randn(n, 1, 4, generator=generator), labels, np.array([f"{name}{i}" for i in range(n)]))


def transcript(counts):
    """All messages of two rounds of training, with so many films at each hospital."""
    seen = []
    federate(
        [Hospital(name, films(n, name, n)) for name, n in zip("ABC", counts, strict=True)],
        Training(n_classes=2, sample_rate=0.5), Schedule(2), progress=None,
        aggregator=SecureAggregation(listen=lambda *what: seen.append(what)),
    )  # fmt: skip
    return seen


def leaves(content):
    if isinstance(content, dict):
        content = [*content, *content.values()]
    return [leaf for part in content for leaf in leaves(part)] if isinstance(content, list) else [content]


def test_counts_of_films_do_not_travel():
    """SecAgg+ sends each hospital's count in the clear, and puts it into what is masked."""
    first, second = transcript((57, 41, 63)), transcript((62, 38, 58))  # declared: 60, 40, 60 in both
    for seen in (first, second):
        for number, step, kind, name, message in seen:
            head = message if kind == "request" else message.split()[0]
            texts = [leaf for leaf in leaves(json.loads(head)) if not isinstance(leaf, str)]
            # The round is the only number in any message, and of texts not even the length differs.
            assert texts == [number], (step, name)
    sizes = [
        [(step, kind, name, len(m) if kind == "request" else len(m.to_bytes())) for _, step, kind, name, m in seen]
        for seen in (first, second)
    ]
    assert sizes[0] == sizes[1]


def test_control_no_mask_is_seen(monkeypatch):
    party = masking(big(), without("all"), monkeypatch)
    assert not is_noise(party.masked()["A"], party.updates["A"]) and is_update(party, "A", party.masked()["A"])
    assert is_noise(party.masked()["B"], party.updates["B"])
