"""A model with what its users must know to prepare films for it: one file."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from primia_lite import models
from primia_lite.config import UserError
from primia_lite.runtime import write_atomic


@dataclass(frozen=True, eq=False)
class ModelCard:
    """What is served: weights, and how films are prepared for them.

    Attributes
    ----------
    model : its name in :data:`primia_lite.models.catalogue.MODELS`
    options : of its network
    class_names : in the order of the logits
    image_size : side of a film, px
    in_shape : of one film as the trained part takes it
    state : weights
    trained_on : one line on data, privacy and seed, shown to users
    flooded : served with room for noise on shared logits, see :mod:`~primia_lite.encrypted.flooding`; a linear head
    standardise : how films are prepared, see :func:`primia_lite.models.prepare`
    """

    model: str
    options: dict
    class_names: tuple[str, ...]
    image_size: int
    in_shape: tuple[int, ...]
    state: dict = field(repr=False)
    trained_on: str = ""
    flooded: bool = False
    standardise: bool = False

    _PUBLIC = ("model", "class_names", "image_size", "in_shape", "trained_on", "flooded", "standardise")

    def network(self) -> torch.nn.Module:
        models.check_options(self.model, self.options)
        with torch.random.fork_rng(devices=[]):
            # Not models.build, which fits norms first: they come with the weights.
            network = models.spec(self.model).build(len(self.class_names), tuple(self.in_shape), **self.options)
        network.load_state_dict(self.state)
        return network.eval()

    def describe(self) -> dict:
        """What a hospital needs, for JSON; no weights."""
        return {name: getattr(self, name) for name in self._PUBLIC}

    def to_bytes(self) -> bytes:
        file = io.BytesIO()
        torch.save({name: getattr(self, name) for name in (*self._PUBLIC, "options", "state")}, file)
        return file.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> ModelCard:
        """:meth:`to_bytes` undone; of other bytes torch raises many kinds of errors."""
        return cls(**torch.load(io.BytesIO(data), weights_only=True))

    def save(self, path: str | Path) -> Path:
        return write_atomic(path, self.to_bytes())

    @classmethod
    def load(cls, path: str | Path) -> ModelCard:
        """From a file; a UserError where there is none, or another kind."""
        try:
            return cls.from_bytes(Path(path).read_bytes())
        except FileNotFoundError as error:
            raise UserError(f"there is no {path}: save a model there by ModelCard.save") from error
        except Exception as error:
            raise UserError(f"{path} isn't a model saved by ModelCard.save: {type(error).__name__}") from error


def prepare_film(description: dict, image: np.ndarray) -> np.ndarray:
    """A film, uint8 [H, W] of the size that :meth:`ModelCard.describe` says, as a served model takes it: public
    features [D], or pixels [H, W]; computed by the hospital."""
    from primia_lite.data import ChestXrays

    size, image = description["image_size"], np.asarray(image)
    if image.dtype != np.uint8 or image.shape != (size, size):
        raise UserError(f"this film is {image.dtype} {image.shape}, the model takes uint8 ({size}, {size}): resize it")
    # Pixels don't depend on classes.
    one = ChestXrays(
        image[None], np.zeros(1, np.int64), ("normal", "other"), *(np.array([v]) for v in ("film", "here", "test"))
    )
    prepared = models.prepare(description["model"], one, standardise=description["standardise"], cache=False)
    return prepared.inputs[0, 0].numpy().squeeze()
