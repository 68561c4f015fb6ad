"""What crosses the line between a hospital and a service: its form, and how large it may be."""

from __future__ import annotations

import itertools
import json
import struct
from dataclasses import asdict

from primia_lite.config import UserError
from primia_lite.encrypted.batch import BatchCNNPacking, BatchLinearPacking
from primia_lite.encrypted.packing import CNNPacking, LinearPacking, Packing
from primia_lite.encrypted.seal import CiphertextError

_KINDS = {each.kind: each for each in (LinearPacking, CNNPacking, BatchLinearPacking, BatchCNNPacking)}
# Of any number in a description: what comes of it stays a number that a computer takes in its stride.
_MOST_NUMBER = 1 << 20
# A film's ciphertexts in one body: their number, then each one's length and bytes.
_COUNT = struct.Struct("<I")
_MOST_PARTS = 1 << 14
_MAGIC = b"PLCK0001"
# Of a client's public material; Galois keys of a network with a hidden layer are most of it.
MAX_PUBLIC_BYTES = 256 << 20


def spec_of(packing: Packing) -> dict:
    """A packing's description, for JSON."""
    return {"kind": packing.kind} | asdict(packing)


def packing_from(spec: dict) -> Packing:
    """The packing of a description, which may be a stranger's; a UserError if it makes none."""
    try:
        numbers = {key: value for key, value in spec.items() if key != "kind"}
        if not all(isinstance(value, int) and 0 <= value <= _MOST_NUMBER for value in numbers.values()):
            raise ValueError("a number of it isn't whole, or out of range")
        return _KINDS[spec["kind"]](**numbers)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError("this isn't the description of a packing: ask the server for its own") from error


def join(parts: list[bytes]) -> bytes:
    """A film's ciphertexts as one body."""
    return b"".join([_COUNT.pack(len(parts)), *(piece for part in parts for piece in (_COUNT.pack(len(part)), part))])


def split(body: bytes) -> list[bytes]:
    """The ciphertexts of a body; a CiphertextError if its lengths don't fit."""
    if len(body) < 4 or (number := _COUNT.unpack_from(body)[0]) > _MOST_PARTS:
        raise CiphertextError("this body isn't a list of ciphertexts: send what wire.join returned")
    parts, place = [], 4
    try:
        for _ in range(number):
            start = place + 4
            place = start + _COUNT.unpack_from(body, place)[0]
            parts.append(body[start:place])
    except struct.error:
        place = -1
    if place != len(body):
        raise CiphertextError("this list of ciphertexts was cut, or has bytes too many")
    return parts


def join_keys(packing: Packing, keys: list[bytes]) -> bytes:
    """A client's public material: the packing that it is for, and its keys."""
    head = json.dumps({"packing": spec_of(packing), "bytes": [len(key) for key in keys]}).encode()
    return b"".join([_MAGIC, _COUNT.pack(len(head)), head, *keys])


def split_keys(data: bytes, packing: Packing) -> list[bytes]:
    """The keys of a client's public material; a CiphertextError if it isn't that, or for another packing."""
    if len(data) > MAX_PUBLIC_BYTES:
        raise CiphertextError(f"{len(data)} bytes of keys are more than the {MAX_PUBLIC_BYTES} allowed")
    start = len(_MAGIC) + 4
    if len(data) < start or not data.startswith(_MAGIC):
        raise CiphertextError("these bytes are no public material: send what CkksClient.public returned")
    place = start + _COUNT.unpack_from(data, len(_MAGIC))[0]
    try:
        head = json.loads(data[start : min(place, start + 4096)])
        theirs, lengths = packing_from(head["packing"]), [int(n) for n in head["bytes"]]
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError, UserError) as error:
        raise CiphertextError("the head of these keys can't be read: send what CkksClient.public returned") from error
    if theirs != packing:
        raise CiphertextError("these keys are for another model: ask the server for its description first")
    if min(lengths, default=-1) < 0 or place + sum(lengths) != len(data):
        raise CiphertextError("the public material was cut, or has bytes too many")
    ends = itertools.accumulate(lengths, initial=place)
    return [data[start:end] for start, end in itertools.pairwise(ends)]


def most_key_bytes(packing: Packing) -> int:
    """What a client's public material can be at most: each evaluation key has a pair of polynomials for each prime."""
    p = packing.parameters
    polynomial = 8 * p.poly_modulus_degree * len(p.coeff_mod_bit_sizes)
    evaluation = (len(packing.rotations) + packing.relinearise) * (len(p.coeff_mod_bit_sizes) - 1)
    # Galois keys are kept in a table with a place for each of N rotations.
    table = 64 * p.poly_modulus_degree if packing.rotations else 0
    return 2 * polynomial * (1 + evaluation) + table + 8192


def most_upload_bytes(packing: Packing) -> int:
    """What a film's ciphertexts can be at most, as one body."""
    return _most_bytes(packing, packing.uploads, 0)


def most_reply_bytes(packing: Packing) -> int:
    """What the reply to a film can be at most, as one body."""
    return _most_bytes(packing, len(packing.logit_places), packing.reply_level)


def _most_bytes(packing: Packing, ciphertexts: int, level: int) -> int:
    p = packing.parameters
    primes = max(1, len(p.coeff_mod_bit_sizes) - 1) - level
    return ciphertexts * (2 * 8 * p.poly_modulus_degree * primes + 1024) + 1024
