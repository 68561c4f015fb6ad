"""A folder of DICOM films and a labels CSV. Nothing that names a patient leaves this module."""

from __future__ import annotations

import csv
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from primia_lite.config import DataError, data_root
from primia_lite.data.pixels import check_aspect, read_films, to_square, warn_skipped
from primia_lite.data.split import choose_films, split_by_patient
from primia_lite.data.types import CLASSES_2, CLASSES_3, SPLITS, ChestXrays

_COLUMNS = ("file", "label", "patient_id")
# All that is read of a header: no element that describes the patient is ever parsed.
_TAGS = (
    "SamplesPerPixel", "PhotometricInterpretation", "NumberOfFrames", "PlanarConfiguration", "Rows", "Columns",
    "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "BurnedInAnnotation", "RescaleSlope",
    "RescaleIntercept", "ModalityLUTSequence", "VOILUTSequence", "WindowCenter", "WindowWidth", "VOILUTFunction",
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
    labels_csv: str = "labels.csv",
    aspect: str = "stretch",
    progress: bool | None = None,
) -> ChestXrays:
    """Read the films that a CSV lists: columns ``file``, ``label``, ``patient_id``, and at will ``site`` and ``split``.

    Labels are ``normal``, ``bacterial`` and ``viral``, or ``normal`` and ``pneumonia``. Pixels go through the modality
    rescale and the first VOI window or table of the header (without one, from the film's 0.5th to its 99.5th
    percentile), MONOCHROME1 is inverted, and the result is 8-bit grey.

    Patients are renamed ``patient-0001``, ``patient-0002``, ... in the order of the CSV; ids from the CSV never leave
    the loader, nor does any header, and skipped films are told by their row, since a file name may hold a patient's.

    Parameters
    ----------
    root : the folder with the CSV, or the one above ``dicom/``; default ``PRIMIA_LITE_DATA``
    test_fraction, validation_fraction : where there is no ``split`` column: test's share of all films, and validation's
        of the others; whole patients, stratified, by ``seed``
    labels_csv : its name in the folder; ``file`` is relative to that folder
    n_films, skip_bad, aspect, progress : as for ``kermany``

    Raises
    ------
    DataError
        No folder, column, file or such label; a film of several frames, in colour, unreadable, or with text burned in;
        a patient in two splits.
    """
    check_aspect(aspect)
    for name, value in (("validation_fraction", validation_fraction), ("test_fraction", test_fraction)):
        if not 0 <= value < 1:
            raise DataError(f"{name}={value}: give a share from 0 to below 1, such as 0.1")
    folder, _ = find(root, labels_csv)
    if folder is None:
        where = data_root() if root is None else Path(root)
        raise DataError(
            f"no {labels_csv} in {where} or {where / 'dicom'}: put the DICOM files there with a CSV of columns "
            f"{','.join(_COLUMNS)} (and, if you like, site,split)"
        )
    rows = _read_csv(folder / labels_csv)
    class_names = _class_names(rows, labels_csv)
    labels = np.array([class_names.index(row.label) for row in rows], dtype=np.int64)
    patients = np.array([row.patient for row in rows], dtype=str)
    if rows[0].split:
        split = np.array([row.split for row in rows], dtype=str)
    else:
        validation = (1 - test_fraction) * validation_fraction
        fractions = {"train": 1 - test_fraction - validation, "val": validation, "test": test_fraction}
        split = split_by_patient(labels, patients, fractions, seed, class_names=class_names)
    chosen = np.arange(len(rows)) if n_films is None else choose_films(labels, patients, split, n_films, seed)
    rows, labels, patients, split = [rows[i] for i in chosen], labels[chosen], patients[chosen], split[chosen]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="pydicom")  # its warnings quote header values
        images, good, skipped = read_films(
            lambda row: _film(row, size, aspect), rows, [str(row) for row in rows], size,
            skip_bad=skip_bad, progress=progress,
        )  # fmt: skip
    warn_skipped([f"{row} of {labels_csv}" for row in skipped], len(rows))
    return ChestXrays(
        images=images, labels=labels[good], class_names=class_names, patient_id=patients[good],
        site=np.array([rows[i].site for i in good], dtype=str), split=split[good], source="dicom", skipped=skipped,
    )  # fmt: skip


def find(root: str | Path | None = None, labels_csv: str = "labels.csv") -> tuple[Path | None, int | None]:
    """The folder of the CSV, and its number of films; (None, None) if there is none."""
    base = data_root() if root is None else Path(root).expanduser()
    for folder in (base / "dicom", base):
        if (folder / labels_csv).is_file():
            lines = (folder / labels_csv).read_bytes().splitlines()
            return folder, max(0, sum(bool(line.strip()) for line in lines) - 1)
    return None, None


def _read_csv(path: Path) -> list[_Row]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, skipinitialspace=True)
            columns = [column.strip() for column in reader.fieldnames or ()]
            reader.fieldnames = columns
            missing = [column for column in _COLUMNS if column not in columns]
            if missing:
                raise DataError(
                    f"{path} lacks the column {', '.join(missing)}: its first line must be {','.join(_COLUMNS)}"
                )
            lines = [(reader.line_num, {k: (value or "").strip() for k, value in line.items() if k}) for line in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} is not a CSV in UTF-8 ({type(error).__name__}): save it again as one") from None
    if not lines:
        raise DataError(f"{path} lists no film: add one line per film")
    rows: list[_Row] = []
    pseudonyms: dict[str, str] = {}
    seen: dict[str, int] = {}
    first: dict[str, _Row] = {}  # of each patient
    for number, line in lines:
        for column in (*_COLUMNS, *(c for c in ("site", "split") if c in columns)):
            if not line[column]:
                raise DataError(f"{path}, row {number}: {column} is empty, fill it in")
        split = line.get("split", "")
        if split and split not in SPLITS:
            raise DataError(f"{path}, row {number}: split {split!r} must be one of {', '.join(SPLITS)}")
        if line["file"] in seen:
            raise DataError(f"{path}, row {number}: the file of row {seen[line['file']]} again, remove one of them")
        seen[line["file"]] = number
        patient = pseudonyms.setdefault(line["patient_id"], f"patient-{len(pseudonyms) + 1:04d}")
        site = line.get("site", "dicom")
        row = _Row(number, path.parent / line["file"], line["label"].lower(), patient, site, split)
        other = first.setdefault(patient, row)
        if other.split != split:
            raise DataError(
                f"{path}, row {number}: the patient of row {other.number} ({other.split}) again, in split {split!r}: "
                "move all films of a patient to one split, or drop the split column"
            )
        rows.append(row)
    return rows


def _class_names(rows: list[_Row], labels_csv: str) -> tuple[str, ...]:
    found = {row.label for row in rows}
    for class_names in (CLASSES_2, CLASSES_3):
        if found <= set(class_names):
            return class_names
    wrong = next((row for row in rows if row.label not in CLASSES_3 + CLASSES_2), None)
    if wrong:
        raise DataError(
            f"{labels_csv}, row {wrong.number}: unknown label {wrong.label!r}, use {', '.join(CLASSES_3)} (or "
            f"{', '.join(CLASSES_2)})"
        )
    raise DataError(f"{labels_csv} mixes 'pneumonia' with 'bacterial' or 'viral': use {CLASSES_3} or {CLASSES_2}")


def _film(row: _Row, size: int, aspect: str) -> np.ndarray:
    """One film, uint8 [size, size].

    ``from None`` everywhere: pydicom's own messages may quote the header.
    """
    import pydicom
    from pydicom.errors import InvalidDicomError

    name = f"{row.path.name} ({row})"
    advice = "or leave it out with skip_bad=True (--skip-bad)"
    try:
        header = pydicom.dcmread(row.path, specific_tags=list(_TAGS))
    except FileNotFoundError:
        raise DataError(f"{name}: no such file in {row.path.parent}, correct the CSV, {advice}") from None
    except InvalidDicomError:
        raise DataError(f"{name} is not a DICOM file: export it again, {advice}") from None
    except Exception as error:  # pydicom has no common error for damaged files
        raise DataError(f"{name} can't be read ({type(error).__name__}): export it again, {advice}") from None
    if int(header.get("NumberOfFrames") or 1) > 1:
        raise DataError(f"{name} has {header.NumberOfFrames} frames, not one: export the single film, {advice}")
    photometric = header.get("PhotometricInterpretation", "missing")
    if photometric not in ("MONOCHROME1", "MONOCHROME2") or int(header.get("SamplesPerPixel") or 1) != 1:
        raise DataError(f"{name} is in colour ({photometric}): X-ray films are grey. Export it as grey, {advice}")
    if str(header.get("BurnedInAnnotation", "")).upper() == "YES":
        raise DataError(f"{name} has text burned in (BurnedInAnnotation YES), perhaps a name: blank it, {advice}")
    try:
        grey = _grey(header)
    except Exception as error:  # as above; decoders of compressed pixels add their own
        raise DataError(
            f"{name}: its pixels can't be decoded ({type(error).__name__}): export it uncompressed and whole, {advice}"
        ) from None
    return to_square(Image.fromarray(255 - grey if photometric == "MONOCHROME1" else grey), size, aspect)


def _grey(header) -> np.ndarray:
    """uint8 [rows, columns] after rescale and windowing, before the inversion of MONOCHROME1."""
    from pydicom.pixels import apply_modality_lut, apply_voi_lut

    values = apply_modality_lut(header.pixel_array, header)
    windowed = header.get("WindowWidth") is not None and header.get("WindowCenter") is not None
    if windowed or header.get("VOILUTSequence"):
        low, high = _voi_range(header)
        if header.get("VOILUTSequence"):
            # pydicom 3.0 indexes a table of 8-bit entries by 8-bit numbers: one of more than 256 entries wraps around.
            header.VOILUTSequence[0].LUTDescriptor[2] = max(header.VOILUTSequence[0].LUTDescriptor[2], 10)
        values = apply_voi_lut(values, header).astype(np.float64)
    else:
        low, high = np.percentile(values, (0.5, 99.5))
    scaled = (values - low) / max(high - low, 1e-9)
    return np.rint(255 * np.clip(scaled, 0, 1)).astype(np.uint8)


def _voi_range(header) -> tuple[float, float]:
    """What black and white are in the output of ``apply_voi_lut`` (its documentation; DICOM PS3.3 C.11.2)."""
    if header.get("VOILUTSequence"):
        return 0.0, 2.0 ** header.VOILUTSequence[0].LUTDescriptor[2] - 1
    if header.get("ModalityLUTSequence"):
        return 0.0, 2.0 ** header.ModalityLUTSequence[0].LUTDescriptor[2] - 1
    low = -(2.0 ** (header.BitsStored - 1)) if header.PixelRepresentation else 0.0
    high = low + 2.0**header.BitsStored - 1
    slope, intercept = float(header.get("RescaleSlope", 1)), float(header.get("RescaleIntercept", 0))
    if slope <= 0:
        raise ValueError("negative rescale slope")
    return low * slope + intercept, high * slope + intercept
