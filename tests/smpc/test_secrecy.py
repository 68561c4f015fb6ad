"""What each party sees, and what breaks it: controls that must fail, and attacks that must work where we say so."""

import numpy as np
import pytest

from primia_lite.smpc.engines import Plain, Wire
from primia_lite.smpc.program import ACTIVATION, run
from primia_lite.smpc.ring import Stream, decode, encode
from primia_lite.smpc.simulation import fresh_seeds, simulate_film


def chi2(values):
    counts = np.bincount(values >> np.uint32(28), minlength=16)
    return ((counts - counts.sum() / 16) ** 2 / (counts.sum() / 16)).sum()


def test_over_fresh_keys_a_server_sees_uniform_words_and_with_one_key_it_does_not(small):
    """The same film 30 times. The control reuses a key: every opened word repeats."""
    _, program, weights, films = small
    film = films[:1].numpy()
    fresh = [simulate_film(program, weights, film)[1].words() for _ in range(30)]
    assert chi2(np.concatenate(fresh)) < 60
    assert abs(np.corrcoef(fresh[0].view(np.int32), film.ravel())[0, 1]) < 0.2
    assert len(np.unique(np.stack(fresh), axis=0)) == 30
    seeds, model_seeds = fresh_seeds(), fresh_seeds()
    again = [simulate_film(program, weights, film, seeds, model_seeds)[1].words() for _ in range(3)]
    assert len(np.unique(np.stack(again), axis=0)) == 1


def test_a_key_used_twice_gives_the_difference_of_two_films(small):
    _, program, weights, films = small
    seeds, model_seeds = fresh_seeds(), fresh_seeds()
    seen = [simulate_film(program, weights, films[i : i + 1].numpy(), seeds, model_seeds)[1].words() for i in range(2)]
    difference = decode(seen[0] - seen[1], ACTIVATION)
    assert np.abs(difference - (films[0] - films[1]).numpy().ravel()).max() < 0.001


def test_the_dealer_with_one_server_reads_the_film(small):
    _, program, weights, films = small
    seeds, film = fresh_seeds(), films[:1].numpy()
    _, found = simulate_film(program, weights, film, seeds)
    mask = Stream(seeds[0]).draw(film.size) + Stream(seeds[1]).draw(film.size)
    assert np.abs(decode(found.words() - mask, ACTIVATION) - film.ravel()).max() < 0.001


def test_a_server_that_lies_moves_a_logit_by_what_it_likes(small):
    _, program, weights, films = small
    film = films[:1].numpy()
    shares = simulate_film(program, weights, film)[1].shares
    want = run(program, Plain(weights), Wire(film.shape, film.astype(float))).share
    lie = shares[1] + encode(np.array([[0.0, 5.0, 0.0]]), program.logit_fraction)
    assert decode(shares[0] + lie, program.logit_fraction) - want == pytest.approx(np.array([[0, 5, 0]]), abs=0.005)
