"""The checks behind the exercises of the notebooks: ``pl.check("04.2", answer)`` says *right*, or what to look at.

A chapter's module holds ``CHECKS``: by the number of an exercise a function that takes an answer and returns None where
it is right, or a sentence that helps.
"""

from __future__ import annotations

from importlib import import_module
from typing import NamedTuple

from primia_lite.config import UserError


class Verdict(NamedTuple):
    """What a check found. True where the answer is right; a notebook shows its sentence."""

    right: bool
    sentence: str

    def __bool__(self) -> bool:
        return self.right

    def __repr__(self) -> str:
        return self.sentence


def check(number: str, answer: object) -> Verdict:
    """Check an answer to the exercise ``number``, such as "04.2" for the second one of notebook 04.

    A function that is asked for may still return None, and a value be None: then the exercise waits to be done.
    """
    chapter, _, exercise = number.partition(".")
    try:
        checks = import_module(f"primia_lite.exercises.chapter_{chapter}").CHECKS
    except ModuleNotFoundError:
        raise UserError(f"no exercise {number!r}: notebooks are numbered 00, 01, ...") from None
    if exercise not in checks:
        raise UserError(f"no exercise {number!r}: notebook {chapter} checks {', '.join(checks)}")
    try:
        hint = "nothing to check yet: fill in your answer" if answer is None else checks[exercise](answer)
    except Exception as error:  # a student's own code fails, in ways that only they know
        hint = f"your answer stops with {type(error).__name__}: {error}"
    return Verdict(hint is None, f"{number}: {hint or 'right'}")
