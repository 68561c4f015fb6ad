"""The one type that every source of films is loaded into."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields

import numpy as np

from primia_lite.config import DataError

NORMAL = "normal"
CLASSES_3 = (NORMAL, "bacterial", "viral")
CLASSES_2 = (NORMAL, "pneumonia")
SPLITS = ("train", "val", "test")


@dataclass(frozen=True, eq=False, repr=False)
class ChestXrays:
    """Frontal chest films with their labels and patients.

    Attributes
    ----------
    images : uint8 [N, H, W], H == W, in pixel values 0 (dark, air) to 255 (bright, bone)
    labels : int64 [N], indices into ``class_names``
    class_names : the first is ``normal``
    patient_id, site, split : str [N]; ``split`` is ``train``, ``val`` or ``test``
    lung_mask, lesion_mask : bool [N, H, W], or None where the source has none
    source : ``phantom``, ``kermany``, ``pneumoniamnist`` or ``dicom``
    skipped : names of the files that ``skip_bad`` left out

    Raises
    ------
    DataError
        Arrays of the wrong type or length, a label or split out of range, or a patient whose films lie in two splits.
    """

    images: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]
    patient_id: np.ndarray
    site: np.ndarray
    split: np.ndarray
    lung_mask: np.ndarray | None = None
    lesion_mask: np.ndarray | None = None
    source: str = "phantom"
    skipped: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("patient_id", "site", "split"):
            object.__setattr__(self, name, np.asarray(getattr(self, name), dtype=str))
        object.__setattr__(self, "class_names", tuple(self.class_names))
        self._check_arrays()
        self._check_values()
        check_patient_disjoint(self.patient_id, self.split)

    def _check_arrays(self) -> None:
        images, labels = self.images, self.labels
        if not (isinstance(images, np.ndarray) and images.dtype == np.uint8 and images.ndim == 3):
            raise DataError(f"images must be uint8 [N, H, W], not {_describe(images)}: convert them to 8-bit grey")
        if images.shape[1] != images.shape[2]:
            raise DataError(f"films must be square, not {images.shape[1]} x {images.shape[2]}: resize them")
        if not (isinstance(labels, np.ndarray) and labels.dtype == np.int64 and labels.ndim == 1):
            raise DataError(f"labels must be an int64 array [N], not {_describe(labels)}")
        for name in ("labels", "patient_id", "site", "split"):
            shape = getattr(self, name).shape
            if shape != (len(images),):
                raise DataError(f"{name} has shape {shape} for {len(images)} films: give one value per film")
        for name in ("lung_mask", "lesion_mask"):
            mask = getattr(self, name)
            if mask is not None and (mask.dtype != np.bool_ or mask.shape != images.shape):
                raise DataError(f"{name} must be a bool array of shape {images.shape}, not {_describe(mask)}")

    def _check_values(self) -> None:
        if self.class_names[:1] != (NORMAL,) or len(self.class_names) < 2:
            raise DataError(f"class_names must start with {NORMAL!r} and name a disease, not {self.class_names}")
        wrong = np.flatnonzero((self.labels < 0) | (self.labels >= len(self.class_names)))
        if len(wrong):
            raise DataError(
                f"film {wrong[0]} has label {self.labels[wrong[0]]}: labels are 0 to {len(self.class_names) - 1} "
                f"for {self.class_names}"
            )
        wrong = np.flatnonzero(~np.isin(self.split, SPLITS))
        if len(wrong):
            raise DataError(f"film {wrong[0]} has split {str(self.split[wrong[0]])!r}: use one of {', '.join(SPLITS)}")
        wrong = np.flatnonzero(self.patient_id == "")
        if len(wrong):
            raise DataError(f"film {wrong[0]} has no patient id: give each film one, its own if the patient is unknown")

    def __len__(self) -> int:
        return len(self.images)

    def __repr__(self) -> str:
        return (
            f"ChestXrays({self.source}: {len(self)} films of {self.n_patients} patients, {self.size} px, "
            f"{self.counts()})"
        )

    @property
    def size(self) -> int:
        """Side of a film in px."""
        return self.images.shape[1]

    @property
    def n_patients(self) -> int:
        return len(np.unique(self.patient_id))

    @property
    def sites(self) -> tuple[str, ...]:
        return tuple(str(site) for site in np.unique(self.site))

    def counts(self) -> dict[str, dict[str, int]]:
        """Films per class in each split that has any: ``{"train": {"normal": 10, ...}, ...}``."""
        return {
            split: {name: int(np.sum(self.labels[self.split == split] == i)) for i, name in enumerate(self.class_names)}
            for split in SPLITS
            if np.any(self.split == split)
        }

    def subset(self, index: np.ndarray) -> ChestXrays:
        """The films at ``index`` (integers or a bool mask [N]), in that order.

        Any subset of valid films is valid, so nothing is checked again; a class may be empty (see
        :meth:`require_classes`), and so may the subset.
        """
        index = np.asarray(index)
        if index.size == 0 and index.dtype != np.bool_:
            index = index.astype(np.int64)
        if index.ndim != 1 or index.dtype.kind not in "biu":
            raise DataError(f"subset() takes integers or a bool mask, not {_describe(index)}")
        part = object.__new__(ChestXrays)
        try:
            for field in fields(self):
                value = getattr(self, field.name)
                object.__setattr__(part, field.name, value[index] if isinstance(value, np.ndarray) else value)
        except IndexError as error:
            raise DataError(f"subset() of {len(self)} films: {error}") from error
        return part

    def of_split(self, name: str) -> ChestXrays:
        """The films of one split, which must have some."""
        if name not in SPLITS:
            raise DataError(f"unknown split {name!r}: use one of {', '.join(SPLITS)}")
        if not np.any(self.split == name):
            raise DataError(f"no film of {self.source} is in split {name!r}: load more films, or choose another split")
        return self.subset(self.split == name)

    def require_classes(self, split: str = "train") -> ChestXrays:
        """These films, if each class has at least one film in ``split``; else a DataError."""
        for i, name in enumerate(self.class_names):
            if not np.any((self.labels == i) & (self.split == split)):
                raise DataError(
                    f"class {name!r} has no film in split {split!r} ({len(self)} films of {self.source} loaded): "
                    "add films of that class, or load more of them (n_films)"
                )
        return self

    def fingerprint(self) -> str:
        """Hash of all content (pixels, masks, labels, ids, sites, splits): the same on every machine, 16 hex digits."""
        digest = hashlib.sha256()
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in ("source", "skipped") or value is None:
                continue
            digest.update(f"|{field.name}{np.shape(value)}|".encode())
            if isinstance(value, tuple) or value.dtype.kind == "U":
                digest.update("\0".join(str(item) for item in value).encode())
            elif value.dtype == np.bool_:
                digest.update(np.packbits(value).tobytes())
            else:
                little_endian = value.astype(value.dtype.newbyteorder("<"), copy=False)
                digest.update(np.ascontiguousarray(little_endian).data)
        return digest.hexdigest()[:16]


def check_patient_disjoint(patient_id: np.ndarray, split: np.ndarray) -> None:
    """Raise DataError, naming the first patient, if a patient's films lie in more than one split."""
    if not len(split):
        return
    pairs = np.unique(np.stack([patient_id, split], axis=1).astype(str), axis=0)
    patients, n_splits = np.unique(pairs[:, 0], return_counts=True)
    if np.any(n_splits > 1):
        patient = patients[n_splits > 1][0]
        where = " and ".join(str(s) for s in pairs[pairs[:, 0] == patient, 1])
        raise DataError(
            f"patient {str(patient)!r} has films in {where} ({np.sum(n_splits > 1)} such patients in all): move all "
            "films of a patient to one split, or make new splits with split_by_patient()"
        )


def _describe(value: object) -> str:
    return f"{value.dtype} {value.shape}" if isinstance(value, np.ndarray) else type(value).__name__
