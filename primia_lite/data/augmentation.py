"""Random changes to films that leave the diagnosis as it is. Drawn anew at each step, or once as cached views."""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F

AUGMENTATIONS = ("flip", "shift", "jitter", "stretch", "mixup")
VIEWS = {"flip": 1, "shift": 2, "jitter": 3, "stretch": 1}  # cached views of each kind for a frozen network


def flip(films: torch.Tensor, generator: torch.Generator, probability: float = 0.5) -> torch.Tensor:
    """Mirror films [B, 1, H, W] left to right, each with a probability."""
    mirrored = torch.rand(len(films), generator=generator) < probability
    return torch.where(mirrored[:, None, None, None], films.flip(-1), films)


def shift(films: torch.Tensor, generator: torch.Generator, reach: float = 0.06) -> torch.Tensor:
    """Move films [B, 1, H, W] by whole pixels, up to ``reach`` of the side; the border is repeated."""
    if not len(films):
        return films
    side = films.shape[-1]
    pixels = max(1, round(reach * side))
    padded = F.pad(films, (pixels,) * 4, mode="replicate")
    corners = torch.randint(2 * pixels + 1, (len(films), 2), generator=generator).tolist()
    return torch.stack([film[:, y : y + side, x : x + side] for film, (y, x) in zip(padded, corners, strict=True)])


def jitter(films: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """What differs between two exposures of one child: position, sharpness, exposure, contrast, noise.

    Scale 0.85 to 1.15, rotation up to 8 degrees, shift up to 8 % of the half side; blur up to 0.5 % of the side; gamma
    0.67 to 1.49; contrast 0.75 to 1.25; brightness up to 0.1; noise up to 0.02. Uniform, independent for each film.

    Parameters
    ----------
    films : float32 [B, 1, H, W] in [0, 1]
    """
    draw = torch.rand(len(films), 9, generator=generator)
    scale = 1 / (0.85 + 0.30 * draw[:, 0])
    angle = (2 * draw[:, 1] - 1) * math.radians(8)
    move = (2 * draw[:, 2:4] - 1) * 0.08
    rows = [
        torch.stack([scale * angle.cos(), -scale * angle.sin(), move[:, 0]], 1),
        torch.stack([scale * angle.sin(), scale * angle.cos(), move[:, 1]], 1),
    ]
    grid = F.affine_grid(torch.stack(rows, 1), list(films.shape), align_corners=False)
    films = F.grid_sample(films, grid, align_corners=False, padding_mode="zeros").clamp(0, 1)
    column = draw[:, :, None, None]
    share = column[:, 4:5]
    films = (1 - share) * films + share * _blur(films, 0.005 * films.shape[-1])
    films = films ** torch.exp(0.8 * (column[:, 5:6] - 0.5))
    mean = films.mean((2, 3), keepdim=True)
    films = (films - mean) * (0.75 + 0.5 * column[:, 6:7]) + mean + 0.2 * (column[:, 7:8] - 0.5)
    noise = torch.randn(films.shape, generator=generator)
    return (films + 0.02 * column[:, 8:9] * noise).clamp(0, 1)


def stretch(
    films: torch.Tensor, generator: torch.Generator, log_scale: float = 0.35, reach: float = 0.10
) -> torch.Tensor:
    """What differs between two ways to frame a child: width and height, each by itself, and position.

    Scales are exp(U(±``log_scale``)) for films [B, 1, H, W], moves U(±``reach``) of the half side; the border is
    repeated.
    """
    draw = 2 * torch.rand(len(films), 4, generator=generator) - 1
    rows = torch.zeros(len(films), 2, 3)
    rows[:, 0, 0], rows[:, 1, 1] = torch.exp(log_scale * draw[:, :2]).unbind(1)
    rows[:, :, 2] = reach * draw[:, 2:]
    grid = F.affine_grid(rows, list(films.shape), align_corners=False)
    return F.grid_sample(films, grid, align_corners=False, padding_mode="border")


def _blur(films: torch.Tensor, sigma: float) -> torch.Tensor:
    """Gaussian blur of films [B, 1, H, W]; ``sigma`` in px."""
    reach = max(1, round(3 * sigma))
    x = torch.arange(-reach, reach + 1).float()
    kernel = torch.exp(-(x**2) / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).view(1, 1, -1, 1)
    padded = F.pad(films, (reach,) * 4, mode="replicate")
    return F.conv2d(F.conv2d(padded, kernel), kernel.transpose(2, 3))
