"""What the tests of the attacks share: recipes, threat models, views of phantoms of 32 px."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional as F

from primia_lite import models
from primia_lite.attacks import AttackerView, ThreatModel, initial_state, simulate_view
from primia_lite.training import Training

SIDE, PIXELS = 32, 32 * 32
TANH, RELU = {"activation": "tanh"}, {"activation": "relu"}
RECIPE = Training("convnet", sample_rate=1.0, learning_rate=0.1, model_options=TANH)
GUESSING = ThreatModel()
KNOWING = ThreatModel("knows labels", knows_labels=True)
SUM = ThreatModel("sees a sum", sees="sum", knows_labels=True)
ROUNDS = ThreatModel("sees rounds", sees="rounds", knows_labels=True)


def seen(films, index, threat=KNOWING, privacy=None, state=None, recipe=RECIPE, **changes) -> AttackerView:
    """What an attacker sees of some films' update; randomness from seed 0."""
    recipe = recipe.changed(**changes)
    own = films.subset(index)
    return simulate_view(own, recipe, state or initial_state(recipe, own), threat, privacy, seed=0)


def psnrs(gallery, reconstruction, index) -> np.ndarray:
    return np.array([row["psnr"] for row in gallery.score(reconstruction.images.numpy(), index)])


def flat(gradient) -> torch.Tensor:
    return torch.cat([g.flatten() for g in gradient])


def film_gradients(films, recipe, state) -> torch.Tensor:
    """[N, P], by autograd, a film at a time."""
    model = models.build(recipe.model, recipe.n_classes, films.inputs.shape[2:], **recipe.model_options)
    model.load_state_dict(state)
    return torch.stack([
        flat(torch.autograd.grad(F.cross_entropy(model(x), y[None]), list(model.parameters())))
        for x, y in zip(films.inputs, films.labels, strict=True)
    ])  # fmt: skip
