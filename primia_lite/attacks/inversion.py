"""Films from an update: what a curious server can compute from what it is sent.

Each attack takes an :class:`~primia_lite.attacks.view.AttackerView` and returns a :class:`Reconstruction`; of several
starts the one with the least loss *as the attacker sees it* wins. Where a dense layer is among the network's layers,
its gradient gives away which space its inputs lie in, and an attack that uses this needs no luck.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.grad import conv2d_weight

from primia_lite.attacks.view import AttackerView
from primia_lite.config import UserError
from primia_lite.models.networks import Square
from primia_lite.runtime import in_notebook

Loss = Callable[[torch.Tensor], torch.Tensor]


@dataclass
class Reconstruction:
    """What an attack ends with.

    Attributes
    ----------
    images : float32 [B, 1, H, W] in [0, 1]
    labels : int64 [B], known or inferred
    loss : of the images, as the attacker sees it (which loss, each attack says)
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


# --- what needs no search ---------------------------------------------------------------------------------------------


def infer_labels(view: AttackerView, n_films: int | None = None) -> torch.Tensor:
    """Labels of a batch from the gradient of the last layer's bias, int64 [B], sorted.

    That gradient is mean(p) - counts / B, p the softmax. For one film the label is where it is negative (iDLG, Zhao,
    Mopuri, Bilen 2020). For more, p is estimated on grey noise, as is what clipping leaves of a film of each class, and
    counts are rounded (as Geng et al. 2021). Noise draws them towards n p; of several rounds the mean is taken.

    Right as long as p, and under clipping the gradients' lengths, hardly depend on the film. On phantoms and networks
    at initialisation (``convnet``, 32 px) all labels were right in batches up to 8, and 97 % or more up to 32; where
    clipping cut every film, all up to 4, and 93 % or more up to 32. A guess for trained networks, after several local
    steps, and under clipping for patients with several films.

    Raises
    ------
    UserError
        The network has no dense layer, its last one has no bias, or the number of films isn't known.
    """
    n = n_films or view.total_films
    rounds = range(len(view.updates))
    if n == 1:
        return sum(_bias_gradient(view, t) for t in rounds).argmin()[None]
    share = (sum(_label_counts(view, t, n) for t in rounds) / len(rounds)).clamp(min=1e-6)
    share = n * share / share.sum()
    counts = share.floor()
    for k in (share - counts).argsort(descending=True)[: int(n - counts.sum())].tolist():  # largest remainders
        counts[k] += 1
    return torch.arange(len(counts)).repeat_interleave(counts.long())[:n]


def _label_counts(view: AttackerView, round_number: int, n: int) -> torch.Tensor:
    """Estimated number of films of each class, float32 [classes], not rounded and perhaps below 0."""
    model, noise = view.model(round_number), view.normalise(_noise_films((64, *view.in_shape), 0))
    bias = (view.denominator or n / view.hospitals) * _bias_gradient(view, round_number)
    with torch.no_grad():
        p = model(noise).softmax(1).mean(0)
    # A film of class k, of which clipping leaves a share s_k, adds s_k (p - e_k). The counts must add up to n.
    left = _left_by_clipping(view, model, noise[:8], len(p))
    total = (n + (bias / left).sum()) / (p / left).sum()
    counts = (total * p - bias) / left
    # The best linear estimate, if labels were drawn by p.
    drawn, blur = n * p * (1 - p), view.hospitals * (view.noise_std / left) ** 2 / len(view.updates)
    return n * p + drawn / (drawn + blur).clamp(min=1e-30) * (counts - n * p)


def _left_by_clipping(view: AttackerView, model: nn.Module, films: torch.Tensor, n_classes: int) -> torch.Tensor:
    """Share of a film's gradient that clipping leaves, float32 [classes], by the mean length of these films' ones."""
    if not view.max_grad_norm:
        return torch.ones(n_classes)
    length = [
        float(_norm(expected_update(view, model, film[None], torch.tensor([k]), unroll=False)).detach())
        for k in range(n_classes)
        for film in films
    ]
    return (view.max_grad_norm / torch.tensor(length).view(n_classes, -1).mean(1)).clamp(max=1.0)


def _last_dense(network: nn.Module) -> tuple[str, nn.Linear]:
    found = [(name, layer) for name, layer in network.named_modules() if isinstance(layer, nn.Linear)]
    if not found:
        raise UserError("the network has no dense layer, whose bias gradient would tell the labels: give them")
    return found[-1]


def _bias_gradient(view: AttackerView, round_number: int) -> torch.Tensor:
    name, layer = _last_dense(view.network)
    gradient = view.named_gradient(round_number)
    if layer.bias is None:
        raise UserError(f"layer {name!r} has no bias, whose gradient would tell the labels: give them in the view")
    return gradient[f"{name}.bias" if name else "bias"]


def _dense(view: AttackerView) -> tuple[str, torch.Tensor, torch.Tensor] | None:
    """Name, weight gradient and bias gradient of the first dense layer with a bias."""
    gradient = view.named_gradient()
    for name, layer in view.network.named_modules():
        if isinstance(layer, nn.Linear) and layer.bias is not None:
            key = f"{name}." if name else ""  # a network may be a single layer
            return name, gradient[f"{key}weight"], gradient[f"{key}bias"]
    return None


def dense_layer(view: AttackerView) -> Reconstruction:
    """A film in closed form, where a dense layer with a bias sees the pixels.

    Row k of the weight gradient is the film times row k of the bias gradient (Phong et al. 2018; Geiping et al. 2020,
    proposition 3.1). Of more films it returns a weighted mean. Loss: 0.

    Raises
    ------
    UserError
        The first dense layer doesn't see the pixels, no unit of it was active, or the view has several rounds.
    """
    started = time.process_time()
    view.check_one_round()
    found = _dense(view)
    pixels = int(np.prod(view.in_shape))
    if found is None or found[1].shape[1] != pixels:
        raise UserError(f"no dense layer with a bias sees the film's {pixels} pixels: use invert_gradients")
    _, weight, bias = found
    if not float(bias.abs().max()):
        raise UserError("no unit of the dense layer was active: there is nothing to invert")
    # All rows say the same; weighted by their size they average out rounding, and noise.
    film = view.denormalise((bias @ weight) / (bias @ bias)).view(1, *view.in_shape).clamp(0, 1)
    labels = view.labels if view.labels is not None else infer_labels(view, 1)
    return Reconstruction(film, labels[:1], 0.0, cpu_s=time.process_time() - started)


# --- matching an update -----------------------------------------------------------------------------------------------


def expected_update(
    view: AttackerView, model: nn.Module, inputs: torch.Tensor, labels: torch.Tensor, *, unroll: bool = True
) -> list[torch.Tensor]:
    """The mean gradient over a round's local steps that these films would give, differentiable.

    Parameters
    ----------
    unroll
        Follow the local steps through (all films in each); else one step stands for all.
    """
    parameters = dict(model.named_parameters())
    if view.local_steps == 1 or not unroll:
        return torch.autograd.grad(F.cross_entropy(model(inputs), labels), list(parameters.values()), create_graph=True)
    first = parameters
    for _ in range(view.local_steps):
        loss = F.cross_entropy(functional_call(model, parameters, (inputs,)), labels)
        gradient = torch.autograd.grad(loss, list(parameters.values()), create_graph=True)
        parameters = {
            name: p - view.learning_rate * g for (name, p), g in zip(parameters.items(), gradient, strict=True)
        }
    return [(first[n] - parameters[n]) / (view.learning_rate * view.local_steps) for n in first]


def cosine_distance(a: list[torch.Tensor], b: list[torch.Tensor]) -> torch.Tensor:
    """1 - cosine of two gradients, all layers as one vector (Geiping et al. 2020, equation 4)."""
    product = sum((x * y).sum() for x, y in zip(a, b, strict=True))
    return 1 - product / (_norm(a) * _norm(b) + 1e-20)


def _norm(a: list[torch.Tensor]) -> torch.Tensor:
    return sum((x * x).sum() for x in a).sqrt()


def total_variation(x: torch.Tensor) -> torch.Tensor:
    """Mean absolute difference of neighbours, in both directions."""
    return (x[..., 1:, :] - x[..., :-1, :]).abs().mean() + (x[..., :, 1:] - x[..., :, :-1]).abs().mean()


class _DenseInputs:
    """What the first dense layer gives away about its inputs, as a loss on films.

    The gradient of its weight and bias is a sum over films of outer products of (derivative, [input, 1]), so its rows
    span the inputs, as long as there are no more films than units; an SVD finds that space (the first step of SPEAR,
    Dimitrov et al. 2024). For one film this is its features, exactly, with their scale.

    For one film behind a ReLU there is more. The features say which units were active; with the dense layer's bias
    gradient, which is the derivative of its outputs, this gives the derivative at the convolution's outputs, and the
    convolution's weight gradient becomes a *linear* function of its inputs (R-GAP, Zhu and Blaschko 2021). Both are
    first-order losses without dead units, where matching gradients as a whole is neither.
    """

    def __init__(self, view: AttackerView, model: nn.Module, n_films: int):
        self.basis = self.conv = None
        found = _dense(view)
        if found is None or view.local_steps > 1 or view.noisy:  # steps and noise blur it
            return
        name, weight, bias = found
        rows = torch.cat([weight, bias[:, None]], 1)
        _, size, basis = torch.linalg.svd(rows, full_matrices=False)
        # As many directions as films, all clear of rounding. The outputs' derivatives add up to 0: a rank less.
        last = name == _last_dense(view.network)[0]
        if n_films > min(rows.shape) - last or size[n_films - 1] < 1e-5 * size[0]:
            return
        self.basis = basis[:n_films]
        layers = dict(model.named_modules())
        layers[name].register_forward_pre_hook(self._keep_inputs)
        if n_films == 1:
            self._look_behind(view, model, name, bias @ weight / (bias @ bias), bias @ layers[name].weight.detach())

    def _keep_inputs(self, _, inputs):
        self.inputs = inputs[0]

    def _keep_conv(self, _, inputs, output):
        self.before, self.after = inputs[0], output

    def _look_behind(self, view, model, dense: str, features: torch.Tensor, derivative: torch.Tensor) -> None:
        """Note the convolution whose rectified outputs the dense layer sees, if there is one."""
        names = [name for name, _ in model.named_modules()]
        convs = [
            (name, layer) for name, layer in model.named_modules()
            if isinstance(layer, nn.Conv2d) and names.index(name) < names.index(dense) and layer.groups == 1
        ]  # fmt: skip
        if not convs:
            return
        name, layer = convs[-1]
        layer.register_forward_hook(self._keep_conv)
        with torch.no_grad():
            model(torch.randn(1, *view.in_shape, generator=torch.Generator().manual_seed(0)))
        if self.after.numel() != features.numel() or not torch.equal(
            self.after.relu().flatten(), self.inputs.flatten()
        ):
            return
        gradient = view.named_gradient()
        if float(features.max()) <= 0:
            raise UserError("no unit before the dense layer was active: there is nothing to invert")
        self.conv, self.observed = layer, gradient[f"{name}.weight"]
        shape = self.after.shape
        self.features = features.view(shape)
        self.active = self.features > 1e-5 * features.max()
        self.derivative = derivative.view(shape) * self.active

    def residual(self) -> torch.Tensor:
        """Of the last forward pass: squared distance over squared length, of features and of the convolution's
        gradient where that is known."""
        if self.conv is None:
            inputs = F.pad(self.inputs, (0, 1), value=1.0)
            inside = (inputs @ self.basis.T) @ self.basis
            return ((inputs - inside) ** 2).sum() / (inputs**2).sum()
        layer = self.conv
        # Before the ReLU, so that a unit known to be active is pulled up even where it is off.
        miss = torch.where(self.active, self.after - self.features, self.after.clamp(min=0))
        guess = conv2d_weight(
            self.before, layer.weight.shape, self.derivative, layer.stride, layer.padding, layer.dilation
        )
        return (miss**2).sum() / (self.features**2).sum() + ((guess - self.observed) ** 2).sum() / (
            self.observed**2
        ).sum()


class _NotFinite(Exception):
    """A loss that is no number: ends a line search."""


class Search:
    """A descent that reports, keeps the best, and ends with it when stopped, or when the loss is no longer finite."""

    def __init__(self, what: str, iterations: int, restarts: int, keep: int = 24, *, started: float | None = None):
        from tqdm.auto import tqdm

        if min(iterations, restarts) < 1:
            raise UserError(f"{iterations} iterations and {restarts} restarts: at least one of each is needed")
        self.started = time.process_time() if started is None else started  # CPU seconds count from there
        self.bar = tqdm(total=iterations * restarts, desc=what, unit="step", leave=False, disable=not in_notebook())
        self.marks = set(np.unique(np.geomspace(1, max(iterations, 1), keep).astype(int)) - 1)
        self.what, self.done, self.stopped = what, 0, False

    def adam(
        self, x: torch.Tensor, loss: Loss, iterations: int, step: float, project: Callable[[torch.Tensor], object],
        show: Callable[[torch.Tensor], torch.Tensor] = lambda x: x, *, signed: bool = True,
    ) -> tuple[torch.Tensor, float, list]:  # fmt: skip
        """Adam on the gradient's signs, the step a tenth after 3/8, 5/8 and 7/8 of the way (Geiping et al. 2020).

        Returns the best point, its loss (infinite if none was finite), and (iteration, loss, images) along the way.
        """
        x = x.detach().clone().requires_grad_()
        optimizer = torch.optim.Adam([x], lr=step)
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [int(iterations * f) for f in (3 / 8, 5 / 8, 7 / 8)])
        best, least, history = x.detach().clone(), float("inf"), []
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
                    history.append((self.done + 1, value, show(x.detach()).clone()))
                optimizer.step()
                schedule.step()
                with torch.no_grad():
                    project(x)
                self.done += 1
                self.bar.update()
        except KeyboardInterrupt:
            self.stopped = True
        return best, least, history

    def lbfgs(self, x: torch.Tensor, loss: Loss, iterations: int) -> tuple[torch.Tensor, list]:
        """L-BFGS with a strong Wolfe line search; the best point seen, and (iteration, loss, images) along the way."""
        x = x.detach().clone().requires_grad_()
        optimizer = torch.optim.LBFGS(
            [x], max_iter=iterations, max_eval=2 * iterations, history_size=20, line_search_fn="strong_wolfe",
            tolerance_grad=0, tolerance_change=0,
        )  # fmt: skip
        best, history, first = [x.detach().clone(), float("inf")], [], self.done

        def closure():
            optimizer.zero_grad()
            value = loss(x)
            if not torch.isfinite(value):
                raise _NotFinite
            value.backward()
            if float(value.detach()) < best[1]:
                best[:] = x.detach().clone(), float(value.detach())
            if self.done - first in self.marks:
                history.append((self.done + 1, float(value.detach()), x.detach().clamp(0, 1)))
            self.done += 1
            self.bar.update()
            return value

        try:
            optimizer.step(closure)
        except KeyboardInterrupt:
            self.stopped = True
        except _NotFinite:
            self._not_finite(self.done - first)
        return best[0], history

    def _not_finite(self, steps: int) -> None:
        warnings.warn(
            f"{self.what}: the loss wasn't finite after {steps} steps, this start ends there, with its best so far",
            RuntimeWarning,
            stacklevel=3,
        )

    def close(self, loss: float) -> float:
        """CPU seconds since the start.

        Parameters
        ----------
        loss : of the best images

        Raises
        ------
        UserError
            It isn't finite, so none was, and no user stopped the search.
        """
        self.bar.close()
        if not (self.stopped or math.isfinite(loss)):
            raise UserError(
                f"{self.what}: no finite loss was seen, so there is nothing to return: check the weights and the "
                "update for very large numbers, or give a smaller step or another start"
            )
        return time.process_time() - self.started


def films_and_labels(view: AttackerView, n_films: int | None) -> torch.Tensor:
    """Labels of the films to look for, int64 [B], known or inferred.

    Raises
    ------
    UserError
        Their number isn't known, contradicts the view, or there is no film to look for: only biases moved.
    """
    if n_films is not None and n_films < 1:
        raise UserError(f"n_films is {n_films}: at least one film is needed")
    weights = [g for t in range(len(view.updates)) for g in view.gradient(t) if g.dim() > 1]
    if not any(float(g.abs().max()) for g in weights):
        raise UserError("only biases moved: no unit before the last layer was active, there is nothing to invert")
    if view.labels is None:
        if n_films and view.n_films and n_films != view.total_films:
            raise UserError(f"n_films is {n_films}, but the view says {view.total_films} films: leave it out")
        return infer_labels(view, n_films or view.total_films)
    if n_films and n_films != len(view.labels):
        raise UserError(f"n_films is {n_films}, but the view has labels of {len(view.labels)} films: give one number")
    return view.labels


def _kinked(network: nn.Module) -> bool:
    return any(isinstance(layer, (nn.ReLU, nn.MaxPool2d, Square)) for layer in network.modules())


def invert_gradients(
    view: AttackerView,
    *,
    iterations: int | None = None,
    restarts: int = 1,
    total_variation_weight: float | None = None,
    closed_form: bool = True,
    step: float = 0.1,
    start: torch.Tensor | None = None,
    unroll: bool = True,
    n_films: int | None = None,
    seed: int = 0,
) -> Reconstruction:
    """Inverting Gradients (Geiping et al., NeurIPS 2020): films whose gradient points where the observed one does.

    Minimises cosine distance and total variation by signed Adam within [0, 1]. With ``closed_form`` it also uses what
    a dense layer gives away about its inputs (:class:`_DenseInputs`), where there is one and neither noise nor local
    steps blur it: as a term beside the others, or, for one film behind a ReLU, in place of the cosine. L-BFGS without
    the bounds then sharpens it. Loss: cosine distance, plus what the dense layer says where it is used.

    Parameters
    ----------
    iterations
        Steps of Adam; 200 for smooth activations, 400 for those with kinks (ReLU, squares, max pooling) if left out;
        L-BFGS takes half as many.
    total_variation_weight
        If left out, 1e-4 for smooth activations, 1e-2 for those with kinks, and 0.3 behind a ReLU in closed form, whose
        loss is steeper (trained networks with few live units need it, others don't mind).
    start
        Films to start from, float32 [B, 1, H, W] in [0, 1]; random ones if left out.
    unroll
        Follow several local steps through, instead of taking their sum for one gradient.
    n_films
        A guess at the number of films, where the threat model doesn't grant it.

    Raises
    ------
    UserError
        Nothing to invert, an unknown number of films, several rounds, a ``start`` of another shape, or a loss that was
        never finite.
    """
    started = time.process_time()
    view.check_one_round()
    model, target = view.model(), view.gradient()
    labels = films_and_labels(view, n_films)
    shape = (len(labels), *view.in_shape)
    if start is not None and tuple(start.shape) != shape:
        raise UserError(f"start has shape {tuple(start.shape)}, the attack needs {shape}: films of the view's size")
    kinked = _kinked(model)
    iterations = iterations or (400 if kinked else 200)
    dense = _DenseInputs(view, model, len(labels)) if closed_form else None
    dense = dense if dense is not None and dense.basis is not None else None
    weight = total_variation_weight
    if weight is None:
        weight = 1e-4 if not kinked else 0.3 if dense and dense.conv else 1e-2
    polish = iterations // 2 if dense else 0
    search = Search("inverting gradients", iterations + polish, restarts, started=started)

    def distance(x: torch.Tensor) -> torch.Tensor:
        return cosine_distance(expected_update(view, model, view.normalise(x), labels, unroll=unroll), target)

    def loss(x: torch.Tensor) -> torch.Tensor:
        if dense and dense.conv:
            model(view.normalise(x))
            return dense.residual() + weight * total_variation(x)
        value = distance(x) + weight * total_variation(x)
        # Behind kinks the span is a trap at first.
        return value + dense.residual() if dense and not kinked else value

    def sharpen(x: torch.Tensor) -> torch.Tensor:
        model(view.normalise(x))
        return dense.residual() + (1e-4 if kinked else 1e-6) * smooth_variation(x)

    def own_loss(x: torch.Tensor) -> float:
        # The cosine is blind below rounding, where the features still see.
        value = float(distance(x).detach())
        value = value + float(dense.residual().detach()) if dense else value
        return value if math.isfinite(value) else math.inf

    best: Reconstruction | None = None
    for number in range(restarts):
        x = start if start is not None else _noise_films(shape, seed + number)
        x, _, history = search.adam(x, loss, iterations, step, lambda x: x.clamp_(0, 1))
        if polish and not search.stopped:
            finer = search.lbfgs(x, sharpen, polish)[0].clamp(0, 1)
            if own_loss(finer) < own_loss(x):
                x = finer
            history.append((search.done, own_loss(x), x))
        value = own_loss(x)
        if best is None or value < best.loss:
            best = Reconstruction(x, labels, value, history)
        if search.stopped:
            break
    best.iterations, best.stopped, best.cpu_s = search.done, search.stopped, search.close(best.loss)
    return best


def _noise_films(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return (0.5 + 0.25 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).clamp(0, 1)


def smooth_variation(x: torch.Tensor) -> torch.Tensor:
    """:func:`total_variation` with rounded corners, for line searches."""
    down, right = x[..., 1:, :] - x[..., :-1, :], x[..., :, 1:] - x[..., :, :-1]
    return (down**2 + 1e-8).sqrt().mean() + (right**2 + 1e-8).sqrt().mean()


def deep_leakage(
    view: AttackerView, *, iterations: int = 150, restarts: int = 1, n_films: int | None = None, seed: int = 0
) -> Reconstruction:
    """Deep Leakage from Gradients (Zhu, Liu, Han, NeurIPS 2019), the first of its kind, with the labels given or
    inferred first (iDLG): squared distance of gradients, by L-BFGS. Loss: that distance over the observed gradient's
    squared length. It wants smooth activations; and where clipping shortened the gradient, its length misleads.

    Raises
    ------
    UserError
        As :func:`invert_gradients`.
    """
    started = time.process_time()
    view.check_one_round()
    labels = films_and_labels(view, n_films)
    # The mean over films, of a sum over films or hospitals.
    share = view.denominator / len(labels) if view.denominator else 1 / view.hospitals
    model, target = view.model(), [share * g for g in view.gradient()]
    size = float(_norm(target)) ** 2
    search = Search("deep leakage", iterations, restarts, started=started)

    def loss(x: torch.Tensor) -> torch.Tensor:
        guess = expected_update(view, model, view.normalise(x), labels)
        return sum(((a - b) ** 2).sum() for a, b in zip(guess, target, strict=True)) / size

    best: Reconstruction | None = None
    for number in range(restarts):
        start = _noise_films((len(labels), *view.in_shape), seed + number)
        x, history = search.lbfgs(start, loss, iterations)
        value = float(loss(x).detach())
        value = value if math.isfinite(value) else math.inf
        if best is None or value < best.loss:
            best = Reconstruction(x.detach().clamp(0, 1), labels, value, history)
        if search.stopped:
            break
    best.iterations, best.stopped, best.cpu_s = search.done, search.stopped, search.close(best.loss)
    return best
