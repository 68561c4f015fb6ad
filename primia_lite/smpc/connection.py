"""Messages between the five parties over mutual TLS, each party known by its certificate, each wait with a deadline.

A party's folder holds ``identity.pem`` (its key and self-signed certificate, its role as the name) and ``peers/``, the
certificates of those that it talks to, brought there by hand: nobody else gets past the handshake.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import select
import socket
import ssl
import struct
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from primia_lite.config import UserError
from primia_lite.runtime import write_atomic

ROLES = ("server0", "server1", "dealer", "model", "film")
DEADLINE_S = 60.0  # for a message to come or go as a whole
WAIT_S = 300.0  # for a film's turn
HANDSHAKE_S = 5.0  # for a stranger to show who it is
MAX_HEADER = 1 << 20
PIECE = 1 << 17
_LATER = (ssl.SSLWantReadError, ssl.SSLWantWriteError, BlockingIOError)
_HEAD = struct.Struct("<II")


class PeerError(UserError):
    """Another party vanished, was too slow, or said something that the protocol doesn't know."""


def make_identity(folder: Path, role: str) -> Path:
    """A new key and certificate for a party; returns the certificate's file, ``<role>.crt``, to give to the others."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    if role not in ROLES:
        raise UserError(f"unknown role {role!r}: choose one of {', '.join(ROLES)}")
    if (folder / "identity.pem").exists():
        raise UserError(f"{folder} has an identity already")
    (folder / "peers").mkdir(parents=True, exist_ok=True)
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.UTC)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, role)])
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=365))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
        .public_bytes(serialization.Encoding.PEM)
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    write_atomic(folder / "identity.pem", private + certificate, private=True)
    return write_atomic(folder / f"{role}.crt", certificate)


class Party:
    """A party's side of every connection: its identity, and whom it knows."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._known: dict[str, str] = {}
        try:
            peers = sorted((self.folder / "peers").glob("*.crt"))
            trusted = "".join(path.read_text("utf-8") for path in peers)
            for path in peers:
                der = ssl.PEM_cert_to_DER_cert(path.read_text("utf-8"))
                self._known[hashlib.sha256(der).hexdigest()] = path.stem
            self._contexts = {purpose: self._context(purpose, trusted) for purpose in (True, False)}
        except (OSError, ValueError, ssl.SSLError) as error:
            raise UserError(
                f"{self.folder} needs identity.pem and peers/<role>.crt of every party that it talks to: {error}"
            ) from error

    def _context(self, server: bool, trusted: str) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.check_hostname, context.verify_mode = False, ssl.CERT_REQUIRED  # pinned by certificate, not by name
        context.load_cert_chain(self.folder / "identity.pem")
        if trusted:
            context.load_verify_locations(cadata=trusted)
        return context

    def accept(self, raw: socket.socket, deadline_s: float = DEADLINE_S) -> Connection:
        connection = self._secured(raw, True, min(HANDSHAKE_S, deadline_s))
        connection.deadline_s = deadline_s
        return connection

    def connect(self, address: tuple[str, int], role: str, deadline_s: float = DEADLINE_S) -> Connection:
        """To the party that must be ``role``."""
        try:
            raw = socket.create_connection(address, timeout=deadline_s)
        except OSError as error:
            raise PeerError(f"{role} can't be reached at {address[0]}:{address[1]}: {error}") from error
        connection = self._secured(raw, False, deadline_s)
        if connection.role != role:
            connection.close()
            raise PeerError(f"at {address[0]}:{address[1]} answers {connection.role}, not {role}")
        return connection

    def _secured(self, raw: socket.socket, server: bool, deadline_s: float) -> Connection:
        raw.settimeout(deadline_s)
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            secured = self._contexts[server].wrap_socket(raw, server_side=server)
            seen = hashlib.sha256(secured.getpeercert(binary_form=True) or b"").hexdigest()
        except (OSError, ValueError) as error:
            raw.close()
            raise PeerError(f"no TLS connection to somebody known: {error}") from error
        if seen not in self._known:  # signed by a known party's key, but no party itself
            secured.close()
            raise PeerError("a certificate that isn't among those in peers/")
        return Connection(secured, self._known[seen], deadline_s)


class Connection:
    """Messages of a JSON header and bytes. ``role``: of the other party; ``sent``, ``rounds``: bytes and exchanges."""

    def __init__(self, sock: socket.socket, role: str, deadline_s: float = DEADLINE_S) -> None:
        self.role, self.deadline_s, self.sent, self.rounds = role, deadline_s, 0, 0
        self._socket = sock

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def send(self, header: dict, payload: bytes | memoryview = b"") -> None:
        head = json.dumps(header).encode()
        size = memoryview(payload).nbytes
        self._move(memoryview(_HEAD.pack(len(head), size) + head), memoryview(b""))
        if size:
            self._move(memoryview(payload).cast("B"), memoryview(b""))

    def gone(self) -> bool:
        """Whether the other party, which has nothing to say now, closed the connection (or speaks)."""
        try:
            self._socket.setblocking(False)
            self._socket.recv(1)
        except _LATER:
            return False
        except (OSError, ValueError):
            pass
        return True

    def receive(self, kind: str, most: int = 0, wait_s: float = 0.0) -> tuple[dict, bytearray]:
        """The next message, which must be of this kind and bring at most ``most`` bytes. It may start ``wait_s`` later
        than others.

        Raises
        ------
        PeerError
            It is another; or an ``error`` that the other party reports.
        """
        head, payload = _HEAD.unpack(self._read(_HEAD.size, wait_s))
        if head > MAX_HEADER or payload > most:
            raise PeerError(f"{self.role} sends more than {kind} may have: {head + payload:,} bytes")
        try:
            header = json.loads(self._read(head))
            got = header["kind"]
            known = isinstance(got, str)
        except (ValueError, KeyError, TypeError, RecursionError):
            known = False
        if not known:
            raise PeerError(f"{self.role} sent something that is no message")
        if got == "error":
            raise PeerError(f"{self.role} says: {str(header.get('text'))[:500]}")
        if got != kind:
            raise PeerError(f"{self.role} sent {got[:40]!r} where {kind} belongs")
        return header, self._read(payload)

    def exchange(self, data: bytes) -> bytearray:
        """Send, and receive as much: both sides at once."""
        got = bytearray(len(data))
        self._move(memoryview(data), memoryview(got))
        self.sent, self.rounds = self.sent + len(data), self.rounds + 1
        return got

    def _read(self, n: int, wait_s: float = 0.0) -> bytearray:
        got = bytearray(n)
        self._move(memoryview(b""), memoryview(got), wait_s)
        return got

    def _move(self, out: memoryview, into: memoryview, wait_s: float = 0.0) -> None:
        """In one thread, as a TLS connection must not be read and written by two at once."""
        last = time.monotonic() + self.deadline_s + wait_s
        try:
            self._socket.setblocking(False)
            while out or into:
                waiting = True
                if out:
                    with suppress(*_LATER):
                        out, waiting = out[self._socket.send(out[:PIECE]) :], False
                if into:
                    with suppress(*_LATER):
                        n = self._socket.recv_into(into[:PIECE])
                        if n == 0:
                            raise PeerError(f"{self.role} closed the connection")
                        into, waiting = into[n:], False
                left = last - time.monotonic()
                if left <= 0 and (out or into):
                    raise PeerError(f"{self.role} took longer than {self.deadline_s + wait_s:.0f} s")
                if waiting:
                    select.select([self._socket] if into else [], [self._socket] if out else [], [], left)
        except (OSError, ValueError) as error:  # ValueError: closed by another thread
            raise PeerError(f"the connection to {self.role} broke: {error}") from error


def address_of(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit() or int(port) > 65535:
        raise UserError(f"{text!r} is no address: give host:port")
    return host, int(port)


@contextmanager
def connect_both(
    party: Party, addresses: Sequence[tuple[str, int]], deadline_s: float = DEADLINE_S
) -> Iterator[tuple[Connection, Connection]]:
    """To server 0 and server 1."""
    if len(addresses) != 2:
        raise UserError(f"two servers are needed, {len(addresses)} addresses are given")
    with (
        party.connect(addresses[0], "server0", deadline_s) as first,
        party.connect(addresses[1], "server1", deadline_s) as second,
    ):
        yield first, second


def sync(folder: Path) -> None:
    """What was renamed or deleted in a folder stays so after a power cut."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
