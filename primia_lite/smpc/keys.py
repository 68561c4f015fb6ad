"""The dealer's keys: made and streamed to both servers layer by layer, kept there by number, used once."""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from primia_lite.config import UserError
from primia_lite.runtime import write_atomic
from primia_lite.smpc.connection import Connection, Party, connect_both, sync
from primia_lite.smpc.engines import Dealer, Wire, weight_masks
from primia_lite.smpc.program import Program, run

ID = re.compile(r"[0-9a-f]{32}")
MAX_KEYS, MAX_BATCH = 100_000, 64
CHECK = 32  # bytes of the SHA-256 that ends a key's file
PART_BYTES = 1 << 23  # of one message, which has a deadline; a layer's keys come in several


def is_id(value: object) -> bool:
    """Whether it is a name (or a seed) that parties draw, and nothing else in JSON that looks like one."""
    return isinstance(value, str) and ID.fullmatch(value) is not None


def deal(
    program: Program, n_films: int, party: Party, servers: Sequence[tuple[str, int]], batch: int = 1,
    progress: Callable[[int], None] = lambda number: None,
) -> str:  # fmt: skip
    """Make keys for ``n_films`` diagnoses of up to ``batch`` films each and stream them to both servers; forget them.

    Returns the dealing's name. ``progress`` is called with the number of keys that both servers hold.
    """
    if not (0 < n_films <= MAX_KEYS and 0 < batch <= MAX_BATCH):
        raise UserError(f"make 1 to {MAX_KEYS:,} keys, for 1 to {MAX_BATCH} films each: asked were {n_films}, {batch}")
    dealing, model_seeds = secrets.token_hex(16), (secrets.token_bytes(16), secrets.token_bytes(16))
    with connect_both(party, servers) as connections:
        masks = weight_masks(program.shapes, model_seeds)
        for number in range(n_films):
            seeds = secrets.token_bytes(16), secrets.token_bytes(16)
            for b, connection in enumerate(connections):
                connection.send({
                    "kind": "key", "dealing": dealing, "number": number, "server": b, "program": program.digest,
                    "batch": batch, "seed": seeds[b].hex(), "model_seed": model_seeds[b].hex(),
                })  # fmt: skip
            for connection in connections:
                connection.receive("go")

            def write(b: int, array: np.ndarray) -> None:
                data = memoryview(np.ascontiguousarray(array)).cast("B")
                for start in range(0, len(data), PART_BYTES):
                    connections[b].send({"kind": "part"}, data[start : start + PART_BYTES])

            run(program, Dealer(seeds, masks, write), Wire((batch, *program.in_shape)))
            for connection in connections:
                connection.send({"kind": "end"})
            for connection in connections:
                connection.receive("kept")
            progress(number + 1)
    return dealing


class Key:
    """A key that its server has taken: nobody can take it again. Its arrays come in their order."""

    def __init__(self, seed: bytes, file: BinaryIO, end: int) -> None:
        self.seed, self._file, self._end = seed, file, end

    def read(self, shape: tuple[int, ...], dtype: type) -> np.ndarray:
        return self.later(shape, dtype)()

    def later(self, shape: tuple[int, ...], dtype: type) -> Callable[[], np.ndarray]:
        """For :meth:`read` when it is needed: comparison keys are most of a key, and stay on the disk until then."""
        start, size = self._file.tell(), int(np.prod(shape)) * np.dtype(dtype).itemsize
        if start + size > self._end:
            raise UserError("the key is too short for its program: it is broken, and lost")
        self._file.seek(size, os.SEEK_CUR)

        def load() -> np.ndarray:
            out = np.empty(shape, dtype)
            at = self._file.tell()
            self._file.seek(start)
            self._file.readinto(memoryview(out).cast("B"))
            self._file.seek(at)
            return out

        return load


class KeyStore:
    """A server's keys. Of each dealing: its card, the numbers not used so far, and the first that may be used."""

    def __init__(self, folder: Path, server: int) -> None:
        self.folder, self.server = folder, server
        folder.mkdir(parents=True, exist_ok=True)

    def receive(self, connection: Connection, header: dict, program: Program) -> None:
        """One key from the dealer. Nothing is kept of one that breaks off, is for another program or came before."""
        dealing, number = self._checked(header, program)
        folder = self.folder / dealing
        card = {name: header[name] for name in ("program", "batch", "model_seed")}
        if not folder.exists():
            folder.mkdir()
            write_atomic(folder / "card.json", json.dumps(card).encode(), private=True)
        if json.loads((folder / "card.json").read_text("utf-8")) != card:
            raise UserError("this key belongs to another dealing of the same name")
        path = folder / f"{number:06}.key"
        if number < self.first(dealing) or path.exists():
            raise UserError(f"key {number} of this dealing was here before: it is refused")
        part, check = path.with_suffix(".part"), hashlib.sha256()
        connection.send({"kind": "go"})
        try:
            with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
                first = json.dumps({"server": self.server, "number": number, "seed": header["seed"], **card}).encode()
                for data in (len(first).to_bytes(4, "little"), first):
                    file.write(data)
                    check.update(data)
                left = program.key_bytes[self.server] * header["batch"]
                while left:
                    _, data = connection.receive("part", most=min(left, PART_BYTES))
                    if not data:
                        raise UserError(f"key {number} has an empty part")
                    file.write(data)
                    check.update(data)
                    left -= len(data)
                connection.receive("end")
                file.write(check.digest())
                file.flush()
                os.fsync(file.fileno())
            part.rename(path)
            sync(folder)
        except OSError as error:
            raise UserError(f"key {number} couldn't be kept: {error.strerror}. Free space, and deal again") from error
        finally:
            part.unlink(missing_ok=True)
        connection.send({"kind": "kept", "number": number})

    def _checked(self, header: dict, program: Program) -> tuple[str, int]:
        number, batch = header.get("number"), header.get("batch")
        sound = (
            all(is_id(header.get(name)) for name in ("dealing", "seed", "model_seed"))
            and type(number) is int and 0 <= number < MAX_KEYS and type(batch) is int and 0 < batch <= MAX_BATCH
        )  # fmt: skip
        if not sound:
            raise UserError("this is no key's header")
        if header.get("server") != self.server:
            raise UserError(f"this key is for server {header.get('server')}, and here is server {self.server}")
        if header.get("program") != program.digest:
            raise UserError("this key is for another program")
        return header["dealing"], number

    def first(self, dealing: str) -> int:
        """The lowest number that may be used."""
        path = self.folder / dealing / "next"
        return int(path.read_text("utf-8")) if path.exists() else 0

    def held(self, model: str, program: str) -> dict[str, list[int]]:
        """Numbers that may be used with a model and its program (the digest), by dealing."""
        found = {}
        for folder in sorted(self.folder.iterdir()):
            if self._bound(folder.name) not in (None, model) or self.card(folder.name)["program"] != program:
                continue
            first = self.first(folder.name)
            numbers = sorted(int(path.stem) for path in folder.glob("*.key") if int(path.stem) >= first)
            if numbers:
                found[folder.name] = numbers
        return found

    def card(self, dealing: str) -> dict:
        return json.loads((self.folder / dealing / "card.json").read_text("utf-8"))

    def bind(self, dealing: str, model: str) -> None:
        """A dealing's masks hide one model's weights: with another's, both servers would see the difference."""
        if self._bound(dealing) is None:
            write_atomic(self.folder / dealing / "model", model.encode())
        if self._bound(dealing) != model:
            raise UserError("this dealing was used with another model: deal anew")

    def _bound(self, dealing: str) -> str | None:
        path = self.folder / dealing / "model"
        return path.read_text("utf-8") if path.exists() else None

    def drop(self, dealing: str, number: int) -> None:
        """Marks a key and those before it as used, also should this process be killed now, then deletes them."""
        folder = self.folder / dealing
        write_atomic(folder / "next", str(number + 1).encode())
        sync(folder)
        for old in folder.glob("*.key"):
            if int(old.stem) <= number:
                old.unlink()

    def take(self, dealing: str, number: int, program: str) -> Key:
        """:meth:`drop` the key, and return it.

        Raises
        ------
        UserError
            It was used before, isn't here or is for another program; or its file is truncated, altered, of another
            server or dealing. It is lost then.
        """
        path = self.folder / dealing / f"{number:06}.key"
        if number < self.first(dealing) or not path.exists():
            raise UserError(f"key {number} was used or never came")
        card = self.card(dealing)
        if card["program"] != program:
            raise UserError(f"key {number} is for another program")
        try:
            file = open(path, "rb")  # noqa: SIM115  # its name goes, the content lives as long as the key
        finally:
            self.drop(dealing, number)
        try:
            header, start, end = self._header(file)
            wanted = {"server": self.server, "number": number, "seed": header["seed"], **card}
            if header != wanted:
                raise UserError(f"key {number} is of another server, number or dealing")
        except (ValueError, KeyError, UserError) as error:
            file.close()
            raise UserError(f"key {number} is broken, and lost: {error}") from error
        file.seek(start)
        return Key(bytes.fromhex(header["seed"]), file, end)

    @staticmethod
    def _header(file: BinaryIO) -> tuple[dict, int, int]:
        """Header, and where the arrays start and end; ValueError if the file isn't what was written."""
        end = os.fstat(file.fileno()).st_size - CHECK
        check, left = hashlib.sha256(), max(0, end)
        while left:
            data = file.read(min(left, 1 << 22))
            if not data:
                break
            check.update(data)
            left -= len(data)
        if end < 4 or file.read(CHECK) != check.digest():
            raise ValueError("its checksum differs")
        file.seek(0)
        length = int.from_bytes(file.read(4), "little")
        return json.loads(file.read(length)), 4 + length, end
