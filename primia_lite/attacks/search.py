"""What a search for films ends with, and how it descends: the best seen is kept, however it ends."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from primia_lite.config import UserError
from primia_lite.runtime import in_notebook

Loss = Callable[[torch.Tensor], torch.Tensor]


@dataclass
class Reconstruction:
    """What an attack ends with.

    Attributes
    ----------
    images : float32 [B, 1, H, W] in [0, 1]
    labels : int64 [B], known or inferred; -1 where the attack doesn't say
    loss : of the images, as the attacker sees it (which loss, each method says)
    history : (iteration, loss, images) along the way, of the best start
    iterations, cpu_s : of all starts together; CPU seconds of the process
    stopped : whether a user stopped it; the images are the best so far
    """

    images: torch.Tensor
    labels: torch.Tensor
    loss: float
    history: list[tuple[int, float, torch.Tensor]] = field(default_factory=list, repr=False)
    iterations: int = 0
    cpu_s: float = 0.0
    stopped: bool = False


def best_start(attack: Callable[[int], Reconstruction], restarts: int = 1) -> Reconstruction:
    """The attack's outcome of least loss over its starts, numbered from 0."""
    if restarts < 1:
        raise UserError(f"restarts is {restarts}: at least one is needed")
    began, found = time.process_time(), []
    while len(found) < restarts and not (found and found[-1].stopped):
        found.append(attack(len(found)))
    best = min(found, key=lambda each: each.loss)
    best.stopped = found[-1].stopped
    if not (best.stopped or math.isfinite(best.loss)):
        raise UserError(
            "no finite loss was seen, so there is nothing to return: check the weights and the update for very large "
            "numbers, or give a smaller step or another start"
        )
    best.iterations, best.cpu_s = sum(each.iterations for each in found), time.process_time() - began
    return best


def noise_films(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Grey noise to start from, in [0, 1]."""
    return (0.5 + 0.25 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).clamp(0, 1)


class _NotFinite(Exception):
    """Ends a line search whose loss is no number."""


class Search:
    """Descents from one start, with one progress bar; ``iterations`` is how many steps they take at most."""

    def __init__(self, what: str, iterations: int, keep: int = 24):
        from tqdm.auto import tqdm

        if iterations < 1:
            raise UserError(f"iterations is {iterations}: at least one is needed")
        self.bar = tqdm(total=iterations, desc=what, unit="step", leave=False, disable=not in_notebook())
        self.marks = set(np.unique(np.geomspace(1, iterations, keep).astype(int)) - 1)
        self.what, self.done, self.stopped, self.history = what, 0, False, []

    def adam(
        self, x: torch.Tensor, loss: Loss, iterations: int, step: float, *, signed: bool = False, bounded: bool = False,
        show: Callable[[torch.Tensor], torch.Tensor] = lambda x: x,
    ) -> tuple[torch.Tensor, float]:  # fmt: skip
        """Adam, the step a tenth after 3/8, 5/8 and 7/8 of the way (Geiping et al. 2020).

        Parameters
        ----------
        signed : follow the gradient's signs
        bounded : keep to [0, 1]
        show : makes images of a point

        Returns
        -------
        The best point, and its loss (infinite if none was finite).
        """
        x = x.detach().clone().requires_grad_()
        optimizer = torch.optim.Adam([x], lr=step)
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [int(iterations * f) for f in (3 / 8, 5 / 8, 7 / 8)])
        best, least = x.detach().clone(), math.inf
        try:
            for number in range(iterations):
                value = loss(x)
                if not torch.isfinite(value):
                    self._not_finite(number)
                    break
                (gradient,) = torch.autograd.grad(value, x)
                x.grad = gradient.sign() if signed else gradient
                value = float(value.detach())
                if value < least:
                    best, least = x.detach().clone(), value
                if number in self.marks or number == iterations - 1:
                    self.history.append((self.done + 1, value, show(x.detach()).clone()))
                optimizer.step()
                schedule.step()
                if bounded:
                    with torch.no_grad():
                        x.clamp_(0, 1)
                self.done += 1
                self.bar.update()
        except KeyboardInterrupt:
            self.stopped = True
        return best, least

    def lbfgs(self, x: torch.Tensor, loss: Loss, iterations: int, *, record: bool = False) -> torch.Tensor:
        """The best point of L-BFGS with a strong Wolfe line search."""
        x = x.detach().clone().requires_grad_()
        optimizer = torch.optim.LBFGS(
            [x], max_iter=iterations, max_eval=2 * iterations, history_size=20, line_search_fn="strong_wolfe",
            tolerance_grad=0, tolerance_change=0,
        )  # fmt: skip
        best, least, first = x.detach().clone(), math.inf, self.done

        def closure():
            nonlocal best, least
            optimizer.zero_grad()
            value = loss(x)
            if not torch.isfinite(value):
                raise _NotFinite
            value.backward()
            size = float(value.detach())
            if size < least:
                best, least = x.detach().clone(), size
            if record and self.done - first in self.marks:
                self.history.append((self.done + 1, size, x.detach().clamp(0, 1)))
            self.done += 1
            self.bar.update()
            return value

        try:
            optimizer.step(closure)
        except KeyboardInterrupt:
            self.stopped = True
        except _NotFinite:
            self._not_finite(self.done - first)
        return best

    def _not_finite(self, steps: int) -> None:
        warnings.warn(
            f"{self.what}: the loss wasn't finite after {steps} steps, this start ends there, with its best so far",
            RuntimeWarning,
            stacklevel=3,
        )

    def end(self, images: torch.Tensor, labels: torch.Tensor, loss: float) -> Reconstruction:
        """Close the bar; a loss that is no number counts as infinite."""
        self.bar.close()
        loss = loss if math.isfinite(loss) else math.inf
        return Reconstruction(images.clamp(0, 1), labels, loss, self.history, self.done, stopped=self.stopped)
