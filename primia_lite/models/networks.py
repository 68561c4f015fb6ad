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
    """(x - mean) / scale by constants, each feature's own: a norm that needs no statistics of private films. Under
    encryption it is folded into the dense layer behind it."""

    def __init__(self, size: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("scale", torch.ones(size))

    def forward(self, x):
        return (x - self.mean) / self.scale


def fit_norms(network: nn.Sequential, inputs: torch.Tensor) -> None:
    """Set each :class:`FixedNorm` from public inputs [N, ...], so that its outputs there have mean 0 and a squared
    length of 1 on average: a clipped gradient isn't spent on what all films share."""
    with torch.no_grad():
        for layer in network:
            if isinstance(layer, FixedNorm):
                layer.mean.copy_(inputs.mean(0))
                layer.scale.copy_(inputs.std(0).clamp(min=1e-6) * inputs.shape[1] ** 0.5)
            inputs = layer(inputs)


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


def resnet18(n_classes: int, in_shape: tuple[int, ...]) -> nn.Module:
    """ResNet-18 (He et al. 2016), the network of the PriMIA paper, from MONAI with GroupNorm in place of BatchNorm."""
    from monai.networks.nets.resnet import ResNetBlock
    from monai.networks.nets.resnet import resnet18 as monai_resnet18
    from opacus.validators import ModuleValidator

    if in_shape[-1] > 224:
        raise UserError(f"resnet18 takes films of at most 224 px, these have {in_shape[-1]}: load them with size=224")
    network = ModuleValidator.fix(
        monai_resnet18(spatial_dims=2, n_input_channels=1, num_classes=n_classes, conv1_t_stride=2)
    )
    # Opacus's hooks can't see past what is overwritten: the activations, and the sum that ends each residual block.
    for layer in list(network.modules()):
        if isinstance(layer, nn.ReLU):
            layer.inplace = False
        elif isinstance(layer, ResNetBlock):
            layer.bn2 = nn.Sequential(layer.bn2, Copy())
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
