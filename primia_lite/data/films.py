"""Films as a network takes them, and whose they are: what training and privacy work on."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import torch

# Mean and standard deviation of grey values, from chest films in general and no data set in particular: half of the
# range, and a quarter of it. Public, so they cost no ε.
PIXEL_MEAN, PIXEL_STD = 0.5, 0.25


@dataclass(frozen=True)
class Units:
    """Units of privacy, numbered from 0, and the films that each owns.

    Attributes
    ----------
    of_film : int64 [N], the number of the unit that owns a film
    order : int64 [N], films, those of a unit together
    start, count : int64 [U], where in ``order`` a unit's films begin, and how many they are
    """

    of_film: torch.Tensor
    order: torch.Tensor
    start: torch.Tensor
    count: torch.Tensor

    def __len__(self) -> int:
        return len(self.count)

    def films(self, units: torch.Tensor) -> torch.Tensor:
        """All films of some units, unit by unit."""
        return self.order[ranges(self.start[units], self.count[units])]


def ranges(start: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """start[0], start[0] + 1, ... (count[0] numbers), start[1], ..."""
    before = count.cumsum(0) - count
    return torch.arange(int(count.sum())) + (start - before).repeat_interleave(count)


@dataclass(frozen=True)
class Films:
    """Films as a network takes them.

    Attributes
    ----------
    inputs : float32 [N, V, D] features, or [N, 1, 1, H, W] pixels; V views of each film, the first is the film as it is
    labels : int64 [N]
    patient_id : str [N]
    normalisation : mean and standard deviation that pixels in [0, 1] were scaled with
    model : the network that the inputs are for; empty where any may take them
    cache : what was worked out from these films before
    """

    inputs: torch.Tensor
    labels: torch.Tensor
    patient_id: np.ndarray
    normalisation: tuple[float, float] = (PIXEL_MEAN, PIXEL_STD)
    model: str = ""
    cache: dict = field(default_factory=dict, init=False, repr=False, compare=False)

    def units(self, unit: str) -> Units:
        """Whose films these are, by ``patient`` or by ``film``; worked out once."""
        if ("units", unit) not in self.cache:
            owner = self.patient_id if unit == "patient" else np.arange(len(self))
            number = torch.from_numpy(np.unique(owner, return_inverse=True)[1].astype(np.int64))
            count = torch.bincount(number)
            self.cache["units", unit] = Units(
                number, torch.argsort(number, stable=True), count.cumsum(0) - count, count
            )
        return self.cache["units", unit]

    def normalise(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels in [0, 1] as the network takes them."""
        return (pixels - self.normalisation[0]) / self.normalisation[1]

    def denormalise(self, inputs: torch.Tensor) -> torch.Tensor:
        """The inverse of :meth:`normalise`."""
        return inputs * self.normalisation[1] + self.normalisation[0]

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, index) -> Films:
        index = np.asarray(index)
        index = np.flatnonzero(index) if index.dtype == bool else index.astype(np.int64)
        return replace(self, inputs=self.inputs[index], labels=self.labels[index], patient_id=self.patient_id[index])
