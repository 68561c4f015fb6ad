"""The embedded default source of films: the phantom (:mod:`primia_lite.phantom`), in the type of all sources."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from primia_lite import phantom
from primia_lite.config import cache_dir
from primia_lite.data.cache import cached
from primia_lite.data.types import ChestXrays

KEPT_FROM = 100  # films: fewer are drawn in less than half a second


def generate(
    n_films: int, size: int, seed: int = 0, *, split_fractions: Mapping[str, float] | None = None
) -> ChestXrays:
    """Phantom films with lung and lesion masks, as :func:`primia_lite.phantom.draw` draws them, from the cache where it
    has them or more of the same series: film i doesn't depend on how many follow."""

    def drawn() -> dict:
        return phantom.draw(n_films, size, seed, split_fractions)

    if n_films < KEPT_FROM:
        films = drawn()
    else:
        recipe = json.dumps([size, seed, split_fractions, code_of_phantom()], default=str)
        name = f"{size}-{hashlib.sha256(recipe.encode()).hexdigest()[:20]}.npz"
        films = cached(cache_dir() / "phantom" / name, drawn, lambda found: len(found["images"]) >= n_films)
    return ChestXrays(
        **{name: values[:n_films] for name, values in films.items()}, class_names=phantom.CLASS_NAMES, source="phantom"
    )


@functools.cache
def code_of_phantom() -> str:
    """Hash of the code that draws the films."""
    files = sorted(Path(phantom.__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
