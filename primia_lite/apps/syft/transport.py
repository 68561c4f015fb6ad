"""Governed federation: a researcher asks, hospitals decide, and what they release is masked.

Every step of :mod:`primia_lite.secagg` is a syft job at each hospital. The job's files carry the request;
the hospital's runner (:mod:`~primia_lite.apps.syft.runner`) answers it, and in step ``mask`` runs the approved
code on the private films, in a process of its own. The researcher is the protocol's server and sees only the sum.

A person at a hospital reviews a study once; rounds with the same code and settings need no second review.

On machines of their own each party makes its client with ``syft_rds``, hospitals run ``fetch``, ``process``, ``sync``
of :class:`~primia_lite.apps.syft.hospital.Datasite` again and again, and the researcher's ``turn`` waits for them.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from primia_lite.apps.syft.researcher import Researcher
from primia_lite.config import UserError
from primia_lite.data.films import Films
from primia_lite.federation.aggregation import Aggregate, check, length, unflat
from primia_lite.federation.hospital import State
from primia_lite.federation.progress import RoundProgress
from primia_lite.federation.rounds import Result, Schedule, ServerOptimizer, run_rounds
from primia_lite.federation.study import Study, films_from


class SyftAggregation:
    """An aggregator whose hospitals are elsewhere: they compute their updates themselves, and release masked ones.

    Parameters
    ----------
    weights
        Gives the global weights that a round starts from.
    """

    def __init__(self, researcher: Researcher, study: Study, weights: Callable[[], State]):
        self.researcher, self.study, self.weights = researcher, study, weights

    @property
    def name(self) -> str:
        return f"secure aggregation over PySyft, threshold {self.study.agreement.threshold}"

    def min_revealed(self, hospitals: int) -> int:
        return self.study.agreement.threshold

    def aggregate(self, compute_update, sizes, template, number, *, integer_sum=False, question=None) -> Aggregate:
        check(compute_update, sizes)
        if length(template) != self.study.agreement.length or integer_sum != self.study.integer_sum:
            raise UserError(
                f"the study agreed on updates of {self.study.agreement.length} numbers, "
                f"the model has {length(template)}"
            )
        server = self.researcher.round(self.study, self.weights(), number)
        vector = server.total.astype(np.int64) if integer_sum else server.mean
        return Aggregate(unflat(vector, template), server.survivors)


def _elsewhere():
    raise RuntimeError("this update is computed at the hospital")  # an aggregator that would see it can't be used


def federate_with_syft(
    researcher: Researcher,
    study: Study,
    schedule: Schedule | None = None,
    *,
    seed: int = 0,
    validation: Films | None = None,
    progress: Callable[[dict], None] | str | None = "rounds",
) -> Result:
    """Train a model over a study that hospitals have approved; as :func:`primia_lite.federation.rounds.federate` does.

    Parameters
    ----------
    schedule
        What the server does; left out, plain averaging over the study's rounds.
    seed
        Of the initial weights.

    Returns
    -------
    a result without ``epsilon``, which hospitals keep to themselves, and without hospitals

    Raises
    ------
    UserError
        More rounds than the study has.
    TooFewSurvivors
        Too few hospitals answered, with what they said.
    """
    schedule = schedule or Schedule(study.rounds)
    if schedule.rounds > study.rounds:
        raise UserError(f"{schedule.rounds} rounds, but study {study.name!r} asks for {study.rounds}")
    mock = films_from(researcher.mock(study.agreement.names[0], study.dataset))
    in_shape = tuple(mock.inputs.shape[2:])
    server = ServerOptimizer.start(study.training, schedule, in_shape, seed)
    aggregator = SyftAggregation(researcher, study, lambda: server.state)
    show = RoundProgress(progress, schedule.rounds, []) if isinstance(progress, str) else progress
    sizes = study.agreement.sizes
    rounds = run_rounds(
        server, aggregator, lambda number: dict.fromkeys(sizes, _elsewhere), sizes,
        privacy=study.privacy, validation=validation,
    )  # fmt: skip
    for record in rounds:
        if show:
            show(record)
    if isinstance(show, RoundProgress):
        show.close()
    return Result(server.final(), server.history, {}, False, study.training, in_shape, ())
