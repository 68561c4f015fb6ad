"""From a DICOM header and its pixels to 8-bit grey as a viewer shows it. pydicom decodes, looks up and windows."""

from __future__ import annotations

from collections.abc import Iterator, MutableSequence
from contextlib import contextmanager

import numpy as np

from primia_lite.config import DataError

_HUGE = 1e30  # no rescale or window is: finite arithmetic below it


@contextmanager
def blaming(what: str) -> Iterator[None]:
    """Any error inside as a DataError that names ``what``: pydicom has none in common, and its may quote the header."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{what} can't be used ({type(error).__name__}): correct it") from None


def stored_values(header) -> tuple[np.ndarray, np.ndarray]:
    """Stored values, whole numbers [rows, columns], and where they are padding, bool."""
    from pydicom.pixels import pixel_array

    try:
        raw = pixel_array(header, correct_unused_bits=False)
    except Exception as error:
        kind = getattr(header.file_meta.get("TransferSyntaxUID"), "name", "")
        if "JPEG" in kind:
            raise DataError(
                f"its pixels are compressed ({kind}) and can't be decoded here: pip install 'pylibjpeg[all]' or export "
                "it uncompressed"
            ) from None
        # Of the header only what _TAGS lists is read, so this can't quote a patient's name.
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise DataError(f"its pixels can't be decoded ({reason}): export it uncompressed and whole") from None
    if raw.ndim != 2:
        raise DataError(f"it has {len(raw)} frames, not one: export the single film")
    unused = max(0, 8 * raw.itemsize - header.BitsStored)
    values = raw << unused >> unused
    ends = _padding_ends(header, np.iinfo(raw.dtype))
    padding = np.zeros(raw.shape, dtype=bool)
    for stored in (raw, values) if ends else ():  # padding may lie beyond BitsStored
        padding |= (stored >= min(ends)) & (stored <= max(ends))
    if padding.all():
        raise DataError("it is nothing but padding (PixelPaddingValue): export it again")
    # Unused bits repeat the sign or are 0, in all of the film; anything else is more than the header tells of.
    if unused and not any(
        (raw == form)[~padding].all() for form in (values, values & raw.dtype.type(2**header.BitsStored - 1))
    ):
        raise DataError(
            f"it has pixel values beyond its BitsStored of {header.BitsStored} (a wrong header, or an old overlay in "
            "the upper bits): export it again"
        )
    return values, padding


def _padding_ends(header, limits: np.iinfo) -> list[int]:
    """First and last value of the padding; empty without any."""
    ends = []
    for tag in ("PixelPaddingValue", "PixelPaddingRangeLimit"):
        if header.get(tag) is None:
            break
        with blaming(f"its {tag}"):
            # Of 16 bits, and often written with the wrong sign.
            signs = (int(header[tag].value) + turn for turn in (0, -(2**16), 2**16))
            fitting = [value for value in signs if limits.min <= value <= limits.max]
        if not fitting:
            break
        ends.append(fitting[0])
    return ends


def as_displayed(values: np.ndarray, padding: np.ndarray, header) -> np.ndarray:
    """uint8 [rows, columns], 0 black, after rescale, table or window, inversion of MONOCHROME1; padding is black."""
    from pydicom.pixels import apply_modality_lut, apply_voi, apply_windowing

    stored = values[~padding]
    window = _window(header)
    if header.get("ModalityLUTSequence"):
        with blaming("its ModalityLUTSequence"):
            values = apply_modality_lut(values.astype(np.int64), header)
    else:
        slope = _number(header, "RescaleSlope", 1.0)
        if slope < 0 and (window is not None or header.get("VOILUTSequence")):
            raise DataError(f"its RescaleSlope of {slope:g} is negative beside a window or table: export it again")
        values = values * slope + _number(header, "RescaleIntercept", 0.0)
    if header.get("VOILUTSequence"):
        with blaming("its VOILUTSequence"):
            descriptor = header.VOILUTSequence[0].LUTDescriptor
            entries, first, bits = descriptor
            # pydicom 3.0 counts entries in 16 bits, or in 8 where those of the table have 8: longer ones wrap around.
            descriptor[2] = 10 if bits == 8 else bits
            index = np.clip(np.rint(values).astype(np.int64), first, first + (entries or 2**16) - 1)
            values = apply_voi(index, header) / (2.0**bits - 1)
    elif window is not None:
        with blaming("its WindowCenter, WindowWidth or VOILUTFunction"):
            for tag in ("ModalityLUTSequence", "RescaleSlope", "RescaleIntercept"):
                header.pop(tag, None)
            header.BitsStored, header.PixelRepresentation = 8, 0  # pydicom's black is then 0, its white 255
            with np.errstate(over="ignore"):  # far down a sigmoid
                values = apply_windowing(values, header, window) / 255
    else:
        seen = values[~padding]
        low, high = np.percentile(seen, (0.5, 99.5))
        if low == high:
            low, high = seen.min(), seen.max()
        values = (values - low) / (high - low or 1.0)
    grey = np.rint(255 * np.clip(values, 0, 1)).astype(np.uint8)
    n_greys = np.count_nonzero(np.bincount(grey[~padding]))
    if n_greys < 3 and n_greys < len(np.unique(stored)):
        raise DataError(
            f"its WindowWidth, RescaleSlope or table leaves {n_greys} of all its greys: correct or remove them"
        )
    if header.PhotometricInterpretation == "MONOCHROME1":
        grey = 255 - grey
    grey[padding] = 0
    return grey


def _window(header) -> int | None:
    """Number of the first window that can be used, if any."""
    header.VOILUTFunction = header.get("VOILUTFunction") or "LINEAR"
    least = 1.0 if header.VOILUTFunction == "LINEAR" else 1e-30
    windows = zip(_numbers(header, "WindowCenter"), _numbers(header, "WindowWidth"), strict=False)
    return next((i for i, (c, w) in enumerate(windows) if abs(c) < _HUGE and least <= w < _HUGE), None)


def _number(header, tag: str, default: float) -> float:
    numbers = _numbers(header, tag) or [default]
    if len(numbers) > 1 or not abs(numbers[0]) < _HUGE:
        raise DataError(f"its {tag} is {header.get(tag)}, not a number: correct it")
    return numbers[0]


def _numbers(header, tag: str) -> list[float]:
    value = header.get(tag)
    values = value if isinstance(value, MutableSequence) else [] if value in (None, "") else [value]
    with blaming(f"its {tag}"):
        return [np.nan if v in (None, "") else float(v) for v in values]


def upright(grey: np.ndarray, header) -> np.ndarray:
    """The film with the head up and the patient's left at the right, where the header says how it lies."""
    across, down = "", ""
    orientation, cosines = header.get("PatientOrientation"), _numbers(header, "ImageOrientationPatient")
    if isinstance(orientation, MutableSequence) and len(orientation) == 2:
        across, down = (str(letters)[:1].upper() for letters in orientation)
    elif len(cosines) == 6:
        # x runs to the patient's left, y to the back (posterior), z to the head; rows first, then columns.
        six = np.reshape(cosines, (2, 3))
        across, down = ("LPHRAF"[axis + 3 * (row[axis] < 0)] for axis, row in zip(abs(six).argmax(1), six, strict=True))
    if {across, down} & {"H", "F"} and {across, down} & {"A", "P"} and orientation:
        raise DataError(
            f"it is a lateral film (PatientOrientation {across}, {down}), not a frontal one: correct the CSV"
        )
    if across in ("H", "F") and down in ("L", "R"):
        grey, across, down = grey.T, down, across
    if across == "R" and down in ("H", "F"):
        grey = grey[:, ::-1]
    if down == "H" and across in ("L", "R"):
        grey = grey[::-1]
    return np.ascontiguousarray(grey)
