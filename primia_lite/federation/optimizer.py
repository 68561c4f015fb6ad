"""The server's step from the mean update to the next global weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from primia_lite import models
from primia_lite.config import UserError
from primia_lite.federation.hospital import State
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
        model = models.build(
            training.model, training.n_classes, in_shape, seed=seed_for(seed, "weights"), **training.model_options
        )
        state = {name: value.clone() for name, value in model.state_dict().items()}
        return cls(training, schedule, in_shape, state)

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
        return {name: self.state[name] for name, _ in self._build().named_parameters()}

    def model(self) -> torch.nn.Module:
        model = self._build()
        model.load_state_dict(self.final() if self.round == self.schedule.rounds else self.state)
        return model

    def _build(self) -> torch.nn.Module:
        training = self.training
        return models.build(training.model, training.n_classes, self.in_shape, **training.model_options)

    def kept(self) -> dict:
        return {name: getattr(self, name) for name in ("state", "velocity", "sum", "round", "history")}

    def restore(self, kept: dict) -> None:
        vars(self).update(kept)
