"""Encrypted diagnosis over HTTP: the model owner's service (starlette, uvicorn).

A client asks for a model's description, opens a session with its public keys, and posts a film's ciphertexts; back come
masked replies. The service keeps public keys and counters, nothing else; keys and weights are in worker processes, so
that this one has time to answer. TLS protects traffic; without it the film is still encrypted, but anybody on the
way may change bytes, or use a session.

Workers have SEAL read what strangers sent. TenSEAL 0.3.18, the newest, brings SEAL 4.3.3, and 4.4.0 calls itself a
critical security update for untrusted input. Sizes, levels and scales are checked before SEAL gets any byte, and this
process takes plain bytes of its workers; but who takes a worker over has its weights. So until TenSEAL brings 4.4.0,
serve hospitals that you know.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import functools
import logging
import secrets
import ssl
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import anyio
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from primia_lite.apps.service.limits import Limits, Rate, Refused
from primia_lite.apps.service.workers import InProcess, SessionGone, Worker, WorkerDied
from primia_lite.config import UserError
from primia_lite.encrypted.model_card import ModelCard
from primia_lite.encrypted.server import plan
from primia_lite.encrypted.wire import most_key_bytes, most_reply_bytes, most_upload_bytes, spec_of

if TYPE_CHECKING:
    import uvicorn


_log = logging.getLogger(__name__)
_ENDED = "this session was closed, or has expired: open a new one"


class _CutShort(JSONResponse):
    """An answer while a body is still on its way. If the connection were closed at once, the system would throw the
    answer away before a client that still writes has read it; so what comes is dropped for a moment first."""

    moment_s, most_bytes = 1.0, 8 << 20

    async def __call__(self, scope, receive, send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self.body, "more_body": True})
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.moment_s):
                dropped = 0
                while dropped < self.most_bytes and (message := await receive()).get("more_body"):
                    dropped += len(message["body"])
        await send({"type": "http.response.body", "body": b"", "more_body": False})


@dataclass
class OpenSession:
    model: str
    worker: InProcess | Worker
    used: float
    queries: int = 0


class Service:
    """The application's state and handlers; ``app`` is for an ASGI server.

    Parameters
    ----------
    cards : models to serve, by the name in the address
    workers : processes that compute; 0 computes in this one, which a hostile ciphertext that breaks SEAL would end
    """

    def __init__(self, cards: dict[str, ModelCard], limits: Limits | None = None, workers: int = 0):
        self.limits = limits or Limits()
        self.cards = cards
        self.packings = {
            name: plan(card.network(), tuple(card.in_shape), flooded=card.flooded).packing
            for name, card in cards.items()
        }
        self._key_bytes = {name: most_key_bytes(packing) for name, packing in self.packings.items()}
        most_bytes = max(map(most_reply_bytes, self.packings.values()), default=0)
        self.workers = [Worker(cards, most_bytes) for _ in range(workers)] or [InProcess(cards)]
        # A lane for each, so that one that hangs keeps nobody from another.
        self._lanes = {worker: asyncio.Lock() for worker in self.workers}
        self.waiting, self._closing = collections.Counter(), set()
        # By last use; those that ended, so that their clients are told that, and not that they never were.
        self.open: collections.OrderedDict[str, OpenSession] = collections.OrderedDict()
        self.ended: collections.OrderedDict[str, None] = collections.OrderedDict()
        self.queries, self.body_bytes = 0, 0
        self.started = time.monotonic()
        self._opened, self._asked = Rate(self.limits.opened_per_minute), Rate(self.limits.per_minute)
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
                if request.method != "POST" or getattr(request.state, "body_is_read", False):
                    return JSONResponse({"error": refused.sentence}, refused.status, headers=refused.headers)
                headers = refused.headers | {"Connection": "close"}
                return _CutShort({"error": refused.sentence}, refused.status, headers=headers)
            except UserError as error:
                return JSONResponse({"error": str(error)}, 400)
            except ClientDisconnect:
                return Response(status_code=400)
            except Exception:  # a fault of ours: the client gets no traceback, the log does
                _log.exception("%s %s", request.method, request.scope["route"].path)
                return JSONResponse({"error": "the service failed on this request: ask its owner to read the log"}, 500)
            finally:
                self.body_bytes -= getattr(request.state, "body_bytes", 0)

        return answer

    async def _body(self, request: Request, most: int) -> bytes:
        """The request's body, unless it is too large: then refused before it is read."""
        sentence = f"the body is larger than the {most} bytes that this model takes"
        declared = request.headers.get("content-length", "0")
        if declared.isdecimal() and int(declared[:20]) > most:
            raise Refused(413, sentence)
        out, request.state.body_bytes = bytearray(), 0
        try:
            async with asyncio.timeout(self.limits.timeout_s):
                async for part in request.stream():
                    if len(out) + len(part) > most:
                        raise Refused(413, sentence)
                    if self.body_bytes + len(part) > self.limits.body_bytes:
                        raise Refused(503, "too many large requests come at once: try again in a moment", 1)
                    out += part
                    self.body_bytes += len(part)
                    request.state.body_bytes += len(part)
        except TimeoutError:
            raise Refused(408, f"the body took longer than {self.limits.timeout_s:g} s: send it again") from None
        request.state.body_is_read = True
        return bytes(out)

    async def _call(self, worker: InProcess | Worker, what: str, *arguments, wait_s: float | None = None):
        """In a worker, when those before it are done."""
        async with asyncio.timeout(wait_s):
            await self._lanes[worker].acquire()
        timeout_s = self.limits.timeout_s
        watch = asyncio.get_running_loop().call_later(
            timeout_s, worker.kill, worker.pid, f"{what} took more than {timeout_s:g} s"
        )
        try:
            return await anyio.to_thread.run_sync(worker.call, what, *arguments)
        except WorkerDied:
            for token in [token for token, entry in self.open.items() if entry.worker is worker]:
                self._forget(token)
            raise
        finally:
            watch.cancel()
            self._lanes[worker].release()

    async def _compute(self, worker: InProcess | Worker, what: str, *arguments):
        """In a worker, unless too many wait for it."""
        if self.waiting[worker] >= self.limits.waiting:
            raise Refused(503, "too many requests are waiting: try again in a moment", 1)
        self.waiting[worker] += 1
        try:
            return await self._call(worker, what, *arguments, wait_s=self.limits.timeout_s)
        except TimeoutError:
            raise Refused(503, "those before this request took too long: try again in a moment", 1) from None
        except WorkerDied as error:
            raise Refused(
                503, f"the computation failed ({error}), and its sessions with it: open another one"
            ) from error
        finally:
            self.waiting[worker] -= 1

    def _session(self, token: str) -> OpenSession:
        self._expire()
        if token in self.ended:
            raise Refused(410, _ENDED)
        if token not in self.open:
            raise Refused(404, "this session is unknown: open a new one")
        self.open.move_to_end(token)
        self.open[token].used = time.monotonic()
        return self.open[token]

    def _expire(self) -> None:
        """End sessions that are too old, and the longest unused beyond those allowed; not the last that there is."""
        limits, latest = self.limits, time.monotonic() - self.limits.session_s
        held = sum(self._key_bytes[entry.model] for entry in self.open.values())
        for token, entry in list(self.open.items()):
            many = len(self.open) > 1 and (len(self.open) > limits.sessions or held > limits.key_bytes)
            if entry.used >= latest and not many:
                break
            held -= self._key_bytes[entry.model]
            self._end(token)

    def _forget(self, token: str) -> OpenSession | None:
        """Strike a session off, where its worker has it no more."""
        entry = self.open.pop(token, None)
        if entry is not None:
            self.ended[token] = None
            if len(self.ended) > 4096:
                self.ended.popitem(last=False)
        return entry

    def _end(self, token: str) -> None:
        """End a session. Its worker is told when it is free; nobody waits for that."""
        if (entry := self._forget(token)) is None:  # somebody else was faster
            return

        async def close():
            with contextlib.suppress(WorkerDied):
                await self._call(entry.worker, "close", token)

        task = asyncio.create_task(close())
        self._closing.add(task)  # the loop itself holds tasks weakly
        task.add_done_callback(self._closing.discard)

    async def health(self, request: Request) -> Response:
        uptime_s = round(time.monotonic() - self.started, 1)
        counts = {"sessions": len(self.open), "queries": self.queries, "waiting": self.waiting.total()}
        return JSONResponse({"status": "ok", "uptime_s": uptime_s} | counts)

    async def models(self, request: Request) -> Response:
        return JSONResponse(
            {name: card.describe() | {"packing": spec_of(self.packings[name])} for name, card in self.cards.items()}
        )

    async def open_session(self, request: Request) -> Response:
        name = request.path_params["model"]
        if name not in self.packings:
            raise Refused(404, f"there is no model {name!r}: /models lists {', '.join(self.packings)}")
        self._opened.check(request.client.host if request.client else "")
        body = await self._body(request, self._key_bytes[name])
        token, held = secrets.token_urlsafe(32), collections.Counter(id(entry.worker) for entry in self.open.values())
        worker = min(self.workers, key=lambda worker: held[id(worker)])
        await self._compute(worker, "open", name, token, body)
        self.open[token] = OpenSession(name, worker, time.monotonic())
        self._expire()
        return JSONResponse({"session": token}, 201)

    async def diagnose(self, request: Request) -> Response:
        token = request.path_params["token"]
        entry = self._session(token)
        if entry.queries >= self.limits.queries:
            # Not ended: films of it may be under way.
            raise Refused(410, f"this session had its {self.limits.queries} films: open a new one")
        self._asked.check(request.client.host if request.client else "")
        entry.queries += 1  # before the body comes, or many slow ones would pass together
        body = await self._body(request, most_upload_bytes(self.packings[entry.model]))
        if token not in self.open:  # it ended meanwhile
            raise Refused(410, _ENDED)
        try:
            reply = await self._compute(entry.worker, "diagnose", token, body)
        except SessionGone as error:
            self._forget(token)
            raise Refused(410, _ENDED) from error
        self.queries += 1
        return Response(reply, media_type="application/octet-stream")

    async def close_session(self, request: Request) -> Response:
        token = request.path_params["token"]
        self._session(token)
        self._end(token)
        return Response(status_code=204)


def uvicorn_server(
    cards: dict[str, ModelCard],
    host: str = "127.0.0.1",
    port: int = 8000,
    *,
    limits: Limits | None = None,
    certfile: str | None = None,
    keyfile: str | None = None,
    workers: int = 1,
) -> uvicorn.Server:
    """The service at an address; its ``run()`` offers it until it is stopped.

    Against very many connections, or a client that never reads its answers, put a reverse proxy before it.
    """
    import uvicorn

    from primia_lite.apps.service.protocol import HeadDeadlineProtocol

    if (certfile is None) != (keyfile is None):
        raise UserError("TLS needs both --certfile and --keyfile")
    if certfile is not None:
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certfile, keyfile)
        except OSError as error:  # SSLError is one
            raise UserError(
                f"TLS can't use {certfile} with {keyfile} ({error}): give a certificate and its own key, as PEM files"
            ) from error
    service = Service(cards, limits, workers)
    config = uvicorn.Config(
        service.app,
        host=host,
        port=port,
        ssl_certfile=certfile,
        ssl_keyfile=keyfile,
        log_level="warning",
        http=functools.partial(HeadDeadlineProtocol, head_s=service.limits.head_s),
        ws="none",
        proxy_headers=False,  # whoever connects is the client: a header could pass the limits by address
        timeout_keep_alive=30,
        limit_concurrency=256,
        server_header=False,
    )
    return uvicorn.Server(config)
