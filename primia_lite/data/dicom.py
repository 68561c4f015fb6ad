"""A folder of DICOM films and a labels CSV. Nothing that names a patient leaves this module."""

from __future__ import annotations

import csv
import io
import os
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from primia_lite.config import DataError, data_root, printable
from primia_lite.data.dicom_pixels import as_displayed, blaming, stored_values, upright
from primia_lite.data.pixels import (
    check_options,
    join_patients,
    picture_key,
    read_films,
    to_square,
    warn_skipped,
)
from primia_lite.data.split import choose_films, split_by_patient
from primia_lite.data.types import CLASSES_2, CLASSES_3, SPLITS, ChestXrays

LABELS = "labels.csv"
_COLUMNS = ("file", "label", "patient_id")
# All that is read of a header: how the pixels are stored, shown and oriented, nothing that tells who the patient is.
_TAGS = (
    "SamplesPerPixel", "PhotometricInterpretation", "NumberOfFrames", "PlanarConfiguration", "Rows", "Columns",
    "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "PixelPaddingValue", "PixelPaddingRangeLimit",
    "BurnedInAnnotation", "RescaleSlope", "RescaleIntercept", "ModalityLUTSequence", "VOILUTSequence", "WindowCenter",
    "WindowWidth", "VOILUTFunction", "PresentationLUTShape", "PatientOrientation", "ImageOrientationPatient",
    "PixelData",
)  # fmt: skip


@dataclass(frozen=True)
class _Row:
    number: int  # line of the CSV, the header being 1
    path: Path
    label: str
    patient: str  # pseudonym
    site: str
    split: str

    def __str__(self) -> str:
        return f"row {self.number}"


def read(
    size: int,
    *,
    root: str | Path | None = None,
    n_films: int | None = None,
    seed: int = 0,
    skip_bad: bool = False,
    validation_fraction: float = 0.1,
    test_fraction: float = 0.2,
    aspect: str = "stretch",
) -> ChestXrays:
    """Read the films that ``labels.csv`` lists: ``file``, ``label``, ``patient_id``, at will ``site`` and ``split``.

    Labels are ``normal``, ``bacterial`` and ``viral``, or ``normal`` and ``pneumonia``. Pixels go through the modality
    rescale and the VOI table or else the first usable VOI window of the header (without one, from the film's 0.5th to
    its 99.5th percentile), MONOCHROME1 is inverted, padding is black, films stored mirrored or turned are set upright,
    and the result is 8-bit grey.

    Patients are renamed ``patient-0001``, ``patient-0002``, ... in the order of the CSV; ids from the CSV never leave
    the loader, nor does any header, and skipped films are told by their row, since a file name may hold a patient's.

    Parameters
    ----------
    root : the folder with the CSV, or the one above ``dicom/``; default ``PRIMIA_LITE_DATA``
    test_fraction, validation_fraction : where there is no ``split`` column: test's share of all films, and validation's
        of the others; whole patients, stratified, by ``seed``
    n_films, skip_bad, aspect : as for ``kermany``
    """
    check_options(aspect, validation_fraction=validation_fraction, test_fraction=test_fraction)
    folder, _ = find(root)
    if folder is None:
        where = data_root() if root is None else Path(root)
        raise DataError(
            f"no {LABELS} in {printable(where)} or {printable(where / 'dicom')}: put the DICOM files there with a "
            f"CSV of columns {','.join(_COLUMNS)} (and, if you like, site,split)"
        )
    rows = _read_csv(folder / LABELS)
    class_names = _class_names(rows)
    labels = np.array([class_names.index(row.label) for row in rows], dtype=np.int64)
    patients = np.array([row.patient for row in rows], dtype=str)
    split = _splits(rows, labels, patients, class_names, (validation_fraction, test_fraction), seed)
    chosen = np.arange(len(rows)) if n_films is None else choose_films(labels, patients, split, n_films, seed)
    rows, labels, patients, split = [rows[i] for i in chosen], labels[chosen], patients[chosen], split[chosen]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="pydicom")  # its warnings quote header values
        images, keys, good, skipped = read_films(
            lambda row: _film(row, size, aspect), rows, [str(row) for row in rows], skip_bad=skip_bad
        )
    warn_skipped([f"{row} of {LABELS}" for row in skipped], len(rows))
    given = np.array([rows[i].split for i in good])  # empty where the splits are this loader's own
    names = [f"{rows[i]} of {LABELS}" for i in good]
    patients, split = join_patients(keys, names, patients[good], split[good], given)
    return ChestXrays(
        images=images, labels=labels[good], class_names=class_names, patient_id=patients,
        site=np.array([rows[i].site for i in good], dtype=str), split=split, source="dicom", skipped=skipped,
    )  # fmt: skip


def _splits(
    rows: list[_Row],
    labels: np.ndarray,
    patients: np.ndarray,
    class_names: tuple[str, ...],
    fractions: tuple[float, float],
    seed: int,
) -> np.ndarray:
    if rows[0].split:
        return np.array([row.split for row in rows], dtype=str)
    validation, test = (1 - fractions[1]) * fractions[0], fractions[1]
    parts = {"train": 1 - test - validation, "val": validation, "test": test}
    return split_by_patient(labels, patients, parts, seed, class_names=class_names)


def find(root: str | Path | None = None) -> tuple[Path | None, int | None]:
    """The folder of the CSV, and its number of films; (None, None) if there is none."""
    base = data_root() if root is None else Path(root).expanduser()
    for folder in (base / "dicom", base):
        if (folder / LABELS).is_file():
            lines = (folder / LABELS).read_bytes().splitlines()
            return folder, max(0, sum(bool(line.strip()) for line in lines) - 1)
    return None, None


def _read_csv(path: Path) -> list[_Row]:
    where = printable(path)
    try:
        # A file's name may be in the bytes of another encoding: these find it.
        text = path.read_bytes().decode("utf-8-sig", "surrogateescape")
        if "\0" in text:
            raise csv.Error("UTF-16")
        reader = csv.DictReader(io.StringIO(text, newline=""), skipinitialspace=True)
        columns = [column.strip() for column in reader.fieldnames or ()]
        reader.fieldnames = columns
        missing = [column for column in _COLUMNS if column not in columns]
        if missing:
            raise DataError(
                f"{where} lacks the column {', '.join(missing)}: its first line must be {','.join(_COLUMNS)}"
            )
        lines = [(reader.line_num, {k: (value or "").strip() for k, value in line.items() if k}) for line in reader]
    except OSError as error:
        raise DataError(f"{where} can't be read: {error.strerror}") from None
    except csv.Error as error:
        raise DataError(f"{where} is not a CSV in UTF-8 ({error}): save it again as one") from None
    if not lines:
        raise DataError(f"{where} lists no film: add one line per film")
    rows: list[_Row] = []
    pseudonyms: dict[str, str] = {}
    seen: dict[object, int] = {}
    first: dict[str, _Row] = {}  # of each patient
    for number, line in lines:
        for column in (*_COLUMNS, *(c for c in ("site", "split") if c in columns)):
            if not line[column]:
                raise DataError(f"{where}, row {number}: {column} is empty, fill it in")
        split = line.get("split", "")
        if split and split not in SPLITS:
            raise DataError(f"{where}, row {number}: split {split!r} must be one of {', '.join(SPLITS)}")
        file = path.parent / line["file"]
        earlier = seen.setdefault(_identity(file), number)
        if earlier != number:
            raise DataError(f"{where}, row {number}: the file of row {earlier} again, remove one of them")
        patient = pseudonyms.setdefault(line["patient_id"], f"patient-{len(pseudonyms) + 1:04d}")
        site = printable(line.get("site", "dicom"))
        row = _Row(number, file, line["label"].lower(), patient, site, split)
        other = first.setdefault(patient, row)
        if other.split != split:
            raise DataError(
                f"{where}, row {number}: the patient of row {other.number} ({other.split}) again, in split {split!r}: "
                "move all films of a patient to one split, or drop the split column"
            )
        rows.append(row)
    return rows


def _identity(path: Path) -> object:
    """The same for all names of one file: ``./``, links, capitals where the disk doesn't tell them apart."""
    try:
        found = path.stat()
    except OSError:
        return os.path.realpath(path)
    return (found.st_dev, found.st_ino) if found.st_ino else os.path.realpath(path)


def _class_names(rows: list[_Row]) -> tuple[str, ...]:
    found = {row.label for row in rows}
    for class_names in (CLASSES_2, CLASSES_3):
        if found <= set(class_names):
            return class_names
    wrong = next((row for row in rows if row.label not in CLASSES_3 + CLASSES_2), None)
    if wrong:
        raise DataError(
            f"{LABELS}, row {wrong.number}: unknown label {wrong.label!r}, use {', '.join(CLASSES_3)} (or "
            f"{', '.join(CLASSES_2)})"
        )
    raise DataError(f"{LABELS} mixes 'pneumonia' with 'bacterial' or 'viral': use {CLASSES_3} or {CLASSES_2}")


def _film(row: _Row, size: int, aspect: str) -> tuple[np.ndarray, int]:
    """One film, uint8 [size, size], and the key of its stored pixels."""
    try:
        with blaming("its header or pixels"):
            grey, key = _read_dicom(row.path)
            return to_square(Image.fromarray(grey), size, aspect), key
    except DataError as error:
        advice = "or leave it out with skip_bad=True (--skip-bad)"
        raise DataError(f"{printable(row.path.name)} ({row}): {error}, {advice}") from None


def _read_dicom(path: Path) -> tuple[np.ndarray, int]:
    """uint8 [rows, columns] as a viewer shows it, upright, and the key of the stored pixels."""
    import pydicom
    from pydicom.errors import InvalidDicomError

    try:
        header = pydicom.dcmread(path, specific_tags=list(_TAGS))
    except FileNotFoundError:
        raise DataError(f"no such file in {printable(path.parent)}, correct the CSV") from None
    except InvalidDicomError:
        raise DataError("it is not a DICOM file: export it again") from None
    except Exception as error:
        raise DataError(f"it can't be read ({type(error).__name__}): export it again") from None
    for tag in _TAGS:  # pydicom reads an element when it is first asked for
        with blaming(f"its {tag}"):
            header.get(tag)
    if not header.get("PixelData"):
        raise DataError("it has no PixelData, so it is no film: correct the CSV")
    with blaming("its NumberOfFrames"):
        frames = int(header.get("NumberOfFrames") or 1)
    if frames > 1:
        raise DataError(f"it has {frames} frames, not one: export the single film")
    photometric = header.get("PhotometricInterpretation")
    if not photometric:
        raise DataError("it has no PhotometricInterpretation: export it again")
    if photometric not in ("MONOCHROME1", "MONOCHROME2") or (header.get("SamplesPerPixel") or 1) != 1:
        raise DataError(f"it is in colour ({printable(photometric)[:16]}): X-ray films are grey. Export it as grey")
    if photometric == "MONOCHROME2" and header.get("PresentationLUTShape") == "INVERSE":
        raise DataError("its PresentationLUTShape INVERSE contradicts MONOCHROME2: correct one of them")
    if str(header.get("BurnedInAnnotation", "")).upper() == "YES":
        raise DataError("it has text burned in (BurnedInAnnotation YES), perhaps a name: blank it")
    values, padding = stored_values(header)
    return upright(as_displayed(values, padding, header), header), picture_key(values.astype(np.int32))
