"""The embedded default source of films: the phantom (:mod:`primia_lite.phantom`), in the type of all sources."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from primia_lite.data.types import ChestXrays
from primia_lite.phantom import CLASS_NAMES, draw


def generate(
    n_films: int,
    size: int,
    seed: int = 0,
    *,
    sites: Sequence[str] = ("A", "B", "C"),
    class_fractions: Mapping[str, float] | None = None,
    split_fractions: Mapping[str, float] | None = None,
) -> ChestXrays:
    """Phantom films with lung and lesion masks. Parameters and errors are those of :func:`primia_lite.phantom.draw`."""
    drawn = draw(n_films, size, seed, sites=sites, class_fractions=class_fractions, split_fractions=split_fractions)
    return ChestXrays(**drawn._asdict(), class_names=CLASS_NAMES, source="phantom")
