"""A hospital's folder with its private keys, and its card: the one public file that the others need of it.

No key is ever overwritten, and a private one is for its owner alone.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from primia_lite.apps.flower.folder import CONFIG, IDENTITY, LINK, SERVER
from primia_lite.apps.flower.hospital import load_films
from primia_lite.config import UserError, printable
from primia_lite.federation.hospital import declare_size
from primia_lite.federation.untrusted import read_file, read_json

CARD, SUPERNODE = "card.json", "supernode"
CARD_FIELDS = ("name", "identity", "supernode", "declared", "unit", "size")
MOST_CARD_BYTES = 2**14
RESERVED = (SERVER, LINK, "run")  # names of files and processes beside the hospitals'


def write_new(path: Path, content: bytes | str, *, private: bool = False) -> None:
    """Write a file that isn't there yet, from the start with mode 600 if it is private; UserError if it is there."""
    content = content.encode() if isinstance(content, str) else content
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if private else 0o644)
    except FileExistsError as error:
        raise UserError(f"{path} is there already, and is never overwritten: choose another folder") from error
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
    except OSError:  # half of a key must not stand in the way of a whole one
        path.unlink()
        raise


def private_pem(key) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def toml(content: Mapping[str, object]) -> str:
    """Tables of strings, numbers, booleans and lists, as TOML."""
    lines, tables = [], []
    for key, value in content.items():
        if isinstance(value, Mapping):
            tables.append(f"\n[{key}]\n{toml(value)}")
        elif value is not None:
            lines.append(f"{key} = {json.dumps(list(value) if isinstance(value, tuple) else value)}\n")
    return "".join(lines + tables)


def make_hospital(
    folder: Path, films: Mapping[str, object], unit: str = "patient", declared: int | None = None
) -> dict:
    """A hospital's folder: its two keys, ``hospital.toml``, and the card that it gives to the server's operator.

    Parameters
    ----------
    folder : its name is the hospital's
    films : see :class:`~primia_lite.apps.flower.hospital.FolderHospital`
    unit : what is counted: ``patient``, or ``film``, where these are protected or there is no DP
    declared : how many of them the hospital makes public; left out, their number rounded to tens

    Returns
    -------
    the card: ``name``, ``identity``, ``supernode``, ``declared``, ``unit``, ``size``; all of it public
    """
    name = _name(folder.name)
    if (folder / IDENTITY).exists():
        raise UserError(f"{folder} holds a hospital's keys, which are never overwritten: choose another folder or name")
    loaded = load_films(films)
    units = len(set(loaded.patient_id)) if unit == "patient" else len(loaded)
    identity, node = Ed25519PrivateKey.generate(), ec.generate_private_key(ec.SECP384R1())
    card = {
        "name": name, "identity": identity.public_key().public_bytes_raw().hex(),
        "supernode": _ssh(node.public_key()), "unit": unit, "size": films["size"],
        "declared": declare_size(units) if declared is None else declared,
    }  # fmt: skip
    check_card(card, "the card")
    private_ssh = node.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    write_new(folder / IDENTITY, private_pem(identity), private=True)
    write_new(folder / SUPERNODE, private_ssh, private=True)
    write_new(folder / CONFIG, toml({"name": name, "films": films}))
    write_new(folder / CARD, json.dumps(card, indent=1) + "\n")
    return card


def read_card(path: Path) -> dict:
    """A hospital's card, checked."""
    what = f"the card {path.name}"
    return check_card(read_json(read_file(path, what, MOST_CARD_BYTES), what), what)


def check_card(card: Mapping, what: str) -> dict:
    """The fields of a card as :func:`make_hospital` writes them; UserError for what none has: it is another's word."""
    if missing := [key for key in CARD_FIELDS if key not in card]:
        raise UserError(f"{what} is no hospital's card, it has no {missing[0]}: take card.json in a hospital's folder")
    found = {key: card[key] for key in CARD_FIELDS}
    found["name"] = _name(found["name"])
    checks = {
        "identity": isinstance(found["identity"], str) and re.fullmatch("[0-9a-f]{64}", found["identity"]),
        "declared": type(found["declared"]) is int and 1 <= found["declared"] <= 10**9,
        "unit": found["unit"] in ("patient", "film"),
        "size": type(found["size"]) is int and 8 <= found["size"] <= 4096,
        "supernode": _is_supernode_key(found["supernode"]),
    }
    if odd := [field for field, fine in checks.items() if not fine]:
        shown = printable(repr(found[odd[0]]), 80)
        raise UserError(f"{what} has {odd[0]} {shown}, which no hospital's card has: ask {found['name']} for it again")
    return found


def _name(name: object) -> str:
    """A hospital's name, which becomes that of folders and files."""
    fine = isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,39}", name)
    if not fine or name.lower() in RESERVED:
        shown = printable(repr(name), 80)
        raise UserError(f"a hospital's name is {shown}: take letters, digits, - and _, not {', '.join(RESERVED)}")
    return name


def _is_supernode_key(text: object) -> bool:
    """Whether a text is a public key of P-384, which Flower wants, in one line of OpenSSH and nothing else."""
    try:
        key = serialization.load_ssh_public_key(text.encode()) if isinstance(text, str) else None
    except (ValueError, UnsupportedAlgorithm):
        return False
    curve = key.curve if isinstance(key, ec.EllipticCurvePublicKey) else None
    return isinstance(curve, ec.SECP384R1) and text == _ssh(key)


def _ssh(key: ec.EllipticCurvePublicKey) -> str:
    return key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH).decode()
