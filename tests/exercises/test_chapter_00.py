import math

import pytest

import primia_lite as pl


def test_right_answers():
    assert pl.check("00.1", math.e)
    assert pl.check("00.2", lambda update, n_own, n_all, mask: n_own / n_all * update + mask)


@pytest.mark.parametrize(
    ("number", "answer", "hint"),
    [
        ("00.1", 1.0, "formula"),
        ("00.2", lambda update, n_own, n_all, mask: None, "nothing"),
        ("00.2", lambda update, n_own, n_all, mask: update + mask, "plain sum"),
        ("00.2", lambda update, n_own, n_all, mask: n_own / n_all * update, "read"),
        ("00.2", lambda update, n_own, n_all, mask: n_own / n_all * (update + mask), "cancel"),
    ],
)
def test_wrong_answers_get_a_hint(number, answer, hint):
    assert not pl.check(number, answer) and hint in repr(pl.check(number, answer))
