"""The hospital's side of the service: asks for a diagnosis over HTTP, and tries again where that may help.

It trusts nobody: what answers may be another program, a proxy, or a service that was taken over. Answers are of bounded
size and time and aren't decompressed, a description is checked before it decides anything, texts are cleaned before
they are shown, and a reply's sizes, level, scale and coefficients are checked; SEAL reads nothing that came from there.
"""

from __future__ import annotations

import contextlib
import random
import re
import threading
import time
import urllib.parse
from concurrent.futures import Future

import httpx
import numpy as np

from primia_lite.apps.service.connection import connector
from primia_lite.config import UserError, printable
from primia_lite.encrypted.client import CkksClient
from primia_lite.encrypted.flooding import Flooding
from primia_lite.encrypted.model_card import prepare_film
from primia_lite.encrypted.packing import Packing
from primia_lite.encrypted.seal import CiphertextError
from primia_lite.encrypted.wire import (
    MAX_PUBLIC_BYTES,
    join,
    most_key_bytes,
    most_reply_bytes,
    most_upload_bytes,
    packing_from,
    split,
)
from primia_lite.federation.untrusted import read_json

# Of an answer that isn't a reply: descriptions of all models, or a sentence.
_MOST_BYTES = 1 << 20
# Of a description.
_MOST_SIDE, _MOST_CLASSES, _MOST_NAME = 1024, 1000, 60


class ServiceError(UserError):
    """The service said no, or can't be reached; with its own sentence where it gave one."""

    def __init__(self, sentence: str, status: int = 0):
        super().__init__(printable(sentence, 1000))
        self.status = status


class RemoteServer:
    """A model behind a service: ``diagnose`` takes a film and returns its logits.

    Makes a key of its own, opens a session, and opens another if that one ended. To an address of this machine it
    connects itself; elsewhere by the proxy that ``HTTP_PROXY``, ``HTTPS_PROXY`` or ``ALL_PROXY`` names, unless
    ``NO_PROXY`` excepts it.

    Parameters
    ----------
    url : of the service, such as http://127.0.0.1:8000
    model : its name there; may be left out where there is one
    ca_file : certificate to trust for https; the system's if left out
    timeout_s, retries
        Seconds of silence in one request, and how often it is made again; all of it together has four times as long.
        Waits grow from 0.2 s, doubling, or are what the service asks for; beyond 30 s its answer is raised instead.
    decimals, flooding : see :class:`~primia_lite.encrypted.client.CkksClient`
    transport : of httpx, for tests

    Attributes
    ----------
    name, description : of the model, as the service tells them, checked; see
        :meth:`~primia_lite.encrypted.model_card.ModelCard.describe`
    client : :class:`~primia_lite.encrypted.client.CkksClient`, with the key
    token : of the open session, None without

    Raises
    ------
    ServiceError
        Not reachable, another service, a description that can't be, or no such model.
    UserError
        Certificates that can't be read, an address or a proxy's address that is none, or flooding for a model that is
        served without room for it.
    """

    def __init__(
        self, url: str, model: str | None = None, *, ca_file: str | None = None, timeout_s: float = 60.0,
        retries: int = 4, decimals: int = 3, flooding: Flooding | None = None,
        transport: httpx.BaseTransport | None = None,
    ):  # fmt: skip
        self.timeout_s, self.retries, self.token = timeout_s, retries, None
        self._most_bytes = _MOST_BYTES
        self._connect, self._where = connector(url, ca_file, timeout_s, transport)
        self._http = self._connect()
        offered = self._answer("GET", "/models")
        if model is None and len(offered) == 1:
            (model,) = offered
        if model not in offered:
            raise ServiceError(f"the service has no model {model!r}: choose one of {', '.join(offered)}", 404)
        try:
            if not model.isprintable() or len(model) > 200:
                raise UserError("a name that can't be shown")
            self.name, (self.description, packing) = model, _read(offered[model])
        except UserError as error:
            raise ServiceError(f"{self._another} ({error})") from error
        self._most_bytes = max(self._most_bytes, most_reply_bytes(packing))
        self.client = CkksClient(packing, decimals, flooding)

    def __enter__(self) -> RemoteServer:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """End the session; the service forgets the keys."""
        if self.token is not None:
            token, self.token = self.token, None
            with contextlib.suppress(ServiceError, httpx.TransportError):  # else it will expire
                self._exchange("DELETE", f"/sessions/{token}", None, 5.0)
        self._http.close()

    def _exchange(self, method: str, path: str, content: bytes | None, seconds: float) -> httpx.Response:
        """One request and its whole answer; a ServiceError if that is too large, compressed, takes too long, or isn't
        HTTP, and httpx's TransportError if none came."""
        answer, line = Future(), self._http

        def ask() -> None:
            try:
                answer.set_result(self._read_answer(line, method, path, content))
            except BaseException as error:
                answer.set_exception(error)

        # httpx's limits of time start anew with each byte. A thread can be left behind; closing its line ends it.
        threading.Thread(target=ask, daemon=True).start()
        try:
            return answer.result(seconds)
        except (ServiceError, httpx.TransportError):
            raise
        except TimeoutError:
            self._http = self._connect()
            line.close()
            raise ServiceError(f"{self._where} took too long to answer: try again later") from None
        except Exception as error:  # of what strangers send, libraries make many kinds
            raise ServiceError(self._another) from error

    def _read_answer(self, line: httpx.Client, method: str, path: str, content: bytes | None) -> httpx.Response:
        with line.stream(method, path, content=content) as response:
            if response.headers.get("Content-Encoding", "identity").strip().lower() != "identity":
                raise ServiceError(f"{self._where} sent a compressed answer, which wasn't asked for")
            body = bytearray()
            for part in response.iter_bytes():
                body += part
                if len(body) > self._most_bytes:
                    raise ServiceError(f"{self._where} sent more than the {self._most_bytes} bytes that it may")
        return httpx.Response(response.status_code, headers=response.headers, content=bytes(body))

    def _ask(self, method: str, path: str, content: bytes | None = None) -> bytes:
        """The content of a successful answer. httpx's own retries are for connections only, not for answers."""
        deadline = time.monotonic() + 4 * self.timeout_s
        for attempt in range(self.retries + 1):
            wait = 0.2 * 2**attempt * random.uniform(0.7, 1.3)
            try:
                response = self._exchange(method, path, content, deadline - time.monotonic())
            except httpx.TransportError as error:
                refused = ServiceError(
                    f"no service answers at {self._where} ({printable(str(error))}): start one with "
                    "`primia-lite serve`, or check the address"
                )
            else:
                if response.is_success:
                    return response.content
                refused = ServiceError(self._sentence(response), response.status_code)
                asked = response.headers.get("Retry-After", "")
                wait = max(wait, float(asked)) if asked.isdecimal() else wait
                # For longer, the caller should decide.
                if response.status_code not in (408, 429, 502, 503, 504) or wait > 30:
                    raise refused
            if attempt == self.retries or time.monotonic() + wait > deadline:
                break
            time.sleep(wait)
        raise refused

    def _sentence(self, response: httpx.Response) -> str:
        with contextlib.suppress(UserError):
            if isinstance(sentence := read_json(response.content, "the answer").get("error"), str):
                return f"the service says: {printable(sentence, 500)}"
        return f"{self._where} answered {response.status_code}, without a sentence of this service: check the address"

    @property
    def _another(self) -> str:
        return f"what answers at {self._where} isn't this service: check the address"

    def _answer(self, method: str, path: str, content: bytes | None = None) -> dict:
        """The service's JSON."""
        try:
            return read_json(self._ask(method, path, content), "the answer", _MOST_BYTES)
        except ServiceError:
            raise
        except UserError as error:
            raise ServiceError(self._another) from error

    def open(self) -> str:
        """Open a session, unless one is open."""
        if self.token is None:
            name = urllib.parse.quote(self.name, safe="")
            token = self._answer("POST", f"/models/{name}/sessions", self.client.public()).get("session")
            if not isinstance(token, str) or not re.fullmatch(r"[\w-]{1,200}", token, re.ASCII):
                raise ServiceError(self._another)
            self.token = token
        return self.token

    def diagnose(self, film: np.ndarray) -> np.ndarray:
        """Logits, float64 [classes]; of uint8 pixels [H, W], or of a film as the model takes it.

        Raises
        ------
        ServiceError
            The service said no, or what it sent isn't a reply.
        UserError
            A film of another size or with values that aren't finite.
        """
        film = np.asarray(film)
        if film.dtype == np.uint8:
            film = prepare_film(self.description, film)
        body = join(self.client.encrypt(film))
        self.client.refuse_secret(body)
        try:
            reply = self._ask("POST", f"/sessions/{self.open()}/diagnose", body)
        except ServiceError as error:
            if error.status not in (404, 410):
                raise
            self.token = None  # it made room for others, or the service was started anew
            reply = self._ask("POST", f"/sessions/{self.open()}/diagnose", body)
        try:
            return self.client.decrypt(split(reply))
        except CiphertextError as error:
            raise ServiceError(f"{self._where} sent something else than a reply ({error})") from error


def _read(told) -> tuple[dict, Packing]:
    """A model's description and packing, from what a service tells of it; a UserError if it isn't what
    :meth:`~primia_lite.encrypted.model_card.ModelCard.describe` tells, or more than a hospital should do for it."""
    if not isinstance(told, dict):
        raise UserError("no description")
    out = {name: told.get(name) for name in ("model", "class_names", "image_size", "standardise", "trained_on")}
    names, texts = out["class_names"], (out["model"], out["trained_on"])
    if type(out["image_size"]) is not int or not 1 <= out["image_size"] <= _MOST_SIDE:
        raise UserError("its image_size can't be")
    if type(out["standardise"]) is not bool or not all(isinstance(text, str) for text in texts):
        raise UserError("a part of its description is missing")
    if not isinstance(names, list) or len(names) > _MOST_CLASSES or not all(isinstance(name, str) for name in names):
        raise UserError("its class_names can't be")
    names = tuple(printable(name, _MOST_NAME) for name in names)
    packing = packing_from(told.get("packing"))
    if not all(names) or len(set(names)) != len(names) or len(names) != packing.classes:
        raise UserError("its class_names can't be")
    if packing.in_slots or max(most_key_bytes(packing), most_upload_bytes(packing)) > MAX_PUBLIC_BYTES:
        raise UserError("its packing isn't for one film, or asks for too much")
    model, trained_on = (printable(text, 200) for text in texts)
    return out | {"model": model, "class_names": names, "trained_on": trained_on}, packing
