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
from primia_lite.apps.service.limits import NO_LIMITS, Limits
from primia_lite.apps.service.server import Service, uvicorn_server
from primia_lite.apps.service.workers import SessionGone, SessionStore, Worker
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
def listening(cards, limits=NO_LIMITS, **options):
    """The service behind a real socket, in a thread of this process: its port."""
    with socket.create_server(("127.0.0.1", 0)) as line:
        server = uvicorn_server(cards, limits=limits, workers=0, **options)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [line]})
        thread.start()
        try:
            while not server.started and thread.is_alive():
                time.sleep(0.01)
            yield line.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join()


@pytest.mark.slow
def test_two_processes_and_what_crosses_between_them(card, deep):
    films = load("phantom", 32, n_films=30)
    image = films.images[0]
    with running({"head": card, "net": deep}, limits=False) as (url, process):
        recorder = Recorder(int(url.rsplit(":", 1)[1]))
        with RemoteServer(f"http://127.0.0.1:{recorder.port}", "head", decimals=6) as server:
            x = film()
            plain = weights_of(card) @ x
            np.testing.assert_allclose(server.diagnose(x), plain, atol=1e-5)
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
        assert psutil.Process(process.pid).is_running()
    assert process.poll() is not None


def test_commands(card, tmp_path, capsys):
    from primia_lite.apps.cli import main

    assert main(["serve"]) == 2
    assert "name a model file" in capsys.readouterr().err
    assert main(["serve", str(tmp_path / "none.pt")]) == 2
    assert "save a model there" in capsys.readouterr().err
    (tmp_path / "bad.pt").write_bytes(b"x")
    assert main(["serve", str(tmp_path / "bad.pt")]) == 2
    assert "isn't a model" in capsys.readouterr().err
    assert main(["serve", str(card.save(tmp_path / "good.pt")), "--certfile", "x"]) == 2
    assert "both" in capsys.readouterr().err
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["serve", "--demo", "--port", str(taken.getsockname()[1])]) == 2
    assert "choose another with --port" in capsys.readouterr().err
    assert main(["diagnose", str(tmp_path / "none.png")]) == 2
    assert "can't be read" in capsys.readouterr().err


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
        assert web.delete("/sessions/none").status_code == 404


def test_limits(card):
    limits = Limits(sessions=2, session_s=0.4, queries=2, per_minute=30, opened_per_minute=4)
    with app({"head": card}, limits) as web:
        client, token = opened(web)
        body = join(client.encrypt(film()))
        ask = lambda: web.post(f"/sessions/{token}/diagnose", content=body)  # noqa: E731
        assert [ask().status_code for _ in range(3)] == [200, 200, 410]
        opened(web)
        opened(web)  # the first is closed for it
        assert ask().status_code == 410 and web.get("/health").json()["sessions"] == 2
        _, last = opened(web)
        refused = web.post("/models/head/sessions", content=client.public())
        assert refused.status_code == 429 and int(refused.headers["Retry-After"]) >= 1
        time.sleep(0.5)
        assert web.delete(f"/sessions/{last}").status_code == 410  # expired


def test_keys_of_all_sessions_have_a_limit(card, deep):
    cards = {"head": card, "net": deep}
    of_both = sum(most_key_bytes(packing) for packing in Service(cards).packings.values())
    with app(cards, dataclasses.replace(NO_LIMITS, key_bytes=of_both)) as web:
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


def test_queries_in_a_minute_are_limited(card):
    with app({"head": card}, Limits(per_minute=2)) as web:
        client, token = opened(web)
        body = join(client.encrypt(film()))
        other, token_2 = opened(web)  # a second session buys no more
        answers = [web.post(f"/sessions/{token}/diagnose", content=body) for _ in range(2)]
        answers.append(web.post(f"/sessions/{token_2}/diagnose", content=join(other.encrypt(film()))))
        assert [a.status_code for a in answers] == [200, 200, 429]
        assert "in a minute" in answers[2].json()["error"] and 50 < int(answers[2].headers["Retry-After"]) <= 60


def test_another_address_in_a_header_buys_nothing(card):
    with listening({"head": card}, Limits(opened_per_minute=2)) as port, httpx.Client() as web:
        statuses = [
            web.post(f"http://127.0.0.1:{port}/models/head/sessions", headers={"X-Forwarded-For": f"10.0.0.{k}"})
            for k in range(3)
        ]
        assert [answer.status_code for answer in statuses] == [400, 400, 429]


# --- TLS --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tls(tmp_path_factory) -> dict[str, str]:
    """A self-signed certificate for this machine, its key, and the key of another."""
    folder = tmp_path_factory.mktemp("tls")
    keys = {name: ec.generate_private_key(ec.SECP256R1()) for name in ("key", "other")}
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(keys["key"].public_key())
    builder = builder.serial_number(x509.random_serial_number())
    builder = builder.not_valid_before(now - datetime.timedelta(hours=1)).not_valid_after(now + datetime.timedelta(1))
    names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    certificate = builder.add_extension(names, False).sign(keys["key"], hashes.SHA256())
    (folder / "certificate").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    for which, key in keys.items():
        (folder / which).write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
    return {path.name: str(path) for path in folder.iterdir()}


def test_tls_carries_a_diagnosis_to_those_who_trust_the_certificate(card, tls):
    with listening({"head": card}, certfile=tls["certificate"], keyfile=tls["key"]) as port:
        url = f"https://127.0.0.1:{port}"
        with RemoteServer(url, ca_file=tls["certificate"], decimals=6) as server:
            plain = weights_of(card) @ film()
            np.testing.assert_allclose(server.diagnose(film()), plain, atol=1e-5)
        with pytest.raises(ServiceError, match="certificate"):
            RemoteServer(url, retries=0)
        with pytest.raises(ServiceError, match="service"):
            RemoteServer(url.replace("https", "http"), retries=0)


def test_bad_certificates_get_a_sentence(card, tls, tmp_path, capsys):
    from primia_lite.apps.cli import main

    (tmp_path / "text").write_text("x")
    model = str(card.save(tmp_path / "good.pt"))
    for certificate, key in (("/nope", "/nope"), (tls["certificate"], "/nope"), (tls["certificate"], tls["other"])):
        assert main(["serve", model, "--certfile", certificate, "--keyfile", key]) == 2
        assert "give a certificate and its own key" in capsys.readouterr().err
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

        monkeypatch.setattr(service.workers[0].store.servers["head"], "kernel", fails)
        answer = web.post(f"/sessions/{token}/diagnose", content=join(client.encrypt(film())))
        assert answer.status_code == 400 and "not enough keys" in answer.json()["error"]


def test_large_bodies_are_cut_early(card):
    sent = 0

    def endless():
        nonlocal sent
        for _ in range(100):
            sent += 1 << 20
            yield bytes(1 << 20)

    with running({"head": card}, limits=False) as (url, process), httpx.Client(base_url=url, timeout=20) as web:
        before = psutil.Process(process.pid).memory_info().rss
        client = CkksClient(packing_from(web.get("/models").json()["head"]["packing"]))
        token = web.post("/models/head/sessions", content=client.public()).json()["session"]
        for path in (f"/sessions/{token}/diagnose", "/models/head/sessions"):
            declared = web.post(path, content=bytes(5 << 20))
            assert declared.status_code == 413 and "larger than" in declared.json()["error"]
            sent = 0
            assert web.post(path, content=endless()).status_code == 413
            assert sent < 60 << 20
        assert psutil.Process(process.pid).memory_info().rss - before < 16 << 20
        assert web.get("/health").json()["status"] == "ok"
        good = web.post(f"/sessions/{token}/diagnose", content=join(client.encrypt(film())))
        assert good.status_code == 200


def test_slow_and_broken_bodies_cost_nobody_else(card):
    with running({"head": card}, limits=False) as (url, _):
        port = int(url.rsplit(":", 1)[1])
        request = b"POST /models/head/sessions HTTP/1.1\r\nHost: x\r\nContent-Length: 5000\r\n\r\nabc"
        lines = [socket.create_connection(("127.0.0.1", port)) for _ in range(20)]
        for line in lines:
            line.sendall(request)
        lines.pop().close()  # a client that leaves
        with socket.create_connection(("127.0.0.1", port)) as line:
            line.sendall(b"\x00\xff\r\n\r\n")
            assert b"400" in line.recv(100)
        with RemoteServer(url, decimals=6) as server:
            assert np.isfinite(server.diagnose(film())).all()
        for line in lines:
            line.close()


async def post(service: Service, path: str, receive) -> tuple[int, bytes]:
    """Status and start of the answer, to a body that comes as ``receive`` says."""
    sent = []

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": path, "headers": [], "query_string": b"",
             "root_path": "", "client": ("here", 1), "http_version": "1.1", "scheme": "http"}  # fmt: skip
    await service.app(scope, receive, send)
    return sent[0]["status"], sent[1]["body"]


def test_silent_connections_make_room_for_others(card):
    with listening({"head": card}, dataclasses.replace(NO_LIMITS, head_s=4.0)) as port, contextlib.ExitStack() as stack:
        url = f"http://127.0.0.1:{port}/health"
        kept = stack.enter_context(httpx.Client())
        assert kept.get(url).status_code == 200
        lines = [stack.enter_context(socket.create_connection(("127.0.0.1", port))) for _ in range(300)]
        slow = lines[-1]
        slow.sendall(b"GET /health HTTP/1.1\r\n")
        time.sleep(0.5)
        assert httpx.get(url).status_code == 503
        for _ in range(25):  # a byte now and then buys no time
            with contextlib.suppress(OSError):
                slow.sendall(b"x")
            time.sleep(0.2)
        assert httpx.get(url).status_code == 200
        assert kept.get(url).status_code == 200  # between two requests there is more time
        for line in lines:
            line.settimeout(1)
            with contextlib.suppress(ConnectionResetError):
                assert line.recv(1) == b""


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

        assert (await post(service, "/models/head/sessions", keys))[0] == 201
        (token,), all_are_in = service.open, asyncio.Event()

        async def late():
            await all_are_in.wait()
            return {"type": "http.request", "body": body, "more_body": False}

        asked = [asyncio.create_task(post(service, f"/sessions/{token}/diagnose", late)) for _ in range(5)]
        await asyncio.sleep(0.05)
        all_are_in.set()
        return [status for status, _ in await asyncio.gather(*asked)]

    assert sorted(asyncio.run(ask_together())) == [200, 200, 410, 410, 410]


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
def test_a_worker_that_dies_costs_its_sessions_only_and_is_replaced_when_that_is_possible(card, monkeypatch):
    service = Service({"head": card}, Limits(timeout_s=5.0), workers=2)
    with TestClient(service.app) as web:
        first, second = (RemoteServer("http://testserver", decimals=6, transport=web._transport) for _ in range(2))
        right = first.diagnose(film())
        np.testing.assert_allclose(second.diagnose(film()), right, atol=1e-5)
        (one, other), kept, pid = service.workers, second.token, service.workers[0].pid
        assert [entry.worker for entry in service.open.values()] == [one, other]
        os.kill(pid, signal.SIGKILL)
        np.testing.assert_allclose(first.diagnose(film()), right, atol=1e-5)  # in a new session
        np.testing.assert_allclose(second.diagnose(film()), right, atol=1e-5)
        assert one.pid != pid and second.token == kept
        body = join(first.client.encrypt(film()))
        with monkeypatch.context() as patch:
            patch.setattr(workers, "work", hostile.dies)
            os.kill(one.pid, signal.SIGKILL)
            answer = web.post(f"/sessions/{first.token}/diagnose", content=body)
            assert answer.status_code == 503 and "ended" in answer.json()["error"]
            assert list(service.open) == [kept]
        statuses = {web.post("/models/head/sessions", content=first.client.public()).status_code for _ in range(4)}
        assert statuses == {503, 201}  # one call finds it dead, and it starts
        pids = [worker.pid for worker in service.workers]
    assert not any(map(psutil.pid_exists, pids))


@pytest.mark.slow
def test_a_hung_worker_keeps_nobody_from_another(card, deep):
    service = Service({"head": card, "net": deep}, Limits(timeout_s=2.0), workers=2)
    with TestClient(service.app) as web, ThreadPoolExecutor() as pool:
        clients, tokens = zip(*[opened(web, name) for name in ("net", "head", "net", "head")], strict=True)
        hung, healthy = service.workers
        assert [entry.worker for entry in service.open.values()] == [hung, healthy] * 2
        large, small = join(clients[0].encrypt(np.full((32, 32), 0.1))), join(clients[1].encrypt(film()))
        assert len(large) > 250_000  # more than a pipe holds
        ask = lambda token, body: web.post(f"/sessions/{token}/diagnose", content=body)  # noqa: E731
        assert ask(tokens[0], large).status_code == ask(tokens[1], small).status_code == 200
        pid = hung.pid
        os.kill(pid, signal.SIGSTOP)
        waiting = [pool.submit(ask, tokens[0], large) for _ in range(2)]
        while service.waiting[hung] < 2:
            time.sleep(0.01)
        started = time.monotonic()
        assert web.delete(f"/sessions/{tokens[2]}").status_code == 204
        for token in (tokens[1], tokens[3]):
            assert ask(token, small).status_code == 200
        assert time.monotonic() - started < 1.5
        answers = [future.result(60) for future in waiting]
        assert [answer.status_code for answer in answers] == [503, 503]
        assert any("took more than 2 s" in answer.text for answer in answers)
        assert hung.pid != pid and list(service.open) == [tokens[1], tokens[3]]


def test_a_session_that_its_worker_lost_ends(card):
    service = Service({"head": card}, NO_LIMITS)
    with TestClient(service.app) as web:
        client, token = opened(web)
        service.workers[0].store.sessions.clear()
        for _ in range(2):
            answer = web.post(f"/sessions/{token}/diagnose", content=join(client.encrypt(film())))
            assert answer.status_code == 410 and not service.open


def test_masks_are_made_in_idle_time(card):
    worker = Worker({"head": card}, 1 << 20)
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
    store = SessionStore({"head": card})
    for token in "ab":
        store.open("head", token, client.public())
    while store.prepare():
        pass
    assert [session.prepared for session in store.sessions.values()] == [2, 2]


@pytest.mark.slow
def test_many_hospitals_at_once(card, monkeypatch):
    monkeypatch.syspath_prepend(repo_root() / "benchmarks")
    from _service_load import load_test

    with running({"head": card}, limits=False) as (url, process):
        load_test(url, requests=100)  # what memory the first requests take stays taken
        found = load_test(url, requests=800, pid=process.pid)
        assert found["errors"] == [] and len(found["ms"]) == 800
        np.testing.assert_allclose(found["logits"], found["films"] @ weights_of(card).T, atol=1e-3)
        assert found["rss_mib"][-1] - found["rss_mib"][0] < 8
        assert httpx.get(f"{url}/health").json()["sessions"] == 0


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


@pytest.mark.slow
def test_ten_thousand_altered_bodies(card, deep):
    """Each gets an answer of 4xx, or a reply of the right form, and so do good uploads under altered keys; none gets a
    5xx, and none ends the service."""
    rng, counts = np.random.default_rng(0), collections.Counter()
    with app({"head": card, "net": deep}) as web:
        sources = {}
        for name, x in (("head", film()), ("net", np.full((32, 32), 0.1))):
            client, token = opened(web, name)
            uploads, good = client.encrypt(x), f"/sessions/{token}/diagnose"
            keys = split_keys(client.public(), client.packing)
            for form in (bytes, stored):
                for what, path, parts in (("keys", f"/models/{name}/sessions", keys), ("films", good, uploads)):
                    parts = [form(part) for part in parts]
                    body = join_keys(client.packing, parts) if what == "keys" else join(parts)
                    assert web.post(path, content=body).is_success
                    starts = [0, *(body.index(part) for part in parts)]
                    sources[name, what, form] = path, body, starts, join(uploads)
        # A CNN's keys and films cost tens of milliseconds where they are let through.
        shares = np.array([{"head keys": 8, "head films": 89, "net keys": 1, "net films": 2}[f"{name} {what}"]
                           for name, what, _ in sources]) / 200  # fmt: skip
        chosen = rng.choice(len(sources), 10_000, p=shares)
        for (name, what, _), (path, body, starts, good) in (list(sources.items())[k] for k in chosen):
            answer = web.post(path, content=hostile.altered(body, rng, starts, most=1))
            counts[name, what, answer.status_code] += 1
            assert answer.status_code in (200, 201, 400, 413), answer.text
            if answer.status_code == 200:
                assert len(split(answer.content)) == 1
            elif answer.status_code == 201:
                session = f"/sessions/{answer.json()['session']}"
                assert web.post(f"{session}/diagnose", content=good).status_code in (200, 400)
                web.delete(session)
        assert web.get("/health").json()["status"] == "ok"
        for path, body, *_ in sources.values():
            assert web.post(path, content=body).is_success
    # Enough of each kind is refused, and let through.
    for name, what, fine, least in (("head", "keys", 201, 50), ("head", "films", 200, 500), ("net", "films", 200, 10),
                                    ("net", "keys", 201, 5)):  # fmt: skip
        assert min(counts[name, what, fine], counts[name, what, 400]) > least, counts
