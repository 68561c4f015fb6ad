"""Keys and certificates as files: none is ever overwritten, and a private one is for its owner alone."""

from __future__ import annotations

import datetime
import ipaddress
import os
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from primia_lite.config import UserError

CA = "ca.crt"
VALID_DAYS = 365


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


def private_pem(key) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


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
    write_new(folder / "ca.key", private_pem(key), private=True)
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
    write_new(folder / "server.key", private_pem(key), private=True)
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
