"""The hospital's side of secure aggregation: it masks its update, and unmasks a sum once, for enough survivors."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from primia_lite.config import UserError
from primia_lite.secagg import shares as shamir
from primia_lite.secagg.agreement import Agreement, ProtocolError, Question
from primia_lite.secagg.fixed_point import integers
from primia_lite.secagg.keys import SEALED, derive, mask_seed, mask_sign
from primia_lite.secagg.masks import add_masks
from primia_lite.secagg.messages import STEPS, Reply, advertised_keys, confirmation, decode, encode, relayed_reply


@dataclass
class RoundSecrets:
    """A hospital's secrets and what it has seen, in one round."""

    session: int
    step: str  # the last one that it took part in
    mask_key: bytes
    share_key: bytes
    own_seed: bytes = b""
    advertised: dict[str, list[str]] = field(default_factory=dict)
    neighbours: list[str] = field(default_factory=list)
    shares: dict[str, str] = field(default_factory=dict)  # by whose secrets they are parts of, both, hexadecimal
    survivors: list[str] = field(default_factory=list)
    question: list[str] | None = None  # round and weights

    @property
    def keys(self) -> tuple[X25519PrivateKey, X25519PrivateKey]:
        return tuple(X25519PrivateKey.from_private_bytes(key) for key in (self.mask_key, self.share_key))

    @property
    def public_keys(self) -> list[str]:
        return [key.public_key().public_bytes_raw().hex() for key in self.keys]


class SecAggClient:
    """The hospital's side.

    Parameters
    ----------
    name, identity
        Who it is; its public key is in the agreement.
    last_session
        Number of the last round that it took part in. It answers later ones only: the server could otherwise have one
        update summed twice, with other hospitals each time, and subtract. Rounds of an agreement never start anew at 1:
        keep the number (see :meth:`save`), or agree on new identities.
    answered
        By round: the weights and survivors that it has signed for, to which it adds. One for all of a hospital's
        clients, whatever their agreement; :meth:`save` and :meth:`restore` know of it.

    Attributes
    ----------
    secrets : of the round that it is in, else None
    """

    def __init__(
        self,
        name: str,
        identity: Ed25519PrivateKey,
        agreement: Agreement,
        last_session: int = 0,
        answered: dict[str, list[str]] | None = None,
    ):
        if agreement.identities.get(name) != identity.public_key().public_bytes_raw():
            raise UserError(f"{name}'s identity isn't the one in the agreement")
        self.name, self.agreement, self.last_session = name, agreement, last_session
        self._identity, self._answered = identity, {} if answered is None else answered
        self.secrets: RoundSecrets | None = None
        self._lock = threading.Lock()  # two requests at once would both be answered

    def answer(self, request: bytes, update: Callable[[], np.ndarray], question: Question | None = None) -> Reply:
        """The reply to a request of the server. After an error the hospital's secrets of the round are gone.

        Parameters
        ----------
        update : called in step ``mask`` alone; float32 [L], or int64 [L] where the agreement isn't ``weighted``
        question : in step ``mask``: what the update answers, as the hospital itself sees it; None under DP

        Raises
        ------
        ProtocolError
            The server asks for what the protocol doesn't allow.
        UserError
            The update has another shape, values that aren't finite or above the clip. Nothing was sent.
        """
        with self._lock:
            try:
                return self._answer(request, update, question)
            except BaseException:
                self.secrets = None
                raise

    def _answer(self, request: bytes, update: Callable[[], np.ndarray], question: Question | None) -> Reply:
        handlers = (self._advertise, self._share, self._open, self._confirm, self._unmask)
        try:
            content = json.loads(request)
            step, session = content.pop("step"), content.pop("session")
            handle = handlers[STEPS.index(step)]
            self._expect(step, session)
            body = handle(session, **content)
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            raise ProtocolError(f"{self.name} was asked for something that can't be understood") from error
        vector = None
        if step == "mask":
            body["question"] = list(question or ())
            vector = self._masked(session, update, question)
        if step == "unmask":
            self.secrets = None  # it answers once
        else:
            self.secrets.step = step
        reply = Reply(self.name, session, step, body, vector=vector)
        return replace(reply, signature=self._identity.sign(reply.signed(self.agreement)))

    def _expect(self, step: str, session: int) -> None:
        if type(session) is not int:
            raise ProtocolError(f"round {session!r} has no number")
        if step == STEPS[0]:
            if session <= self.last_session:
                raise ProtocolError(f"{self.name} was asked for round {session} after round {self.last_session}")
            self.secrets = None
            return
        before = STEPS[STEPS.index(step) - 1]
        if self.secrets is None or (self.secrets.session, self.secrets.step) != (session, before):
            mine = self.secrets
            now = f"{mine.step} of round {mine.session} was last" if mine else "it is in no round"
            raise ProtocolError(f"{self.name} was asked for {step} of round {session}, but {now}")

    # Each handler takes what a request holds, and returns the reply's body.

    def _advertise(self, session: int) -> dict:
        self.last_session = session
        self.secrets = RoundSecrets(session, "", os.urandom(32), os.urandom(32))
        return {"keys": self.secrets.public_keys}

    def _share(self, session: int, advertised: list[str]) -> dict:
        mine, agreement = self.secrets, self.agreement
        mine.advertised = advertised_keys(advertised, agreement, session)
        if mine.advertised.get(self.name) != mine.public_keys:
            raise ProtocolError(f"{self.name}'s own keys aren't among those that the server gave")
        mine.own_seed = os.urandom(32)
        mine.neighbours = list(agreement.neighbours(mine.advertised)[self.name])
        everyone = (*mine.neighbours, self.name)
        points = [agreement.point[name] for name in everyone]
        parts = [shamir.split(secret, agreement.share_threshold, points) for secret in (mine.mask_key, mine.own_seed)]
        both = {name: b"".join(part[agreement.point[name]] for part in parts) for name in everyone}
        mine.shares[self.name] = both.pop(self.name).hex()
        sealed = {
            other: encode(self.cipher(self.name, other).encrypt(bytes(12), shares, None))
            for other, shares in both.items()
        }
        return {"shares": sealed, "commitment": hashlib.sha256(mine.own_seed).hexdigest()}

    def cipher(self, sender: str, receiver: str) -> ChaCha20Poly1305:
        """For one message, from one to the other: the key is used once, so the nonce may be 0."""
        mine = self.secrets
        other = receiver if sender == self.name else sender
        public = bytes.fromhex(mine.advertised[other][1])
        purpose = ("shares", self.agreement.digest, mine.session, sender, receiver)
        return ChaCha20Poly1305(derive(mine.keys[1], public, *purpose))

    def _open(self, session: int, shares: dict[str, str]) -> dict:
        mine, agreement = self.secrets, self.agreement
        if not shares.keys() <= set(mine.neighbours):
            raise ProtocolError(f"{self.name} got shares of hospitals that aren't its neighbours")
        unopened = []
        for other, sealed in sorted(shares.items()):
            try:
                content = decode(sealed, SEALED, f"{other}'s share")
                mine.shares[other] = self.cipher(other, self.name).decrypt(bytes(12), content, None).hex()
            except (InvalidTag, ProtocolError):
                unopened.append(other)  # as if it hadn't come
        if len(mine.shares) < agreement.share_threshold:
            odd = f"; what came in the name of {', '.join(unopened)} doesn't open" if unopened else ""
            raise ProtocolError(
                f"{self.name} got shares of {len(mine.shares) - 1} others: its update would hide among too few "
                f"(needed: {agreement.share_threshold - 1}){odd}"
            )
        return {"unopened": unopened}

    def _masked(self, session: int, update: Callable[[], np.ndarray], question: Question | None) -> np.ndarray:
        mine, agreement = self.secrets, self.agreement
        if question:
            mine.question = list(question)
            if self._answered.get(question.round, [question.weights])[0] != question.weights:
                raise ProtocolError(
                    f"{self.name} has answered this round for other weights: without DP it answers once. For more "
                    "rounds, or to start anew, agree on another study"
                )
        secret, seeds = mine.keys[0], [(mine.own_seed, 1)]
        for other in sorted(mine.shares.keys() - {self.name}):
            public = bytes.fromhex(mine.advertised[other][0])
            seed = mask_seed(agreement, session, self.name, other, secret, public, question or ())
            seeds.append((seed, mask_sign(self.name, other)))
        values = np.asarray(update())
        wanted = np.float32 if agreement.weighted else np.int64
        if values.shape != (agreement.length,) or values.dtype != wanted:
            raise UserError(
                f"hospital {self.name}'s update is {values.dtype} {list(values.shape)}: "
                f"{np.dtype(wanted)} [{agreement.length}] was agreed on"
            )
        weight = agreement.weight(self.name)
        try:
            vector = agreement.fixed_point.quantise(values, weight) if agreement.weighted else integers(values)
        except UserError as error:
            raise UserError(f"hospital {self.name}: {error}") from error
        add_masks(vector, seeds)
        mine.mask_key = mine.share_key = mine.own_seed = b""  # not needed again
        return vector

    def _confirm(self, session: int, survivors: list[str]) -> dict:
        mine, agreement = self.secrets, self.agreement
        repeated = not isinstance(survivors, list) or len(set(survivors)) < len(survivors)
        if repeated or not {self.name} <= set(survivors) <= mine.advertised.keys():
            raise ProtocolError(f"{self.name} got a list of survivors that isn't one")
        if len(survivors) < agreement.threshold:
            raise ProtocolError(f"{self.name} got {len(survivors)} survivors, below the threshold")
        if not set(mine.neighbours) & set(survivors) <= mine.shares.keys():
            raise ProtocolError(f"{self.name} got survivors that it shares no mask with")
        mine.survivors = sorted(survivors)
        signed = confirmation(mine.survivors, mine.advertised)
        if mine.question:
            round_, weights = mine.question
            answer = [weights, signed["survivors"]]
            if self._answered.setdefault(round_, answer) != answer:
                raise ProtocolError(
                    f"{self.name} has signed other survivors, or weights, of this round: without DP two sums would "
                    "give their difference away. Ask again with the same hospitals, or agree on another study"
                )
        return signed

    def _unmask(self, session: int, confirmed: list[str]) -> dict:
        mine, agreement = self.secrets, self.agreement
        if len(confirmed) > len(agreement.names):
            raise ProtocolError(f"{self.name} got more confirmations than there are hospitals")
        wanted, signers = confirmation(mine.survivors, mine.advertised), set()
        for text in confirmed:
            reply = relayed_reply(text).check(agreement, session, "confirm")
            if reply.body != wanted:
                raise ProtocolError(f"{reply.sender} signed other survivors or keys than {self.name}: the server lied")
            signers.add(reply.sender)
        if not signers <= set(mine.survivors) or len(signers) < agreement.threshold or self.name not in signers:
            raise ProtocolError(
                f"{len(signers)} hospitals confirmed, but {agreement.threshold} are needed, {self.name} among them"
            )
        half = 2 * shamir.SHARE_BYTES  # hexadecimal
        seeds = {name: both[half:] for name, both in mine.shares.items() if name in mine.survivors}
        keys = {name: both[:half] for name, both in mine.shares.items() if name not in mine.survivors}
        return {"keys": keys, "seeds": seeds}

    # A process that ends between two steps keeps its round at the hospital.

    def save(self) -> bytes:
        """The round that it is in, secrets included: for the hospital's own disk and nobody else.

        Write it after :meth:`answer` and before the reply leaves, over the one before, and answer from the last one
        only. A hospital that goes back to an older state (a backup, a copy in a second process) answers a step again,
        and no code here can tell: two masked updates from one state give their difference away, two lists of survivors
        both secrets of a hospital, and with them its update.
        """
        kept = {"last_session": self.last_session, "round": self.secrets and vars(self.secrets)}
        if self._answered:
            kept["answered"] = self._answered
        return json.dumps(kept, default=bytes.hex).encode()

    def restore(self, content: bytes) -> SecAggClient:
        """Itself, to go on from what :meth:`save` kept; ProtocolError if it has done more since."""
        kept = json.loads(content)
        if kept["last_session"] < self.last_session + bool(kept["round"]):
            raise ProtocolError(
                f"{self.name} doesn't go back from round {self.last_session} to {kept['last_session']}: it would "
                "answer again. Restore into a new SecAggClient, once"
            )
        self.last_session = kept["last_session"]
        self._answered.update(kept.get("answered", {}))
        if kept["round"]:
            secrets = {k: bytes.fromhex(kept["round"][k]) for k in ("mask_key", "share_key", "own_seed")}
            self.secrets = RoundSecrets(**kept["round"] | secrets)
        return self
