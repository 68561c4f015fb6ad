"""Folders of a federation over Flower: keys, certificates, and the study that all settle.

A hospital makes its own folder and keeps its private keys; what the others need of it is one public file, its card. The
server's operator turns the cards into a study, which each hospital reads, and takes or leaves.
"""

from __future__ import annotations

import datetime
import ipaddress
import json
import os
import re
import shutil
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from primia_lite.apps.flower.deploy import LINK
from primia_lite.apps.flower.hospital import CONFIG, IDENTITY, STUDY, load_films, read_identity
from primia_lite.apps.flower.server import CONFIG as SERVER_CONFIG
from primia_lite.config import UserError, printable
from primia_lite.federation.aggregation import length
from primia_lite.federation.claims import read_file, read_json
from primia_lite.federation.hospital import declare_size
from primia_lite.federation.rounds import Schedule, ServerOptimizer
from primia_lite.federation.study import Study
from primia_lite.federation.study import describe as describe
from primia_lite.privacy.dpsgd import Privacy
from primia_lite.privacy.shared import SharedNoise
from primia_lite.secagg import Agreement, default_threshold
from primia_lite.training import Training

SERVER, CARD, SUPERNODE, CA = "server", "card.json", "supernode", "ca.crt"
CARD_FIELDS = ("name", "identity", "supernode", "declared", "unit", "size")
MOST_CARD_BYTES = 2**14
RESERVED = (SERVER, LINK, "run")  # names of files and processes beside the hospitals'
VALID_DAYS = 365
SPARE = 20  # the budget has room for a twentieth of the rounds, and one, that are charged but end without a sum
# Those of notebook 02. Whatever [training] and [privacy] of a settings file say comes before.
TRAINING = {"learning_rate": 4.0, "sample_rate": 0.5, "local_steps": 1, "weight_decay": 1e-4, "label_smoothing": 0.1}
PRIVACY = {"max_grad_norm": 0.25, "target_delta": 1e-4, "unit": "patient"}


# --- files ------------------------------------------------------------------------------------------------------------


def write_new(path: Path, content: bytes | str, *, private: bool = False) -> None:
    """Write a file that isn't there yet, from the start with mode 600 if it is private.

    Raises
    ------
    UserError
        It is there: keys are never overwritten.
    """
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


def _private_pem(key) -> bytes:
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


# --- certificates -----------------------------------------------------------------------------------------------------


def make_authority(folder: Path) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    """A certificate authority for this federation alone: ``ca.key`` (private), and ``ca.crt`` for the SuperNodes."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "primia_lite federation CA")])
    usage = _usage(key_cert_sign=True, crl_sign=True)
    certificate = (
        _certificate(name, name, key.public_key(), key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .sign(key, hashes.SHA256())
    )
    write_new(folder / "ca.key", _private_pem(key), private=True)
    write_new(folder / CA, certificate.public_bytes(serialization.Encoding.PEM))
    return certificate, key


def make_server_certificate(folder: Path, hosts: Sequence[str], authority) -> None:
    """``server.key`` (private) and ``server.crt`` for some host names or IP addresses."""
    ca, ca_key = authority
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, hosts[0])])
    names = []
    for host in hosts:
        try:
            names.append(x509.IPAddress(ipaddress.ip_address(host)))
        except ValueError:
            names.append(x509.DNSName(host))
    certificate = (
        _certificate(name, ca.subject, key.public_key(), ca_key.public_key())
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(digital_signature=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .sign(ca_key, hashes.SHA256())
    )
    write_new(folder / "server.key", _private_pem(key), private=True)
    write_new(folder / "server.crt", certificate.public_bytes(serialization.Encoding.PEM))


def _certificate(subject, issuer, public_key, issuer_key) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder(issuer, subject, public_key, x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=5))
        .not_valid_after(now + datetime.timedelta(days=VALID_DAYS))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key), critical=False)
    )


def _usage(**wanted: bool) -> x509.KeyUsage:
    every = (
        "digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
        "key_cert_sign", "crl_sign", "encipher_only", "decipher_only",
    )  # fmt: skip
    return x509.KeyUsage(**{name: wanted.get(name, False) for name in every})


# --- a hospital -------------------------------------------------------------------------------------------------------


def make_hospital(
    folder: Path, films: Mapping[str, object], unit: str = "patient", declared: int | None = None
) -> dict:
    """A hospital's folder: its two keys, ``hospital.toml``, and the card that it gives to the server's operator.

    Parameters
    ----------
    folder
        Its name is the hospital's.
    films
        See :class:`~primia_lite.apps.flower.hospital.SiteInFolder`.
    unit
        What is counted: ``patient``, or ``film``, where these are protected or there is no DP.
    declared
        How many of them the hospital makes public; left out, their number rounded to tens.

    Returns
    -------
    The card: ``name``, ``identity``, ``supernode``, ``declared``, ``unit``, ``size``; all of it public.

    Raises
    ------
    UserError
        A name that isn't letters, digits, - and _; a folder with keys; films that can't be loaded.
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
    write_new(folder / IDENTITY, _private_pem(identity), private=True)
    write_new(folder / SUPERNODE, private_ssh, private=True)
    write_new(folder / CONFIG, toml({"name": name, "films": films}))
    write_new(folder / CARD, json.dumps(card, indent=1) + "\n")
    return card


def read_card(path: Path) -> dict:
    """A hospital's card, checked.

    Raises
    ------
    UserError
        It is none, or a value in it is one that no hospital's card has.
    """
    what = f"the card {path.name}"
    return check_card(read_json(read_file(path, what, MOST_CARD_BYTES), what), what)


def check_card(card: Mapping, what: str) -> dict:
    """The fields that a card has, as :func:`make_hospital` writes them: it is another party's word.

    Raises
    ------
    UserError
        A value that can't be right, naming it.
    """
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
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        return False
    return text == _ssh(key)


def _ssh(key: ec.EllipticCurvePublicKey) -> str:
    return key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH).decode()


def join(folder: Path, study: bytes, ca: bytes, superlink: str) -> Study:
    """Take a study at a hospital: put ``study.json`` and ``ca.crt`` into its folder.

    Raises
    ------
    UserError
        The hospital isn't in the study under its own key and declared size; or it has joined another.
    """
    agreed = Study.from_bytes(study)
    card = read_card(folder / CARD)
    name, agreement = card["name"], agreed.agreement
    if name not in agreement.identities:
        raise UserError(f"hospital {name} isn't in the study, which names {', '.join(agreement.names)}")
    if agreement.identities[name] != read_identity(folder / IDENTITY).public_key().public_bytes_raw():
        raise UserError(f"the study has another key of hospital {name} than {folder / IDENTITY}: send the card again")
    if agreement.sizes[name] != card["declared"]:
        raise UserError(
            f"the study says that hospital {name} declares {agreement.sizes[name]}, its card {card['declared']}"
        )
    host, _, port = superlink.rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"superlink is {superlink!r}: give the server's address as host:port")
    write_new(folder / STUDY, study)
    write_new(folder / CA, ca)
    config = tomllib.loads((folder / CONFIG).read_text("utf-8"))
    (folder / CONFIG).write_text(toml({"superlink": superlink, **config}), "utf-8")
    return agreed


# --- the server -------------------------------------------------------------------------------------------------------


def settle(
    cards: Sequence[Mapping], rounds: int, target_epsilon: float | None, model: str, settings: Mapping[str, Mapping]
) -> tuple[Study, tuple[int, ...]]:
    """A study for the hospitals whose cards are given, and the shape of a film as the model takes it.

    Parameters
    ----------
    target_epsilon
        Budget of each hospital over all rounds; None trains without DP.
    settings
        ``training`` and ``privacy``: what is to differ from ``TRAINING`` and ``PRIVACY``. ``colluding`` in ``privacy``
        has hospitals share the noise (:class:`~primia_lite.privacy.shared.SharedNoise`).

    Raises
    ------
    UserError
        Cards that don't fit together, or settings that contradict each other.
    """
    from primia_lite.data import CLASSES_3, load
    from primia_lite.models import prepare

    cards = [check_card(card, f"card {number}") for number, card in enumerate(cards, 1)]
    names = [card["name"] for card in cards]
    if len({name.lower() for name in names}) < len(names):  # some file systems know no capitals
        raise UserError(f"two cards have one name: {', '.join(names)}")
    if len({card["supernode"] for card in cards}) < len(cards):
        raise UserError("two cards have one SuperNode's key: each hospital makes its own")
    try:
        training = Training(model=model, **{"n_classes": len(CLASSES_3), **TRAINING, **settings.get("training", {})})
    except TypeError as error:
        raise UserError(f"[training] of the settings can't be used: {error}") from error
    shape = prepare(training.model, load("phantom", cards[0]["size"], n_films=12), cache=False).inputs.shape
    in_shape = tuple(shape[2:])
    entries = length(ServerOptimizer.start(training, Schedule(1), in_shape, 0).parameters())
    sizes = {card["name"]: card["declared"] for card in cards}
    privacy, wanted = None, {**PRIVACY, **settings.get("privacy", {})}
    colluding = wanted.pop("colluding", None)
    if target_epsilon is not None:
        shared = None
        if colluding is not None:
            shared = SharedNoise(default_threshold(len(sizes)), colluding, entries, tuple(sizes.values()))
        try:
            privacy = Privacy.for_budget(
                target_epsilon, sample_rate=training.sample_rate, steps=rounds * training.steps_per_round,
                spare_steps=(rounds // SPARE + 1) * training.steps_per_round, shared=shared, **wanted,
            )  # fmt: skip
        except TypeError as error:
            raise UserError(f"[privacy] of the settings can't be used: {error}") from error
    unit = privacy.unit if privacy else "film"
    for what, value in (("unit", unit), ("size", cards[0]["size"])):
        if odd := [card for card in cards if card[what] != value]:
            raise UserError(
                f"hospital {odd[0]['name']}'s card has {what} {odd[0][what]}, but {value} is needed: make the card anew"
            )
    identities = {card["name"]: bytes.fromhex(card["identity"]) for card in cards}
    agreement = Agreement(identities, sizes, entries, weighted=not (privacy and privacy.shared))
    return Study("federation", "films", training, privacy, rounds, agreement), in_shape


def make_server(
    folder: Path,
    cards: Sequence[Mapping],
    *,
    hosts: Sequence[str],
    port: int,
    rounds: int,
    target_epsilon: float | None,
    model: str = "litenet",
    settings: Mapping[str, Mapping] | None = None,
) -> Study:
    """The server's folder: certificates, ``study.json`` and ``server.toml``. See :func:`settle`.

    Parameters
    ----------
    hosts
        Where the SuperLink listens, and further names or addresses by which hospitals reach it.
    """
    if (folder / STUDY).exists():
        raise UserError(f"{folder} holds a server already: choose another folder, or delete it")
    settings = settings or {}
    study, in_shape = settle(cards, rounds, target_epsilon, model, settings)
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    authority = make_authority(folder)
    make_server_certificate(folder, list(dict.fromkeys([*hosts, "127.0.0.1", "localhost"])), authority)
    write_new(folder / STUDY, study.to_bytes())
    for card in cards:
        write_new(folder / "hospitals" / f"{card['name']}.pub", card["supernode"] + "\n")
    config = {"host": hosts[0], "port": port, "in_shape": in_shape}
    extra = {key: settings[key] for key in ("schedule", "timeouts") if key in settings}
    write_new(folder / SERVER_CONFIG, toml({**config, **extra}))
    return study


def make_all(
    folder: Path,
    names: Sequence[str],
    films: Mapping[str, object],
    *,
    port: int,
    target_epsilon: float | None,
    **server,
) -> Study:
    """Server and hospitals in one folder, for a trial on one machine; hospitals get equal parts of the films."""
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} isn't empty, and keys are never overwritten: choose another folder")
    unit = (server.get("settings") or {}).get("privacy", {}).get("unit", PRIVACY["unit"]) if target_epsilon else "film"
    try:
        cards = [make_hospital(folder / name, {**films, "part": [i, len(names)]}, unit) for i, name in enumerate(names)]
        study = make_server(
            folder / SERVER, cards, hosts=["127.0.0.1"], port=port, target_epsilon=target_epsilon, **server
        )
        for name in names:
            ca = (folder / SERVER / CA).read_bytes()
            join(folder / name, study.to_bytes(), ca, f"127.0.0.1:{port}")
    except BaseException:  # nothing of it was used yet
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return study
