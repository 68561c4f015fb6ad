"""What another party sent, read once at the door: bounded, and whatever is in it, a refusal is a sentence.

A card, a study, a request or weights come from somebody who may have made a mistake, or may lie: nothing in them may
end a process, fill the memory or a log.
"""

from __future__ import annotations

import json
import math
import zipfile
from pathlib import Path

import psutil

from primia_lite.config import UserError, printable

MOST_BYTES = 2**20  # of a card, a study or code: thousands of hospitals
MOST_REQUEST_BYTES = 2**24  # of a round's request, which relays what all of them sent
DEEPEST = 16  # levels of lists and objects; ours have five
_DIGITS = 19  # whole numbers of 64 bits


def read_json(content: bytes, what: str, most_bytes: int = MOST_BYTES) -> dict:
    """A JSON object of at most 16 levels whose numbers are finite, texts are text and names differ; else UserError."""
    if len(content) > most_bytes:
        raise UserError(f"{what} can't be read: it has {len(content):,} bytes, at most {most_bytes:,} are taken")
    try:
        found = json.loads(
            content.decode(), object_pairs_hook=_object, parse_int=_whole, parse_float=_finite, parse_constant=_finite
        )
        if not isinstance(found, dict):
            raise ValueError(f"a {type(found).__name__}, no object")
        _check_values(found)
        return found
    except RecursionError as error:
        raise UserError(f"{what} can't be read: it has too many levels") from error
    except ValueError as error:
        raise UserError(f"{what} can't be read: {printable(str(error), 200)}") from error


def _object(pairs: list[tuple[str, object]]) -> dict:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name comes twice")
    return found


def _whole(text: str) -> int:
    if len(text.lstrip("-")) > _DIGITS:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text} is no finite number")
    return value


def _check_values(found: dict) -> None:
    level: list = [found]
    for _ in range(DEEPEST):
        inner = []
        for value in level:
            inner += [*value.keys(), *value.values()] if isinstance(value, dict) else value
        for text in inner:
            if isinstance(text, str):
                text.encode()  # half a surrogate pair can't be written anywhere
        level = [value for value in inner if isinstance(value, dict | list)]
        if not level:
            return
    raise ValueError(f"more than {DEEPEST} levels")


def read_file(path: Path, what: str, most_bytes: int = MOST_BYTES) -> bytes:
    """A file's content; UserError if it can't be read, or is larger than ``most_bytes``."""
    try:
        with open(path, "rb") as file:
            content = file.read(most_bytes + 1)
    except OSError as error:
        raise UserError(f"{what} can't be read: {error.strerror}") from error
    if len(content) > most_bytes:
        raise UserError(f"{what} can't be read: it is larger than {most_bytes:,} bytes")
    return content


def check_unpacked(archive, what: str) -> None:
    """UserError unless the arrays of an npz (path or file) fit into memory: a small one may unpack to any size."""
    try:
        with zipfile.ZipFile(archive) as z:
            unpacked = sum(part.file_size for part in z.infolist())
    except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
        raise UserError(f"{what} can't be read: {error}") from error
    if unpacked > psutil.virtual_memory().total:
        raise UserError(f"{what} can't be read: it unpacks to {unpacked / 2**30:.1f} GiB, more than this machine has")
