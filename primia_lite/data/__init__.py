"""Chest films: one type, one door.

>>> films = load("phantom", 64, n_films=60)
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib import import_module

import lazy_loader

from primia_lite.config import DATA_SOURCES, DataError, printable
from primia_lite.data.split import assign_hospitals, partition, split_by_patient
from primia_lite.data.types import CLASSES_2, CLASSES_3, NORMAL, SPLITS, ChestXrays

__getattr__, _lazy_dir, _lazy = lazy_loader.attach(
    __name__,
    submodules=["phantom"],
    submod_attrs={"films": ["PIXEL_MEAN", "PIXEL_STD", "Films", "Units", "ranges"], "split": ["resplit"]},
)
__all__ = [
    "CLASSES_2", "CLASSES_3", "NORMAL", "SPLITS", "ChestXrays", "DataError", "assign_hospitals", "load", "partition",
    "sources", "split_by_patient", *_lazy,
]  # fmt: skip


def __dir__() -> list[str]:
    return sorted(__all__)


# Source -> (module, function). Imported on use: `import primia_lite.data` needs no Pillow, medmnist or pydicom.
_LOADERS = {
    "phantom": ("primia_lite.data.phantom", "generate"),
    "kermany": ("primia_lite.data.kermany", "read"),
    "pneumoniamnist": ("primia_lite.data.medmnist", "read"),
    "dicom": ("primia_lite.data.dicom", "read"),
}
HOW_TO_GET = {
    "phantom": "built in: nothing to get",
    "kermany": "download ChestXRay2017.zip from https://doi.org/10.17632/rscbjbr9sj.3 (or Kaggle's "
    "paultimothymooney/chest-xray-pneumonia) and unpack it so that <data>/chest_xray/train exists",
    "pneumoniamnist": "load('pneumoniamnist', size, download=True), or put pneumoniamnist[_64|_128|_224].npz from "
    "https://zenodo.org/records/10519652 into <data>/",
    "dicom": "put your films and labels.csv (columns file,label,patient_id) into <data>/dicom/",
}
DEFAULT_PHANTOM_FILMS = 1000


def load(
    source: str,
    size: int,
    *,
    root=None,
    n_films: int | None = None,
    seed: int = 0,
    skip_bad: bool = False,
    validation_fraction: float = 0.1,
    **options,
) -> ChestXrays:
    """Load films from one of the sources (``data/README.md`` tells what they are and how to get them).

    Parameters
    ----------
    source : ``phantom``, ``kermany``, ``pneumoniamnist`` or ``dicom``
    size : side of a film in px
    root : folder to look in; default ``PRIMIA_LITE_DATA``, or ``data/``
    n_films : load about this many, whole patients, in the same proportions of splits and classes; default all
        (phantom: 1,000)
    seed : of the phantom's patients, of the validation split and of the choice of ``n_films``
    skip_bad : leave out unreadable films with a warning and list them in ``skipped``, instead of raising
    validation_fraction : share of the training films, whole patients, that validation gets where the source has none
    options : those of the source's own loader. Of the parameters above, a source ignores those that mean nothing to it.

    Raises
    ------
    DataError
        Unknown source or option, missing folder, unreadable or colour film, a class without a training film, a patient
        or a film in two splits.
    """
    loader = _loader(source)
    if not isinstance(size, int) or size < 8:
        raise DataError(f"size={size!r}: give the side of a film in pixels, such as 64 or 224")
    if n_films is not None and n_films < 1:
        raise DataError(f"n_films={n_films}: give a positive number, or None for all films")
    if source == "phantom" and n_films is None:
        n_films = DEFAULT_PHANTOM_FILMS
    common = {
        "size": size, "root": root, "n_films": n_films, "seed": seed, "skip_bad": skip_bad,
        "validation_fraction": validation_fraction,
    }  # fmt: skip
    accepted = inspect.signature(loader).parameters
    for name in options:
        if name not in accepted:
            own = [p for p in accepted if p not in common]
            raise DataError(f"unknown option {name!r} of source {source!r}: it takes {', '.join(own) or 'none'}")
    films = loader(**{name: value for name, value in common.items() if name in accepted}, **options)
    return films.require_classes("train")


def _loader(source: str) -> Callable[..., ChestXrays]:
    if source not in _LOADERS:
        known = "\n".join(f"  {name}: {HOW_TO_GET[name]}" for name in DATA_SOURCES)
        raise DataError(f"unknown data source {source!r}. Known sources:\n{known}")
    module, function = _LOADERS[source]
    return getattr(import_module(module), function)


def sources(root=None) -> list[dict]:
    """For each source: ``name``, ``found``, ``where`` (path or None), ``n_files`` (or None), ``how_to_get``."""
    rows = []
    for name in DATA_SOURCES:
        found, where, n_files = True, None, None
        if name != "phantom":
            where, n_files = import_module(_LOADERS[name][0]).find(root)
            found = where is not None
        rows.append(
            {"name": name, "found": found, "where": printable(where) if where else None, "n_files": n_files,
             "how_to_get": HOW_TO_GET[name]}
        )  # fmt: skip
    return rows
