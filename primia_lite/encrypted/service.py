"""Encrypted diagnosis over HTTP: the model owner's service (starlette, uvicorn).

A client asks for a model's description, opens a session with its public keys, and posts a film's ciphertexts; back come
masked replies. The service keeps public keys and counters, nothing else. TLS protects traffic; without it the film is
still encrypted, but anybody on the way may change bytes, or use a session.
"""

from __future__ import annotations

import collections
import secrets
import struct
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass

import anyio
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from primia_lite.config import UserError
from primia_lite.encrypted.card import ModelCard
from primia_lite.encrypted.ckks import Server, Session
from primia_lite.encrypted.packing import Packing
from primia_lite.encrypted.seal import CiphertextError

# A film's ciphertexts in one body: their number, then each one's length and bytes.
_COUNT = struct.Struct("<I")
_MOST_PARTS = 1 << 14


@dataclass(frozen=True)
class Limits:
    """What one client may cost. None switches a limit off.

    Attributes
    ----------
    sessions : kept at a time; opening one more closes the one that wasn't used for longest
    session_s : seconds without a query after which a session is closed
    queries : films in a session. A linear head of d features is known after d + 1 chosen queries, in whatever
        sessions; so this slows extraction down, and does not prevent it
    per_minute : queries of a session in a minute, at most
    opened_per_minute : sessions opened from one address in a minute
    timeout_s : seconds that a request may take, its upload included
    waiting : requests that wait for a core; more are sent away
    """

    sessions: int | None = 64
    session_s: float | None = 3600.0
    queries: int | None = 1000
    per_minute: int | None = 120
    opened_per_minute: int | None = 12
    timeout_s: float = 60.0
    waiting: int | None = 64


NO_LIMITS = Limits(None, None, None, None, None, 600.0, None)


class Refused(Exception):
    """An answer other than success: status, sentence, seconds to wait."""

    def __init__(self, status: int, sentence: str, wait_s: float | None = None):
        super().__init__(sentence)
        self.status, self.sentence, self.wait_s = status, sentence, wait_s


def join(parts: list[bytes]) -> bytes:
    """A film's ciphertexts as one body."""
    return b"".join([_COUNT.pack(len(parts)), *(piece for part in parts for piece in (_COUNT.pack(len(part)), part))])


def split(body: bytes) -> list[bytes]:
    """:func:`join` undone.

    Raises
    ------
    CiphertextError
        Lengths that don't fit.
    """
    if len(body) < 4 or (number := _COUNT.unpack_from(body)[0]) > _MOST_PARTS:
        raise CiphertextError("this body isn't a list of ciphertexts: send what service.join returned")
    parts, place = [], 4
    for _ in range(number):
        if place + 4 > len(body):
            raise CiphertextError("this list of ciphertexts was cut")
        (length,) = _COUNT.unpack_from(body, place)
        place += 4
        if place + length > len(body):
            raise CiphertextError("this list of ciphertexts was cut")
        parts.append(body[place : place + length])
        place += length
    if place != len(body):
        raise CiphertextError(f"{len(body) - place} bytes follow the ciphertexts")
    return parts


def most_key_bytes(packing: Packing) -> int:
    """What a client's public material can be at most: each evaluation key has a pair of polynomials for each prime."""
    p = packing.parameters
    polynomial = 8 * p.poly_modulus_degree * len(p.coeff_mod_bit_sizes)
    evaluation = (len(packing.rotations) + packing.relinearise) * (len(p.coeff_mod_bit_sizes) - 1)
    # Galois keys are kept in a table with a place for each of N rotations.
    table = 64 * p.poly_modulus_degree if packing.rotations else 0
    return 2 * polynomial * (1 + evaluation) + table + 8192


def most_upload_bytes(packing: Packing) -> int:
    p = packing.parameters
    primes = max(1, len(p.coeff_mod_bit_sizes) - 1)
    return packing.uploads * (2 * 8 * p.poly_modulus_degree * primes + 1024) + 1024


class _Rate:
    """Events in the last minute, by key."""

    def __init__(self, most: int | None):
        self.most, self.events = most, collections.OrderedDict()

    def check(self, key: str) -> None:
        if self.most is None:
            return
        now = time.monotonic()
        times = self.events.setdefault(key, collections.deque())
        self.events.move_to_end(key)
        while len(self.events) > 4096:  # many addresses: the oldest is forgotten
            self.events.popitem(last=False)
        while times and times[0] < now - 60:
            times.popleft()
        if len(times) >= self.most:
            wait = 60 - (now - times[0])
            raise Refused(429, f"more than {self.most} requests in a minute: wait {wait:.0f} s", wait)
        times.append(now)


class _Open:
    """An open session."""

    def __init__(self, model: str, session: Session):
        self.model, self.session, self.used, self.queries = model, session, time.monotonic(), 0


class Service:
    """The application's state and handlers; ``app`` is for an ASGI server.

    Parameters
    ----------
    cards : models to serve, by the name in the address
    threads : that compute at a time
    """

    def __init__(self, cards: dict[str, ModelCard], limits: Limits | None = None, threads: int = 1):
        self.limits = limits or Limits()
        self.cards = cards
        self.servers = {
            name: Server(card.network(), tuple(card.in_shape), keep_costs=False) for name, card in cards.items()
        }
        self.open: collections.OrderedDict[str, _Open] = collections.OrderedDict()
        self.queries, self.waiting, self.threads = 0, 0, threads
        self.started = time.monotonic()
        self._opened, self._asked = _Rate(self.limits.opened_per_minute), _Rate(self.limits.per_minute)
        self._limiter: anyio.CapacityLimiter | None = None
        routes = [
            Route("/health", self._guard(self.health)),
            Route("/models", self._guard(self.models)),
            Route("/models/{model}/sessions", self._guard(self.open_session), methods=["POST"]),
            Route("/sessions/{token}/diagnose", self._guard(self.diagnose), methods=["POST"]),
            Route("/sessions/{token}", self._guard(self.close_session), methods=["DELETE"]),
        ]
        self.app = Starlette(routes=routes)

    def _guard(self, handler):
        """Errors as a status and a sentence; no traceback leaves, and nothing stops the service."""

        async def answer(request: Request) -> Response:
            try:
                with anyio.fail_after(self.limits.timeout_s):
                    return await handler(request)
            except Refused as refused:
                headers = {} if refused.wait_s is None else {"Retry-After": str(max(1, round(refused.wait_s)))}
                if refused.status == 413:  # what is still on its way isn't read
                    headers["Connection"] = "close"
                return JSONResponse({"error": refused.sentence}, refused.status, headers=headers)
            except UserError as error:
                return JSONResponse({"error": str(error)}, 400)
            except TimeoutError:
                return JSONResponse({"error": f"this took longer than {self.limits.timeout_s:g} s"}, 503)
            except ClientDisconnect:
                return Response(status_code=400)

        return answer

    async def _body(self, request: Request, most: int) -> bytes:
        """The request's body, unless it is too large: then refused before it is read."""
        sentence = f"the body is larger than the {most} bytes that this model takes"
        declared = request.headers.get("content-length", "0")
        if declared.isdigit() and int(declared) > most:
            raise Refused(413, sentence)
        parts, size = [], 0
        stream: AsyncIterator[bytes] = request.stream()
        async for part in stream:
            size += len(part)
            if size > most:
                raise Refused(413, sentence)
            parts.append(part)
        return b"".join(parts)

    async def _compute(self, function, *arguments):
        """In a thread, so that others are answered meanwhile."""
        if self.limits.waiting is not None and self.waiting >= self.limits.waiting:
            raise Refused(503, "too many requests are waiting: try again in a moment", 1)
        if self._limiter is None:
            self._limiter = anyio.CapacityLimiter(self.threads)
        self.waiting += 1
        try:
            return await anyio.to_thread.run_sync(lambda: function(*arguments), limiter=self._limiter)
        finally:
            self.waiting -= 1

    def _session(self, token: str) -> _Open:
        self._expire()
        if token not in self.open:
            raise Refused(404, "this session is unknown, was closed or has expired: open a new one")
        self.open.move_to_end(token)
        return self.open[token]

    def _expire(self) -> None:
        if self.limits.session_s is not None:
            latest = time.monotonic() - self.limits.session_s
            for token in [token for token, entry in self.open.items() if entry.used < latest]:
                del self.open[token]

    async def health(self, request: Request) -> Response:
        return JSONResponse(
            {
                "status": "ok",
                "uptime_s": round(time.monotonic() - self.started, 1),
                "sessions": len(self.open),
                "queries": self.queries,
                "waiting": self.waiting,
            }
        )

    async def models(self, request: Request) -> Response:
        return JSONResponse(
            {name: card.describe() | {"packing": self.servers[name].describe()} for name, card in self.cards.items()}
        )

    async def open_session(self, request: Request) -> Response:
        name = request.path_params["model"]
        if name not in self.servers:
            raise Refused(404, f"there is no model {name!r}: /models lists {', '.join(self.servers)}")
        self._opened.check(request.client.host if request.client else "")
        server = self.servers[name]
        body = await self._body(request, most_key_bytes(server.packing))
        session = await self._compute(server.open, body)
        self._expire()
        while self.limits.sessions is not None and len(self.open) >= self.limits.sessions:
            self.open.popitem(last=False)
        token = secrets.token_urlsafe(32)
        self.open[token] = _Open(name, session)
        return JSONResponse({"session": token}, 201)

    async def diagnose(self, request: Request) -> Response:
        token = request.path_params["token"]
        entry = self._session(token)
        if self.limits.queries is not None and entry.queries >= self.limits.queries:
            raise Refused(429, f"this session had its {self.limits.queries} films: open another one", 60)
        self._asked.check(token)
        body = await self._body(request, most_upload_bytes(self.servers[entry.model].packing))
        uploads = split(body)
        entry.queries += 1
        entry.used = time.monotonic()
        replies = await self._compute(entry.session.diagnose, uploads)
        self.queries += 1
        return Response(join(replies), media_type="application/octet-stream")

    async def close_session(self, request: Request) -> Response:
        self._session(request.path_params["token"])
        del self.open[request.path_params["token"]]
        return Response(status_code=204)


def serve(
    cards: dict[str, ModelCard], host: str = "127.0.0.1", port: int = 8000, *, limits: Limits | None = None,
    certfile: str | None = None, keyfile: str | None = None, threads: int = 1,
) -> None:  # fmt: skip
    """Run the service until it is stopped.

    Raises
    ------
    UserError
        One of certificate and key without the other.
    """
    import uvicorn

    if (certfile is None) != (keyfile is None):
        raise UserError("TLS needs both --certfile and --keyfile")
    service = Service(cards, limits, threads)
    uvicorn.run(
        service.app, host=host, port=port, ssl_certfile=certfile, ssl_keyfile=keyfile, log_level="warning",
        timeout_keep_alive=30, limit_concurrency=256, server_header=False,
    )  # fmt: skip
