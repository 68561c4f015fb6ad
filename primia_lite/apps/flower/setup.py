"""The study and the server's certificates, which its operator makes; each hospital takes the study or leaves it."""

from __future__ import annotations

import datetime
import ipaddress
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from primia_lite.apps.flower.card import CARD, check_card, make_hospital, private_pem, read_card, toml, write_new
from primia_lite.apps.flower.folder import CA, CONFIG, IDENTITY, SERVER, SERVER_CONFIG, STUDY, config_of
from primia_lite.apps.flower.hospital import read_identity
from primia_lite.config import UserError
from primia_lite.data import CLASSES_3, load
from primia_lite.federation.aggregation import length
from primia_lite.federation.optimizer import Schedule, ServerOptimizer
from primia_lite.federation.study import Study
from primia_lite.models import prepare
from primia_lite.privacy.dpsgd import Privacy
from primia_lite.privacy.shared import SharedNoise
from primia_lite.secagg import Agreement, default_threshold
from primia_lite.training import Training

SPARE = 20  # the budget has room for a twentieth of the rounds, and one, that are charged but end without a sum
# Those of notebook 02. Whatever [training] and [privacy] of a settings file say comes before.
TRAINING = {"learning_rate": 4.0, "sample_rate": 0.5, "local_steps": 1, "weight_decay": 1e-4, "label_smoothing": 0.1}
PRIVACY = {"max_grad_norm": 0.25, "target_delta": 1e-4, "unit": "patient"}

VALID_DAYS = 365
_NOT_OF_A_CA = (
    "digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
    "encipher_only", "decipher_only",
)  # fmt: skip


def join(folder: Path, study: bytes, ca: bytes, superlink: str) -> Study:
    """Take a study at a hospital: put ``study.json`` and ``ca.crt`` into its folder.

    UserError unless the study names the hospital with its own key and declared size, and it has joined no other.
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
    (folder / CONFIG).write_text(toml({"superlink": superlink, **config_of(folder / CONFIG)}), "utf-8")
    return agreed


def settle(
    cards: Sequence[Mapping], rounds: int, target_epsilon: float | None, model: str, settings: Mapping[str, Mapping]
) -> tuple[Study, tuple[int, ...]]:
    """A study for the hospitals whose cards are given, and the shape of a film as the model takes it.

    Parameters
    ----------
    target_epsilon : budget of each hospital over all rounds; None trains without DP
    settings : ``training`` and ``privacy``: what is to differ from ``TRAINING`` and ``PRIVACY``. ``colluding`` in
        ``privacy`` has hospitals share the noise (:class:`~primia_lite.privacy.shared.SharedNoise`)
    """
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
    privacy = None
    if target_epsilon is not None:
        privacy = _privacy(target_epsilon, training, rounds, entries, sizes, settings.get("privacy", {}))
    unit = privacy.unit if privacy else "film"
    for what, value in (("unit", unit), ("size", cards[0]["size"])):
        if odd := [card for card in cards if card[what] != value]:
            raise UserError(
                f"hospital {odd[0]['name']}'s card has {what} {odd[0][what]}, but {value} is needed: make the card anew"
            )
    identities = {card["name"]: bytes.fromhex(card["identity"]) for card in cards}
    agreement = Agreement(identities, sizes, entries, weighted=not (privacy and privacy.shared))
    return Study("federation", "films", training, privacy, rounds, agreement), in_shape


def _privacy(target_epsilon, training: Training, rounds: int, entries: int, sizes, settings: Mapping) -> Privacy:
    wanted = {**PRIVACY, **settings}
    if (colluding := wanted.pop("colluding", None)) is not None:
        wanted["shared"] = SharedNoise(default_threshold(len(sizes)), colluding, entries, tuple(sizes.values()))
    try:
        return Privacy.for_budget(
            target_epsilon, sample_rate=training.sample_rate, steps=rounds * training.steps_per_round,
            spare_steps=(rounds // SPARE + 1) * training.steps_per_round, **wanted,
        )  # fmt: skip
    except TypeError as error:
        raise UserError(f"[privacy] of the settings can't be used: {error}") from error


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

    The SuperLink listens at the first of ``hosts``; hospitals reach it by the others.
    """
    if (folder / STUDY).exists():
        raise UserError(f"{folder} holds a server already: choose another folder, or delete it")
    settings = settings or {}
    study, in_shape = settle(cards, rounds, target_epsilon, model, settings)
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    make_certificates(folder, list(dict.fromkeys([*hosts, "127.0.0.1", "localhost"])))
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


# --- certificates -----------------------------------------------------------------------------------------------------


def make_certificates(folder: Path, hosts: Sequence[str]) -> None:
    """A certificate authority for this federation alone, and its server's certificate for some names or IP addresses.

    ``ca.key`` and ``server.key`` (private), ``ca.crt`` for the SuperNodes, and ``server.crt``.
    """
    ca_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    authority = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "primia_lite federation CA")])
    usage = x509.KeyUsage(key_cert_sign=True, crl_sign=True, **dict.fromkeys(_NOT_OF_A_CA, False))
    ca = _certificate(authority, ca_key, authority, ca_key, [
        (x509.BasicConstraints(ca=True, path_length=0), True), (usage, True),
    ])  # fmt: skip
    server = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, hosts[0])])
    certificate = _certificate(server, key, authority, ca_key, [
        (x509.BasicConstraints(ca=False, path_length=None), True),
        (x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), False),
        (x509.SubjectAlternativeName([_general_name(host) for host in hosts]), False),
    ])  # fmt: skip
    for name, private in (("ca.key", ca_key), ("server.key", key)):
        write_new(folder / name, private_pem(private), private=True)
    for name, public in ((CA, ca), ("server.crt", certificate)):
        write_new(folder / name, public.public_bytes(serialization.Encoding.PEM))


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _certificate(subject, key, issuer, issuer_key, extensions) -> x509.Certificate:
    now = datetime.datetime.now(datetime.UTC)
    builder = (
        x509.CertificateBuilder(issuer, subject, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=5))
        .not_valid_after(now + datetime.timedelta(days=VALID_DAYS))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False)
    )
    for extension, critical in extensions:
        builder = builder.add_extension(extension, critical)
    return builder.sign(issuer_key, hashes.SHA256())
