"""The server's step to the next global weights, from the mean update, or from a sum with shared noise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from primia_lite.config import UserError
from primia_lite.federation.hospital import State, network
from primia_lite.privacy.dpsgd import Privacy
from primia_lite.runtime import seed_for
from primia_lite.training import Training


@dataclass(frozen=True)
class Schedule:
    """What the server does.

    Attributes
    ----------
    rounds : number of synchronisations
    server_learning_rate : scales the mean update; 1 is FedAvg
    server_momentum : of the server's step (FedAvgM, Hsu et al. 2019); post-processing, so it costs no ε
    average_last : the final model is the mean of the global models after the last so many rounds; 0 takes the last one
    """

    rounds: int
    server_learning_rate: float = 1.0
    server_momentum: float = 0.0
    average_last: int = 0

    def __post_init__(self):
        if self.rounds < 1:
            raise UserError(f"rounds is {self.rounds}: at least one is needed")
        if not 0 <= self.average_last <= self.rounds:
            raise UserError(f"average_last is {self.average_last}: it must lie between 0 and rounds ({self.rounds})")
        if not 0 <= self.server_momentum < 1:
            raise UserError(f"server_momentum is {self.server_momentum}: it must be in [0, 1)")


class ServerOptimizer:
    """Global weights, momentum, running mean and history: all that a checkpoint holds."""

    def __init__(self, training: Training, schedule: Schedule, in_shape: tuple[int, ...], state: State):
        self.training, self.schedule, self.in_shape, self.state = training, schedule, in_shape, state
        self.velocity = {name: torch.zeros_like(value) for name, value in state.items()}
        self.sum = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in state.items()}
        self.round = 0
        self.history: list[dict] = []

    @classmethod
    def start(cls, training: Training, schedule: Schedule, in_shape: tuple[int, ...], seed: int) -> ServerOptimizer:
        """With initial weights from a seed."""
        state = network(training, in_shape, seed_for(seed, "weights")).state_dict()
        return cls(training, schedule, in_shape, {name: value.clone() for name, value in state.items()})

    def step(self, delta: State) -> None:
        self.round += 1
        for name, change in delta.items():
            self.velocity[name] = self.schedule.server_momentum * self.velocity[name] + change
            self.state[name] = self.state[name] + self.schedule.server_learning_rate * self.velocity[name]
        if self.round > self.schedule.rounds - self.schedule.average_last:
            for name, value in self.state.items():
                self.sum[name] += value.double()

    def final(self) -> State:
        if not self.schedule.average_last:
            return self.state
        return {name: (value / self.schedule.average_last).float() for name, value in self.sum.items()}

    def parameters(self) -> State:
        """What hospitals change: constants of norms are no part of it."""
        return {name: self.state[name] for name, _ in network(self.training, self.in_shape).named_parameters()}

    def model(self) -> torch.nn.Module:
        model = network(self.training, self.in_shape)
        model.load_state_dict(self.final() if self.round == self.schedule.rounds else self.state)
        return model

    def state_dict(self) -> dict:
        return {name: getattr(self, name) for name in ("state", "velocity", "sum", "round", "history")}

    def load_state_dict(self, kept: dict) -> None:
        vars(self).update(kept)


def shared_step(
    total: Mapping[str, torch.Tensor], state: State, training: Training, privacy: Privacy, declared: int
) -> State:
    """How the global weights change where noise is shared: -η (total / (s q declared) + λ weights).

    It equals the mean of the steps that the hospitals would take alone, weighted by their declared units. Nothing here
    sees a single hospital's numbers.

    Parameters
    ----------
    total : the sum of the hospitals' ``Update.delta``, int64 by parameter name, negative numbers as such
    state : the global weights; weight decay λ applies to those in ``total``
    declared : the declared units of the hospitals in the sum, together
    """
    divisor, decay = privacy.quantizer.scale * training.sample_rate * declared, training.weight_decay
    return {
        name: (-training.learning_rate * (value.double() / divisor + decay * state[name].double())).to(
            state[name].dtype
        )
        for name, value in total.items()
    }
