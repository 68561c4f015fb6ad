"""The clipped sum of per-unit gradients of a whole network, exact, in one forward and one backward pass.

A unit (a film, or a patient) owns rows of the batch, and its gradient is the sum of theirs. Autograd computes only the
gradients of layer outputs; norms and clipped sums follow layer by layer from these and from the layer inputs
("book-keeping", Bu et al., ICML 2023). Each layer takes the cheapest of three ways:

- materialised: each unit's gradient is computed once, and kept until its clip factor is known;
- ghost: norms come from inner products of inputs and of output gradients (Goodfellow 2015; Li et al., ICLR 2022), and
  the sum from one weight gradient of the whole batch, whose rows are scaled by their unit's factor;
- recomputed: each unit's gradient is computed for its norm, forgotten, and computed again for the sum.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from primia_lite.config import UserError
from primia_lite.privacy.row_gradients import PRODUCTS, columns_of, deltas_of, own_parameters, padded, row_gradients

PART_BYTES = 4 * 2**20  # worked on at once, so that the processor's cache holds it
MATERIALISED_BYTES = 256 * 2**20  # what all layers together may keep
MATERIALISING_COST = 60  # multiplications in the time that it takes to write a number of a gradient and read it twice
GHOST_COST = 1  # multiplications that one of the ghost way is worth
_CANCELLING = 64  # so many times longer than its sum may a unit's products be before they count as its norm


@dataclass
class _Use:
    """One call of a layer: its input [R, ...], and the gradient of its output once that is known."""

    x: torch.Tensor
    version: int
    edge: torch.autograd.graph.GradientEdge
    gradient: torch.Tensor | None = None


@dataclass(frozen=True)
class _Group:
    """n units that own v rows each: indices [n] of units, and [n v] of their rows; slices where these are the same."""

    units: torch.Tensor | slice
    rows: torch.Tensor | slice
    n: int
    v: int

    def parts(self, row_bytes: float) -> Iterator[_Group]:
        """Groups whose rows take at most ``PART_BYTES``, or of one unit."""
        size = max(1, int(PART_BYTES / (row_bytes * self.v)))
        for start in range(0, self.n, size):
            n = min(size, self.n - start)
            units, rows = slice(start, start + n), slice(start * self.v, (start + n) * self.v)
            if isinstance(self.rows, slice):
                yield _Group(units, rows, n, self.v)
            else:
                yield _Group(self.units[units], self.rows[rows], n, self.v)


@dataclass(frozen=True)
class _Way:
    """Squared norms [units] of some parameters' gradients, and the weighted sum of these for given factors."""

    squares: torch.Tensor
    weighted: Callable[[torch.Tensor], dict[str, torch.Tensor]]


def clipped_sum(
    model: nn.Module,
    losses: Callable[[nn.Module], torch.Tensor],
    unit: torch.Tensor,
    n_units: int,
    max_grad_norm: float,
) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    """Sum over units of each unit's gradient, clipped to an L2 norm of C: times min(1, C / norm).

    Parameters
    ----------
    losses
        Runs the model forward once on R rows, and gives the loss of each [R]; a unit's rows add up to its loss. No
        row's loss may depend on another row, nor on a parameter other than by calling its layer.
    unit : int64 [R], the owner of each row, in 0..n_units-1
    max_grad_norm : C

    Returns
    -------
    The sum by name of parameter, for those that require a gradient (``.grad`` is left alone); the norms [n_units]
    before clipping, not finite where a gradient isn't, which the caller has to check; the losses [R], detached.
    """
    layers = trained_layers(model)
    with _captured(layers) as uses:
        each = losses(model)
    if each.shape != unit.shape:
        raise UserError(f"losses of shape {tuple(each.shape)} for {len(unit)} rows: give one for each row")
    sums = {name: torch.zeros_like(p) for name, p in model.named_parameters() if p.requires_grad}
    squares = each.new_zeros(n_units)
    if not len(unit):
        return sums, squares, each.detach()
    with torch.no_grad():
        _backward(each, uses)
        groups, ways = _groups(unit, n_units), []
        room = MATERIALISED_BYTES
        for name, layer in layers.items():
            used = [use for use in uses[name] if use.gradient is not None]
            own = list(own_parameters(layer))
            # The weight of a product takes a way of its own, other parameters of a layer take one together.
            for names in (([each] for each in own) if type(layer) in PRODUCTS else [own]) if used else ():
                way, taken = _way(layer, used, names, groups, unit, squares, room)
                room -= taken
                ways.append((name, way))
        norms = torch.stack([way.squares for _, way in ways]).sum(0).sqrt() if ways else squares
        factor = (max_grad_norm / norms).clamp(max=1.0)
        for name, way in ways:
            for own, total in way.weighted(factor).items():
                key = f"{name}.{own}".removeprefix(".")
                sums[key] = total.view_as(sums[key])
    return sums, norms, each.detach()


# --- which layers there are, and what they saw ------------------------------------------------------------------------


def trained_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that own parameters to train, by name; UserError, naming layer and fix, for a model that mixes films
    (BatchNorm) or whose gradients can't be clipped."""
    layers, owner = {}, {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            raise UserError(
                f"layer {name!r} is {type(layer).__name__}: it mixes the films of a batch, so that no film's gradient "
                "is its own. Replace it by GroupNorm: model = opacus.validators.ModuleValidator.fix(model)"
            )
        if not (own := own_parameters(layer)):
            continue
        # Other names, and its weight is made from them (weight_norm).
        if type(layer) not in (*PRODUCTS, nn.GroupNorm) or not own.keys() <= {"weight", "bias"}:
            raise UserError(
                f"layer {name!r} ({type(layer).__name__}) has parameters {', '.join(own)}, and no known gradient of "
                "each row: freeze them"
            )
        for p in own.values():
            if id(p) in owner:
                raise UserError(f"layers {owner[id(p)]!r} and {name!r} share a parameter: give each its own")
            owner[id(p)] = name
        layers[name] = layer
    return layers


@contextlib.contextmanager
def _captured(layers: dict[str, nn.Module]) -> Iterator[dict[str, list[_Use]]]:
    """Record every call of the layers."""
    uses: dict[str, list[_Use]] = {name: [] for name in layers}

    def record(name):
        def hook(_, inputs, output):
            if not inputs:
                raise UserError(f"layer {name!r} is called with keywords: give its input by position")
            if output.requires_grad:
                # The edge, not the output: an activation in place would change what the output stands for.
                edge = torch.autograd.graph.get_gradient_edge(output)
                uses[name].append(_Use(inputs[0].detach(), inputs[0]._version, edge))

        return hook

    # First, so that no other hook's change of the output comes between.
    hooks = [layer.register_forward_hook(record(name), prepend=True) for name, layer in layers.items()]
    try:
        with torch.enable_grad():
            yield uses
    finally:
        for hook in hooks:
            hook.remove()


def _backward(each: torch.Tensor, uses: dict[str, list[_Use]]) -> None:
    """Fill in the gradients of all layer outputs; autograd then leaves out those of the weights."""
    flat = [(name, use) for name, of_layer in uses.items() for use in of_layer]
    if not flat:
        return
    for name, use in flat:
        if use.x._version != use.version:
            raise UserError(f"the input of layer {name!r} is overwritten after use: replace the in-place operation")
    gradients = torch.autograd.grad(each, [use.edge for _, use in flat], torch.ones_like(each), allow_unused=True)
    for (name, use), gradient in zip(flat, gradients, strict=True):
        if len(use.x) != len(each) or len(each) != len(each if gradient is None else gradient):
            raise UserError(f"layer {name!r} sees {len(use.x)} rows for {len(each)} losses: it mixes rows")
        use.gradient = gradient


def _groups(unit: torch.Tensor, n_units: int) -> list[_Group]:
    """Units by number of rows; those without any are left out."""
    if len(unit) == n_units and torch.equal(unit, torch.arange(n_units, device=unit.device)):
        return [_Group(slice(None), slice(None), n_units, 1)]
    counts = torch.bincount(unit, minlength=n_units)
    order = torch.argsort(unit, stable=True)
    owned = counts[unit[order]]
    return [
        _Group(units := torch.nonzero(counts == v).flatten(), order[owned == v], len(units), v)
        for v in torch.unique(counts).tolist()
        if v
    ]


# --- the ways ---------------------------------------------------------------------------------------------------------


def _way(layer, uses, names, groups, unit, zeros, room) -> tuple[_Way, int]:
    """The cheapest way for some parameters of a layer, by number of multiplications, and the bytes it materialises."""
    numbers = sum(getattr(layer, name).numel() for name in names)
    units = sum(group.n for group in groups)
    needed = 4 * units * numbers
    x, d = uses[0].x[0], uses[0].gradient[0]
    row_bytes = 4 * (x.numel() + d.numel() + numbers)
    if names == ["weight"] and type(layer) in PRODUCTS:
        # A row's gradient is a product [O, L] x [L, K]: L positions, K inputs of each output (of each channel group).
        positions, columns = d.numel() // len(layer.weight), layer.weight[0].numel() * getattr(layer, "groups", 1)
        row_bytes += 4 * columns * positions
        pairs = sum(group.n * (group.v * positions) ** 2 for group in groups) * (columns + len(layer.weight))
        instead = MATERIALISING_COST * units * numbers if needed <= room else len(unit) * positions * numbers
        if len(uses) == 1 and GHOST_COST * pairs < instead:
            return _ghost(layer, uses[0], groups, unit, zeros, row_bytes - 4 * numbers), 0
    fits = needed <= room
    return _computed(layer, uses, names, groups, zeros, row_bytes, materialise=fits), needed * fits


def _computed(layer, uses, names, groups, zeros, row_bytes: float, *, materialise: bool) -> _Way:
    """By each unit's gradient, materialised or recomputed."""

    def gradients() -> Iterator[tuple[_Group, dict[str, torch.Tensor]]]:
        for group in groups:
            for part in group.parts(row_bytes):
                of_rows = [row_gradients(layer, use.x[part.rows], use.gradient[part.rows], names) for use in uses]
                yield part, {name: sum(g[name].view(part.n, part.v, -1).sum(1) for g in of_rows) for name in names}

    materialised = list(gradients()) if materialise else None
    squares = zeros.clone()
    for part, of_part in materialised or gradients():
        squares[part.units] = sum(g.square().sum(1) for g in of_part.values())

    def weighted(factor):
        total = dict.fromkeys(names, 0.0)
        for part, of_part in materialised or gradients():
            for name, g in of_part.items():
                total[name] = total[name] + factor[part.units] @ g
        return total

    return _Way(squares, weighted)


def _ghost(layer, use: _Use, groups, unit, zeros, row_bytes: float) -> _Way:
    """By the norm of a sum of outer products: |Σ d aᵀ|² = Σ (a·a')(d·d') over pairs of positions and rows of a unit.

    The sum itself is one of float32, off by so much of Σ |d| |a|. Where products cancel that may be more than the clip,
    so a 64th of it counts as norm if that is more.
    """
    squares = zeros.clone()
    x, d = use.x, use.gradient
    for group in groups:
        for part in group.parts(row_bytes + 8 * group.v * (d[0].numel() // len(layer.weight)) ** 2):
            grams = []
            for columns in (columns_of(layer, x[part.rows]), deltas_of(layer, d[part.rows])):
                # [n v, G, K, L] -> [n G, K, v L]
                columns = columns.unflatten(0, (part.n, part.v)).permute(0, 2, 3, 1, 4).flatten(3).flatten(0, 1)
                if columns.shape[2] > 1:
                    columns = columns.double()  # terms of opposite signs lose a float32 norm
                grams.append(columns.mT @ columns)
            products = (grams[0] * grams[1]).view(part.n, -1).sum(1)
            lengths = (grams[0].diagonal(dim1=1, dim2=2) * grams[1].diagonal(dim1=1, dim2=2)).sqrt()
            least = (lengths.reshape(part.n, -1).sum(1) / _CANCELLING).square()
            squares[part.units] = torch.maximum(products, least).to(squares.dtype)

    def weighted(factor):
        scaled = d * factor[unit].view(-1, *[1] * (d.dim() - 1))
        if type(layer) is nn.Linear:
            return {"weight": scaled.flatten(0, -2).mT @ x.flatten(0, -2)}
        total = torch.ops.aten.convolution_backward(
            scaled, padded(layer, x), layer.weight, None, layer.stride, (0, 0), layer.dilation, False, (0, 0),
            layer.groups, (False, True, False),
        )  # fmt: skip
        return {"weight": total[1]}

    return _Way(squares, weighted)
