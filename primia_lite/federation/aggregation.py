"""How a round's updates become one: the only interface between the rounds and a way of summing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch

from primia_lite.config import UserError
from primia_lite.federation.hospital import State, Update


class Aggregator(Protocol):
    """Turns the updates of a round into their weighted mean."""

    name: str

    def aggregate(self, updates: Mapping[str, Update], weights: Mapping[str, float]) -> State:
        """The sum of ``weights[h] * updates[h].delta`` over the hospitals; the weights add up to 1."""
        ...


class WeightedMean:
    """FedAvg's mean (McMahan et al., AISTATS 2017), in the clear: the server sees each hospital's update."""

    name = "weighted mean in the clear"

    def aggregate(self, updates: Mapping[str, Update], weights: Mapping[str, float]) -> State:
        if updates.keys() != weights.keys():
            raise UserError(
                f"updates from {sorted(updates)} but weights for {sorted(weights)}: they must name the same"
            )
        # float64 and a fixed order, so that the sum doesn't depend on who answered first.
        names = sorted(updates)
        return {
            key: torch.stack([weights[h] * updates[h].delta[key].double() for h in names]).sum(0).float()
            for key in updates[names[0]].delta
        }
