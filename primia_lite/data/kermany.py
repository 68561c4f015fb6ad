"""The paediatric pneumonia set of Kermany et al. 2018, in the folders that Mendeley Data and Kaggle distribute.

Source: doi:10.17632/rscbjbr9sj.3, CC BY 4.0. Folders, file names and patients: ``data/README.md``.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from primia_lite.config import DataError, cache_dir, data_root, printable
from primia_lite.data.cache import cached
from primia_lite.data.pixels import (
    check_options,
    decode,
    join_patients,
    parallel,
    picture_key,
    read_films,
    to_square,
    warn_skipped,
)
from primia_lite.data.split import choose_films, split_by_patient
from primia_lite.data.types import CLASSES_3, SPLITS, ChestXrays, check_patient_disjoint

_FOLDERS = (
    ".", "chest_xray", "chest_xray/chest_xray", "CellData/chest_xray", "ZhangLabData/CellData/chest_xray", "kermany",
    "kermany/chest_xray",
)  # fmt: skip
_CLASS_FOLDERS = ("NORMAL", "PNEUMONIA")
_SUFFIXES = (".jpeg", ".jpg", ".png")
# Kaggle: person<N>_<disease>_<film>, [NORMAL2-]IM-<N>-<film>. Mendeley: <DISEASE>-<N>-<film>.
_NAMES = re.compile(
    r"(?P<person>person\d+_(?P<disease>bacteria|virus))_\d"
    r"|(?P<normal>(?:NORMAL2-)?IM-\d+)-\d"
    r"|(?P<mendeley>(?P<kind>NORMAL|BACTERIA|VIRUS)-\d+)-\d"
)
_LABELS = {"normal": 0, "bacteria": 1, "virus": 2}
_CACHE_VERSION = 2  # raise it where what is stored changes


@dataclass(frozen=True)
class _File:
    path: Path
    name: str  # relative to the root of the set, as users and messages see it
    label: int
    patient: str
    folder: str  # train, val or test


def read(
    size: int,
    *,
    root: str | Path | None = None,
    n_films: int | None = None,
    seed: int = 0,
    skip_bad: bool = False,
    validation_fraction: float = 0.1,
    validation: str = "from_train",
    aspect: str = "stretch",
) -> ChestXrays:
    """Read the films, resized to ``size`` px, with the three classes and the patients that their names tell.

    Test is the original test folder (624 films). The original ``val`` folder has 16 films, too few to choose by.

    Parameters
    ----------
    root : the folder that holds ``train/`` and ``test/``, or one above it; default ``PRIMIA_LITE_DATA``
    n_films : about this many, whole patients, in the same proportions of splits and classes; default all
    validation
        ``from_train``: the original train and val folders are pooled, and ``validation_fraction`` of their films is cut
        off by patient, stratified, with ``seed``. ``original``: the folders as they are (Kaggle's layout only).
    aspect : ``stretch`` (default: the common 224 px copies have lost the aspect ratio already), ``crop`` or ``pad``
    """
    check_options(aspect, validation_fraction=validation_fraction)
    if validation not in ("from_train", "original"):
        raise DataError(f"validation={validation!r}: choose 'from_train' or 'original'")
    folder, _ = find(root)
    if folder is None:
        raise DataError(
            f"no chest_xray/train/NORMAL in {printable(_root(root))}: download the set (doi:10.17632/rscbjbr9sj.3, or "
            "Kaggle's paultimothymooney/chest-xray-pneumonia), unpack it there, or point PRIMIA_LITE_DATA at it"
        )
    files, unnamed = _list_files(folder, skip_bad)
    labels = np.array([f.label for f in files], dtype=np.int64)
    patients = np.array([f.patient for f in files], dtype=str)
    split = np.array([f.folder for f in files], dtype="<U5")
    if validation == "original" and not np.any(split == "val"):
        raise DataError(f"{printable(folder)} has no val folder (Mendeley's layout): use validation='from_train'")
    if validation == "from_train":
        pool = split != "test"
        split[pool] = "train"
        if validation_fraction > 0:
            parts = {"train": 1 - validation_fraction, "val": validation_fraction}
            split[pool] = split_by_patient(labels[pool], patients[pool], parts, seed)
    check_patient_disjoint(patients, split)  # before minutes of decoding
    if n_films is not None:
        chosen = choose_films(labels, patients, split, n_films, seed)
        files, labels, patients, split = [files[i] for i in chosen], labels[chosen], patients[chosen], split[chosen]
    images, keys, good, skipped = _images(files, size, aspect, skip_bad)
    skipped = tuple(unnamed) + skipped
    warn_skipped(skipped, len(files) + len(unnamed))
    names = [files[i].name for i in good]
    parted = validation == "from_train"  # train and val are then this loader's parts, test is the source's
    given = np.where(split[good] == "test", "test", "train") if parted else split[good]
    patients, split = join_patients(keys, names, patients[good], split[good], given)
    return ChestXrays(
        images=images, labels=labels[good], class_names=CLASSES_3, patient_id=patients,
        site=np.full(len(good), "kermany"), split=split, source="kermany", skipped=skipped,
    )  # fmt: skip


def find(root: str | Path | None = None) -> tuple[Path | None, int | None]:
    """The folder that holds ``train/`` and ``test/``, and its number of films; (None, None) if there is none."""
    for name in _FOLDERS:
        folder = _root(root) / name
        if any((folder / "train" / c).is_dir() for c in _CLASS_FOLDERS):
            return folder.resolve(), sum(len(_films(folder / split / c)) for split in SPLITS for c in _CLASS_FOLDERS)
    return None, None


def _root(root: str | Path | None) -> Path:
    return data_root() if root is None else Path(root).expanduser()


def _films(folder: Path) -> list[Path]:
    """Films in a folder, sorted; not macOS's ``._`` twins, ``.DS_Store`` or ``__MACOSX``."""
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in _SUFFIXES and not p.name.startswith("."))


def _list_files(folder: Path, skip_bad: bool) -> tuple[list[_File], list[str]]:
    files, unnamed = [], []
    for split in SPLITS:
        for class_folder in _CLASS_FOLDERS:
            paths = _films(folder / split / class_folder)
            if not paths and split != "val":
                raise DataError(
                    f"{printable(folder / split / class_folder)} has no film: unpack the set again, completely"
                )
            for path in paths:
                name = printable(path.relative_to(folder).as_posix())
                try:
                    label, patient = label_and_patient(printable(path.name))
                    if (label > 0) != (class_folder == "PNEUMONIA"):
                        raise DataError(f"{name} lies in {class_folder}, its name says otherwise: move or remove it")
                except DataError as error:
                    if not skip_bad:
                        raise DataError(f"{error} (or leave it out with skip_bad=True, --skip-bad)") from None
                    unnamed.append(name)
                else:
                    files.append(_File(path, name, label, patient, split))
    return files, unnamed


def label_and_patient(file_name: str) -> tuple[int, str]:
    """Label (0 normal, 1 bacterial, 2 viral) and patient of a film, from its name.

    ``person7_virus_29.jpeg`` is a film of patient ``person7_virus``: numbers under both diseases are taken to be
    different children, which the publisher neither says nor denies.
    """
    match = _NAMES.match(file_name)
    if not match:
        raise DataError(
            f"{file_name} tells neither class nor patient: names look like person7_virus_29.jpeg, IM-0115-0001.jpeg or "
            "BACTERIA-7422-0001.jpeg. Rename or remove it"
        )
    disease = (match["disease"] or match["kind"] or "normal").lower()
    return _LABELS[disease], match["person"] or match["normal"] or match["mendeley"]


def _images(
    files: list[_File], size: int, aspect: str, skip_bad: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray, tuple[str, ...]]:
    """As ``read_films``, out of the cache if it is there."""
    names = [f.name for f in files]

    def read_one(file: _File) -> tuple[np.ndarray, int]:
        try:
            film = decode(file.path.read_bytes(), file.name)
        except OSError as error:
            raise DataError(f"{file.name} can't be read: {error.strerror}") from error
        return to_square(film, size, aspect), picture_key(np.asarray(film))

    def made() -> dict[str, np.ndarray]:
        images, keys, good, skipped = read_films(read_one, files, names, skip_bad=skip_bad)
        return {"images": images, "keys": keys, "good": good, "skipped": np.array(skipped, dtype=str)}

    path = cache_dir() / f"kermany-{_key(files, size, aspect)}.npz"
    found = cached(path, made, lambda found: skip_bad or not len(found["skipped"]))
    return found["images"], found["keys"], found["good"], tuple(found["skipped"].tolist())


def _key(files: list[_File], size: int, aspect: str) -> str:
    # Of the bytes, not of times and sizes: a file that is mended in place must not meet its old picture. Hashing the
    # original 1.2 GB takes seconds, decoding it minutes.
    def hash_one(file: _File) -> bytes:
        try:
            return hashlib.sha256(file.path.read_bytes()).digest()
        except OSError:
            return b"unreadable"

    digest = hashlib.sha256(f"{_CACHE_VERSION}|{size}|{aspect}".encode())
    for file, content in zip(files, parallel(hash_one, files, "checking files"), strict=True):
        digest.update(f"|{file.name}|".encode() + content)
    return digest.hexdigest()[:24]
