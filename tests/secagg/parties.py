"""The parties of a round of secure aggregation, joined by bytes, as over a wire."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from primia_lite import secagg
from primia_lite.secagg import Agreement, Reply, SecAggClient, SecAggServer, run_round
from primia_lite.secagg import shares as shamir
from primia_lite.secagg.masks import add_masks


def names(n: int) -> list[str]:
    """A, B, C ... or so many with numbers."""
    return list("ABCDEFGH"[:n]) if n <= 8 else [f"h{i:04d}" for i in range(n)]


def identities(n: int) -> dict[str, Ed25519PrivateKey]:
    return {name: Ed25519PrivateKey.generate() for name in names(n)}


def agree(keys: Mapping[str, Ed25519PrivateKey], length: int = 8, sizes: Iterable[int] | None = None, **options):
    sizes = sizes or [10 * (i + 1) for i in range(len(keys))]
    public = {name: key.public_key().public_bytes_raw() for name, key in keys.items()}
    return Agreement(public, dict(zip(keys, sizes, strict=True)), length, **options)


class Round:
    """One round and all its parties; a test takes it as far as it likes, and meddles.

    Attributes
    ----------
    leave : by step, who vanishes before answering it
    updates : what each hospital sends, by name
    question : what it answers, where no noise protects it; by hospital, if it isn't the same for all
    seen : step, hospital, request and reply, as bytes: the transcript
    """

    def __init__(self, n=3, length=8, session=1, *, leave=None, updates=None, before: Round | None = None,
                 question=None, **options):  # fmt: skip
        self.keys = before.keys if before else identities(n)
        self.agreement = before.agreement if before else agree(self.keys, length, **options)
        self.clients = before.clients if before else {
            name: SecAggClient(name, key, self.agreement) for name, key in self.keys.items()
        }  # fmt: skip
        self.server = SecAggServer(self.agreement, session)
        rng = np.random.default_rng(session)
        self.updates = updates or {
            name: rng.uniform(-1, 1, self.agreement.length).astype(np.float32) for name in self.keys
        }
        self.leave: dict[str, Iterable[str]] = leave or {}
        self.gone: set[str] = set()
        self.question = question
        self.seen: list[tuple[str, str, bytes, bytes]] = []

    def ask(self, name: str, request: bytes) -> Reply:
        question = self.question[name] if isinstance(self.question, dict) else self.question
        reply = self.clients[name].answer(request, lambda: self.updates[name], question)
        self.seen.append((reply.step, name, request, reply.to_bytes()))
        return Reply.from_bytes(reply.to_bytes())

    def exchange(self, step: str, requests: Mapping[str, bytes]) -> Iterable[Reply]:
        self.gone |= set(self.leave.get(step, ()))
        for name, request in requests.items():
            if name not in self.gone:
                yield self.ask(name, request)

    def replies(self) -> list[Reply]:
        """To what the server asks next."""
        return list(self.exchange(self.server.step, self.server.requests()))

    def step(self) -> None:
        for reply in self.replies():
            self.server.receive(reply)
        self.server.close()

    def until(self, step: str) -> Round:
        while self.server.step != step:
            self.step()
        return self

    def finish(self) -> Round:
        assert run_round(self.server, self.exchange) == []
        return self

    def request(self, name: str, **changes) -> bytes:
        """What the server asks a hospital next, with fields replaced."""
        return altered(self.server.requests()[name], **changes)

    def quantised(self, name: str) -> np.ndarray:
        """int64 [L]"""
        integers = self.agreement.fixed_point.quantise(self.updates[name], self.agreement.weight(name))
        return integers.view(np.int32).astype(np.int64)

    def exact(self, survivors: Iterable[str]) -> np.ndarray:
        return sum(self.quantised(name) for name in survivors)

    def masked(self) -> dict[str, np.ndarray]:
        """uint32 [L] by hospital, from the transcript."""
        return {name: Reply.from_bytes(reply).vector for step, name, _, reply in self.seen if step == "mask"}

    def resigned(self, reply: Reply, **changes) -> Reply:
        """A reply with fields replaced, signed by its sender after all: what a hospital that lies sends."""
        changed = Reply(**{**vars(reply), **changes})
        signature = self.keys[changed.sender].sign(changed.signed(self.agreement))
        return Reply(**{**vars(changed), "signature": signature})


def altered(request: bytes, **changes) -> bytes:
    content = json.loads(request)
    for key, value in changes.items():
        content[key] = value(content[key]) if isinstance(value, Callable) else value
    return json.dumps(content).encode()


def relayed(reply: Reply) -> str:
    """As a server passes it on."""
    return reply.split()[0].decode()


def fork(party: Round) -> Round:
    """A second future of a round: everybody's state at this moment, copied."""
    other = Round(before=party, session=party.server.session, updates=party.updates)
    other.clients = {
        name: SecAggClient(name, party.keys[name], party.agreement).restore(client.save())
        for name, client in party.clients.items()
    }
    server = vars(party.server)
    copies = {"replies": {step: dict(replies) for step, replies in server["replies"].items()}}
    if server["masked_sum"] is not None:
        copies["masked_sum"] = server["masked_sum"].copy()
    vars(other.server).update(server | copies)
    other.gone = set(party.gone)
    return other


def strip(party, secrets=None):
    """All hospitals' masked vectors less every mask that the server can compute, from the transcript and from
    ``secrets``: (kind, whose) -> 32 bytes, that it has from elsewhere."""
    agreement, shares, keys, known = party.agreement, {}, {}, dict(secrets or {})
    for step, name, _, content in party.seen:
        body = Reply.from_bytes(content).body
        if step == "advertise":
            keys[name] = bytes.fromhex(body["keys"][0])
        if step == "unmask":
            for kind in ("keys", "seeds"):
                for whose, share in body[kind].items():
                    shares.setdefault((kind, whose), {})[agreement.point[name]] = bytes.fromhex(share)
    for what, parts in shares.items():
        if len(parts) >= agreement.share_threshold:
            known[what] = shamir.combine(parts, agreement.share_threshold)
    out = party.masked()
    for name, vector in out.items():
        out[name] = vector = vector.copy()
        if ("seeds", name) in known:
            add_masks(vector, [(known["seeds", name], -1)])
        for other in keys.keys() - {name}:
            for mine, yours in ((name, other), (other, name)):
                if ("keys", mine) in known:
                    secret = X25519PrivateKey.from_private_bytes(known["keys", mine])
                    seed = secagg.mask_seed(agreement, party.server.session, name, other, secret, keys[yours])
                    add_masks(vector, [(seed, -secagg.mask_sign(name, other))])
                    break
    return out


def is_update(party, name, vector):
    return np.array_equal(vector, party.quantised(name).astype(np.uint32))
