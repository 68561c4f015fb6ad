"""The hospital's side of the service: asks for a diagnosis over HTTP, and tries again where that may help."""

from __future__ import annotations

import contextlib
import random
import ssl
import time

import httpx
import numpy as np

from primia_lite.config import UserError
from primia_lite.encrypted.card import prepare_film
from primia_lite.encrypted.ckks import Client
from primia_lite.encrypted.flooding import Flooding
from primia_lite.encrypted.packing import packing_from
from primia_lite.encrypted.service import join, split

# What a model's description must hold.
_TOLD = {"packing", "model", "class_names", "image_size", "standardise"}


class ServiceError(UserError):
    """The service said no, or can't be reached; with its own sentence where it gave one."""

    def __init__(self, sentence: str, status: int = 0):
        super().__init__(sentence)
        self.status = status


class RemoteServer:
    """A model behind a service: ``diagnose`` takes a film and returns its logits.

    Makes a key of its own, opens a session, and opens another if that one expired.

    Parameters
    ----------
    url : of the service, such as http://127.0.0.1:8000
    model : its name there; may be left out where there is one
    ca_file : certificate to trust for https; the system's if left out
    timeout_s, retries : of one request; waits grow from 0.2 s, doubling, or are what the service asks for; beyond 30 s
        its answer is raised instead
    decimals, flooding : see :class:`~primia_lite.encrypted.ckks.Client`
    transport : of httpx, for tests

    Raises
    ------
    ServiceError
        Not reachable, another service, or no such model.
    UserError
        A certificate to trust that can't be read, an address that is none, or flooding for a model that is served
        without room for it.
    """

    def __init__(
        self, url: str, model: str | None = None, *, ca_file: str | None = None, timeout_s: float = 60.0,
        retries: int = 4, decimals: int = 3, flooding: Flooding | None = None,
        transport: httpx.BaseTransport | None = None,
    ):  # fmt: skip
        try:
            verify = ssl.create_default_context(cafile=ca_file) if ca_file else True
        except OSError as error:  # SSLError is one
            raise UserError(
                f"the certificate {ca_file} can't be read ({error}): give a PEM file with the one to trust"
            ) from error
        try:
            self._http = httpx.Client(base_url=url, timeout=timeout_s, verify=verify, transport=transport)
        except httpx.InvalidURL as error:
            raise UserError(f"{url!r} isn't an address ({error}): give one such as http://127.0.0.1:8000") from error
        self.retries = retries
        offered = self._answer("GET", "/models")
        if model is None and len(offered) == 1:
            (model,) = offered
        if model not in offered:
            raise ServiceError(f"the service has no model {model!r}: choose one of {', '.join(offered)}", 404)
        self.name, self.description = model, offered[model]
        if not isinstance(self.description, dict) or not self.description.keys() >= _TOLD:
            raise ServiceError(self._another)
        self.client = Client(packing_from(self.description["packing"]), decimals, flooding)
        self._token: str | None = None

    def __enter__(self) -> RemoteServer:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """End the session; the service forgets the keys."""
        if self._token is not None:
            token, self._token = self._token, None
            with contextlib.suppress(httpx.HTTPError):  # else it will expire
                self._http.delete(f"/sessions/{token}")
        self._http.close()

    def _ask(self, method: str, path: str, content: bytes | None = None) -> httpx.Response:
        for attempt in range(self.retries + 1):
            wait = 0.2 * 2**attempt * random.uniform(0.7, 1.3)
            try:
                response = self._http.request(method, path, content=content)
            except httpx.TransportError as error:
                status = 0
                sentence = (
                    f"no service answers at {self._http.base_url} ({error}): start one with `primia-lite serve`, or "
                    "check the address"
                )
            else:
                if response.is_success:
                    return response
                sentence, status = _sentence(response), response.status_code
                if status not in (408, 429, 502, 503, 504):
                    raise ServiceError(sentence, status)
                asked = response.headers.get("Retry-After", "")
                wait = max(wait, float(asked)) if asked.isdigit() else wait
                if wait > 30:  # for longer, the caller should decide
                    raise ServiceError(sentence, status)
            if attempt < self.retries:
                time.sleep(wait)
        raise ServiceError(sentence, status)

    @property
    def _another(self) -> str:
        return f"what answers at {self._http.base_url} isn't this service: check the address"

    def _answer(self, method: str, path: str, content: bytes | None = None) -> dict:
        """The service's JSON."""
        try:
            answer = self._ask(method, path, content).json()
        except ValueError as error:
            raise ServiceError(self._another) from error
        if not isinstance(answer, dict) or not answer:
            raise ServiceError(self._another)
        return answer

    def open(self) -> str:
        """Open a session, unless one is open."""
        if self._token is None:
            answer = self._answer("POST", f"/models/{self.name}/sessions", self.client.public())
            if not isinstance(token := answer.get("session"), str):
                raise ServiceError(self._another)
            self._token = token
        return self._token

    def diagnose(self, film: np.ndarray) -> np.ndarray:
        """Logits, float64 [classes]; of uint8 pixels [H, W], or of a film as the model takes it.

        Raises
        ------
        ServiceError
            The service said no.
        UserError
            A film of another size or with values that aren't finite.
        """
        film = np.asarray(film)
        if film.dtype == np.uint8:
            film = prepare_film(self.description, film)
        body = join(self.client.encrypt(film))
        self.client.refuse_secret(body)
        try:
            response = self._ask("POST", f"/sessions/{self.open()}/diagnose", body)
        except ServiceError as error:
            if error.status not in (404, 410):
                raise
            self._token = None  # it expired, or the service was started anew
            response = self._ask("POST", f"/sessions/{self.open()}/diagnose", body)
        return self.client.decrypt(split(response.content))


def _sentence(response: httpx.Response) -> str:
    try:
        return f"the service says: {response.json()['error']}"
    except (ValueError, KeyError, TypeError):
        return f"the service answered {response.status_code}"
