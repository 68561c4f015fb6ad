"""From files to square 8-bit films: decoding in parallel, colour check, resizing. Shared by the file-based sources."""

from __future__ import annotations

import hashlib
import io
import sys
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image, ImageChops, ImageOps

from primia_lite.config import DataError
from primia_lite.runtime import cores, in_notebook

ASPECTS = ("stretch", "crop", "pad")
# Grey saved as RGB comes back from JPEG within 1 or 2 levels of grey; a coloured marker is far beyond this.
COLOUR_TOLERANCE = 8
_OR_SKIP = "or leave it out with skip_bad=True (--skip-bad)"


def decode(content: bytes, name: str) -> Image.Image:
    """An 8-bit grey image from the bytes of a JPEG or PNG file, turned as its EXIF tag tells every viewer to.

    Refused is what is unreadable, in colour, not 8 bits deep, partly transparent, or of several frames.
    """
    try:
        image = Image.open(io.BytesIO(content))
        frames = getattr(image, "n_frames", 1)
        image = ImageOps.exif_transpose(image)
        alpha = image.convert("RGBA").getchannel("A").getextrema()[0] if image.has_transparency_data else 255
    except Exception as error:  # Pillow has no common error for damaged files
        raise DataError(f"{name} can't be read ({_reason(error)}): get the file again, {_OR_SKIP}") from error
    if frames > 1:
        raise DataError(f"{name} has {frames} frames, not one: save the single film, {_OR_SKIP}")
    if alpha < 255:
        raise DataError(f"{name} is partly transparent: save it without transparency, {_OR_SKIP}")
    if image.mode in ("L", "LA", "1"):
        return image.convert("L")
    if image.mode not in ("RGB", "RGBA", "P", "PA", "CMYK", "YCbCr"):
        raise DataError(f"{name} has pixels of type {image.mode}, not 8-bit grey: convert it, {_OR_SKIP}")
    rgb = image.convert("RGB")
    red, green, blue = rgb.split()
    spread = max(ImageChops.difference(green, other).getextrema()[1] for other in (red, blue))
    if spread > COLOUR_TOLERANCE:
        raise DataError(
            f"{name} is in colour (its channels differ by up to {spread} of 255): X-ray films are grey. Check it, "
            f"convert it to grey, {_OR_SKIP}"
        )
    return rgb.convert("L")


def to_square(image: Image.Image, size: int, aspect: str = "stretch") -> np.ndarray:
    """Resize with antialiasing to uint8 [size, size].

    ``aspect``: ``stretch`` the sides to a square, ``crop`` the middle square, or ``pad`` with black bars.
    """
    method = Image.Resampling.BICUBIC
    if aspect == "crop":
        image = ImageOps.fit(image, (size, size), method)
    elif aspect == "pad":
        image = ImageOps.pad(image, (size, size), method, color=0)
    elif image.size != (size, size):
        image = image.resize((size, size), method)
    return np.asarray(image, dtype=np.uint8)


def check_options(aspect: str, **shares: float) -> None:
    """What the loaders of files have in common: the way to a square, shares of films."""
    if aspect not in ASPECTS:
        raise DataError(f"aspect={aspect!r}: choose one of {', '.join(ASPECTS)}")
    for name, share in shares.items():
        if not 0 <= share < 1:
            raise DataError(f"{name}={share}: give a share from 0 to below 1, such as 0.1")


def show_progress() -> bool:
    """Whether to draw a bar: in a terminal or a live notebook only."""
    return in_notebook() or sys.stderr.isatty()


def parallel(function: Callable, items: Sequence, label: str) -> list:
    """``function`` of each item, in order, by a thread per core (Pillow and hashlib release the interpreter lock)."""
    from tqdm.auto import tqdm

    with ThreadPoolExecutor(cores()) as pool:
        results = pool.map(function, items)
        return list(tqdm(results, total=len(items), desc=label, unit="film", disable=not show_progress()))


def read_films(
    read_one: Callable[[object], tuple[np.ndarray, int]], items: Sequence, names: Sequence[str], *, skip_bad: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray, tuple[str, ...]]:
    """Read films in parallel. ``read_one`` gives a film and the :func:`picture_key` of what it was made from.

    Returns the M good films [M, size, size], their keys (int64 [M], equal where films are) and indices in ``items``
    (int64 [M]), and the names of the others.

    Raises
    ------
    DataError
        What ``read_one`` raised for the first bad film; with ``skip_bad`` only if no film is good.
    """

    def attempt(item: object) -> tuple[np.ndarray, int] | DataError:
        try:
            return read_one(item)
        except DataError as error:
            if not skip_bad:
                raise
            return error

    results = parallel(attempt, items, "reading films")
    good = np.array([i for i, film in enumerate(results) if not isinstance(film, DataError)], dtype=np.int64)
    skipped = tuple(name for name, film in zip(names, results, strict=True) if isinstance(film, DataError))
    if not len(good):
        raise DataError(f"none of the {len(items)} films can be used. {results[0] if results else ''}")
    images, keys = zip(*(results[i] for i in good), strict=True)
    return np.stack(images), np.array(keys, dtype=np.int64), good, skipped


def picture_key(pixels: np.ndarray) -> int:
    """A hash of decoded pixels, before any resizing: two films have the same if they are pixel for pixel the same."""
    digest = hashlib.blake2b(str(pixels.shape).encode(), digest_size=8)
    digest.update(np.ascontiguousarray(pixels))
    return int.from_bytes(digest.digest(), "little", signed=True)


def join_patients(
    keys: np.ndarray, names: Sequence[str], patient_id: np.ndarray, split: np.ndarray, given: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Patients [N] and splits [N] in which patients who share a film are one: a film shows one child.

    Parameters
    ----------
    keys : of each film, see :func:`picture_key`
    names : of each film, for messages
    given : str [N], the part that the source itself puts a film into; films of one part may change their split

    Raises
    ------
    DataError
        The same film in two parts that the source gives.
    """
    patient_id, split = patient_id.copy(), split.copy()
    first: dict[int, int] = {}
    same = []
    for i, key in enumerate(keys.tolist()):
        k = first.setdefault(key, i)
        if given[i] != given[k]:
            raise DataError(
                f"{names[k]} ({split[k]}) and {names[i]} ({split[i]}) are the same film, pixel for pixel: remove one "
                "of them, or a model meets its test films in training"
            )
        if patient_id[i] != patient_id[k]:
            same.append(f"{names[k]} ({patient_id[k]}) and {names[i]} ({patient_id[i]})")
            of_both = np.isin(patient_id, [patient_id[i], patient_id[k]])
            patient_id[of_both], split[of_both] = patient_id[k], split[k]
    if same:
        warnings.warn(
            f"the same film, pixel for pixel, under two patients, who count as one: {listed(same)}", stacklevel=3
        )
    return patient_id, split


def listed(names: Sequence[str]) -> str:
    """The first five, and how many more."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def warn_skipped(skipped: Sequence[str], n_films: int) -> None:
    """Say how many films were left out, and which."""
    if skipped:
        warnings.warn(f"skipped {len(skipped)} of {n_films} films: {listed(skipped)}", stacklevel=3)


def _reason(error: Exception) -> str:
    # Pillow's message for an unknown format prints the address of the buffer, which says nothing to the reader.
    return "not an image" if isinstance(error, Image.UnidentifiedImageError) else str(error) or type(error).__name__
