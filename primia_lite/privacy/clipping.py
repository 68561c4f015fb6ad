"""The clipped sum of per-unit gradients of a whole network, exact, in one forward and one backward pass.

A unit (a film, or a patient) owns rows of the batch, and its gradient is the sum of theirs. Autograd computes only the
gradients of layer outputs; norms and clipped sums follow layer by layer from these and from the layer inputs
("book-keeping", Bu et al., ICML 2023). Each layer takes the cheapest of three ways:

- kept: each unit's gradient is computed once, and kept until its clip factor is known;
- ghost: norms come from inner products of inputs and of output gradients (Goodfellow 2015; Li et al., ICLR 2022), and
  the sum from one weight gradient of the whole batch, whose rows are scaled by their unit's factor;
- anew: each unit's gradient is computed for its norm, forgotten, and computed again for the sum.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from primia_lite.config import UserError

# What is worked on at once, so that the processor's cache holds it; and what all layers together may keep.
_PART_BYTES = 4 * 2**20
_KEPT_BYTES = 256 * 2**20
# Multiplications in the time that it takes to write a number of a unit's gradient and to read it twice.
_KEEPING = 60
# So many times longer than its sum may the products of a unit be together before they count as its norm.
_CANCELLING = 64
# Layers whose output is a product of weight and input: of exactly these types, a subclass may compute something else.
_PRODUCTS = (nn.Linear, nn.Conv2d)


@dataclass
class _Use:
    """One call of a layer: its inputs, and the gradient of its output [R, ...] once that is known."""

    inputs: tuple[torch.Tensor, ...]
    versions: list[int]
    edge: torch.autograd.graph.GradientEdge
    gradient: torch.Tensor | None = None

    def of(self, rows) -> tuple[list[torch.Tensor], torch.Tensor]:
        return [x.detach()[rows] for x in self.inputs], self.gradient[rows]


@dataclass(frozen=True)
class _Group:
    """n units that own v rows each: indices [n] of units, and [n v] of their rows; slices where these are the same."""

    units: torch.Tensor | slice
    rows: torch.Tensor | slice
    n: int
    v: int

    def parts(self, row_bytes: float) -> Iterator[_Group]:
        """Groups whose rows take at most ``_PART_BYTES``, or of one unit."""
        size = max(1, int(_PART_BYTES / (row_bytes * self.v)))
        for start in range(0, self.n, size):
            n = min(size, self.n - start)
            units, rows = slice(start, start + n), slice(start * self.v, (start + n) * self.v)
            if isinstance(self.rows, slice):
                yield _Group(units, rows, n, self.v)
            else:
                yield _Group(self.units[units], self.rows[rows], n, self.v)


@dataclass(frozen=True)
class _Way:
    """Of some parameters of a layer: squared norms [units], and the weighted sum of gradients for given factors."""

    squares: torch.Tensor
    weighted: Callable[[torch.Tensor], dict[str, torch.Tensor]]


def clipped_sum(
    model: nn.Module,
    losses: Callable[[nn.Module], torch.Tensor],
    unit: torch.Tensor,
    n_units: int,
    max_grad_norm: float,
) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    """Sum over units of each unit's gradient, clipped to an L2 norm of ``max_grad_norm``.

    The factor is min(1, C / norm); Opacus divides by norm + 1e-6. Sums over disjoint sets of units add up: a batch too
    large for the memory can be worked through in parts.

    Parameters
    ----------
    losses
        Runs the model forward once on R rows, and gives the loss of each [R], weighted such that a unit's rows add up
        to its loss. No row's loss may depend on another row, nor on a parameter other than by calling its layer.
    unit : int64 [R], the owner of each row, in 0..n_units-1

    Returns
    -------
    The sum by name of parameter, for those that require a gradient (``.grad`` is left alone); the norms [n_units]
    before clipping, not finite where a gradient isn't, which the caller has to check; the losses [R], detached.

    Raises
    ------
    UserError
        A layer whose per-row gradients nobody knows, that shares a parameter with another one, that doesn't see one row
        for each loss, or whose input is overwritten later.
    """
    layers = _trained_layers(model)
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
        kept = 0
        for name, layer in layers.items():
            used = [use for use in uses[name] if use.gradient is not None]
            for names in _apart(layer) if used else ():
                way, room = _way(layer, used, names, groups, unit, squares, _KEPT_BYTES - kept)
                kept += room
                ways.append((name, way))
        norms = torch.stack([way.squares for _, way in ways]).sum(0).sqrt() if ways else squares
        factor = (max_grad_norm / norms).clamp(max=1.0)
        for name, way in ways:
            for own, total in way.weighted(factor).items():
                key = f"{name}.{own}".removeprefix(".")
                sums[key] = total.view_as(sums[key])
    return sums, norms, each.detach()


# --- which layers there are, and what they saw ------------------------------------------------------------------------


def _own(layer: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in layer.named_parameters(recurse=False) if p.requires_grad}


def _trained_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that own parameters to train; raise UserError for one that can't be clipped."""
    from opacus import GradSampleModule  # slow to import, and a linear head needs none of it

    layers, owner = {}, {}
    for name, layer in model.named_modules():
        own = _own(layer)
        # Other names in a layer of torch: its weight is made from them (weight_norm).
        plain = own.keys() <= {"weight", "bias"} or not type(layer).__module__.startswith("torch.")
        if own and not (plain and type(layer) in GradSampleModule.GRAD_SAMPLERS):
            raise UserError(
                f"layer {name!r} ({type(layer).__name__}) has parameters {', '.join(own)}, and no known gradient of "
                "each row: freeze them, or register a sampler with opacus.grad_sample.register_grad_sampler"
            )
        if own and type(layer) in (nn.Conv1d, nn.Conv3d) and layer.padding_mode != "zeros":
            raise UserError(f"layer {name!r} has padding_mode {layer.padding_mode!r}: only 'zeros' is known for it")
        for p in own.values():
            if id(p) in owner:
                raise UserError(f"layers {owner[id(p)]!r} and {name!r} share a parameter: give each its own")
            owner[id(p)] = name
        if own:
            layers[name] = layer
    return layers


@contextlib.contextmanager
def _captured(layers: dict[str, nn.Module]) -> Iterator[dict[str, list[_Use]]]:
    """Record every call of the layers."""
    uses: dict[str, list[_Use]] = {name: [] for name in layers}

    def record(name):
        def hook(_, inputs, output):
            if inputs and output.requires_grad:
                # The edge, not the output: an activation in place would change what the output stands for.
                edge = torch.autograd.graph.get_gradient_edge(output)
                uses[name].append(_Use(inputs, [x._version for x in inputs], edge))
            elif not inputs:
                raise UserError(f"layer {name!r} is called with keywords: give its input by position")

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
        if [x._version for x in use.inputs] != use.versions:
            raise UserError(f"the input of layer {name!r} is overwritten after use: replace the in-place operation")
    gradients = torch.autograd.grad(each, [use.edge for _, use in flat], torch.ones_like(each), allow_unused=True)
    for (name, use), gradient in zip(flat, gradients, strict=True):
        if any(len(x) != len(each) for x in use.inputs) or len(each) != len(each if gradient is None else gradient):
            raise UserError(f"layer {name!r} sees {len(use.inputs[0])} rows for {len(each)} losses: it mixes rows")
        use.gradient = gradient


def _groups(unit: torch.Tensor, n_units: int) -> list[_Group]:
    """Units by number of rows; those without any are left out."""
    if len(unit) == n_units and torch.equal(unit, torch.arange(n_units, device=unit.device)):
        return [_Group(slice(None), slice(None), n_units, 1)]
    counts = torch.bincount(unit, minlength=n_units)
    if len(counts) > n_units:
        raise UserError(f"unit {int(unit.max())} of {n_units}: units are numbered from 0")
    order = torch.argsort(unit, stable=True)
    owned = counts[unit[order]]
    return [
        _Group(units := torch.nonzero(counts == v).flatten(), order[owned == v], len(units), v)
        for v in torch.unique(counts).tolist()
        if v
    ]


# --- the ways ---------------------------------------------------------------------------------------------------------


def _apart(layer: nn.Module) -> list[list[str]]:
    """The parameters of a layer that take a way together: the weight of a product has its own."""
    own = list(_own(layer))
    return [[name] for name in own] if type(layer) in _PRODUCTS else [own]


def _way(layer, uses, names, groups, unit, zeros, room) -> tuple[_Way, int]:
    """The cheapest way for some parameters of a layer, by number of multiplications, and the bytes that it keeps."""
    numbers = sum(getattr(layer, name).numel() for name in names)
    units = sum(group.n for group in groups)
    needed = 4 * units * numbers
    x, d = uses[0].inputs[0][0], uses[0].gradient[0]
    row_bytes = 4 * (x.numel() + d.numel() + numbers)
    if names == ["weight"] and type(layer) in _PRODUCTS:
        # A row's gradient is a product [O, L] x [L, K]: L positions, K inputs of each output (of each channel group).
        positions, columns = _positions(layer, d), layer.weight[0].numel() * getattr(layer, "groups", 1)
        row_bytes += 4 * columns * positions
        pairs = sum(group.n * (group.v * positions) ** 2 for group in groups) * (columns + len(layer.weight))
        instead = _KEEPING * units * numbers if needed <= room else len(unit) * positions * numbers
        if len(uses) == 1 and pairs < instead:
            return _ghost(layer, uses[0], groups, unit, zeros, row_bytes - 4 * numbers), 0
    keep = needed <= room
    return _computed(layer, uses, names, groups, zeros, row_bytes, keep=keep), needed * keep


def _computed(layer, uses, names, groups, zeros, row_bytes: float, *, keep: bool) -> _Way:
    """By each unit's gradient, kept or computed anew."""

    def gradients() -> Iterator[tuple[_Group, dict[str, torch.Tensor]]]:
        for group in groups:
            for part in group.parts(row_bytes):
                of_rows = [_row_gradients(layer, *use.of(part.rows), names) for use in uses]
                yield part, {name: sum(g[name].view(part.n, part.v, -1).sum(1) for g in of_rows) for name in names}

    kept = list(gradients()) if keep else None
    squares = zeros.clone()
    for part, of_part in kept or gradients():
        squares[part.units] = sum(g.square().sum(1) for g in of_part.values())

    def weighted(factor):
        total = dict.fromkeys(names, 0.0)
        for part, of_part in kept or gradients():
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
    x, d = use.inputs[0].detach(), use.gradient
    for group in groups:
        for part in group.parts(row_bytes + 8 * group.v * _positions(layer, d[0]) ** 2):
            grams = []
            for columns in (_columns(layer, x[part.rows]), _deltas(layer, d[part.rows])):
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
            scaled, _padded(layer, x), layer.weight, None, layer.stride, (0, 0), layer.dilation, False, (0, 0),
            layer.groups, (False, True, False),
        )  # fmt: skip
        return {"weight": total[1]}

    return _Way(squares, weighted)


def _positions(layer, d: torch.Tensor) -> int:
    """How many products one row of output gradients stands for."""
    return d.numel() // len(layer.weight)


# --- gradients of each row --------------------------------------------------------------------------------------------


def _row_gradients(layer, inputs: list[torch.Tensor], d: torch.Tensor, names) -> dict[str, torch.Tensor]:
    """Gradients [n, numbers] of each row's loss."""
    if type(layer) in _PRODUCTS:
        d = _deltas(layer, d)
        out = {}
        if "bias" in names:
            out["bias"] = d.sum(3).flatten(1)
        if "weight" in names:
            columns = _columns(layer, inputs[0])
            out["weight"] = torch.bmm(d.flatten(0, 1), columns.flatten(0, 1).mT).view(len(d), -1)
        return out
    if type(layer) is nn.GroupNorm:
        return _group_norm_gradients(layer, inputs[0], d)
    from opacus import GradSampleModule

    sampled = GradSampleModule.GRAD_SAMPLERS[type(layer)](layer, inputs, d)
    return {name: sampled[p].flatten(1) for name, p in _own(layer).items()}


def _columns(layer, x: torch.Tensor) -> torch.Tensor:
    """What each weight of an output is multiplied with, at each position: [n, G, K, L]."""
    if type(layer) is nn.Linear:
        return x.flatten(1, -2).mT[:, None] if x.dim() > 2 else x[:, None, :, None]
    x = _padded(layer, x)
    (kh, kw), (sh, sw), (dh, dw) = layer.kernel_size, layer.stride, layer.dilation
    n, c, height, width = x.shape
    out_h, out_w = (height - dh * (kh - 1) - 1) // sh + 1, (width - dw * (kw - 1) - 1) // sw + 1
    a, b, h, w = x.stride()
    windows = x.as_strided((n, c, kh, kw, out_h, out_w), (a, b, h * dh, w * dw, h * sh, w * sw), x.storage_offset())
    return windows.reshape(n, layer.groups, -1, out_h * out_w)


def _deltas(layer, d: torch.Tensor) -> torch.Tensor:
    """Output gradients, [n, G, O, L]."""
    if type(layer) is nn.Linear:
        return d.flatten(1, -2).mT[:, None] if d.dim() > 2 else d[:, None, :, None]
    return d.reshape(len(d), layer.groups, -1, d[0, 0].numel())


def _padded(layer: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    if layer.padding_mode != "zeros":
        return F.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode)
    return F.pad(x, layer._reversed_padding_repeated_twice) if any(layer._reversed_padding_repeated_twice) else x


def _group_norm_gradients(layer: nn.GroupNorm, x: torch.Tensor, d: torch.Tensor) -> dict[str, torch.Tensor]:
    """By ATen's own backward pass, which sums over rows: so rows become channels of one row."""
    n, c, groups, positions = len(x), layer.num_channels, layer.num_groups, x[0, 0].numel()
    x, d = x.contiguous(), d.contiguous()  # the kernel takes it for granted
    _, mean, rstd = torch.native_group_norm(x, None, None, n, c, positions, groups, layer.eps)
    _, weight, bias = torch.ops.aten.native_group_norm_backward(
        d.view(1, n * c, -1), x.view(1, n * c, -1), mean.view(1, -1), rstd.view(1, -1), x.new_ones(n * c),
        1, n * c, positions, n * groups, (False, True, True),
    )  # fmt: skip
    return {"weight": weight.view(n, c), "bias": bias.view(n, c)}
