"""What a search for films ends with, and how it descends: the best seen is kept, however it ends."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
            "no finite loss was seen: are there very large numbers in weights or update, or is the step too large?"
        )
    best.iterations, best.cpu_s = sum(each.iterations for each in found), time.process_time() - began
    return best


def noise_films(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Grey noise to start from, in [0, 1]."""
    return (0.5 + 0.25 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).clamp(0, 1)


class _NotFinite(Exception):
    """Ends a descent whose loss is no number."""


class Search:
    """Descents from one start, with one progress bar; ``iterations`` is how many steps they take at most."""

    def __init__(self, what: str, iterations: int):
        from tqdm.auto import tqdm

        if iterations < 1:
            raise UserError(f"iterations is {iterations}: at least one is needed")
        self.bar = tqdm(total=iterations, desc=what, unit="step", leave=False, disable=not in_notebook())
        self.marks = set(np.unique(np.geomspace(1, iterations, 24).astype(int)) - 1)
        self.what, self.done, self.stopped, self.history = what, 0, False, []

    def adam(
        self, x: torch.Tensor, loss: Loss, iterations: int, step: float, *, pixels: bool = False,
        show: Loss = lambda x: x,
    ) -> tuple[torch.Tensor, float]:  # fmt: skip
        """Adam, the step a tenth after 3/8, 5/8 and 7/8 of the way (Geiping et al. 2020): the best point, and its loss
        (infinite if none was finite). Over ``pixels`` it follows the gradient's signs within [0, 1]; ``show`` makes
        images of a point."""
        x = x.detach().clone().requires_grad_()
        optimizer = torch.optim.Adam([x], lr=step)
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [int(iterations * f) for f in (3 / 8, 5 / 8, 7 / 8)])
        with self._descent(x):
            for number in range(iterations):
                value = loss(x)
                self._count(x, value, show if number in self.marks or number == iterations - 1 else None)
                (gradient,) = torch.autograd.grad(value, x)
                x.grad = gradient.sign() if pixels else gradient
                optimizer.step()
                schedule.step()
                if pixels:
                    with torch.no_grad():
                        x.clamp_(0, 1)
        return self.best, self.least

    def lbfgs(self, x: torch.Tensor, loss: Loss, iterations: int, *, record: bool = False) -> torch.Tensor:
        """The best point of L-BFGS with a strong Wolfe line search."""
        x = x.detach().clone().requires_grad_()
        optimizer = torch.optim.LBFGS(
            [x], max_iter=iterations, max_eval=2 * iterations, history_size=20, line_search_fn="strong_wolfe",
            tolerance_grad=0, tolerance_change=0,
        )  # fmt: skip

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            value = loss(x)
            marked = record and self.done - self.first in self.marks
            self._count(x, value, (lambda x: x.clamp(0, 1)) if marked else None)
            value.backward()
            return value

        with self._descent(x):
            optimizer.step(closure)
        return self.best

    @contextmanager
    def _descent(self, x: torch.Tensor) -> Iterator[None]:
        """What ends early, by the user or by a loss that is no number, ends with its best."""
        self.first, self.best, self.least = self.done, x.detach().clone(), math.inf
        try:
            yield
        except KeyboardInterrupt:
            self.stopped = True
        except _NotFinite:
            steps = self.done - self.first
            warnings.warn(f"{self.what}: the loss wasn't finite after {steps} steps", RuntimeWarning, stacklevel=4)

    def _count(self, x: torch.Tensor, value: torch.Tensor, show: Loss | None) -> None:
        if not torch.isfinite(value):
            raise _NotFinite
        size = float(value.detach())
        if size < self.least:
            self.best, self.least = x.detach().clone(), size
        self.done += 1
        if show:
            self.history.append((self.done, size, show(x.detach()).clone()))
        self.bar.update()

    def end(self, images: torch.Tensor, labels: torch.Tensor, loss: float) -> Reconstruction:
        """Close the bar; a loss that is no number counts as infinite."""
        self.bar.close()
        loss = loss if math.isfinite(loss) else math.inf
        return Reconstruction(images.clamp(0, 1), labels, loss, self.history, self.done, stopped=self.stopped)
