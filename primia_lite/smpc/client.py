"""What the film's owner and the model's owner do: they split what is theirs into two shares, one for each server."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from primia_lite.config import UserError
from primia_lite.smpc.connection import DEADLINE_S, MAX_HEADER, WAIT_S, Party, PeerError, connect_both
from primia_lite.smpc.keys import MAX_BATCH
from primia_lite.smpc.program import ACTIVATION, Program, Weights
from primia_lite.smpc.ring import decode, encode, share

Addresses = Sequence[tuple[str, int]]


@dataclass(frozen=True)
class Diagnosis:
    """``logits`` [N, classes]; ``key``: the number that was used up; ``costs``: what each server reports."""

    logits: np.ndarray
    key: int
    costs: tuple[dict, dict]


def send_model(program: Program, weights: Weights, party: Party, servers: Addresses) -> str:
    """Send each server its shares of a model; returns the name that both know it by. Earlier keys don't fit it."""
    name = secrets.token_hex(16)
    with connect_both(party, servers) as connections:
        for connection in connections:
            connection.send({"kind": "model", "name": name}, program.to_json().encode())
        for connection in connections:
            connection.receive("go")
        for layer, (weight, bias) in weights.items():
            fraction = program.fractions[layer]
            pairs = zip(share(encode(weight, fraction)), share(encode(bias, ACTIVATION + fraction)), strict=True)
            for connection, (own, own_bias) in zip(connections, pairs, strict=True):
                connection.send({"kind": "layer"}, own.tobytes() + own_bias.tobytes())
        for connection in connections:
            connection.receive("kept")
    return name


def diagnose(
    film: np.ndarray | Callable[[Program], np.ndarray], party: Party, servers: Addresses,
    program: Program | None = None, deadline_s: float = DEADLINE_S,
) -> Diagnosis:  # fmt: skip
    """Logits of films [N, C, H, W], in the form that the network takes, which neither server sees.

    Parameters
    ----------
    film
        Or a function that prepares films for the program that both servers offer.
    program
        What the servers must compute. Default: what both say alike.

    Raises
    ------
    UserError
        A film of another size, with NaN, or with a pixel that the program's calibration doesn't cover; more films than
        a key serves.
    PeerError
        A server vanished, was too slow, reports an error, or the two differ.
    """
    with connect_both(party, servers, deadline_s) as connections:
        offers = [connection.receive("program", most=MAX_HEADER) for connection in connections]
        model = offers[0][0].get("model")
        if offers[0][1] != offers[1][1] or model != offers[1][0].get("model"):
            raise PeerError("the two servers offer different programs: no film was sent")
        offered = Program.from_json(offers[0][1].decode("utf-8", "replace"))
        if program is not None and program.digest != offered.digest:
            raise PeerError("the servers offer another program than yours: no film was sent")
        batches = set.intersection(*(_batches(header) for header, _ in offers))
        if not batches:
            raise PeerError("the servers hold no keys: the dealer must deal first")
        film = np.asarray(film(offered) if callable(film) else film, np.float64)
        check_film(film, offered, max(batches))
        batch = min(batch for batch in batches if batch >= len(film))
        padded = np.zeros((batch, *offered.in_shape))
        padded[: len(film)] = film
        session = secrets.token_hex(16)
        for connection, own in zip(connections, share(encode(padded, ACTIVATION)), strict=True):
            connection.send({"kind": "film", "session": session, "batch": batch}, own.tobytes())
        replies, size = [], 4 * batch * offered.n_classes
        for connection in connections:
            header, data = connection.receive("logits", most=size, wait_s=WAIT_S)
            if len(data) != size or (header.get("model"), header.get("program")) != (model, offered.digest):
                raise PeerError(f"{connection.role} sent no logits of the model that it offered")
            cost = header.get("cost")
            if not isinstance(cost, dict) or not all(type(value) in (int, float) for value in cost.values()):
                raise PeerError(f"{connection.role} sent no costs")
            replies.append((header, np.frombuffer(data, np.uint32).reshape(batch, -1)))
    logits = decode(replies[0][1] + replies[1][1], offered.logit_fraction)
    return Diagnosis(logits[: len(film)], replies[0][0].get("key"), tuple(header["cost"] for header, _ in replies))


def _batches(header: dict) -> set[int]:
    """How many films at a time a server's keys serve."""
    found = header.get("batches")
    if not isinstance(found, list) or not all(type(n) is int and 0 < n <= MAX_BATCH for n in found):
        raise PeerError("a server's offer isn't one")
    return set(found)


def check_film(film: np.ndarray, program: Program, batch: int) -> None:
    """UserError unless it is one that the program was calibrated for."""
    if film.ndim != 4 or film.shape[1:] != program.in_shape:
        raise UserError(f"films must be [N, {', '.join(map(str, program.in_shape))}], these are {film.shape}")
    if not 0 < len(film) <= batch:
        raise UserError(f"a key serves 1 to {batch} films at a time, these are {len(film)}")
    if not np.isfinite(film).all():
        raise UserError("the film has pixels that aren't finite")
    if np.abs(film).max() > program.input_bound:
        raise UserError(
            f"the film has a pixel of {np.abs(film).max():.3g}, and the program's calibration covers "
            f"{program.input_bound:.3g}: is it normalised as the network takes it?"
        )
