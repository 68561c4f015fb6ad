"""The server's side of secure aggregation: masked updates come in, their exact sum goes out."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import cached_property, partial

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from primia_lite.secagg import shares as shamir
from primia_lite.secagg.agreement import Agreement, ProtocolError, TooFewSurvivors
from primia_lite.secagg.fixed_point import centred
from primia_lite.secagg.keys import SEALED, derive, mask_seed, mask_sign
from primia_lite.secagg.masks import add_masks
from primia_lite.secagg.messages import STEPS, Reply, confirmation, decode, is_hex, public_keys, relayed, request

# What a reply's body holds: no more and no less.
BODIES = {"advertise": {"keys"}, "share": {"shares", "commitment"}, "mask": {"question", "unopened"},
           "confirm": {"survivors", "keys"}, "unmask": {"keys", "seeds"}}  # fmt: skip


class SecAggServer:
    """The server's side of one round, whose number, ``session``, is above all before. It holds no secret and, until the
    end, only a masked sum.

    Attributes
    ----------
    step : what it waits for; None once the sum is there
    total : int32 [L], the exact sum of what the survivors quantised; None before
    survivors : whose updates are in it
    replies : that came and are needed, by step and hospital, without vectors; none after the end
    masked_sum : uint32 [L], of the masked updates so far; None after the end
    """

    def __init__(self, agreement: Agreement, session: int):
        self.agreement, self.session = agreement, session
        self.step: str | None = STEPS[0]
        self.total: np.ndarray | None = None
        self.survivors: tuple[str, ...] = ()
        self.replies: dict[str, dict[str, Reply]] = {step: {} for step in STEPS}
        self.masked_sum: np.ndarray | None = None
        self._public: set[str] = set()  # keys that came

    def requests(self) -> dict[str, bytes]:
        """What to ask each hospital that is still in the round."""
        step, replies, ask = self.step, self.replies, partial(request, self.step, self.session)
        if step == "advertise":
            return dict.fromkeys(self.agreement.names, ask())
        if step == "share":
            return dict.fromkeys(replies["advertise"], ask(advertised=relayed(replies["advertise"])))
        if step == "mask":
            sent = {sender: reply.body["shares"] for sender, reply in replies["share"].items()}
            return {
                name: ask(shares={sender: shares[name] for sender, shares in sent.items() if name in shares})
                for name in sent
            }
        if step == "confirm":
            return dict.fromkeys(self.survivors, ask(survivors=list(self.survivors)))
        return dict.fromkeys(replies["confirm"], ask(confirmed=relayed(replies["confirm"])))

    def receive(self, reply: Reply) -> None:
        """Take a hospital's reply; ProtocolError for one that is forged, late, unasked, repeated, or of another form.
        The round goes on as if it had not come."""
        step = self.step
        if step is None:
            raise ProtocolError(f"a message of {reply.sender} after the end of round {self.session}: it came late")
        if reply.sender in self.replies[step]:
            raise ProtocolError(f"{reply.sender} sent its {step} twice: the first one counts")
        if reply.step == step:  # else it came late, which says more
            self._check_vector(reply)
        reply.check(self.agreement, self.session, step)
        if step != STEPS[0] and reply.sender not in self.replies[STEPS[STEPS.index(step) - 1]]:
            raise ProtocolError(f"{reply.sender} answers, but wasn't asked: it missed a step before")
        if reply.body.keys() != BODIES[step]:
            raise ProtocolError(f"{reply.sender}'s {step} holds {sorted(reply.body)}, not {sorted(BODIES[step])}")
        getattr(self, f"_take_{step}")(reply)
        self.replies[step][reply.sender] = replace(reply, vector=None)

    def _take_advertise(self, reply: Reply) -> None:
        mine = set(public_keys(reply))
        if len(mine) < 2 or mine & self._public:
            raise ProtocolError(f"{reply.sender} advertises a key that another one has")
        for key in mine:  # all the others would end the round for a bad one
            try:
                derive(X25519PrivateKey.generate(), bytes.fromhex(key), "trial")
            except ProtocolError as error:
                raise ProtocolError(f"{reply.sender} advertises {error}") from error
        self._public |= mine

    def _take_share(self, reply: Reply) -> None:
        shares, others = reply.body.get("shares"), self.neighbours[reply.sender]
        if not isinstance(shares, dict) or shares.keys() != set(others):
            raise ProtocolError(f"{reply.sender} sent shares for others than its neighbours")
        for sealed in shares.values():
            decode(sealed, SEALED, f"{reply.sender}'s share")
        if not is_hex(reply.body["commitment"], 32):
            raise ProtocolError(f"{reply.sender}'s commitment can't be read")

    def _check_vector(self, reply: Reply) -> None:
        if self.step != "mask":
            if reply.vector is not None:
                raise ProtocolError(f"{reply.sender} sent a vector in {self.step}")
            return
        vector, length = reply.vector, self.agreement.length
        if not isinstance(vector, np.ndarray) or vector.dtype != np.uint32 or vector.shape != (length,):
            raise ProtocolError(f"{reply.sender} sent no uint32 vector of {length} entries")

    def _take_mask(self, reply: Reply) -> None:
        sender, unopened, came = reply.sender, reply.body["unopened"], self.replies["mask"]
        first = next(iter(came.values()), reply)
        if reply.body["question"] != first.body["question"]:
            raise ProtocolError(f"{sender} answers for another round, or weights, than {first.sender}: it is left out")
        if not isinstance(unopened, list) or not set(unopened) <= set(self.neighbours[sender]):
            raise ProtocolError(f"{sender} names shares that it wasn't sent")
        # They have no mask together, so one sum can't hold both. Who sealed the share goes, if it hasn't come yet and
        # enough of the others have its shares: its masks with them are to be taken off.
        for other in unopened:
            without = {sender} | {name for name, masked in came.items() if other in masked.body["unopened"]}
            holders = set(self.neighbours[other]) & self.replies["share"].keys() - without
            if other in came or len(holders) < self.agreement.share_threshold:
                raise ProtocolError(
                    f"{other} sent {sender} a share that doesn't open, and the sum needs {other}: {sender} is left "
                    f"out. If that comes again, leave out {other}"
                )
        if after := [other for other, masked in came.items() if sender in masked.body["unopened"]]:
            raise ProtocolError(f"{sender} sent {after[0]} a share that doesn't open: {sender} is left out")
        if self.masked_sum is None:
            self.masked_sum = reply.vector.copy()
        else:
            self.masked_sum += reply.vector

    def _take_confirm(self, reply: Reply) -> None:
        if reply.body != self._confirmation:
            raise ProtocolError(f"{reply.sender} confirms other survivors, or other keys")

    def _take_unmask(self, reply: Reply) -> None:
        held = {reply.sender, *self.neighbours[reply.sender]} & self.replies["share"].keys()
        held -= set(self._unopened(reply.sender))
        wanted = {"seeds": held & set(self.survivors), "keys": held - set(self.survivors)}
        for kind, names in wanted.items():
            shares = reply.body[kind]
            # For each hospital the one share that is asked for: both together would unmask it.
            if not isinstance(shares, dict) or shares.keys() != names:
                raise ProtocolError(f"{reply.sender} sent shares for others than was asked")
            if not all(is_hex(share, shamir.SHARE_BYTES) for share in shares.values()):
                raise ProtocolError(f"{reply.sender}'s shares can't be read")

    def _unopened(self, name: str) -> list[str]:
        return self.replies["mask"][name].body["unopened"]

    @property
    def _keys(self) -> dict[str, list[str]]:
        return {name: reply.body["keys"] for name, reply in self.replies["advertise"].items()}

    @cached_property
    def _confirmation(self) -> dict:
        return confirmation(self.survivors, self._keys)

    @cached_property
    def neighbours(self) -> dict[str, tuple[str, ...]]:
        return self.agreement.neighbours(self._keys)

    def close(self) -> None:
        """End a step with those who have answered, and go on to the next; after the last one ``total`` is there.

        Raises
        ------
        TooFewSurvivors
            Fewer than the threshold answered. The round is over, and its sum stays masked.
        ProtocolError
            Shares that don't fit what they are shares of: somebody lied, and there is no sum.
        """
        answered = self.replies[self.step]
        if len(answered) < self.agreement.threshold:
            gone = sorted(set(self.agreement.names) - set(answered))
            step, asked = self.step, any(reply.body["question"] for reply in self.replies["mask"].values())
            signed = f" (without DP: {', '.join(self.survivors)}, and no others)" if asked and self.survivors else ""
            self._end()
            raise TooFewSurvivors(
                f"round {self.session} ended at {step}: {len(answered)} hospitals answered, fewer than the threshold "
                f"of {self.agreement.threshold} (missing: {', '.join(gone)}). What was charged stays charged. Ask "
                f"again once they are back{signed}"
            )
        if self.step == "mask":
            self.survivors = tuple(sorted(answered))
        elif self.step == "unmask":
            try:
                self._unmask()
            finally:
                self._end()
            return
        self.step = STEPS[STEPS.index(self.step) + 1]

    def _end(self) -> None:
        """Keep nothing that a masked sum, or somebody's transcript, could be unmasked with."""
        self.step = self.masked_sum = None
        self.replies = {step: {} for step in STEPS}

    def _secret(self, kind: str, name: str) -> bytes:
        point, replies = self.agreement.point, self.replies["unmask"]
        holders = replies.keys() & {name, *self.neighbours[name]}
        held = {point[holder]: replies[holder].body[kind] for holder in holders}
        shares = {at: bytes.fromhex(secrets[name]) for at, secrets in held.items() if name in secrets}
        try:
            return shamir.combine(shares, self.agreement.share_threshold)
        except ValueError as error:
            if len(shares) < self.agreement.share_threshold:
                raise TooFewSurvivors(
                    f"round {self.session} ended: too few of {name}'s neighbours are left ({error})"
                ) from error
            raise ProtocolError(f"the shares of {name}'s secret don't fit together: there is no sum") from error

    def _unmask(self) -> None:
        seeds = []
        for name in self.survivors:
            seed = self._secret("seeds", name)
            if hashlib.sha256(seed).hexdigest() != self.replies["share"][name].body["commitment"]:
                raise ProtocolError(f"the shares of {name}'s own mask don't give what it committed to: there is no sum")
            seeds.append((seed, -1))
        for gone in sorted(set(self.replies["share"]) - set(self.survivors)):
            others = [other for other in self.neighbours[gone] if other in self.survivors]
            staying = [other for other in others if gone not in self._unopened(other)]
            if not staying:
                continue
            secret = X25519PrivateKey.from_private_bytes(self._secret("keys", gone))
            if secret.public_key().public_bytes_raw().hex() != self.replies["advertise"][gone].body["keys"][0]:
                raise ProtocolError(f"the shares of {gone}'s key don't give its key: there is no sum")
            for other in staying:
                public = bytes.fromhex(self.replies["advertise"][other].body["keys"][0])
                question = self.replies["mask"][other].body["question"]
                seed = mask_seed(self.agreement, self.session, gone, other, secret, public, question)
                seeds.append((seed, -mask_sign(other, gone)))
        add_masks(self.masked_sum, seeds)
        self.total, self.masked_sum = centred(self.masked_sum), None

    @property
    def mean(self) -> np.ndarray:
        """float32 [L]: the survivors' mean, weighted by declared sizes."""
        return self.agreement.fixed_point.mean(self.total, self.agreement.weight(*self.survivors))


Exchange = Callable[[str, Mapping[str, bytes]], Iterable[Reply]]


def run_round(server: SecAggServer, exchange: Exchange) -> list[str]:
    """Take a round to its end, or raise as :meth:`SecAggServer.close` does.

    ``exchange`` is the transport: called with the step and a request for each hospital, it gives the replies that came
    in time. Gives why replies were refused, a line each; those hospitals count as gone.
    """
    refused = []
    while server.step is not None:
        for reply in exchange(server.step, server.requests()):
            try:
                server.receive(reply)
            except ProtocolError as error:
                refused.append(str(error))
        server.close()
    return refused
