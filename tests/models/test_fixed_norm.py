"""Norms that are constants of public films: on features and on channels."""

import pytest
import torch

from primia_lite import models
from primia_lite.config import UserError
from primia_lite.models.networks import FixedNorm


def test_resnet18_with_fixed_norms_has_channels_of_mean_0_and_deviation_1_on_public_films():
    network = models.build("resnet18", 3, (1, 32, 32), norm="fixed", seed=1).eval()
    seen = []
    for layer in network.modules():
        if isinstance(layer, FixedNorm):
            layer.register_forward_hook(lambda layer, given, out: seen.append(out.detach()))
        assert "BatchNorm" not in type(layer).__name__ and "GroupNorm" not in type(layer).__name__
    from primia_lite.models.catalogue import public_pixels

    with torch.no_grad():
        network(public_pixels(32))
    assert len(seen) == 20
    for out in seen:
        assert out.mean((0, 2, 3)).abs().max() < 1e-3 and (out.std((0, 2, 3)) - 1).abs().max() < 1e-2


def test_an_unknown_norm_is_refused():
    with pytest.raises(UserError, match="norm"):
        models.build("resnet18", 3, (1, 32, 32), norm="batch")
