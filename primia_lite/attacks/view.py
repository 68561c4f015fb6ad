"""What an attacker holds: an :class:`AttackerView`, made from what crossed the wire and from nothing else.

The attacks take a view; the hospital's side, which has the films, makes it (:mod:`primia_lite.attacks.simulate`), and
scores are computed by a referee (:mod:`primia_lite.metrics`).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch
from torch import nn

from primia_lite.config import UserError

State = dict[str, torch.Tensor]
# Noise, over the clipping bound, that changes nothing which an attack looks at: "clipping alone" stays below it.
NOISELESS = 1e-6
SERVERS = {"honest": "follows the protocol", "malicious": "chooses architecture and weights to its liking"}
SEES = {
    "update": "one hospital's update of one round",
    "rounds": "one hospital's updates of several rounds",
    "sum": "the sum of several hospitals' updates of one round",
}


@dataclass(frozen=True)
class ThreatModel:
    """Who attacks, and with what.

    Attributes
    ----------
    name : what tables call it
    server : ``honest`` (but curious) or ``malicious``
    sees : ``update``, ``rounds`` or ``sum``
    knows_batch_size : whether the number of films in a step is known; else only what a hospital declares, in tens
    knows_labels : whether the films' labels are known; else the attack infers them
    """

    name: str = "honest but curious server"
    server: str = "honest"
    sees: str = "update"
    knows_batch_size: bool = True
    knows_labels: bool = False

    def __post_init__(self):
        for value, known, what in ((self.server, SERVERS, "server"), (self.sees, SEES, "sees")):
            if value not in known:
                raise UserError(f"{what} is {value!r}: choose one of {', '.join(known)}")
        if self.knows_labels and not self.knows_batch_size:
            raise UserError("whoever knows the labels knows how many films there are: grant the batch size, too")


@dataclass(frozen=True, eq=False)
class AttackerView:
    """All that an attacker has of the films that it is after; more than its threat model grants is dropped or refused.

    Attributes
    ----------
    threat : who attacks
    network : the architecture; it holds the weights of the first round seen
    weights : global weights of each round seen, before it
    updates : what came back, new weights minus those, or their sum over hospitals
    learning_rate, local_steps : public recipe of a round
    in_shape : of one film as the network takes it: [1, H, W], or [D] features
    normalisation : mean and standard deviation that pixels in [0, 1] were scaled with
    n_films : films in a step of each hospital, or None where the threat model doesn't grant it
    labels : int64 [films], or None
    hospitals : how many are in the sum
    max_grad_norm, noise_std : clipping bound C, and σC, of a private step; 0 without DP
    denominator : what a private step's sum was divided by, sample rate times the units that a hospital declares. It is
        public, whatever the threat model; 0 without DP (then the gradient is a mean)
    """

    threat: ThreatModel
    network: nn.Module = field(repr=False)
    weights: tuple[State, ...] = field(repr=False)
    updates: tuple[State, ...] = field(repr=False)
    learning_rate: float
    local_steps: int
    in_shape: tuple[int, ...]
    normalisation: tuple[float, float]
    n_films: int | None = None
    labels: torch.Tensor | None = None
    hospitals: int = 1
    max_grad_norm: float = 0.0
    noise_std: float = 0.0
    denominator: float = 0.0

    def __post_init__(self):
        if not self.threat.knows_batch_size:
            object.__setattr__(self, "n_films", None)
        if not self.threat.knows_labels:
            object.__setattr__(self, "labels", None)
        if not self.updates or len(self.updates) != len(self.weights):
            raise UserError(f"{len(self.updates)} updates, {len(self.weights)} sets of weights: give one pair a round")
        if len(self.updates) > 1 and self.threat.sees != "rounds":
            raise UserError(f"{self.threat.name!r} sees one round; {len(self.updates)} were given")
        if self.hospitals > 1 and self.threat.sees != "sum":
            raise UserError(f"{self.threat.name!r} sees one hospital; a sum over {self.hospitals} was given")
        if self.labels is not None and self.n_films is not None and len(self.labels) != self.total_films:
            raise UserError(f"{len(self.labels)} labels for {self.total_films} films: give one each")
        self._check_tensors()
        self._check_films()

    def _check_tensors(self) -> None:
        own = {name: value.shape for name, value in self.network.state_dict().items()}
        needed = {name for name, _ in self.network.named_parameters()}
        for state in (*self.weights, *self.updates):
            shapes = {name: value.shape for name, value in state.items()}
            if not needed <= shapes.keys() or not shapes.items() <= own.items():
                raise UserError("weights and updates must fit the network, each of its parameters: are they another's?")
        for update in self.updates:
            for name, value in update.items():
                if not torch.isfinite(value).all():
                    raise UserError(f"the update's {name!r} isn't finite: nothing can be inferred from it")

    def _check_films(self) -> None:
        """One blank film through a copy of the network, so that no attack ends in torch's own errors."""
        network = copy.deepcopy(self.network).eval()  # a BatchNorm can't train on one film, and would note it
        try:
            with torch.no_grad():
                out = network(torch.zeros(1, *self.in_shape))
            if out.dim() != 2 or len(out) != 1:
                raise ValueError(f"of one film it makes {tuple(out.shape)} instead of logits (1, classes)")
        except Exception as error:  # whatever torch or the network says
            raise UserError(
                f"the network doesn't take films of shape {tuple(self.in_shape)}: give in_shape as it takes them, "
                f"without the batch ({str(error).strip().partition(chr(10))[0]})"
            ) from error

    @classmethod
    def from_gradient(
        cls,
        network: nn.Module,
        gradient: list[torch.Tensor],
        in_shape: tuple[int, ...],
        *,
        n_films: int = 1,
        labels: torch.Tensor | None = None,
        normalisation: tuple[float, float] = (0.0, 1.0),
    ) -> AttackerView:
        """A view of a shared mean gradient, as older papers have it: an update with learning rate 1."""
        names = [name for name, _ in network.named_parameters()]
        if len(gradient) != len(names):
            raise UserError(f"{len(gradient)} gradients for {len(names)} parameters: give one each, in their order")
        state = {name: value.detach().clone() for name, value in network.state_dict().items()}
        update = {name: -value.detach().clone() for name, value in zip(names, gradient, strict=True)}
        threat = ThreatModel("shared gradient", knows_labels=labels is not None)
        return cls(
            threat, copy.deepcopy(network), (state,), (update,), 1.0, 1, tuple(in_shape), normalisation, n_films, labels
        )

    @property
    def total_films(self) -> int:
        """Films in a step of all hospitals seen together; a UserError where the threat model doesn't grant it."""
        if self.n_films is None:
            raise UserError("the number of films isn't known under this threat model: pass a guess as n_films")
        return self.n_films * self.hospitals

    @property
    def noisy(self) -> bool:
        """Whether there is noise to speak of: not without DP, and not with clipping alone."""
        return self.noise_std > NOISELESS * self.max_grad_norm

    def named_gradient(self, round_number: int | None = None) -> dict[str, torch.Tensor]:
        """Mean gradient over a round's local steps by parameter, from the update; of a sum over hospitals, the sum of
        theirs; of a private step the noisy sum of the clipped gradients over the public denominator.

        Without ``round_number`` of the only round: a UserError if there are several, as an attack that takes one would
        pass over the others, or if nothing, or the same everywhere, came back: then there is nothing to invert.
        """
        if round_number is None and len(self.updates) > 1:
            raise UserError(
                f"this attack takes one round, the view has {len(self.updates)}: MapEstimator adds rounds up"
            )
        scale = -1.0 / (self.learning_rate * self.local_steps) if self.learning_rate else 0.0
        update = self.updates[round_number or 0]
        out = {name: update[name] * scale for name, _ in self.network.named_parameters()}
        if all(float(value.abs().max()) == 0 for value in out.values()):
            raise UserError("the update is all zeros: there is nothing to invert (was the learning rate 0?)")
        if all(value.numel() < 2 or float(value.max() - value.min()) == 0 for value in out.values()):
            raise UserError("the update is constant in every layer: there is nothing to invert")
        return out

    def gradient(self, round_number: int | None = None) -> list[torch.Tensor]:
        """:meth:`named_gradient` in the parameters' order."""
        return list(self.named_gradient(round_number).values())

    def model(self, round_number: int = 0) -> nn.Module:
        """The network with the weights of a round, a copy."""
        model = copy.deepcopy(self.network)
        model.load_state_dict(self.weights[round_number])
        return model.train()

    def normalise(self, pixels: torch.Tensor) -> torch.Tensor:
        return (pixels - self.normalisation[0]) / self.normalisation[1]

    def denormalise(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs * self.normalisation[1] + self.normalisation[0]

    def describe(self) -> dict[str, str]:
        """For a table: the threat model, and what this view holds."""
        threat, numbers = self.threat, sum(value.numel() for value in self.updates[0].values())
        noise = f"noise σC = {self.noise_std:g}" if self.noisy else "no noise"
        return {
            "server": f"{threat.server}: {SERVERS[threat.server]}",
            "sees": f"{SEES[threat.sees]}, and the weights that it started from",
            "number of films": f"{self.total_films} in a step" if self.n_films else "guessed",
            "labels": "known" if threat.knows_labels else "inferred from the update",
            "never sees": "films, losses, who was sampled, the noise",
            "update": f"{numbers:,} numbers after {self.local_steps} local step(s)",
            "privacy": f"clipped to {self.max_grad_norm:g}, {noise}" if self.denominator else "none",
        }
