"""Encrypted diagnosis over HTTP: the model owner's service (starlette, uvicorn).

A client asks for a model's description, opens a session with its public keys, and posts a film's ciphertexts; back come
masked replies. This process only passes bytes on: keys and weights are in workers. Strangers come through a reverse
proxy, which brings TLS and sends away what is slow or too much (docs/service.md).

Workers have SEAL read what strangers sent. TenSEAL 0.3.18, the newest, brings SEAL 4.3.3, and 4.4.0 calls itself a
critical security update for untrusted input. Sizes, levels and scales are checked before SEAL gets any byte, and this
process takes plain bytes of its workers; but who takes a worker over has its weights. So until TenSEAL brings 4.4.0,
serve hospitals that you know.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import itertools
import logging
import math
import secrets
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import anyio
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from primia_lite.apps.service.workers import InProcess, SessionGone, Worker, WorkerDied
from primia_lite.config import UserError
from primia_lite.encrypted.model_card import ModelCard
from primia_lite.encrypted.server import plan
from primia_lite.encrypted.wire import most_key_bytes, most_reply_bytes, most_upload_bytes, spec_of

if TYPE_CHECKING:
    import uvicorn

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """What clients may cost. Addresses aren't accounts: who has many can still crowd out others.

    Attributes
    ----------
    queries : films asked for in a session. A linear head of d features without bias is known after d chosen queries or
        fewer, in whatever sessions; so this and ``per_minute`` slow extraction down, and do not prevent it
    per_minute, opened_per_minute : films, and sessions opened, from one address in a minute
    timeout_s : seconds that a body may take to come, again those that a request may wait for a worker, and again those
        that one may compute before it is replaced
    body_bytes : of the bodies of all requests that are under way
    sessions, key_bytes : kept by a worker, and their public keys; the longest unused is closed for another
    """

    queries: float = 1000
    per_minute: float = 120
    opened_per_minute: float = 12
    timeout_s: float = 60.0
    body_bytes: int = 1 << 29
    sessions: int = 32
    key_bytes: int = 1 << 28


NO_LIMITS = Limits(math.inf, math.inf, math.inf, timeout_s=600.0)  # for benchmarks


class Refused(Exception):
    """An answer other than success: status, sentence, further headers."""

    def __init__(self, status: int, sentence: str, **headers: str):
        super().__init__(sentence)
        self.answer = JSONResponse({"error": sentence}, status, headers)


class Service:
    """The application's state and handlers; ``app`` is for an ASGI server.

    Parameters
    ----------
    cards : models to serve, by the name in the address
    workers : processes that compute; 0 computes in this one, which a hostile ciphertext that breaks SEAL would end
    """

    def __init__(self, cards: dict[str, ModelCard], limits: Limits | None = None, workers: int = 0):
        self.limits, self.cards = limits or Limits(), cards
        self.packings = {
            name: plan(card.network(), tuple(card.in_shape), flooded=card.flooded).packing
            for name, card in cards.items()
        }
        most_bytes = max(map(most_reply_bytes, self.packings.values()), default=0)
        bounds = self.limits.sessions, self.limits.key_bytes, self.limits.queries
        self.workers = [Worker(cards, bounds, most_bytes) for _ in range(workers)] or [InProcess(cards, bounds)]
        # A lane for each, so that one that hangs keeps nobody from another.
        self._lanes = [asyncio.Lock() for _ in self.workers]
        self._turns = itertools.cycle(range(len(self.workers)))
        self.queries, self.body_bytes, self.started = 0, 0, time.monotonic()
        self._minute, self._counts = 0, collections.Counter()
        routes = [
            Route("/health", self._guard(self.health)),
            Route("/models", self._guard(self.models)),
            Route("/models/{model}/sessions", self._guard(self.open_session), methods=["POST"]),
            Route("/sessions/{token}/diagnose", self._guard(self.diagnose), methods=["POST"]),
            Route("/sessions/{token}", self._guard(self.close_session), methods=["DELETE"]),
        ]
        self.app = Starlette(routes=routes, lifespan=self._lifespan)

    @contextlib.asynccontextmanager
    async def _lifespan(self, app):
        yield
        for worker in self.workers:
            worker.stop()

    def _guard(self, handler):
        """Errors as a status and a sentence; no traceback leaves, and nothing stops the service."""

        async def answer(request: Request) -> Response:
            try:
                return await handler(request)
            except Refused as refused:
                return refused.answer
            except UserError as error:
                return JSONResponse({"error": str(error)}, 400)
            except ClientDisconnect:
                return Response(status_code=400)
            except Exception:  # a fault of ours: the client gets no traceback, the log does
                _log.exception("%s %s", request.method, request.scope["route"].path)
                return JSONResponse({"error": "the service failed on this request: ask its owner to read the log"}, 500)

        return answer

    @contextlib.asynccontextmanager
    async def _body(self, request: Request, most: int):
        """The request's whole body. It is read before anything else is said: a client that still writes would miss the
        answer; only what is too large or too slow is cut off."""
        out, close = bytearray(), {"Connection": "close"}
        try:
            try:
                async with asyncio.timeout(self.limits.timeout_s):
                    async for part in request.stream():
                        if len(out) + len(part) > most:
                            raise Refused(413, f"the body is larger than the {most} bytes that it may have", **close)
                        if self.body_bytes + len(part) > self.limits.body_bytes:
                            raise Refused(503, "too many large requests come at once: try again in a moment", **close)
                        out += part
                        self.body_bytes += len(part)
            except TimeoutError:
                sentence = f"the body took longer than {self.limits.timeout_s:g} s: send it again"
                raise Refused(408, sentence, **close) from None
            yield bytes(out)
        finally:
            self.body_bytes -= len(out)

    def _count(self, request: Request, what: str, most: float) -> None:
        """Refuse what comes too often from one address."""
        minute, seconds = divmod(time.monotonic(), 60)
        if minute != self._minute:
            self._minute, self._counts = minute, collections.Counter()
        key = what, request.client.host if request.client else ""
        if self._counts[key] >= most:
            wait = f"{math.ceil(60 - seconds)}"
            raise Refused(429, f"more than {most} {what} in a minute: wait {wait} s", **{"Retry-After": wait})
        self._counts[key] += 1

    async def _compute(self, number: int, what: str, *arguments: str | bytes) -> bytes:
        """In a worker, when those before it are done."""
        worker, lane, timeout_s = self.workers[number], self._lanes[number], self.limits.timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                await lane.acquire()
        except TimeoutError:
            raise Refused(503, "those before this request took too long: try again in a moment") from None
        watch = asyncio.get_running_loop().call_later(
            timeout_s, worker.kill, worker.pid, f"{what} took more than {timeout_s:g} s"
        )
        try:
            return await anyio.to_thread.run_sync(worker.call, what, *arguments)
        except SessionGone:
            raise Refused(410, "this session is unknown, was closed or had its films: open a new one") from None
        except WorkerDied as error:
            raise Refused(503, f"the computation failed ({error}), and its sessions with it: open a new one") from error
        finally:
            watch.cancel()
            lane.release()

    def _worker_of(self, token: str) -> int:
        """A token begins with its worker's number; of another, any worker says that there is no such session."""
        number = token.partition("-")[0]
        return int(number) % len(self.workers) if number.isdecimal() and len(number) < 4 else 0

    async def health(self, request: Request) -> Response:
        uptime_s = round(time.monotonic() - self.started, 1)
        return JSONResponse({"status": "ok", "uptime_s": uptime_s, "queries": self.queries})

    async def models(self, request: Request) -> Response:
        return JSONResponse(
            {name: card.describe() | {"packing": spec_of(self.packings[name])} for name, card in self.cards.items()}
        )

    async def open_session(self, request: Request) -> Response:
        name = request.path_params["model"]
        if name not in self.packings:
            raise Refused(404, f"there is no model {name!r}: /models lists {', '.join(self.packings)}")
        async with self._body(request, most_key_bytes(self.packings[name])) as public:
            self._count(request, "sessions", self.limits.opened_per_minute)
            number = next(self._turns)
            token = f"{number}-{secrets.token_urlsafe(32)}"
            await self._compute(number, "open", name, token, public)
        return JSONResponse({"session": token}, 201)

    async def diagnose(self, request: Request) -> Response:
        token = request.path_params["token"]
        async with self._body(request, max(map(most_upload_bytes, self.packings.values()))) as uploads:
            self._count(request, "films", self.limits.per_minute)
            reply = await self._compute(self._worker_of(token), "diagnose", token, uploads)
        self.queries += 1
        return Response(reply, media_type="application/octet-stream")

    async def close_session(self, request: Request) -> Response:
        token = request.path_params["token"]
        await self._compute(self._worker_of(token), "close", token)
        return Response(status_code=204)


def uvicorn_server(
    cards: dict[str, ModelCard], *, limits: Limits | None = None, workers: int = 1, proxy: str | None = None
) -> uvicorn.Server:
    """The service for a socket that listens: ``run(sockets=[...])`` offers it until it is stopped. ``proxy``: address
    of a reverse proxy, which is believed whose requests it brings; else whoever connects is the client."""
    import uvicorn

    config = uvicorn.Config(
        Service(cards, limits, workers).app, log_level="warning", ws="none", timeout_keep_alive=30,
        limit_concurrency=256, server_header=False, proxy_headers=proxy is not None, forwarded_allow_ips=proxy or "",
    )  # fmt: skip
    return uvicorn.Server(config)
