"""A malicious server reads films out of an update: the imprint layer (Fowl et al., Robbing the Fed, ICLR 2022).

The server hands out weights in which each unit of a dense layer answers to films whose brightness, or another linear
measure of them, lies in a narrow window of its own. A film that is alone in its window leaves itself in that unit's
gradient: film times derivative in the weights, derivative in the bias. Two measures are used side by side, so that two
films which share a window of one seldom share one of the other, and what is read from one is taken out of the other.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from primia_lite.attacks.prior import flat_pixels, principal_components
from primia_lite.attacks.search import Reconstruction
from primia_lite.attacks.view import AttackerView, State
from primia_lite.config import UserError


def imprint_weights(state: State, films: np.ndarray, normalisation: tuple[float, float]) -> State:
    """A network's weights with the imprint layer set up by films that the attacker owns.

    Parameters
    ----------
    state : weights of an ``imprintnet``; its other layers are kept
    films : uint8 [M, H, W], not the victims': their quantiles set the windows
    normalisation : mean and standard deviation that the victims scale pixels with
    """
    bins, pixels = state["imprint.weight"].shape
    flat = (flat_pixels(films, pixels) - normalisation[0]) / normalisation[1]
    layers = [_units(direction, _windows(flat @ direction, bins // 2)) for direction in _measures(flat)]
    weight, bias = (torch.cat(part) for part in zip(*layers, strict=True))
    return {name: value.clone() for name, value in state.items()} | {"imprint.weight": weight, "imprint.bias": bias}


def _units(direction: torch.Tensor, edges: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [n, pixels] and biases [n] of units that rise from 0 to 1 between two edges of this measure."""
    width = edges.diff()
    return direction[None] / width[:, None], -edges[:-1] / width


def _measures(flat: torch.Tensor) -> list[torch.Tensor]:
    """Mean brightness, and the direction in which films differ most beside it, each of L2 norm 1."""
    mean = torch.ones(flat.shape[1]) / flat.shape[1] ** 0.5
    rest = flat - flat.mean(0)
    rest = rest - (rest @ mean)[:, None] * mean
    _, directions = principal_components(rest, min(6, *rest.shape))
    return [mean, directions[:, 0]]


def _windows(values: torch.Tensor, n: int) -> torch.Tensor:
    """Edges of n windows that hold equal shares of a smoothed distribution of ``values`` [M]."""
    # Fewer films than windows: a kernel's width of noise fills the gaps, and both tails get room.
    generator = torch.Generator().manual_seed(0)
    spread = 0.9 * float(values.std()) * len(values) ** -0.2
    draws = values.repeat(1 + 20000 // len(values))
    draws = draws + spread * torch.randn(len(draws), generator=generator)
    edges = torch.quantile(draws, torch.linspace(0, 1, n + 1))
    return edges + torch.arange(n + 1) * 1e-6 * float(values.std())


def orthogonal_weights(state: State, films: np.ndarray, normalisation: tuple[float, float]) -> State:
    """A window for each of these films, uint8 [N, H, W] (equal ones share one): an informed malicious server's weights
    of an ``imprintnet`` with N bins or more, under which candidates' gradients are orthogonal but for what the network
    beside the imprint layer adds, which is made small."""
    bins = len(state["imprint.weight"])
    if bins < len(films):
        raise UserError(f"{len(films)} candidates need as many bins, the network has {bins}: set bins={len(films)}")
    flat = torch.from_numpy(films.reshape(len(films), -1) / 255.0)
    flat = (flat - normalisation[0]) / normalisation[1]
    # A random measure: no two different films have the same value.
    direction = torch.randn(flat.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    direction = direction / direction.norm()
    place = (flat @ direction).unique()
    weight, bias = _units(direction, torch.cat([place[:1] - 1, (place[1:] + place[:-1]) / 2, place[-1:] + 1]))
    empty = bins - len(place)
    planted = {
        "imprint.weight": F.pad(weight.float(), (0, 0, 0, empty)),
        "imprint.bias": F.pad(bias.float(), (0, empty), value=-1.0),
    }
    return {name: 0.01 * value for name, value in state.items()} | planted


@dataclass(frozen=True)
class ImprintReading:
    """The films that an update of an ``imprintnet`` holds, the clearest first; fewer than there were where several
    shared their windows, and at most ``n_films``.

    A window's content is taken for one film if its window of the other measure holds it, too, alone or with others;
    then it is taken out of both, which may leave another film alone. Loss: share of the windows' content that was not
    explained so.
    """

    def attack(self, view: AttackerView, n_films: int | None, seed: int) -> Reconstruction:
        gradient = view.named_gradient()
        if "imprint.weight" not in gradient:
            raise UserError("the network has no imprint layer: build imprintnet, with weights by imprint_weights")
        limit = n_films or (view.total_films if view.n_films else len(gradient["imprint.weight"]))
        content = _content(view, gradient["imprint.weight"], gradient["imprint.bias"])
        whole, found = float(content.norm()), []
        for _ in range(4):  # each pass may free films for the next
            fresh = _read_twins(view, content) or _read_beside_others(view, content)
            if not fresh:
                break
            found += fresh
        # What can't be confirmed by the other measure comes last, the largest first.
        rows, films = _filled(content)
        order = rows[content[rows, -1].abs().argsort(descending=True)].tolist()
        likely = dict(zip(rows.tolist(), _like_a_film(view, films).tolist(), strict=True))
        found += [content[r, :-1] / content[r, -1] for good in (True, False) for r in order if likely[r] == good]
        if not found:
            raise UserError("no film lies in a window of the imprint layer: set it up by imprint_weights")
        images = view.denormalise(torch.stack(found[:limit])).view(-1, *view.in_shape).clamp(0, 1)
        return Reconstruction(images, torch.full((len(images),), -1), float(content.norm()) / whole)


def _content(view: AttackerView, weight_gradient: torch.Tensor, bias_gradient: torch.Tensor) -> torch.Tensor:
    """[film, 1] times derivative in each window, [bins, pixels + 1], the units' signs undone.

    The derivative is the bias's gradient; but where the bias is large its update drowns in rounding. There it follows
    from where the film must lie: its measure is that of the window, to within a window's width.
    """
    weight, bias = view.weights[0]["imprint.weight"], view.weights[0]["imprint.bias"]
    middle = 0.5 - bias  # of the measure over the width, in each window
    by_place = (weight_gradient * weight).sum(1) / middle
    step = view.learning_rate * view.local_steps
    rounding = 6e-8 * bias.abs() * view.local_steps**0.5 / (step * bias_gradient.abs()).clamp(min=1e-30)
    derivative = torch.where(0.3 / middle.abs() < rounding, by_place, bias_gradient)
    return torch.cat([weight_gradient, derivative[:, None]], 1) * view.network.sign[:, None]


def _filled(content: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Windows that hold something, int64 [M], and what would be the film there if it were one, [M, pixels]."""
    rows = (content[:, -1].abs() > 1e-3 * content[:, -1].abs().max().clamp(min=1e-30)).nonzero()[:, 0]
    return rows, content[rows, :-1] / content[rows, -1:]


def _read_twins(view: AttackerView, content: torch.Tensor) -> list[torch.Tensor]:
    """Films that are alone in their windows of both measures; taken out of ``content``."""
    rows, films = _filled(content)
    first = rows < len(content) // 2
    if first.all() or not first.any():
        return []
    distance = torch.cdist(films[first], films[~first]) ** 2 / films.shape[1]
    least, partner = distance.min(1)
    likely = _like_a_film(view, films[first])
    found = []
    for place in least.argsort().tolist():
        if least[place] > 2e-3 or not likely[place]:  # 2e-3 of a pixel's variance: noise from rounding and local steps
            continue
        pair = [int(rows[first][place]), int(rows[~first][partner[place]])]
        clear = max(pair, key=lambda r: abs(float(content[r, -1])))
        if float(content[clear, -1]) == 0:  # its partner was taken by another
            continue
        found.append(content[clear, :-1] / content[clear, -1])
        content[pair] = 0.0
    return found


def _read_beside_others(view: AttackerView, content: torch.Tensor) -> list[torch.Tensor]:
    """Films that are alone in one window and share that of the other measure; taken out of both.

    A mixture of films would point to a window of the other measure that is empty, or that holds no film without it.
    """
    weight, bias = view.weights[0]["imprint.weight"], view.weights[0]["imprint.bias"]
    half = len(content) // 2
    rows, films = _filled(content)
    activation = films @ weight.T + bias
    likely = _like_a_film(view, films)
    found = []
    for place, row in enumerate(rows.tolist()):
        if not likely[place] or float(content[row, -1]) == 0:
            continue
        start = half if row < half else 0
        at = start + int((activation[place, start : start + half] > 0).sum()) - 1
        for partner in (at, at - 1, at + 1):  # rounding may move a film to the next window
            if not start <= partner < start + half or float(content[partner, -1]) == 0:
                continue
            rest = content[partner] - content[row]
            if abs(float(rest[-1])) < 1e-3 * float(content[row, -1].abs()):
                continue
            film = rest[:-1] / rest[-1]
            home = float(film @ weight[partner] + bias[partner])
            if -2 < home < 3 and _like_a_film(view, film[None])[0]:
                found.append(content[row, :-1] / content[row, -1])
                content[partner] = rest
                content[row] = 0.0
                break
    return found


def _like_a_film(view: AttackerView, films: torch.Tensor) -> torch.Tensor:
    """Whether all but a hundredth of the pixels are within their range, bool [M]."""
    pixels = view.denormalise(films)
    return ((pixels < -0.02) | (pixels > 1.02)).float().mean(1) < 0.01
