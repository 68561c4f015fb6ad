"""Graphs of neighbours: their form, the bounds of their degree against exact and simulated ones, and rounds on them."""

from fractions import Fraction
from functools import cache
from math import ceil, comb

import numpy as np
import pytest
from parties import Round, agree, altered, fork, identities, is_update, names, relayed, strip
from scipy import stats

from primia_lite import secagg
from primia_lite.config import UserError
from primia_lite.secagg import STEPS, ProtocolError, TooFewSurvivors
from primia_lite.secagg.graph import choose_degree, default_threshold, neighbours, withstands

# --- the graph --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "degree"), [(5, 2), (6, 4), (30, 8), (201, 60)])
def test_each_has_its_degree_and_neighbours_are_mutual(n, degree):
    graph = neighbours(names(n), degree, b"seed")
    assert sorted(graph) == names(n)
    for name, others in graph.items():
        assert len(set(others)) == len(others) == degree and name not in others and list(others) == sorted(others)
        assert all(name in graph[other] for other in others)


def test_few_hospitals_are_all_neighbours():
    for degree in (3, 4, 10):
        assert neighbours("ABCD", degree, b"") == {n: tuple(o for o in "ABCD" if o != n) for n in "ABCD"}


def test_every_pair_is_as_likely():
    n, degree, graphs = 9, 4, 3000
    counts = np.zeros((n, n))
    for i in range(graphs):
        for name, others in neighbours("ABCDEFGHI", degree, str(i).encode()).items():
            for other in others:
                counts[ord(name) - 65, ord(other) - 65] += 1
    pairs = counts[np.triu_indices(n, 1)]
    assert np.abs(pairs / graphs - degree / (n - 1)).max() < 6 * np.sqrt(0.25 / graphs)


def test_the_graph_follows_from_the_keys_of_all():
    agreement = agree(identities(8), degree=4, share_threshold=3)
    keys = {name: [f"{i:064x}", f"{i + 99:064x}"] for i, name in enumerate(names(8))}
    graph = agreement.neighbours(keys)
    assert graph == agreement.neighbours(dict(reversed(keys.items())))
    others = [agreement.neighbours(keys | {"H": [f"{i:064x}", "ff" * 32]}) for i in range(1000, 1020)]
    assert sum(other != graph for other in others) > 15


# --- how many ---------------------------------------------------------------------------------------------------------


@cache
def at_least(population, marked, drawn, k):
    """Exact chance that of ``drawn`` at least ``k`` are marked."""
    if k <= 0:
        return Fraction(1)
    ways = sum(comb(marked, i) * comb(population - marked, drawn - i) for i in range(k, min(marked, drawn) + 1))
    return Fraction(ways, comb(population, drawn))


def falls(n, told, degree, threshold):
    """A bound for some honest hospital having too many corrupt neighbours, if so many advertisements are relayed, those
    of a tenth of all, who are corrupt, among them."""
    return told * at_least(told - 1, ceil(n / 10), degree, 2 * threshold - degree - 1)


def fits(n, degree, threshold):
    """The three bounds of ``choose_degree`` for a tenth corrupt and a tenth gone, in exact arithmetic."""
    tenth = ceil(n / 10)
    short = 1 - at_least(n - 1, n - 1 - tenth, degree, threshold)
    cut = n * Fraction(2 * tenth, n) ** (degree // 2)
    few = falls(n, default_threshold(n), degree, threshold)
    return few * 2**80 <= 1 and short * n * 2**30 <= 1 and cut * 2**80 <= 1


@pytest.mark.parametrize("n", [120, 137, 200, 300, 1000])
def test_the_degree_is_the_least_and_the_threshold_the_highest_that_fit(n):
    degree, threshold = choose_degree(n)
    assert degree % 2 == 0 and degree < n - 1 and degree / 2 < threshold <= degree
    assert fits(n, degree, threshold) and not fits(n, degree, threshold + 1)
    assert not any(fits(n, degree - 2, t) for t in range(1, degree))


@pytest.mark.parametrize(("n", "least"), [(121, 81), (200, 101), (300, 200), (1000, 501), (1000, 667)])
def test_the_bound_holds_for_as_few_advertisements_as_may_be_relayed_and_for_more(n, least):
    agreement = agree(identities(n), threshold=least)
    degree, shares = agreement.degree, agreement.share_threshold
    if degree == n - 1:
        assert shares == least
        return
    for told in {least, least + 1, (least + n) // 2, n}:
        assert falls(n, told, degree, shares) * 2**80 <= 1
    assert withstands(n, degree, shares, least)
    assert not withstands(n, degree, (degree + 2) // 2, least)  # with the fewest shares that an agreement allows
    assert not withstands(n, degree, shares, ceil(n / 10) + 1)  # nobody but the corrupt, and one


def test_degrees_grow_slowly_and_fit_every_default_threshold():
    degrees = [choose_degree(n)[0] for n in (200, 1000, 5000)]
    assert degrees == sorted(degrees) and degrees[-1] < 250
    for n in range(101, 140, 6):
        agreement = agree(identities(n))
        assert (agreement.degree, agreement.share_threshold) == choose_degree(n)
        assert agreement.share_threshold <= agreement.threshold
    assert agree(identities(100)).degree == 99


def test_corrupt_neighbours_are_as_many_in_simulated_graphs_as_in_the_bound():
    n, degree, corrupt, graphs = 60, 20, 12, 600
    rng, counts = np.random.default_rng(0), []
    for i in range(graphs):
        bad = set(rng.choice(names(n), corrupt, replace=False))
        graph = neighbours(names(n), degree, str(i).encode())
        counts += [len(bad & set(graph[name])) for name in names(n) if name not in bad][:1]
    for k in (3, 5, 7):
        p = float(at_least(n - 1, corrupt, degree, k))
        assert abs(np.mean(np.array(counts) >= k) - p) < 5 * np.sqrt(p * (1 - p) / graphs)


def test_the_honest_who_stay_are_cut_less_often_than_the_bound():
    n, degree, away = 24, 8, 10
    rng, cut = np.random.default_rng(0), 0
    for i in range(400):
        out = set(rng.choice(names(n), away, replace=False))
        graph = neighbours(names(n), degree, str(i).encode())
        left = [name for name in names(n) if name not in out]
        reached, todo = {left[0]}, [left[0]]
        while todo:
            new = set(graph[todo.pop()]) - out - reached
            reached |= new
            todo += new
        cut += len(reached) < len(left)
    assert 0 < cut / 400 < n * (away / n) ** (degree // 2)


@pytest.mark.parametrize(("n", "options", "threshold"), [(150, (0.4, 0.4), 100), (101, (), 68), (5, (), 4)])
def test_all_share_with_all_where_no_graph_serves(n, options, threshold):
    assert choose_degree(n, *options) == (n - 1, threshold)


# --- rounds -----------------------------------------------------------------------------------------------------------


def sparse(n=30, degree=10, share_threshold=7, length=4, **options):
    return Round(n, length, degree=degree, share_threshold=share_threshold, **options)


@pytest.mark.parametrize("step", STEPS)
def test_hospitals_with_neighbours_may_vanish_at_each_step(step):
    party = sparse()
    party.leave = {step: names(30)[4:7]}  # at most three of anybody's neighbours, whatever the graph
    party.finish()
    assert {len(others) for others in party.agreement.neighbours({n: [n, n] for n in names(30)}).values()} == {10}
    assert len(party.server.survivors) == (27 if STEPS.index(step) <= STEPS.index("mask") else 30)
    assert np.array_equal(party.server.total, party.exact(party.server.survivors))


def test_a_tenth_of_the_hospitals_vanishes_along_the_way():
    first, second, third = names(30)[4:7]
    party = sparse(leave={"share": [first], "mask": [second], "unmask": [third]}).finish()
    assert set(party.server.survivors) == set(names(30)) - {first, second}
    assert np.array_equal(party.server.total, party.exact(party.server.survivors))


def test_too_few_neighbours_of_one_hospital_leave_no_sum():
    party = sparse(9, 4, 4).until("unmask")
    around = party.server.neighbours["h0000"]
    party.leave = {"unmask": around[:2]}
    with pytest.raises(TooFewSurvivors, match="neighbours"):
        secagg.run_round(party.server, party.exchange)
    assert party.server.total is None and party.server.masked_sum is None and party.server.step is None


def test_shares_go_to_neighbours_and_come_from_neighbours_only():
    party = sparse(9, 4, 4).until("mask")
    name = "h0000"
    others = party.server.neighbours[name]
    stranger = next(n for n in names(9)[1:] if n not in others)
    shares = {other: party.server.replies["share"][other].body["shares"][name] for other in others}
    with pytest.raises(ProtocolError, match="neighbours"):
        fork(party).ask(name, secagg.request("mask", 1, shares=shares | {stranger: shares[others[0]]}))
    with pytest.raises(ProtocolError, match="few"):
        fork(party).ask(name, secagg.request("mask", 1, shares=dict(list(shares.items())[:2])))
    party.until("unmask")
    reply = party.ask(name, party.request(name))
    assert reply.body["seeds"].keys() == {name, *others}
    body = {"keys": {}, "seeds": reply.body["seeds"] | {stranger: "00" * 66}}
    with pytest.raises(ProtocolError, match="shares"):
        party.server.receive(party.resigned(reply, body=body))


@pytest.mark.parametrize("helpers", [0, 1])
def test_a_lying_server_needs_twice_the_threshold_less_degree_and_one_of_the_neighbours(helpers):
    """Why ``choose_degree`` bounds the corrupt by that: here one is enough (2 * 3 - 4 - 1), and none is not."""
    party = sparse(12, 4, 3, length=4096, threshold=8).until("mask")
    victim = "h0000"
    first, *_, last = party.server.neighbours[victim]
    secrets = {("keys", last): party.clients[last].secrets.mask_key} if helpers else {}
    # The victim gets the shares of these two alone, and so masks with them alone.
    shares = {other: party.server.replies["share"][other].body["shares"][victim] for other in (first, last)}
    party.server.receive(party.ask(victim, secagg.request("mask", 1, shares=shares)))
    for name in names(12)[1:]:
        party.server.receive(party.ask(name, party.request(name)))
    party.server.close()
    # Then those of them who don't help are said to have vanished; all but the victim, who would object, confirm that.
    listed = sorted(set(names(12)) - ({first} if helpers else {first, last}))
    asked = [name for name in listed if name != victim]
    confirmed = [relayed(party.ask(n, altered(party.request(n), survivors=listed))) for n in asked]
    for name in asked:
        party.ask(name, secagg.request("unmask", 1, confirmed=confirmed))
    left = strip(party, secrets)[victim]
    assert is_update(party, victim, left) == bool(helpers)
    assert (stats.kstest(left / 2**32, "uniform").pvalue > 1e-9) != bool(helpers)


@pytest.mark.parametrize(("corrupt", "gone"), [(-0.1, 0.1), (0.5, 0.5), (0.1, 1.0)])
def test_shares_that_leave_nobody_are_refused(corrupt, gone):
    with pytest.raises(UserError, match="together"):
        choose_degree(1000, corrupt, gone)
