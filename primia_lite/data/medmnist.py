"""PneumoniaMNIST of MedMNIST v2 (Yang et al. 2023), through the ``medmnist`` package.

Source: doi:10.5281/zenodo.10519652, CC BY 4.0; the films of Kermany et al. 2018, cropped to the middle square.
"""

from __future__ import annotations

import hashlib
import http.client
import urllib.request
import zipfile
import zlib
from pathlib import Path
from typing import IO

import numpy as np

from primia_lite.config import DataError, data_root
from primia_lite.data.pixels import show_progress
from primia_lite.data.split import choose_films
from primia_lite.data.types import CLASSES_2, SPLITS, ChestXrays
from primia_lite.runtime import write_atomic

SIZES = (28, 64, 128, 224)
_FLAG = "pneumoniamnist"
_TIMEOUT_S = 30


def read(
    size: int,
    *,
    root: str | Path | None = None,
    n_films: int | None = None,
    seed: int = 0,
    download: bool = False,
) -> ChestXrays:
    """Read the films of one of MedMNIST's sizes, with its own train, val and test split.

    The set has two classes and no patient ids, so **each film counts as a patient of its own**. MedMNIST cut val from
    train by film, so a child may have films in both; test is the original test set, whose children are in neither.

    Parameters
    ----------
    size : 28, 64, 128 or 224 px
    root : the folder with the ``.npz`` file; default ``PRIMIA_LITE_DATA``, then ``~/.medmnist``
    n_films : about this many, in the same proportions of splits and classes; default all 5,856
    download : fetch the file into ``root`` if it isn't there (4 to 200 MB), and check its MD5
    """
    if size not in SIZES:
        raise DataError(f"size={size}: {_FLAG} comes in {', '.join(map(str, SIZES))} px, choose one of them")
    name = _file_name(size)
    path = next((f / name for f in _folders(root) if (f / name).is_file()), None)
    if path is None:
        path = _folders(root)[0] / name
        if not download:
            raise DataError(
                f"{name} is not in {path.parent}: get it from {_info()[_key('url', size)]} and put it there, or let "
                f"it be fetched with load({_FLAG!r}, {size}, download=True)"
            )
        _download(path, _info()[_key("url", size)], _info()[_key("MD5", size)])
    images, labels, split = _read_npz(path, size)
    patients = np.array([f"film{i:04d}" for i in range(len(images))])
    films = ChestXrays(
        images=images, labels=labels, class_names=CLASSES_2, patient_id=patients,
        site=np.full(len(images), _FLAG), split=split, source=_FLAG,
    )  # fmt: skip
    return films if n_films is None else films.subset(choose_films(labels, patients, split, n_films, seed))


def find(root: str | Path | None = None) -> tuple[Path | None, int | None]:
    """The first folder that has any of the files, and how many; (None, None) if there is none."""
    for folder in _folders(root):
        n_files = sum((folder / _file_name(size)).is_file() for size in SIZES)
        if n_files:
            return folder, n_files
    return None, None


def _folders(root: str | Path | None) -> list[Path]:
    base = data_root() if root is None else Path(root).expanduser()
    folders = [base, base / _FLAG, base / "medmnist"]
    return folders if root is not None else [*folders, Path.home() / ".medmnist"]


def _file_name(size: int) -> str:
    return f"{_key(_FLAG, size)}.npz"


def _key(name: str, size: int) -> str:
    return name if size == 28 else f"{name}_{size}"


def _info() -> dict:
    from medmnist.info import INFO

    return INFO[_FLAG]


def _read_npz(path: Path, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    from medmnist.dataset import PneumoniaMNIST

    try:
        parts = [PneumoniaMNIST(split=split, root=str(path.parent), size=size) for split in SPLITS]
        images = np.concatenate([part.imgs for part in parts])
        labels = np.concatenate([part.labels.reshape(len(part.imgs)) for part in parts]).astype(np.int64)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path} is damaged ({error}): delete it and get it again") from error
    if images.shape[1:] != (size, size):
        raise DataError(f"{path} holds films of {images.shape[1:]} px, not {size}: delete it and get it again")
    split = np.repeat(SPLITS, [len(part.imgs) for part in parts])
    return images, labels, split


def _download(path: Path, url: str, md5: str) -> None:
    # medmnist's own download needs torchvision, and leaves half a file behind when it is interrupted.
    def write(file: IO[bytes]) -> None:
        digest = hashlib.md5(usedforsecurity=False)
        for chunk in _chunks(url, path):
            digest.update(chunk)
            file.write(chunk)
        if digest.hexdigest() != md5:
            raise DataError(f"{url} arrived damaged (MD5 {digest.hexdigest()}, not {md5}): try again")

    write_atomic(path, write)


def _chunks(url: str, path: Path):
    from tqdm.auto import tqdm

    request = urllib.request.Request(url, headers={"User-Agent": "primia-lite"})
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as response:
            total = int(response.headers.get("Content-Length") or 0) or None
            with tqdm(total=total, desc=path.name, unit="B", unit_scale=True, disable=not show_progress()) as bar:
                while chunk := response.read(1 << 20):
                    yield chunk
                    bar.update(len(chunk))
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise DataError(
            f"could not download {url} ({error}): try again, or fetch it another way and save it as {path}"
        ) from error
