"""Networks that are trained whole, from pixels to logits."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from primia_lite.config import UserError


class Square(nn.Module):
    """x²: the activation that homomorphic encryption can compute (Gilad-Bachrach et al., ICML 2016)."""

    def forward(self, x):
        return x * x


class Copy(nn.Module):
    """A copy of its input, which may then be overwritten."""

    def forward(self, x):
        return x.clone()


class FixedNorm(nn.Module):
    """(x - mean) / scale by constants, each feature's own or each channel's: a norm that needs no statistics of
    private films. Under encryption and on shares it is folded into the layer beside it."""

    def __init__(self, size: int, of_channels: bool = False):
        super().__init__()
        shape = (size, 1, 1) if of_channels else (size,)
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("scale", torch.ones(shape))

    def forward(self, x):
        return (x - self.mean) / self.scale

    def fit(self, x: torch.Tensor) -> None:
        """From public inputs [N, features] or [N, channels, H, W]: outputs have mean 0 there, and features a squared
        length of 1 on average, so that a clipped gradient isn't spent on what all films share; channels a deviation
        of 1."""
        if self.mean.ndim == 1:
            self.mean.copy_(x.mean(0))
            self.scale.copy_(x.std(0).clamp(min=1e-6) * x.shape[1] ** 0.5)
        else:
            self.mean.copy_(x.mean((0, 2, 3), keepdim=True)[0])
            self.scale.copy_(x.std((0, 2, 3), keepdim=True)[0].clamp(min=1e-6))


def fit_norms(network: nn.Module, inputs: torch.Tensor) -> None:
    """Fit each :class:`FixedNorm` on what public inputs [N, ...] become in front of it, the first one first."""
    norms = [layer for layer in network.modules() if isinstance(layer, FixedNorm)]
    hooks = [layer.register_forward_pre_hook(lambda layer, given: layer.fit(given[0])) for layer in norms]
    try:
        with torch.no_grad():
            network(inputs)
    finally:
        for hook in hooks:
            hook.remove()


def folded(network: nn.Sequential) -> nn.Sequential:
    """The same function without :class:`FixedNorm`: each becomes part of the dense layer behind it."""
    layers, norm = [], None
    for layer in network:
        if norm is not None:
            if not isinstance(layer, nn.Linear):
                break
            dense = nn.Linear(layer.in_features, layer.out_features, dtype=torch.float64)
            dense.weight.data = layer.weight.detach().double() / norm.scale.double()
            dense.bias.data = layer.bias.detach().double() - dense.weight @ norm.mean.double()
            layer, norm = dense.to(layer.weight.dtype), None
        if isinstance(layer, FixedNorm):
            norm = layer
        else:
            layers.append(layer)
    if norm is not None:
        raise UserError("a norm without a dense layer right behind it can't be folded: put one there")
    return nn.Sequential(*layers)


def ckksnet(n_classes: int, in_shape: tuple[int, ...], channels: int = 8, hidden: int = 64) -> nn.Module:
    """Convolution, square, norm, dense, square, norm, dense: multiplicative depth 5, no pooling; with ``hidden`` 0
    convolution, square, norm, dense, of depth 3. The norms are constants (:class:`FixedNorm`) and cost no depth."""
    side = in_shape[-1]
    kernel = max(3, round(side / 8) + 1)
    stride = max(2, round(side / 12))
    units = channels * ((side - kernel) // stride + 1) ** 2
    convolution = nn.Conv2d(1, channels, kernel, stride)
    # Squares of squares explode or vanish: outputs of order one keep them in between. Inputs of a norm's kind have
    # length 1, those of the convolution size 1.
    nn.init.kaiming_normal_(convolution.weight, nonlinearity="linear")
    convolution.weight.data.mul_(0.5)
    nn.init.zeros_(convolution.bias)
    layers = [convolution, Square(), nn.Flatten(), FixedNorm(units)]
    if hidden:
        dense = nn.Linear(units, hidden)
        nn.init.normal_(dense.weight, std=0.5)
        nn.init.zeros_(dense.bias)
        layers += [dense, Square(), FixedNorm(hidden)]
    last = nn.Linear(hidden or units, n_classes)
    nn.init.normal_(last.weight, std=0.01)  # every film begins near even odds
    nn.init.zeros_(last.bias)
    return nn.Sequential(*layers, last)


def resnet18(n_classes: int, in_shape: tuple[int, ...], norm: str = "group") -> nn.Module:
    """ResNet-18 (He et al. 2016), the network of the PriMIA paper, from MONAI.

    BatchNorm learns from all films together, and is replaced: by GroupNorm, or with ``norm="fixed"`` by constants
    (:class:`FixedNorm`), which two servers can compute on shares (:mod:`primia_lite.smpc`).
    """
    from monai.networks.nets.resnet import ResNetBlock
    from monai.networks.nets.resnet import resnet18 as monai_resnet18

    if in_shape[-1] > 224:
        raise UserError(f"resnet18 takes films of at most 224 px, these have {in_shape[-1]}: load them with size=224")
    if norm not in ("group", "fixed"):
        raise UserError(f"resnet18 has no norm {norm!r}: choose group or fixed")
    network = monai_resnet18(spatial_dims=2, n_input_channels=1, num_classes=n_classes, conv1_t_stride=2)
    if norm == "fixed":
        network = _with_fixed_norms(network)
    else:
        from opacus.validators import ModuleValidator

        network = ModuleValidator.fix(network)
    # Opacus's hooks can't see past what is overwritten: the activations, and the sum that ends each residual block.
    for layer in list(network.modules()):
        if isinstance(layer, nn.ReLU):
            layer.inplace = False
        elif isinstance(layer, ResNetBlock):
            layer.bn2 = nn.Sequential(layer.bn2, Copy())
    return network


def _with_fixed_norms(network: nn.Module) -> nn.Module:
    """BatchNorm's shift becomes a bias of the convolution before it, which had none; its gain is left to weights."""
    for layer in network.modules():
        for name, child in list(layer.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                setattr(layer, name, FixedNorm(child.num_features, of_channels=True))
            elif isinstance(child, nn.Conv2d) and child.bias is None:
                child.bias = nn.Parameter(torch.zeros(child.out_channels))
    return network


ACTIVATIONS = {"tanh": nn.Tanh, "sigmoid": nn.Sigmoid, "relu": nn.ReLU, "silu": nn.SiLU, "elu": nn.ELU}
ACTIVATIONS["square"] = Square


def activation_layer(name: str) -> nn.Module:
    if name not in ACTIVATIONS:
        raise UserError(f"unknown activation {name!r}: choose one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]()


def convnet(
    n_classes: int, in_shape: tuple[int, ...], activation: str = "relu", hidden: int = 0,
    width: tuple[int, int] = (16, 32),
) -> nn.Module:  # fmt: skip
    """Two 5 x 5 convolutions of stride 2 and a dense layer, with ``hidden`` > 0 another before it.

    A LeNet without pooling, as Zhu, Liu and Han (NeurIPS 2019) attacked one.
    """
    features = width[1] * (-(-in_shape[-1] // 4)) ** 2
    layers = [nn.Conv2d(in_shape[0], width[0], 5, 2, 2), activation_layer(activation)]
    layers += [nn.Conv2d(*width, 5, 2, 2), activation_layer(activation), nn.Flatten()]
    if hidden:
        layers += [nn.Linear(features, hidden), activation_layer(activation)]
    return nn.Sequential(*layers, nn.Linear(hidden or features, n_classes))


def mlp(n_classes: int, in_shape: tuple[int, ...], activation: str = "relu", hidden: int = 64) -> nn.Module:
    """A dense layer on the pixels, an activation, a dense layer."""
    pixels = in_shape[0] * in_shape[-2] * in_shape[-1]
    return nn.Sequential(
        nn.Flatten(), nn.Linear(pixels, hidden), activation_layer(activation), nn.Linear(hidden, n_classes)
    )


class Imprint(nn.Module):
    """A dense layer on the pixels whose units, cut off below 0 and above 1, shift the first logit of the network beside
    it: what a malicious server puts into a model (Fowl et al., Robbing the Fed, ICLR 2022).

    Units count with alternating signs, so that a film which saturates many of them shifts the logit by one at most.
    ``gain`` is how far one shifts it; with several local steps a small one keeps the units where they were.
    """

    def __init__(self, network: nn.Module, pixels: int, bins: int, gain: float):
        super().__init__()
        self.imprint = nn.Linear(pixels, bins)
        self.network, self.gain = network, gain
        self.register_buffer("sign", 1.0 - 2.0 * (torch.arange(bins) % 2), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shift = F.hardtanh(self.imprint(x.flatten(1)), 0.0, 1.0) @ self.sign
        logits = self.network(x)
        return logits + F.pad(self.gain * shift[:, None], (0, logits.shape[1] - 1))


def imprintnet(
    n_classes: int, in_shape: tuple[int, ...], bins: int = 1024, gain: float = 1.0, activation: str = "relu"
) -> nn.Module:
    """A :class:`Imprint` before a :func:`convnet`."""
    pixels = in_shape[0] * in_shape[-2] * in_shape[-1]
    return Imprint(convnet(n_classes, in_shape, activation), pixels, bins, gain)
