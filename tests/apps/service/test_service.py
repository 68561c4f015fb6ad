"""The service: another process, what crosses the wire, limits, bad input, and altered bodies."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import datetime
import ipaddress
import json
import os
import signal
import socket
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import hostile
import httpx
import numpy as np
import psutil
import pytest
import torch
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from starlette.testclient import TestClient
from torch import nn

from primia_lite.apps.service import workers
from primia_lite.apps.service.client import RemoteServer, ServiceError
from primia_lite.apps.service.commands import running
from primia_lite.apps.service.server import NO_LIMITS, Limits, Service, uvicorn_server
from primia_lite.apps.service.workers import InProcess, SessionGone, Worker
from primia_lite.config import UserError, repo_root
from primia_lite.data import load
from primia_lite.encrypted.client import CkksClient
from primia_lite.encrypted.flooding import Flooding
from primia_lite.encrypted.model_card import ModelCard, prepare_film
from primia_lite.encrypted.packing import CNNPacking, LinearPacking
from primia_lite.encrypted.seal import CiphertextError, payload
from primia_lite.encrypted.server import CkksServer
from primia_lite.encrypted.wire import (
    join,
    join_keys,
    most_key_bytes,
    most_reply_bytes,
    most_upload_bytes,
    packing_from,
    spec_of,
    split,
    split_keys,
)
from primia_lite.models import networks

NAMES = ("normal", "bacterial", "viral")
FEATURES = 8
BOUNDS = (32, 1 << 28, 1000)


@pytest.fixture(scope="module")
def card() -> ModelCard:
    torch.manual_seed(0)
    head = nn.Linear(FEATURES, 3, bias=False)
    return ModelCard("litenet", {}, NAMES, 32, (FEATURES,), head.state_dict(), "nothing: random weights")


@pytest.fixture(scope="module")
def deep() -> ModelCard:
    from primia_lite.models.networks import ckksnet

    torch.manual_seed(1)
    options = {"channels": 2, "hidden": 0}
    state = ckksnet(3, (1, 32, 32), **options).state_dict()
    return ModelCard("ckksnet", options, NAMES, 32, (1, 32, 32), state, "nothing: random weights")


def app(cards, limits=NO_LIMITS) -> TestClient:
    return TestClient(Service(cards, limits).app, raise_server_exceptions=True)


def wrapped(body: bytes) -> bytes:
    """In SEAL's header, without compression."""
    return struct.pack("<HBBBBHQ", 0xA15E, 16, 4, 3, 0, 0, 16 + len(body)) + body


def film(seed=0) -> np.ndarray:
    x = np.random.default_rng(seed).normal(size=FEATURES)
    return x / np.linalg.norm(x)


def weights_of(card: ModelCard) -> np.ndarray:
    return card.state["weight"].double().numpy()


def opened(web, name="head"):
    client = CkksClient(packing_from(web.get("/models").json()[name]["packing"]), decimals=6)
    answer = web.post(f"/models/{name}/sessions", content=client.public())
    assert answer.status_code == 201
    return client, answer.json()["session"]


# --- another process --------------------------------------------------------------------------------------------------


class Recorder:
    """Passes bytes between a client and a server on, and keeps them."""

    def __init__(self, port: int):
        self.heard, self.target = bytearray(), port
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        while True:
            try:
                near, _ = self.listener.accept()
            except OSError:
                return
            far = socket.create_connection(("127.0.0.1", self.target))
            for one, other in ((near, far), (far, near)):
                threading.Thread(target=self._pass, args=(one, other), daemon=True).start()

    def _pass(self, one, other):
        while data := one.recv(1 << 16):
            self.heard += data
            other.sendall(data)
        other.close()


@contextlib.contextmanager
def listening(cards, limits=NO_LIMITS, tls=(), **options):
    """The service behind a real socket, in a thread of this process: its port."""
    with socket.create_server(("127.0.0.1", 0)) as line:
        server = uvicorn_server(cards, limits=limits, workers=0, **options)
        if tls:
            server.config.ssl_certfile, server.config.ssl_keyfile = tls
        thread = threading.Thread(target=server.run, kwargs={"sockets": [line]})
        thread.start()
        try:
            while not server.started and thread.is_alive():
                time.sleep(0.01)
            yield line.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="module")
def another_process(card, deep):
    with running({"head": card, "net": deep}, limits=False) as (url, process):
        yield url, process
    assert process.poll() is not None


def test_two_processes_and_what_crosses_between_them(card, deep, another_process, monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):  # no proxy has anything to do with this machine
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    films = load("phantom", 32, n_films=30)
    image = films.images[0]
    recorder = Recorder(int(another_process[0].rsplit(":", 1)[1]))
    with RemoteServer(f"http://127.0.0.1:{recorder.port}", "head", decimals=6) as server:
        x = film()
        np.testing.assert_allclose(server.diagnose(x), weights_of(card) @ x, atol=1e-5)
    with RemoteServer(f"http://127.0.0.1:{recorder.port}", "net", decimals=6) as other:
        prepared = prepare_film(other.description, image)
        plain = deep.network()(torch.from_numpy(prepared)[None, None])[0].detach().numpy()
        np.testing.assert_allclose(other.diagnose(image), plain, atol=1e-3)
    heard = bytes(recorder.heard)
    assert len(heard) > 1 << 20
    for own in (server.client, other.client):
        own.refuse_secret(heard)
        with pytest.raises(UserError):  # it would be found
            own.refuse_secret(heard + own.key.ternary.tobytes())
    for secret in (x, prepared, image / 255.0):
        for kind in (np.float32, np.float64):
            assert np.ascontiguousarray(secret, kind).tobytes()[:32] not in heard
    assert image[10:12].tobytes() not in heard
    recorder.listener.close()


def test_many_hospitals_at_once(card, another_process, monkeypatch):
    monkeypatch.syspath_prepend(repo_root() / "benchmarks")
    from _service_load import load_test

    url, process = another_process
    load_test(url, "head", requests=100)  # what memory the first requests take stays taken
    found = load_test(url, "head", requests=300, pid=process.pid)
    assert found["errors"] == [] and len(found["ms"]) == 300
    np.testing.assert_allclose(found["logits"], found["films"] @ weights_of(card).T, atol=1e-3)
    assert found["rss_mib"][-1] - found["rss_mib"][0] < 8


def test_commands(card, tmp_path, capsys):
    from primia_lite.apps.cli import main

    (tmp_path / "bad.pt").write_bytes(b"x")
    good = str(card.save(tmp_path / "good.pt"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for arguments, said in (
            (["serve", "--port", "0"], "name a model file"),
            (["serve", str(tmp_path / "none.pt"), "--port", "0"], "save a model there"),
            (["serve", str(tmp_path / "bad.pt"), "--port", "0"], "isn't a model"),
            (["serve", good, "--workers", "0"], "at least one process"),
            (["serve", "--demo", "--port", str(taken.getsockname()[1])], "choose another with --port"),
            (["diagnose", str(tmp_path / "none.png")], "can't be read"),
        ):
            assert main(arguments) == 2
            assert said in capsys.readouterr().err


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.org"])
def test_other_machines_come_through_a_reverse_proxy(capsys, host):
    from primia_lite.apps.cli import main

    assert main(["serve", "--demo", "--host", host]) == 2
    assert "--behind-proxy" in capsys.readouterr().err


def test_a_card_comes_back(deep, tmp_path):
    again = ModelCard.load(deep.save(tmp_path / "net.pt"))
    assert again.describe() == deep.describe() and "state" not in deep.describe()
    x = torch.randn(1, 1, 32, 32)
    torch.testing.assert_close(again.network()(x), deep.network()(x))


def test_shared_logits_can_be_flooded_where_the_model_has_room(card, deep):
    flooded = dataclasses.replace(card, flooded=True)
    with app({"plain": card, "flooded": flooded}) as web:
        connect = lambda name: RemoteServer(  # noqa: E731
            "http://testserver", name, decimals=6, flooding=Flooding(queries=100), transport=web._transport
        )
        with pytest.raises(UserError, match="flooding"):
            connect("plain")
        server = connect("flooded")
        plain = weights_of(card) @ film()
        logits = np.array([server.diagnose(film()) for _ in range(30)])
        assert server.client.queries_left == 70
        assert 0.6 < (logits - plain).std() / server.client.flooding_std < 1.6
    with pytest.raises(UserError, match="flooding"):
        Service({"net": dataclasses.replace(deep, flooded=True)})


# --- sessions and limits ----------------------------------------------------------------------------------------------


def test_a_film_is_diagnosed(card):
    with app({"head": card}) as web:
        client, token = opened(web)
        x = film()
        answer = web.post(f"/sessions/{token}/diagnose", content=join(client.encrypt(x)))
        plain = weights_of(card) @ x
        np.testing.assert_allclose(client.decrypt(split(answer.content)), plain, atol=1e-5)
        assert web.get("/health").json()["queries"] == 1


def test_sessions_are_separate_and_end(card):
    with app({"head": card}) as web:
        (one, token), (_, other) = opened(web), opened(web)
        assert token != other and len(token) > 40
        body = join(one.encrypt(film()))
        right = one.decrypt(split(web.post(f"/sessions/{token}/diagnose", content=body).content))
        # Under the other's key it is re-randomised wrongly: noise comes out, no error, and nothing of the film.
        mixed = one.decrypt(split(web.post(f"/sessions/{other}/diagnose", content=body).content))
        assert np.abs(mixed - right).max() > 1
        assert web.delete(f"/sessions/{token}").status_code == 204
        replayed = web.post(f"/sessions/{token}/diagnose", content=body)
        assert replayed.status_code == 410 and "open a new one" in replayed.json()["error"]
        assert web.delete(f"/sessions/{token}").status_code == 410
        assert web.delete("/sessions/none").status_code == 410


def test_films_of_a_session_and_sessions_of_a_worker_have_limits(card):
    with app({"head": card}, dataclasses.replace(NO_LIMITS, sessions=2, queries=2)) as web:
        client, token = opened(web)
        body = join(client.encrypt(film()))
        ask = lambda: web.post(f"/sessions/{token}/diagnose", content=body).status_code  # noqa: E731
        assert [ask() for _ in range(3)] == [200, 200, 410]
        others = [opened(web)[1] for _ in range(2)]  # the first is closed for them
        assert ask() == 410
        assert [web.delete(f"/sessions/{each}").status_code for each in (token, *others)] == [410, 204, 204]


def test_keys_of_all_sessions_have_a_limit(card, deep):
    cards = {"head": card, "net": deep}
    of_net = len(CkksClient(CkksServer(deep.network(), (1, 32, 32)).packing).public())
    with app(cards, dataclasses.replace(NO_LIMITS, key_bytes=of_net + 50_000)) as web:
        tokens = [opened(web, name)[1] for name in ("head", "net", "head", "net", "head")]
        # Beside a net one head has room: what was used last stays.
        assert [web.delete(f"/sessions/{token}").status_code for token in tokens] == [410, 410, 410, 204, 204]
    with app(cards, dataclasses.replace(NO_LIMITS, key_bytes=1)) as web:
        first, second = opened(web, "net")[1], opened(web, "net")[1]  # one there may always be
        assert web.delete(f"/sessions/{first}").status_code == 410
        assert web.delete(f"/sessions/{second}").status_code == 204


def test_a_fault_of_the_service_is_a_sentence_and_a_line_in_the_log(card, caplog, monkeypatch):
    service = Service({"head": card}, NO_LIMITS)
    with TestClient(service.app) as web:
        client, token = opened(web)

        def fails(*_):
            raise ZeroDivisionError("a secret of ours")

        with monkeypatch.context() as patch:
            patch.setattr(service.workers[0], "call", fails)
            answer = web.post(f"/sessions/{token}/diagnose", content=join(client.encrypt(film())))
        assert answer.status_code == 500 and answer.json()["error"].startswith("the service failed on this request")
        assert "secret" not in answer.text and "a secret of ours" in caplog.text
        assert web.post(f"/sessions/{token}/diagnose", content=join(client.encrypt(film()))).status_code == 200


@pytest.fixture
def still(monkeypatch):
    """A clock at the start of a minute."""
    monkeypatch.setattr(time, "monotonic", lambda: 6000.0)


def test_queries_in_a_minute_are_limited(card, still, monkeypatch):
    with app({"head": card}, dataclasses.replace(NO_LIMITS, per_minute=2, opened_per_minute=2)) as web:
        (client, token), (other, token_2) = opened(web), opened(web)  # a second session buys no more
        body, body_2 = join(client.encrypt(film())), join(other.encrypt(film()))
        answers = [web.post(f"/sessions/{token}/diagnose", content=body) for _ in range(2)]
        answers.append(web.post(f"/sessions/{token_2}/diagnose", content=body_2))
        assert [a.status_code for a in answers] == [200, 200, 429]
        assert "in a minute" in answers[2].json()["error"] and answers[2].headers["Retry-After"] == "60"
        assert web.post("/models/head/sessions", content=client.public()).status_code == 429
        monkeypatch.setattr(time, "monotonic", lambda: 6060.0)
        assert web.post(f"/sessions/{token_2}/diagnose", content=body_2).status_code == 200


@pytest.mark.parametrize(("proxy", "last"), [(None, 429), ("10.1.1.1", 429), ("127.0.0.1", 400)])
def test_another_address_in_a_header_counts_only_from_the_proxy(card, proxy, last):
    with listening({"head": card}, Limits(opened_per_minute=2), proxy=proxy) as port, httpx.Client() as web:
        statuses = []
        while len(statuses) < 3:
            if time.monotonic() % 60 > 55:
                time.sleep(5)
            url, header = f"http://127.0.0.1:{port}/models/head/sessions", f"10.0.0.{len(statuses)}"
            statuses.append(web.post(url, headers={"X-Forwarded-For": header}).status_code)
        assert statuses == [400, 400, last]


# --- TLS --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tls(tmp_path_factory) -> dict[str, str]:
    """A self-signed certificate for this machine, and its key."""
    folder = tmp_path_factory.mktemp("tls")
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    builder = builder.serial_number(x509.random_serial_number())
    builder = builder.not_valid_before(now - datetime.timedelta(hours=1)).not_valid_after(now + datetime.timedelta(1))
    names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    certificate = builder.add_extension(names, False).sign(key, hashes.SHA256())
    (folder / "certificate").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    pem = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    (folder / "key").write_bytes(key.private_bytes(*pem))
    return {path.name: str(path) for path in folder.iterdir()}


def test_tls_carries_a_diagnosis_to_those_who_trust_the_certificate(card, tls):
    with listening({"head": card}, tls=(tls["certificate"], tls["key"])) as port:
        url = f"https://127.0.0.1:{port}"
        with RemoteServer(url, ca_file=tls["certificate"], decimals=6) as server:
            plain = weights_of(card) @ film()
            np.testing.assert_allclose(server.diagnose(film()), plain, atol=1e-5)
        with pytest.raises(ServiceError, match="certificate"):
            RemoteServer(url, retries=0)
        with pytest.raises(ServiceError, match="service"):
            RemoteServer(url.replace("https", "http"), retries=0)


def test_bad_certificates_get_a_sentence(tmp_path):
    (tmp_path / "text").write_text("x")
    for ca_file in ("/nope", str(tmp_path / "text")):
        with pytest.raises(UserError, match="give"):
            RemoteServer("https://127.0.0.1:9", ca_file=ca_file)


# --- bad input --------------------------------------------------------------------------------------------------------


def test_bad_bodies_get_a_sentence_and_the_service_goes_on(card, deep):
    with app({"head": card, "net": deep}) as web:
        client, token = opened(web)
        (good,) = client.encrypt(film())
        other = CkksClient(CNNPacking(12, 5, 3, 2, 0, 3)).encrypt(np.ones((12, 12)))[0]
        for bad in (b"", b"abc", join([]), join([good[:-5]]), join([good, good]), join([bytes(len(good))]),
                    join([np.random.default_rng(0).bytes(len(good))]), join([other]), join([good])[:-1],
                    join([good]) + b"x", b"\xff" * 40):  # fmt: skip
            answer = web.post(f"/sessions/{token}/diagnose", content=bad)
            assert answer.status_code in (400, 413) and answer.json()["error"], bad[:20]
            assert web.get("/health").json()["status"] == "ok"
        assert web.post("/models/none/sessions", content=client.public()).status_code == 404
        assert web.post("/models/net/sessions", content=client.public()).status_code in (400, 413)
        assert web.post("/models/head/sessions", content=b"").status_code == 400
        assert web.get("/models/head/sessions").status_code == 405
        assert web.get("/none").status_code == 404
        assert web.post(f"/sessions/{token}/diagnose", content=join([good])).status_code == 200


def test_keys_with_empty_tables_are_refused(deep):
    with app({"net": deep}) as web:
        client = CkksClient(packing_from(web.get("/models").json()["net"]["packing"]))
        public, relin, galois = split_keys(client.public(), client.packing)
        empty = [wrapped(payload(relin)[:32] + struct.pack(f"<{len(table)}Q", *table)) for table in ((0,), (1, 0))]
        # A key for one turn more or less than the model's.
        steps = list(client.packing.rotations)
        others = [client.key.galois_keys(chosen) for chosen in (steps[1:], [*steps, 3])]
        for keys in [[public, each, galois] for each in empty] + [[public, relin, each] for each in others]:
            answer = web.post("/models/net/sessions", content=join_keys(client.packing, keys))
            assert answer.status_code == 400 and "send CkksClient.public()" in answer.json()["error"]


@pytest.mark.parametrize("error", [ValueError, RuntimeError])
def test_what_seal_cannot_compute_is_the_client_s_fault(card, monkeypatch, error):
    service = Service({"head": card}, NO_LIMITS)
    with TestClient(service.app) as web:
        client, token = opened(web)

        def fails(*_):
            raise error("not enough keys")

        monkeypatch.setattr(service.workers[0].servers["head"], "kernel", fails)
        answer = web.post(f"/sessions/{token}/diagnose", content=join(client.encrypt(film())))
        assert answer.status_code == 400 and "not enough keys" in answer.json()["error"]


def test_large_slow_and_broken_bodies_cost_nobody_else(card):
    sent = 0

    def endless():
        nonlocal sent
        for _ in range(100):
            sent += 1 << 20
            yield bytes(1 << 20)

    request = b"POST /models/head/sessions HTTP/1.1\r\nHost: x\r\nContent-Length: 5000\r\n\r\nabc"
    with listening({"head": card}) as port, contextlib.ExitStack() as stack:
        before = psutil.Process().memory_info().rss
        lines = [stack.enter_context(socket.create_connection(("127.0.0.1", port))) for _ in range(20)]
        for line in lines:
            line.sendall(request)
        lines[0].close()  # a client that leaves
        lines[1].sendall(b"\x00\xff" * 5000)
        server = stack.enter_context(RemoteServer(f"http://127.0.0.1:{port}", decimals=6))
        web = stack.enter_context(httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=20))
        for path in (f"/sessions/{server.open()}/diagnose", "/models/head/sessions"):
            for body in (bytes(5 << 20), endless()):
                with contextlib.suppress(httpx.TransportError):  # one that goes on writing may miss the answer
                    assert web.post(path, content=body).status_code == 413
        assert 0 < sent < 60 << 20 and psutil.Process().memory_info().rss - before < 64 << 20
        np.testing.assert_allclose(server.diagnose(film()), weights_of(card) @ film(), atol=1e-5)


async def post(service: Service, path: str, receive) -> tuple[int, bytes]:
    """Status and start of the answer, to a body that comes as ``receive`` says."""
    sent = []

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": path, "headers": [], "query_string": b"",
             "root_path": "", "client": ("here", 1), "http_version": "1.1", "scheme": "http"}  # fmt: skip
    await service.app(scope, receive, send)
    return sent[0]["status"], sent[1]["body"]


def test_a_body_has_so_long_to_come(card):
    messages = iter([{"type": "http.request", "body": b"abc", "more_body": True}])

    async def receive():
        for message in messages:
            return message
        await asyncio.sleep(60)

    status, sentence = asyncio.run(
        post(Service({"head": card}, Limits(timeout_s=0.2)), "/models/head/sessions", receive)
    )
    assert status == 408 and b"send it again" in sentence


def test_slow_bodies_together_do_not_pass_the_limit_of_queries(card):
    service = Service({"head": card}, Limits(queries=2))
    client = CkksClient(service.packings["head"])
    body = join(client.encrypt(film()))

    async def ask_together():
        async def keys():
            return {"type": "http.request", "body": client.public(), "more_body": False}

        status, answer = await post(service, "/models/head/sessions", keys)
        token, all_are_in = json.loads(answer)["session"], asyncio.Event()

        async def late():
            await all_are_in.wait()
            return {"type": "http.request", "body": body, "more_body": False}

        asked = [asyncio.create_task(post(service, f"/sessions/{token}/diagnose", late)) for _ in range(5)]
        await asyncio.sleep(0.05)
        all_are_in.set()
        return [status, *(status for status, _ in await asyncio.gather(*asked))]

    assert sorted(asyncio.run(ask_together())) == [200, 200, 201, 410, 410, 410]


def test_bodies_that_come_at_once_have_a_limit(card):
    service = Service({"head": card}, dataclasses.replace(NO_LIMITS, timeout_s=0.3, body_bytes=25_000))

    async def ask_together():
        async def half(messages):
            for message in messages:
                return message
            await asyncio.sleep(60)

        def body():
            messages = iter([{"type": "http.request", "body": bytes(10_000), "more_body": True}])
            return lambda: half(messages)

        answers = await asyncio.gather(*(post(service, "/models/head/sessions", body()) for _ in range(3)))
        assert service.body_bytes == 0  # they are gone
        return [status for status, _ in answers]

    assert sorted(asyncio.run(ask_together())) == [408, 408, 503]


# --- workers ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_worker_that_dies_or_hangs_costs_its_sessions_only_and_is_replaced_when_that_is_possible(
    card, deep, monkeypatch
):
    service = Service({"head": card, "net": deep}, Limits(timeout_s=2.0), workers=2)
    with TestClient(service.app) as web, ThreadPoolExecutor() as pool:
        remote = lambda name: RemoteServer(  # noqa: E731
            "http://testserver", name, decimals=6, transport=web._transport
        )
        first, second, third = remote("head"), remote("head"), remote("net")
        right = first.diagnose(film())
        np.testing.assert_allclose(second.diagnose(film()), right, atol=1e-5)
        one, kept = service.workers[0], second.token
        ask = lambda token, body: web.post(f"/sessions/{token}/diagnose", content=body)  # noqa: E731
        with monkeypatch.context() as patch:
            patch.setattr(workers, "work", hostile.dies)
            os.kill(pid := one.pid, signal.SIGKILL)
            answer = ask(first.token, join(first.client.encrypt(film())))
            assert answer.status_code == 503 and "ended" in answer.json()["error"]
        statuses = {web.post("/models/head/sessions", content=first.client.public()).status_code for _ in range(4)}
        assert statuses == {503, 201}  # one call finds it dead, and it starts
        np.testing.assert_allclose(first.diagnose(film()), right, atol=1e-5)  # in a new session
        np.testing.assert_allclose(second.diagnose(film()), right, atol=1e-5)
        assert one.pid != pid and second.token == kept

        while third.open()[0] != "0":  # among the first worker's sessions
            third.close()
            third = remote("net")
        large = join(third.client.encrypt(np.full((32, 32), 0.1)))
        assert len(large) > 250_000  # more than a pipe holds
        os.kill(pid := one.pid, signal.SIGSTOP)
        waiting = [pool.submit(ask, third.token, large) for _ in range(2)]
        time.sleep(0.2)
        started = time.monotonic()
        np.testing.assert_allclose(second.diagnose(film()), right, atol=1e-5)
        assert time.monotonic() - started < 1.5 and second.token == kept
        answers = [future.result(60) for future in waiting]
        assert {answer.status_code for answer in answers} <= {503, 410}
        assert any("took more than 2 s" in answer.text for answer in answers)
        assert one.pid != pid and ask(third.token, large).status_code == 410
        pids = [worker.pid for worker in service.workers]
    assert not any(map(psutil.pid_exists, pids))


def test_masks_are_made_in_idle_time(card):
    worker = Worker({"head": card}, BOUNDS, 1 << 20)
    try:
        client = CkksClient(LinearPacking(FEATURES, 3), decimals=6)
        worker.call("open", "head", "token", client.public())
        plain = weights_of(card) @ film()
        for _ in range(5):
            replies = worker.call("diagnose", "token", join(client.encrypt(film())))
            np.testing.assert_allclose(client.decrypt(split(replies)), plain, atol=1e-5)
        with pytest.raises(CiphertextError, match="ciphertexts"):
            worker.call("diagnose", "token", join([]))
        worker.call("close", "token")
        with pytest.raises(SessionGone):
            worker.call("diagnose", "token", join(client.encrypt(film())))
    finally:
        worker.stop()
    store = InProcess({"head": card}, BOUNDS)
    for token in "ab":
        store.open("head", token, client.public())
    while store.prepare():
        pass
    assert [held.session.prepared for held in store.sessions.values()] == [2, 2]


def test_bounds_on_bodies_hold_what_clients_send():
    for packing in (LinearPacking(8, 3), LinearPacking(2369, 3), CNNPacking(16, 5, 2, 4, 8, 3)):
        client = CkksClient(packing)
        public = client.public()
        assert len(public) <= most_key_bytes(packing) < 4 * len(public) + 65536
        body = join(client.encrypt(np.zeros(packing.in_shape)))
        assert len(body) <= most_upload_bytes(packing)
    heads = [(nn.Linear(d, 3, bias=False), (d,), flooded) for d in (8, 2369) for flooded in (False, True)]
    nets = [(networks.ckksnet(3, (1, 16, 16), channels=2, hidden=hidden), (1, 16, 16), False) for hidden in (0, 4)]
    for model, shape, flooded in heads + nets:
        server = CkksServer(model, shape, flooded=flooded)
        client = CkksClient(server.packing)
        replies = server.open(client.public()).diagnose(client.encrypt(np.zeros(server.packing.in_shape)))
        assert len(join(replies)) <= most_reply_bytes(server.packing) < 2 * len(join(replies))


def test_the_client_refuses_before_it_sends(card):
    with app({"head": card}) as web:
        server = RemoteServer("http://testserver", transport=web._transport)
        for bad, message in ((np.full(FEATURES, np.nan), "finite"), (np.ones(FEATURES + 1), "the model takes"),
                             (np.zeros((31, 31), np.uint8), "resize it")):  # fmt: skip
            with pytest.raises(UserError, match=message):
                server.diagnose(bad)
        with pytest.raises(ServiceError, match="model"):
            RemoteServer("http://testserver", "none", transport=web._transport)
        assert web.get("/health").json()["queries"] == 0


def test_the_client_tries_again_and_opens_sessions_anew(card, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda s: None)
    with app({"head": card}) as web:
        failures = [503, 502, 429]

        class Flaky(httpx.BaseTransport):
            def handle_request(self, request):
                if failures and request.url.path.endswith("diagnose"):
                    return httpx.Response(failures.pop(), json={"error": "later"})
                return web._transport.handle_request(request)

        server = RemoteServer("http://testserver", transport=Flaky(), decimals=6)
        first = server.diagnose(film())
        assert not failures
        for _ in range(2):
            web.delete(f"/sessions/{server.token}")
            np.testing.assert_allclose(server.diagnose(film()), first, atol=1e-5)
        failures += [503] * 9
        with pytest.raises(ServiceError, match="later"):
            server.diagnose(film())
    for url in ("http://127.0.0.1:x", "http://a\tb"):
        with pytest.raises(UserError, match="address"):
            RemoteServer(url)
    with pytest.raises(ServiceError, match="service"):
        RemoteServer("http://127.0.0.1:9", retries=1)


def test_another_service_is_told_from_ours(card):
    described = {"packing": spec_of(LinearPacking(FEATURES, 3)), "model": "litenet", "class_names": NAMES}
    for answer in (b"<html>", b"[]", b"{}", b'{"head": 1}', json.dumps({"head": described}).encode()):
        transport = httpx.MockTransport(lambda request, answer=answer: httpx.Response(200, content=answer))
        with pytest.raises(ServiceError, match="service"):
            RemoteServer("http://here", transport=transport)
    answers = {"/models": {"head": described | {"image_size": 32}}}
    transport = httpx.MockTransport(lambda request: httpx.Response(200, json=answers.get(request.url.path, {})))
    with pytest.raises(ServiceError, match="service"):
        RemoteServer("http://here", transport=transport).open()


def test_split_undoes_join():
    for parts in ([], [b""], [b"a", b"", b"bcd"]):
        assert split(join(parts)) == parts
    with pytest.raises(CiphertextError):
        split(b"\xff\xff\xff\xff")


def stored(part: bytes) -> bytes:
    """An object of SEAL without compression, so that what is altered is read and not only decompressed."""
    return wrapped(payload(part))


def test_thousands_of_altered_bodies_get_a_reply_or_a_sentence(card, deep):
    """Films and keys, also a CNN's, compressed or not; and good uploads under altered keys that were let through. Most
    go straight to what a worker calls, one in ten by HTTP, where a refusal is a 4xx."""
    rng, counts, sources, shares_of = np.random.default_rng(0), collections.Counter(), [], []
    service = Service({"head": card, "net": deep}, NO_LIMITS)
    (store,) = service.workers
    with TestClient(service.app) as web:

        def asked(by_http, what, *arguments):
            """Whether a body is let through, and the reply."""
            if not by_http:
                try:
                    return True, store.call(what, *arguments)
                except CiphertextError as error:
                    assert str(error)
                    return False, b""
            paths = {"open": f"/models/{arguments[0]}/sessions", "diagnose": f"/sessions/{arguments[0]}/diagnose"}
            answer = web.post(paths[what], content=arguments[-1])
            assert answer.status_code in (200, 201, 400, 413), answer.text
            return answer.is_success, answer.content

        # A CNN's keys and films cost tens of milliseconds where they are let through.
        for name, x, shares in (("head", film(), (16, 178)), ("net", np.full((32, 32), 0.1), (2, 4))):
            client, token = opened(web, name)
            uploads, keys = client.encrypt(x), split_keys(client.public(), client.packing)
            for form in (bytes, stored):
                for what, parts, share in (("open", keys, shares[0]), ("diagnose", uploads, shares[1])):
                    parts = [form(part) for part in parts]
                    body = join_keys(client.packing, parts) if what == "open" else join(parts)
                    given = (name, "altered") if what == "open" else (token,)
                    sources.append((what, name, given, body, [0, *(body.index(part) for part in parts)], join(uploads)))
                    shares_of.append(share)
        shares_of = np.array(shares_of) / sum(shares_of)
        for number, k in enumerate(rng.choice(len(sources), 4000, p=shares_of)):
            what, name, given, body, starts, good = sources[k]
            by_http = number % 10 == 0
            fine, reply = asked(by_http, what, *given, hostile.altered(body, rng, starts, most=1))
            counts[name, what, fine] += 1
            if fine and what == "diagnose":
                assert len(split(reply)) == 1
            elif fine:
                token = json.loads(reply)["session"] if by_http else "altered"
                asked(by_http, "diagnose", token, good)
                store.close(token)
        for what, _, given, body, *_ in sources:
            assert asked(True, what, *given, body)[0]
    # Enough of each kind is refused, and let through; of a CNN's keys few that were altered are.
    assert counts["net", "open", False] > 15
    for name, what, least in (("head", "open", 20), ("head", "diagnose", 200), ("net", "diagnose", 3)):
        assert min(counts[name, what, fine] for fine in (True, False)) >= least, counts
