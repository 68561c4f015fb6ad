"""What a check says of answers right and wrong, and of exercises that aren't there."""

import pytest

import primia_lite as pl


def test_an_answer_that_is_missing_or_stops_gets_a_sentence():
    assert not pl.check("00.1", None) and "fill in" in repr(pl.check("00.1", None))
    assert "ZeroDivisionError" in repr(pl.check("00.2", lambda *values: 1 / 0))


@pytest.mark.parametrize("number", ["00.99", "77.1", "no number"])
def test_an_unknown_exercise_is_named(number):
    with pytest.raises(pl.UserError, match="exercise"):
        pl.check(number, 1)
