"""One of the two servers. It holds shares of weights, keys that serve once, and a share of each film while it computes.

Server 0 leads: for each film that its owner has sent to both, it connects to server 1; they agree on the next key that
both hold, compute, and each answers the owner with its share of the logits. A server that follows the protocol learns
the program, the number of films and when they came. Two that put together what they have learn the film and the model,
and one that lies can move a logit by what it likes, unseen.
"""

from __future__ import annotations

import math
import queue
import secrets
import socket
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from primia_lite.config import UserError
from primia_lite.runtime import write_atomic
from primia_lite.smpc.connection import DEADLINE_S, MAX_HEADER, ROLES, WAIT_S, Connection, Party, PeerError
from primia_lite.smpc.engines import Online, Preparation, SharedWeight, Wire, open_weights
from primia_lite.smpc.keys import KeyStore, is_id
from primia_lite.smpc.program import Program, run
from primia_lite.smpc.ring import Stream

SLOTS = 32  # connections of one role, or of strangers


@dataclass
class Asked:
    """A film's share for the model that its owner was offered, and the connection that waits for the logits'.

    ``taken`` is held by the thread that alone may answer now."""

    session: str
    connection: Connection
    model: Model
    share: np.ndarray
    taken: threading.Lock = field(default_factory=threading.Lock)
    done: threading.Event = field(default_factory=threading.Event)


class Model:
    """A program and this server's shares of its weights, as its owner sent them."""

    def __init__(self, folder: Path) -> None:
        self.name = (folder / "name").read_text("utf-8")
        self.program = Program.from_json((folder / "program.json").read_text("utf-8"))
        with np.load(folder / "shares.npz") as file:
            self.shares = {
                name: (file[f"{i}w"], file[f"{i}b"]) for i, name in enumerate(self.program.shapes)
            }  # fmt: skip


class Server:
    """``number``: 0 or 1; ``folder``: identity, peers, model and keys; ``other``: where server 1 listens, for 0."""

    def __init__(
        self, folder: str | Path, number: int, other: tuple[str, int] | None = None, deadline_s: float = DEADLINE_S
    ) -> None:
        if number not in (0, 1) or (number == 0) != (other is not None):
            raise UserError("a server is number 0, which knows the address of server 1, or number 1")
        self.folder, self.number, self.other, self.deadline_s = Path(folder), number, other, deadline_s
        self.party, self.keys = Party(folder), KeyStore(Path(folder) / "keys", number)
        self.model: Model | None = None
        if (self.folder / "model" / "name").exists():
            self.model = Model(self.folder / "model")
        self._turn: queue.SimpleQueue[Asked] = queue.SimpleQueue()
        self._waiting: dict[str, Asked] = {}
        self._came = threading.Condition()
        self._computing = threading.Lock()
        self._opened: tuple[str, dict[str, SharedWeight]] | None = None  # of a dealing
        self._next: tuple[str, int] | None = None  # the key that is prepared ahead, or was
        self._ahead: tuple[str, int, list] | None = None  # prepared: dealing, number, gates
        self._listener: socket.socket | None = None
        self._ended = threading.Event()
        self._slots = {role: threading.Semaphore(SLOTS) for role in (*ROLES, "stranger")}

    def listen(self, address: tuple[str, int]) -> tuple[str, int]:
        """Start to serve in threads; returns the address, whose port the system chooses where 0 is given."""
        try:
            self._listener = socket.create_server(address, backlog=SLOTS)
        except OSError as error:
            raise UserError(f"can't listen at {address[0]}:{address[1]}: {error.strerror}") from error

        def accept() -> None:
            while not self._ended.is_set():
                self._slots["stranger"].acquire()  # each is let go after a handshake, or without one soon
                try:
                    raw, _ = self._listener.accept()
                except OSError:
                    return
                threading.Thread(target=self._serve, args=(raw,), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        if self.number == 0:
            threading.Thread(target=self._lead, daemon=True).start()
        return self._listener.getsockname()[:2]

    def close(self) -> None:
        self._ended.set()
        if self._listener is not None:
            with suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
            self._listener.close()

    def _serve(self, raw: socket.socket) -> None:
        try:
            connection = self.party.accept(raw, self.deadline_s)
        except Exception as error:
            print(f"server {self.number}: {error}", flush=True)
            return
        finally:
            self._slots["stranger"].release()
        slot = self._slots[connection.role]
        with connection:
            if not slot.acquire(blocking=False):
                self._say(connection, PeerError(f"too many connections of {connection.role}: try again"))
                return
            try:
                self.answer(connection)
            except Exception as error:
                self._say(connection, error)
            finally:
                slot.release()

    def _say(self, connection: Connection, error: Exception) -> None:
        """Never raises: threads that go on call it."""
        if not isinstance(error, UserError):
            error = PeerError(f"server {self.number} failed ({type(error).__name__}): a film's key is lost")
        with suppress(Exception):
            print(f"server {self.number}: {connection.role}: {error}", flush=True)
            connection.send({"kind": "error", "text": str(error)})  # the other may have gone

    def answer(self, connection: Connection) -> None:
        """One party's request, by its role: a model, keys, a film, or the other server."""
        if connection.role == "model":
            self._receive_model(connection)
        elif connection.role == "dealer":
            while True:
                try:
                    header, _ = connection.receive("key")
                except PeerError:
                    return  # the dealer has ended
                self.keys.receive(connection, header, self._known().program)
        elif connection.role == "film":
            self._receive_film(connection)
        elif connection.role == f"server{1 - self.number}" and self.number == 1:
            self._follow(connection)
        else:
            raise PeerError(f"{connection.role} has nothing to ask here")

    def _known(self) -> Model:
        if self.model is None:
            raise UserError("no model is here yet: its owner sends it first")
        return self.model

    def _receive_model(self, connection: Connection) -> None:
        header, text = connection.receive("model", most=MAX_HEADER)
        program = Program.from_json(text.decode("utf-8", "replace"))
        name, shares = header.get("name"), {}
        if not is_id(name):
            raise PeerError("this is no model's header")
        connection.send({"kind": "go"})
        for layer, shape in program.shapes.items():
            n, outputs = math.prod(shape), shape[0]
            _, data = connection.receive("layer", most=4 * (n + outputs))
            if len(data) != 4 * (n + outputs):
                raise PeerError(f"layer {layer!r} has another size than its program says")
            words = np.frombuffer(data, np.uint32)
            shares[layer] = words[:n].reshape(shape), words[n:]
        folder = self.folder / "model"
        folder.mkdir(exist_ok=True)
        arrays = {
            f"{i}{kind}": part for i, pair in enumerate(shares.values()) for kind, part in zip("wb", pair, strict=True)
        }
        with self._computing:
            (folder / "name").unlink(missing_ok=True)  # a model that arrived in part isn't one
            write_atomic(folder / "program.json", program.to_json().encode())
            write_atomic(folder / "shares.npz", lambda file: np.savez(file, **arrays), private=True)
            write_atomic(folder / "name", name.encode())
            self.model, self._opened, self._ahead, self._next = Model(folder), None, None, None
        connection.send({"kind": "kept", "name": name})

    def _receive_film(self, connection: Connection) -> None:
        """Give the program; wait for the film's share; answer when it has had its turn."""
        model = self._known()
        batches = sorted({self.keys.card(dealing)["batch"] for dealing in self._held(model)})
        connection.send({"kind": "program", "model": model.name, "batches": batches}, model.program.to_json().encode())
        size = 4 * math.prod(model.program.in_shape)
        header, data = connection.receive("film", most=size * max(batches, default=0))
        session, batch = header.get("session"), header.get("batch")
        if not is_id(session) or batch not in batches or len(data) != size * batch:
            raise PeerError("this is no film of the program's size")
        share = np.frombuffer(data, np.uint32).reshape(batch, *model.program.in_shape)
        asked = Asked(session, connection, model, share)
        if self.number == 0:
            self._turn.put(asked)
        else:
            with self._came:
                self._waiting[session] = asked
                self._came.notify_all()
        try:
            if not asked.done.wait(WAIT_S) and asked.taken.acquire(blocking=False):
                raise PeerError("the film had no turn in time: try again")
            asked.done.wait()  # the thread that took it answers, by deadlines of its own
        finally:
            with self._came:
                self._waiting.pop(session, None)

    def _lead(self) -> None:
        while not self._ended.is_set():
            try:
                asked = self._turn.get(timeout=1)
            except queue.Empty:
                continue
            if not asked.taken.acquire(blocking=False):
                continue
            try:
                with self.party.connect(self.other, "server1", self.deadline_s) as peer:
                    self._compute(asked, peer)
            except Exception as error:  # the next film may still be read
                self._say(asked.connection, error)
            asked.done.set()
            self._prepare_ahead()

    def _follow(self, peer: Connection) -> None:
        header, _ = peer.receive("film")
        session = header.get("session")
        with self._came:
            if not self._came.wait_for(lambda: session in self._waiting, timeout=self.deadline_s):
                raise PeerError("the film's owner has sent no share to server 1")
            asked = self._waiting.pop(session)
        if not asked.taken.acquire(blocking=False):
            raise PeerError("the film had no turn in time")
        try:
            self._compute(asked, peer)
        except Exception as error:
            for connection in (asked.connection, peer):
                self._say(connection, error)
        asked.done.set()
        self._prepare_ahead()

    def _compute(self, asked: Asked, peer: Connection) -> None:
        """Both servers: agree on model and key, then from the film's share to that of its logits."""
        with self._computing:
            model = asked.model
            if self.number == 0:
                peer.send({"kind": "film", "session": asked.session})
            if asked.connection.gone():
                raise PeerError("the film's owner has left")
            if self.model is not model:
                raise UserError("another model came while the film waited: try again")
            dealing, number, other = self._agree(peer, model, len(asked.share))
            started = time.thread_time(), time.perf_counter()
            self._open(peer, model, dealing, other)
            ready = self._prepared(model, dealing, number)
            prepared = time.thread_time(), time.perf_counter()
            seed = secrets.token_hex(16)
            peer.send({"kind": "ready", "seed": seed})
            header, _ = peer.receive("ready")
            if not is_id(header.get("seed")):
                raise PeerError(f"{peer.role} sent no seed")
            peer.sent = peer.rounds = 0
            online = time.thread_time(), time.perf_counter()
            engine = Online(self.number, self._opened[1], ready, peer.exchange)
            logits = run(model.program, engine, Wire(asked.share.shape, asked.share)).share
            # Else the film's owner, who sees both shares, and the dealer could take the last layer's masks off.
            blind = Stream(bytes.fromhex(header["seed"] if self.number else seed)).draw(logits.shape)
            logits = logits - blind if self.number else logits + blind
            ended = time.thread_time(), time.perf_counter()
        cost = {
            "prepare_cpu_s": prepared[0] - started[0], "online_cpu_s": ended[0] - online[0],
            "online_wall_s": ended[1] - online[1], "sent_bytes": peer.sent, "rounds": peer.rounds, **engine.seconds,
        }  # fmt: skip
        offer = {"model": model.name, "program": model.program.digest}
        asked.connection.send({"kind": "logits", **offer, "key": number, "cost": cost}, logits.tobytes())

    def _held(self, model: Model) -> dict[str, list[int]]:
        """Numbers of keys not used so far, the one that is prepared among them, by dealing."""
        ahead = self._next  # before the folder is read, and once: another thread changes it
        held = self.keys.held(model.name, model.program.digest)
        if ahead is not None and ahead[1] not in held.get(ahead[0], []):
            held.setdefault(ahead[0], []).append(ahead[1])
        return held

    def _agree(self, peer: Connection, model: Model, batch: int) -> tuple[str, int, bool]:
        """The dealing and number of a key that both hold, and whether the other has its weights open."""
        held = {
            dealing: sum(1 << number for number in numbers)  # as bits, so that many numbers are a short message
            for dealing, numbers in self._held(model).items()
            if self.keys.card(dealing)["batch"] == batch
        }
        peer.send({
            "kind": "state", "program": model.program.digest, "model": model.name,
            "held": {dealing: f"{bits:x}" for dealing, bits in held.items()},
            "opened": self._opened[0] if self._opened else None,
        })  # fmt: skip
        state, _ = peer.receive("state")
        if (state.get("program"), state.get("model")) != (model.program.digest, model.name):
            raise PeerError("the two servers hold different models: their owner sends one to both")
        try:
            theirs = {dealing: int(bits, 16) for dealing, bits in state["held"].items()}
        except (KeyError, AttributeError, TypeError, ValueError) as error:
            raise PeerError(f"{peer.role} sent no list of keys") from error
        for dealing in sorted(held):
            both = held[dealing] & theirs.get(dealing, 0)
            if both > 0:
                return dealing, (both & -both).bit_length() - 1, state.get("opened") == dealing
        for dealing, bits in held.items():  # no use, and in the way of keys that both hold
            self.keys.drop(dealing, bits.bit_length() - 1)
        self._next = self._ahead = None
        raise UserError(f"no key is left that both servers hold (for {batch} films): the dealer must deal more")

    def _open(self, peer: Connection, model: Model, dealing: str, other_has: bool) -> None:
        """Once for each dealing, or again where one of the two was started anew: the same masked weights."""
        if other_has and self._opened is not None and self._opened[0] == dealing:
            return
        self.keys.bind(dealing, model.name)
        seed = bytes.fromhex(self.keys.card(dealing)["model_seed"])
        self._opened = dealing, open_weights(self.number, model.shares, seed, peer.exchange)

    def _prepared(self, model: Model, dealing: str, number: int) -> list:
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            self._next = None
            if ahead[:2] == (dealing, number):
                return ahead[2]
        key = self.keys.take(dealing, number, model.program.digest)
        batch = self.keys.card(dealing)["batch"]
        engine = Preparation(self.number, self._opened[1], key)
        run(model.program, engine, Wire((batch, *model.program.in_shape)))
        return engine.ready

    def _prepare_ahead(self) -> None:
        """The next key of the dealing whose weights are open, while nobody waits."""
        with self._computing:
            try:
                if self._opened is None or self._ahead is not None:
                    return
                model, dealing = self._known(), self._opened[0]
                numbers = self.keys.held(model.name, model.program.digest).get(dealing)
                if numbers:
                    self._next = dealing, numbers[0]
                    self._ahead = *self._next, self._prepared(model, *self._next)
            except Exception as error:  # threads that go on call this
                self._next = None
                print(f"server {self.number}: {type(error).__name__}: {error}", flush=True)
