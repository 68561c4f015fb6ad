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


def ckksnet(n_classes: int, in_shape: tuple[int, ...], channels: int = 8, hidden: int = 64) -> nn.Module:
    """Convolution, square, dense, square, dense: multiplicative depth 5, no norms, no pooling; with ``hidden`` 0
    convolution, square, dense, of depth 3."""
    side = in_shape[-1]
    kernel = max(3, round(side / 8) + 1)
    stride = max(2, round(side / 12))
    positions = ((side - kernel) // stride + 1) ** 2
    layers = [nn.Conv2d(1, channels, kernel, stride), Square(), nn.Flatten()]
    if hidden:
        layers += [nn.Linear(channels * positions, hidden), Square()]
    net = nn.Sequential(*layers, nn.Linear(hidden or channels * positions, n_classes))
    for layer in net:
        if hasattr(layer, "weight"):
            # Squares of squares explode or vanish: halving the gain keeps the outputs of order one.
            nn.init.kaiming_normal_(layer.weight, nonlinearity="linear")
            layer.weight.data.mul_(0.5)
            nn.init.zeros_(layer.bias)
    return net


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


ACTIVATIONS = {
    "tanh": nn.Tanh, "sigmoid": nn.Sigmoid, "relu": nn.ReLU, "silu": nn.SiLU, "elu": nn.ELU, "square": Square,
}  # fmt: skip


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

    Parameters
    ----------
    gain : how far a unit shifts the logit; with several local steps a small one keeps the units where they were
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
