"""Labels of the films behind an update, counted from the gradient of the last layer's bias."""

from __future__ import annotations

import torch
from torch import nn

from primia_lite.attacks.gradients import expected_update, norm
from primia_lite.attacks.search import noise_films
from primia_lite.attacks.view import AttackerView
from primia_lite.config import UserError


def infer_labels(view: AttackerView, n_films: int | None = None) -> torch.Tensor:
    """Labels of a batch from the gradient of the last layer's bias, int64 [B], sorted.

    That gradient is mean(p) - counts / B, p the softmax. For one film the label is where it is negative (iDLG, Zhao,
    Mopuri, Bilen 2020). For more, p is estimated on grey noise, as is what clipping leaves of a film of each class, and
    counts are rounded (as Geng et al. 2021). Noise draws them towards n p; of several rounds the mean is taken.

    Right as long as p, and under clipping the gradients' lengths, hardly depend on the film: at initialisation
    (phantoms, ``convnet``, 32 px) for all labels of batches up to 8 and 97 % up to 32; where clipping cut every film,
    for 93 % up to 32. A guess for trained networks, after local steps, and for clipped patients of several films.
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


def films_and_labels(view: AttackerView, n_films: int | None) -> torch.Tensor:
    """Labels of the films to look for, int64 [B], known or inferred."""
    if n_films is not None and n_films < 1:
        raise UserError(f"n_films is {n_films}: at least one film is needed")
    if not any(float(g.abs().max()) for t in range(len(view.updates)) for g in view.gradient(t) if g.dim() > 1):
        raise UserError("only biases moved: no unit before the last layer was active, there is nothing to invert")
    known = view.total_films if view.n_films else None if view.labels is None else len(view.labels)
    if n_films and known and n_films != known:
        raise UserError(f"n_films is {n_films}, but the view says {known} films: leave it out")
    return infer_labels(view, n_films) if view.labels is None else view.labels


def _label_counts(view: AttackerView, round_number: int, n: int) -> torch.Tensor:
    """Estimated number of films of each class, float32 [classes], not rounded and perhaps below 0."""
    model, noise = view.model(round_number), view.normalise(noise_films((64, *view.in_shape), 0))
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
        float(norm(expected_update(view, model, film[None], torch.tensor([k]), unroll=False)).detach())
        for k in range(n_classes)
        for film in films
    ]
    return (view.max_grad_norm / torch.tensor(length).view(n_classes, -1).mean(1)).clamp(max=1.0)


def last_dense(network: nn.Module) -> tuple[str, nn.Linear]:
    """Name of the last dense layer, and the layer."""
    found = [(name, layer) for name, layer in network.named_modules() if isinstance(layer, nn.Linear)]
    if not found:
        raise UserError("the network has no dense layer, whose bias gradient would tell the labels: give them")
    return found[-1]


def _bias_gradient(view: AttackerView, round_number: int) -> torch.Tensor:
    name, layer = last_dense(view.network)
    if layer.bias is None:
        raise UserError(f"layer {name!r} has no bias, whose gradient would tell the labels: give them in the view")
    return view.named_gradient(round_number)[f"{name}.bias" if name else "bias"]
