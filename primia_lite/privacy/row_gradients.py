"""The gradient of each row's loss by a layer's parameters, from the layer's inputs and the gradients of its outputs."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

# Layers whose output is a product of weight and input: of exactly these types, a subclass may compute something else.
PRODUCTS = (nn.Linear, nn.Conv2d)


def own_parameters(layer: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in layer.named_parameters(recurse=False) if p.requires_grad}


def row_gradients(layer, x: torch.Tensor, d: torch.Tensor, names) -> dict[str, torch.Tensor]:
    """Gradients [n, numbers] of each row's loss."""
    if type(layer) is nn.GroupNorm:
        return _group_norm_gradients(layer, x, d)
    d = deltas_of(layer, d)
    if names == ["bias"]:
        return {"bias": d.sum(3).flatten(1)}
    return {"weight": torch.bmm(d.flatten(0, 1), columns_of(layer, x).flatten(0, 1).mT).view(len(d), -1)}


def columns_of(layer, x: torch.Tensor) -> torch.Tensor:
    """What each weight of an output is multiplied with, at each position: [n, G, K, L]."""
    if type(layer) is nn.Linear:
        return x.flatten(1, -2).mT[:, None] if x.dim() > 2 else x[:, None, :, None]
    x = padded(layer, x)
    (kh, kw), (sh, sw), (dh, dw) = layer.kernel_size, layer.stride, layer.dilation
    n, c, height, width = x.shape
    out_h, out_w = (height - dh * (kh - 1) - 1) // sh + 1, (width - dw * (kw - 1) - 1) // sw + 1
    a, b, h, w = x.stride()
    windows = x.as_strided((n, c, kh, kw, out_h, out_w), (a, b, h * dh, w * dw, h * sh, w * sw), x.storage_offset())
    return windows.reshape(n, layer.groups, -1, out_h * out_w)


def deltas_of(layer, d: torch.Tensor) -> torch.Tensor:
    """Output gradients, [n, G, O, L]."""
    if type(layer) is nn.Linear:
        return d.flatten(1, -2).mT[:, None] if d.dim() > 2 else d[:, None, :, None]
    return d.reshape(len(d), layer.groups, -1, d[0, 0].numel())


def padded(layer: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    sides = layer._reversed_padding_repeated_twice
    if not any(sides):
        return x
    return F.pad(x, sides, mode="constant" if layer.padding_mode == "zeros" else layer.padding_mode)


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
