"""Checks of notebook 07's exercises."""

from __future__ import annotations

from collections.abc import Callable, Sequence


def read_again(answer: str) -> str | None:
    chosen = set(answer.lower()) & set("abcd")
    if "b" in chosen:
        return "the global weights lie in a file of the round's own, which the approval leaves out"
    if chosen != set("acd"):
        return "a yes is for the bytes of code and study: a comment, the name and the threshold change them"
    return None


def in_the_sum(answer: tuple[int, int]) -> str | None:
    one, two = answer
    if one != 2:
        return "A counts as gone in the second round: B and C answer, and two are enough"
    return None if two == 0 else "one hospital is left, fewer than the threshold of two: there is no sum"


def hidden(send: Callable[[str, int], Sequence[float]]) -> str | None:
    """Sums over hospitals of what the student's job sends must hold every secret."""
    for secrets in ({"A": 17, "B": 4, "C": 230}, {"A": 0, "B": 9, "C": 9}):
        sent = [send(name, secret) for name, secret in secrets.items()]
        if any(each is None for each in sent):
            return "nothing to check yet: return three numbers"
        if any(len(each) != 3 for each in sent):
            return "return three numbers, as every hospital must send the same kind of thing"
        if [sum(column) for column in zip(*sent, strict=True)] != list(secrets.values()):
            return "give each hospital an entry of its own: its secret there, and zeros in the others"
    return None


def readings(count: Callable[[int, int, int], tuple[int, int]]) -> str | None:
    for hospitals, studies, rounds in ((3, 1, 3), (10, 4, 300)):
        found = count(hospitals, studies, rounds)
        if found is None:
            return "nothing to check yet: return two numbers"
        if found[0] != hospitals * studies:
            return "with one yes a study, each hospital reads each study once"
        if found[1] != hospitals * studies * rounds:
            return "otherwise every round's job is read at every hospital"
    return None


CHECKS = {"1": read_again, "2": in_the_sum, "3": hidden, "4": readings}
