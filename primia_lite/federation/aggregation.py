"""How a round's updates become one: the only interface between the rounds and a way of summing.

An aggregator is given a function for each hospital that has it compute its update, so that it decides who sees the
result. In this process all parties run side by side; each sees only what its own code is handed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from primia_lite import secagg
from primia_lite.config import UserError
from primia_lite.federation.hospital import State, Update

ComputeUpdate = Callable[[], Update]


@dataclass(frozen=True)
class Aggregate:
    """What the server has after a round.

    ``value`` is the mean update, float32, weighted by declared sizes, or where noise is shared the sum, int64; of the
    ``survivors``.
    """

    value: State
    survivors: tuple[str, ...]


class Aggregator(Protocol):
    """Turns the updates of a round into their weighted mean, or their sum."""

    name: str

    def min_revealed(self, hospitals: int) -> int:
        """The fewest of so many hospitals whose mean or sum the server may come to know."""
        ...

    def aggregate(
        self,
        compute_update: Mapping[str, ComputeUpdate],
        sizes: Mapping[str, int],
        template: State,
        number: int,
        *,
        integer_sum: bool = False,
        question: secagg.Question | None = None,
    ) -> Aggregate:
        """One round; UserError for hospitals without a size, or an update of another shape.

        Parameters
        ----------
        compute_update : by hospital: computes its update when called
        sizes : declared size by hospital: its weight is its share of those that take part
        template : what an update holds: tensors by parameter, of which only names and shapes matter
        number : of the round
        integer_sum : updates are integers, summed as they are: noise is shared among the hospitals
        question : what updates without DP answer, for hospitals in this process; elsewhere they see it themselves
        """
        ...


class WeightedMean:
    """FedAvg's mean (McMahan et al., AISTATS 2017), in the clear: the server sees each hospital's update."""

    name = "weighted mean in the clear"

    def min_revealed(self, hospitals: int) -> int:
        return 1

    def aggregate(self, compute_update, sizes, template, number, *, integer_sum=False, question=None) -> Aggregate:
        check(compute_update, sizes)
        # float64 and a fixed order, so that the sum doesn't depend on who answered first.
        names, total = sorted(compute_update), sum(sizes.values())
        updates = {h: unflat(flat(compute_update[h]().delta, template, h), template) for h in names}
        if integer_sum:
            value = {key: torch.stack([updates[h][key] for h in names]).sum(0) for key in template}
        else:
            value = {
                key: torch.stack([sizes[h] / total * updates[h][key].double() for h in names]).sum(0).float()
                for key in template
            }
        return Aggregate(value, tuple(names))


class SecAggOver(ABC):
    """Secure aggregation (:mod:`primia_lite.secagg`), whatever carries its messages.

    A transport gives ``name``, ``agreement`` and :meth:`round`: one is here, PySyft's and Flower's are in
    ``primia_lite.apps``.
    """

    name: str
    agreement: secagg.Agreement | None = None

    @abstractmethod
    def round(
        self, number: int, updates: Mapping[str, Callable[[], np.ndarray]], question: secagg.Question | None
    ) -> secagg.SecAggServer:
        """Take a round to its end by :func:`primia_lite.secagg.run_round`.

        ``updates`` compute the entries, for hospitals in this process; those elsewhere do it themselves.
        """

    def agree(self, sizes: Mapping[str, int], length: int, weighted: bool) -> None:
        """Have an agreement on these values, or refuse them."""
        agreed = self.agreement
        if (dict(agreed.sizes), agreed.length, agreed.weighted) != (dict(sizes), length, weighted):
            raise UserError(
                "the round's sizes, length or kind of sum aren't those of the agreement: start from one study"
            )

    def min_revealed(self, hospitals: int) -> int:
        return self.agreement.threshold

    def aggregate(self, compute_update, sizes, template, number, *, integer_sum=False, question=None) -> Aggregate:
        check(compute_update, sizes)
        self.agree(sizes, length(template), weighted=not integer_sum)
        updates = {
            name: lambda name=name: flat(compute_update[name]().delta, template, name) for name in compute_update
        }
        server = self.round(number, updates, question)
        vector = server.total.astype(np.int64) if integer_sum else server.mean
        return Aggregate(unflat(vector, template), server.survivors)


class SecureAggregation(SecAggOver):
    """:mod:`primia_lite.secagg` between parties in this process.

    Parameters
    ----------
    threshold : fewest hospitals whose sum is revealed; left out, two thirds, rounded up
    clip : the largest absolute value of an update's entry. Entries are rounded to about 5e-10 of it
    absent : simulates drop-outs: called with round and step, gives those who are gone from there on in this round
    listen : called with each message: round, step, ``request`` or ``reply``, the hospital, and the bytes (or, of a
        reply, the :class:`~primia_lite.secagg.Reply`). All that a server sees goes through here

    Attributes
    ----------
    agreement, clients : of the last round, the latter by hospital
    """

    def __init__(
        self,
        threshold: int | None = None,
        clip: float = 32.0,
        *,
        absent: Callable[[int, str], Iterable[str]] = lambda number, step: (),
        listen: Callable[[int, str, str, str, bytes | secagg.Reply], None] = lambda *message: None,
    ):
        self.threshold, self.clip, self.absent, self.listen = threshold, clip, absent, listen
        self.name = f"secure aggregation, threshold {threshold or 'two thirds'}, clip {clip:g}"
        self.clients: dict[str, secagg.SecAggClient] = {}
        self._identities: dict[str, Ed25519PrivateKey] = defaultdict(Ed25519PrivateKey.generate)
        self._answered: dict[str, dict] = defaultdict(dict)  # by hospital
        self._session = 0

    def min_revealed(self, hospitals: int) -> int:
        return secagg.default_threshold(hospitals) if self.threshold is None else self.threshold

    def agree(self, sizes: Mapping[str, int], length: int, weighted: bool) -> None:
        keys = {name: self._identities[name].public_key().public_bytes_raw() for name in sizes}
        agreement = secagg.Agreement(keys, sizes, length, self.clip, self.threshold, weighted)
        if agreement != self.agreement:
            self.agreement = agreement
            self.clients = {
                name: secagg.SecAggClient(name, self._identities[name], agreement, answered=self._answered[name])
                for name in sizes
            }

    def round(self, number, updates, question) -> secagg.SecAggServer:
        self._session += 1
        server = secagg.SecAggServer(self.agreement, self._session)
        gone: set[str] = set()

        def exchange(step: str, requests: Mapping[str, bytes]) -> Iterable[secagg.Reply]:
            gone.update(self.absent(number, step))
            for name, request in requests.items():
                self.listen(number, step, "request", name, request)
                if name not in gone:
                    reply = self.clients[name].answer(request, updates[name], question)
                    self.listen(number, step, "reply", name, reply)
                    yield reply

        secagg.run_round(server, exchange)
        return server


def check(compute_update: Mapping[str, object], sizes: Mapping[str, int]) -> None:
    """Raise UserError unless both name the same hospitals, and each has a size."""
    if compute_update.keys() != sizes.keys():
        raise UserError(f"updates from {sorted(compute_update)} but sizes of {sorted(sizes)}: they must name the same")
    if min(sizes.values(), default=0) < 1:
        raise UserError(f"declared sizes are {dict(sizes)}: each must be at least 1")


def length(template: State) -> int:
    return sum(value.numel() for value in template.values())


def flat(delta: State, template: State, name: str) -> np.ndarray:
    """float32 or int64 [L]: an update's entries in the order of ``template``, whose shapes it must have."""
    shapes = {key: tuple(value.shape) for key, value in template.items()}
    found = {key: tuple(value.shape) for key, value in delta.items()}
    if found != shapes:
        raise UserError(f"hospital {name}'s update holds {found}, but the model has {shapes}")
    parts = [delta[key].detach().reshape(-1).numpy() for key in template]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def unflat(vector: np.ndarray, template: State) -> State:
    """The inverse of :func:`flat`."""
    parts = torch.from_numpy(vector).split([value.numel() for value in template.values()])
    return {key: part.view(value.shape) for (key, value), part in zip(template.items(), parts, strict=True)}
