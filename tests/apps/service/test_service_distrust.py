"""A hospital trusts no service: proxies, answers without end or measure, descriptions, texts, and altered replies. And
a service trusts no worker."""

from __future__ import annotations

import contextlib
import gzip
import json
import socket
import threading
import time

import hostile
import httpx
import numpy as np
import pytest
import torch
from PIL import Image
from starlette.testclient import TestClient
from torch import nn

from primia_lite.apps.cli import main
from primia_lite.apps.service import workers
from primia_lite.apps.service.client import RemoteServer, ServiceError
from primia_lite.apps.service.server import NO_LIMITS, Service
from primia_lite.config import UserError, printable
from primia_lite.encrypted.client import CkksClient
from primia_lite.encrypted.model_card import ModelCard
from primia_lite.encrypted.packing import CNNPacking, LinearPacking
from primia_lite.encrypted.seal import CiphertextError
from primia_lite.encrypted.wire import join, spec_of

FEATURES, SIDE = 8, 16
BOUNDS = (32, 1 << 28, 1000)
BOMB = gzip.compress(bytes(32 << 20), 1)
PROXIES = ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "ALL_PROXY", "all_proxy")


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch):
    for name in (*PROXIES, "https_proxy", "NO_PROXY", "no_proxy", "SSL_CERT_FILE"):
        monkeypatch.delenv(name, raising=False)


def card_of(model: str, network: nn.Module, shape: tuple[int, ...], **options) -> ModelCard:
    return ModelCard(model, options, ("normal", "bacterial", "viral"), SIDE, shape, network.state_dict(), "nothing")


@pytest.fixture(scope="module")
def card() -> ModelCard:
    torch.manual_seed(0)
    return card_of("litenet", nn.Linear(FEATURES, 3, bias=False), (FEATURES,))


@pytest.fixture(scope="module")
def net() -> ModelCard:
    from primia_lite.models.networks import ckksnet

    torch.manual_seed(1)
    options = {"channels": 2, "hidden": 0}
    return card_of("ckksnet", ckksnet(3, (1, SIDE, SIDE), **options), (1, SIDE, SIDE), **options)


@pytest.fixture
def film(tmp_path) -> str:
    pixels = np.random.default_rng(0).integers(0, 255, (SIDE, SIDE), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "film.png")
    return str(tmp_path / "film.png")


@contextlib.contextmanager
def answering(answer, host="127.0.0.1"):
    """A program at a port that reads requests and says ``answer(head, body)``, bytes or an iterable of them: its port,
    and the heads that it has read."""
    heads = []

    def serve_one(line):
        with line, contextlib.suppress(OSError, ValueError):
            data = b""
            while b"\r\n\r\n" not in data:
                if not (more := line.recv(1 << 16)):
                    return
                data += more
            head, _, body = data.partition(b"\r\n\r\n")
            heads.append(head.decode("latin-1"))
            lower = head.lower()
            size = int(lower.split(b"content-length:")[1].split()[0]) if b"content-length:" in lower else 0
            while len(body) < size:
                body += line.recv(1 << 16)
            said = answer(heads[-1], body)
            for part in [said] if isinstance(said, bytes) else said:
                line.sendall(part)
            line.shutdown(socket.SHUT_WR)
            line.settimeout(2)
            line.recv(1)

    def accept():
        while True:
            try:
                line, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=serve_one, args=(line,), daemon=True).start()

    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, 0), family=family) as listener:
        threading.Thread(target=accept, daemon=True).start()
        yield listener.getsockname()[1], heads
        listener.shutdown(socket.SHUT_RDWR)


def said(body: bytes | str, status: str = "200 OK", *headers: str) -> bytes:
    body = body.encode() if isinstance(body, str) else body
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", "Connection: close", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def described(**changes) -> dict:
    """A model as a service tells of it."""
    packing = spec_of(LinearPacking(FEATURES, 3))
    plain = {"model": "litenet", "class_names": ["a", "b", "c"], "image_size": SIDE, "standardise": False,
             "trained_on": "nothing", "packing": packing}  # fmt: skip
    return plain | changes


MODELS = json.dumps({"head": described()})


def remote(answers, **options) -> RemoteServer:
    """A client whose requests are answered in this process."""
    return RemoteServer("http://here", transport=httpx.MockTransport(answers), **{"retries": 0, **options})


# --- proxies ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["127.0.0.1", "LOCALHOST", "[::1]", "[::ffff:127.0.0.1]"])
@pytest.mark.parametrize("variable", PROXIES)
def test_no_proxy_for_this_machine(monkeypatch, variable, host):
    with answering(lambda *_: said("by the proxy", "502 Bad Gateway")) as (proxy, asked_it):
        monkeypatch.setenv(variable, f"http://user:secret@127.0.0.1:{proxy}")
        with answering(lambda *_: said(MODELS), "::1" if host == "[::1]" else "127.0.0.1") as (port, _):
            assert RemoteServer(f"http://{host}:{port}", retries=0).name == "head"
        assert asked_it == []


@pytest.mark.parametrize(
    "answer",
    [said("<html>Log in</html>"), said("no", "502 Bad Gateway"), said("<h1>", "503 Busy"), b"", b"\0" * 50,
     said("who?", "407 Proxy Authentication Required", 'Proxy-Authenticate: Basic realm="x"')],
)  # fmt: skip
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_proxy_elsewhere_is_named(monkeypatch, scheme, answer):
    with answering(lambda *_: answer) as (port, asked):
        monkeypatch.setenv(f"{scheme}_proxy".upper(), f"http://user:secret@127.0.0.1:{port}/")
        with pytest.raises(ServiceError, match="PROXY") as caught:
            RemoteServer(f"{scheme}://service.example", retries=0)
        assert asked and "secret" not in str(caught.value) and f"http://127.0.0.1:{port} " in str(caught.value)
        monkeypatch.setenv("NO_PROXY", "other.example,.example")
        asked.clear()
        with pytest.raises(ServiceError) as caught:
            RemoteServer(f"{scheme}://service.example", retries=0)
        assert not asked and "PROXY" not in str(caught.value)


@pytest.mark.parametrize(
    "proxy", ["://", "http://", "ftp://proxy", "http://a:secret@", "user:se#cret@proxy:3128", "http://u:sec/ret@p:1",
              "http://[::1", "proxy:port", "http://xn--\xff", "http://p:99999", "socks5://proxy:1", "http://a\tb"],
)  # fmt: skip
def test_an_address_that_is_no_proxy_s(monkeypatch, proxy):
    monkeypatch.setenv("HTTP_PROXY", proxy)
    with pytest.raises(UserError, match="PROXY") as caught:
        RemoteServer("http://service.example", retries=0)
    assert "sec" not in str(caught.value)
    with answering(lambda *_: said(MODELS)) as (port, _):
        assert RemoteServer(f"http://127.0.0.1:{port}", retries=0).name == "head"


def test_certificates_that_a_variable_names(monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", "/nope")
    with answering(lambda *_: said(MODELS)) as (port, _):
        assert RemoteServer(f"http://127.0.0.1:{port}", retries=0).name == "head"
        with pytest.raises(UserError, match="SSL_CERT_FILE"):
            RemoteServer(f"https://127.0.0.1:{port}", retries=0)


@pytest.mark.parametrize(
    "url", ["127.0.0.1:8000", "", "ftp://127.0.0.1", "http://", "file:///etc/passwd", "http://[::1"]
)
def test_what_is_no_address(url):
    with pytest.raises(UserError, match="address"):
        RemoteServer(url)


# --- answers without end or measure -----------------------------------------------------------------------------------


def test_large_answers_are_cut_off(card):
    sent = 0

    def endless(head, body):
        nonlocal sent
        yield b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n"
        for _ in range(400):
            yield bytes(1 << 18)
            sent += 1 << 18

    with answering(endless) as (port, _), pytest.raises(ServiceError, match="more"):
        RemoteServer(f"http://127.0.0.1:{port}", retries=0)
    assert sent < 20 << 20


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "zstd", "identity, gzip", "GZIP"])
def test_bombs_are_not_inflated(encoding):
    with answering(lambda *_: said(BOMB, "200 OK", f"Content-Encoding: {encoding}")) as (port, heads):
        with pytest.raises(ServiceError, match="compressed"):
            RemoteServer(f"http://127.0.0.1:{port}", retries=0)
        assert "accept-encoding: identity" in heads[0].lower()


@pytest.mark.parametrize(
    "start, drip",
    [(b"", b"HTTP/1.1 200 OK\r\n" + b"X-A: b\r\n" * 10_000), (b"HTTP/1.1 200 OK\r\n\r\n", b" " * 10_000),
     (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n" * 10_000),
     (b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 100 Continue\r\n\r\n" * 10_000)],
)  # fmt: skip
def test_an_answer_that_drips_is_given_up(start, drip):
    ended = threading.Event()

    def slowly(head, body):
        try:
            yield start
            for place in range(0, len(drip), 5):
                yield drip[place : place + 5]
                time.sleep(0.05)
        finally:
            ended.set()

    with answering(slowly) as (port, _):
        started = time.monotonic()
        with pytest.raises(ServiceError, match="long"):
            RemoteServer(f"http://127.0.0.1:{port}", timeout_s=0.3, retries=5)
        assert time.monotonic() - started < 10
        assert ended.wait(20)  # the line is closed


def test_one_film_that_takes_too_long_costs_only_itself(card):
    with TestClient(Service({"head": card}, NO_LIMITS).app) as web:
        slow = [True]

        def answers(request):
            if request.url.path.endswith("diagnose") and slow:
                slow.pop()
                time.sleep(1)
            return web._transport.handle_request(request)

        server = remote(answers, timeout_s=0.1)
        server.timeout_s = 5.0  # keys may take their time
        server.open()
        server.timeout_s = 0.1
        with pytest.raises(ServiceError, match="long"):
            server.diagnose(np.full(FEATURES, 0.1))
        server.timeout_s = 5.0
        assert server.diagnose(np.full(FEATURES, 0.1)).shape == (3,)


@pytest.mark.parametrize(
    "answer",
    [b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 1_000_000, b"HTTP/1.1 200 OK\r\nX: " + b"y" * (1 << 20), b"\xff" * 4096,
     b"HTTP/9.9 200 OK\r\n\r\n", b"SSH-2.0-OpenSSH_9.6\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
     b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{}", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\nx",
     said("{}", "204 No Content"), said("[" * 100_000), said("{" * 5), said('"' + "\\ud800" * 9 + '"'), said("NaN"),
     said("9" * 5000), said(b"\xff\xfe{\0}\0"), said("", "200 OK", "Content-Type: image/png"), said("x", "101 Switch"),
     said('{"error": "\\u001b[31m' + "x" * 9999 + '"}', "400 Bad"), said('{"error": {"a": 1}}', "500 Oh"),
     said('{"error": ' + "[" * 9000, "400 Bad"), said("{}", "999 What"), said("{}", "503 No", "Retry-After: \xb2")],
)  # fmt: skip
def test_answers_that_are_none_get_a_sentence(answer, film, capsys):
    with answering(lambda *_: answer) as (port, _):
        with pytest.raises(ServiceError) as caught:
            RemoteServer(f"http://127.0.0.1:{port}", retries=0)
        assert str(caught.value).isprintable() and len(str(caught.value)) < 1001


@pytest.mark.parametrize("location", ["http://127.0.0.1:{}/models", "//127.0.0.1:{}/", "file:///etc/passwd", "http://xn--\xff/",
                                      "http://[", "javascript:x", "http://a:99999/", "\x1b[2J", ""])  # fmt: skip
def test_redirects_are_not_followed(location):
    with answering(lambda *_: said(MODELS)) as (other, asked):
        moved = said("", "307 Moved", "Location: " + location.format(other))
        with answering(lambda *_: moved) as (port, _), pytest.raises(ServiceError) as caught:
            RemoteServer(f"http://127.0.0.1:{port}", retries=0)
        assert asked == [] and str(caught.value).isprintable()


def test_a_service_leaves_no_cookie(card):
    asked = []

    def answers(request):
        asked.append(request.headers.get("cookie"))
        return httpx.Response(200, text=MODELS, headers={"Set-Cookie": "a=" + "b" * 4000})

    server = remote(answers)
    with pytest.raises(ServiceError):
        server.open()
    assert asked == [None, None]


# --- descriptions -----------------------------------------------------------------------------------------------------


WRONG = [
    None, [], 7, "x", {}, *({name: value} for name, values in {
        "model": [None, 7, []], "trained_on": [None, {}], "standardise": [None, 0, "no"],
        "image_size": [None, 0, -1, 10**9, 64.0, "64", True, [64], float("nan"), float("inf"), 10**300],
        "class_names": [None, "abc", [], ["a", "b"], ["a", "b", "a"], ["a", "b", 3], ["a"] * 3,
                        [["a"], ["b"], ["c"]], [f"{n}" for n in range(5000)], {"a": 1, "b": 2, "c": 3}],
        "packing": [None, [], "linear", {}, {"kind": "linear"}, {"kind": []}, {"kind": "x" * 10**5}, *(
            {"kind": "linear", "features": 8, "classes": 3} | wrong for wrong in (
                {"classes": 4}, {"features": 10**400}, {"features": 8.0}, {"features": -8}, {"kind": "linear batch"},
                {"more": 1})),
            # Keys of gigabytes
            {"kind": "cnn", "side": 256, "kernel": 256, "stride": 1, "channels": 4096, "hidden": 0, "classes": 3}],
    }.items() for value in values),
]  # fmt: skip


@pytest.mark.parametrize("changes", WRONG, ids=lambda changes: f"{changes}"[:40])
def test_descriptions_that_cannot_be(changes):
    told = described(**changes) if isinstance(changes, dict) and changes else changes
    with pytest.raises(ServiceError, match="service") as caught:
        remote(lambda _: httpx.Response(200, text=json.dumps({"head": told})))
    assert str(caught.value).isprintable() and len(str(caught.value)) < 400


@pytest.mark.parametrize("name", ["a/../b", "x" * 1000, "\x1b[31mred", "\ud800", "\u202egnp", "a\nb"])
def test_names_of_models(name):
    asked = []

    def answers(request):
        asked.append(request.url.raw_path.decode())
        return httpx.Response(200, text=json.dumps({name: described()}))

    try:
        server = remote(answers)
    except ServiceError as error:
        assert str(error).isprintable() and name != "a/../b"
        return
    with pytest.raises(ServiceError):
        server.open()
    assert asked[1] == "/models/a%2F..%2Fb/sessions"


def test_texts_of_a_service_cannot_steer_a_terminal(net, film, capsys):
    names = ["nor\x1b[31mmal", "\u202egnissim\u2066", "v" * 10**5]
    changes = {"class_names": names, "trained_on": "\x1b]0;title\x07 line\nline\r\x9b2J", "model": "ckksnet"}
    with TestClient(Service({"head": net}, NO_LIMITS).app) as web:

        def answer(head, body):
            method, path, _ = head.split("\r\n")[0].split(" ")
            response = web.request(method, path, content=body)
            if path == "/models":
                told = response.json()
                told["head"] |= changes
                return said(json.dumps(told))
            return said(response.content, f"{response.status_code} x")

        with answering(answer) as (port, _):
            assert main(["diagnose", film, "--url", f"http://127.0.0.1:{port}"]) == 0
    lines = capsys.readouterr().out.rstrip("\n").split("\n")
    assert len(lines) == 6 and all(line.isprintable() and len(line) < 300 for line in lines)
    assert "gnissim" in lines[1] and "mal" in lines[0]


def test_printable():
    assert printable(" a\tb\n\x1b[0m\u202e\ud800 ") == " a\\tb\\n\\x1b[0m\\u202e\\ud800 "
    assert printable("Lungenentzündung, 肺炎") == "Lungenentzündung, 肺炎"
    assert len(printable("x" * 10**6, 200)) == len(printable("\x1b" * 10**6, 200)) == 200
    assert len(printable("x" * 10**6, None)) == 10**6


def test_a_description_that_changes_changes_nothing(card):
    with TestClient(Service({"head": card}, NO_LIMITS).app) as web:
        told = [web.get("/models").json()]
        told[0]["head"]["packing"]["classes"], told[0]["head"]["class_names"] = 2, ["a", "b"]

        def answers(request):
            if request.url.path == "/models" and len(told) == 1:
                told.append(None)  # the first answer is the right one
                return web._transport.handle_request(request)
            if request.url.path == "/models":
                return httpx.Response(200, json=told[0])
            return web._transport.handle_request(request)

        server = remote(answers)
        assert server.diagnose(np.full(FEATURES, 0.1)).shape == (3,) == (len(server.description["class_names"]),)
        # And one that was wrong from the start gets keys that the service refuses.
        with pytest.raises(ServiceError, match="another"):
            remote(answers).diagnose(np.full(FEATURES, 0.1))


# --- replies ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["card", "net"])
def talk(request):
    """A client; what is to be answered next instead of the service's answers, and the last of those, both by a path's
    last word; a film."""
    card, instead, last = request.getfixturevalue(request.param), {}, {}
    with TestClient(Service({"head": card}, NO_LIMITS).app) as web:

        def answers(asked):
            word = asked.url.path.split("/")[-1]
            if word in instead:
                return httpx.Response(200, content=instead[word]())
            response = web._transport.handle_request(asked)
            last[word] = response.read()
            return response

        server = remote(answers)
        yield server, instead, last, np.full(server.client.packing.in_shape, 0.1)


@pytest.mark.parametrize("token", [None, 7, "", "a b", "../models", "a?b", "x" * 1000, "\x1b", "ä", ["a"], "a\n"])
def test_tokens(token):
    told = {"/models": MODELS}
    server = remote(lambda r: httpx.Response(200, text=told.get(r.url.path, json.dumps({"session": token}))))
    with pytest.raises(ServiceError, match="service"):
        server.open()


@pytest.mark.parametrize("body", [b"", b"<html>", join([]), join([b""]), join([b"x"] * 5), b"\xff" * 50, b"\0" * 9])
def test_replies_that_are_none(talk, body):
    server, instead, _, film = talk
    instead["diagnose"] = lambda: body
    with pytest.raises(ServiceError, match="something"):
        server.diagnose(film)
    instead.clear()
    assert np.isfinite(server.diagnose(film)).all()


def test_replies_of_another_plan(talk):
    server, instead, _, film = talk
    for packing in (LinearPacking(FEATURES, 3, True), LinearPacking(3000, 3), CNNPacking(12, 5, 3, 2, 2, 3)):
        other = CkksClient(packing)
        instead["diagnose"] = lambda other=other: join(other.encrypt(np.zeros(other.packing.in_shape))[:1])
        with pytest.raises(ServiceError, match="something"):
            server.diagnose(film)
    instead.clear()


STRANGE = [None, True, 0, -1, 3, 10**30, 1.5, float("nan"), float("inf"), "", "x", "\x1b[2J\u202e", "y" * 5000, [],
           [[]], {}, {"kind": "cnn"}, "linear", "cnn", "linear batch", "ckksnet", 64, 4096]  # fmt: skip


def changed(told, rng: np.random.Generator):
    """A description with something in it changed, left out, or added."""
    told = json.loads(json.dumps(told))
    for _ in range(rng.integers(1, 4)):
        place = told["head"] if rng.random() < 0.6 else told["head"].get("packing")
        if not isinstance(place, dict) or not place:
            return told
        name = str(rng.choice(list(place)))
        value = STRANGE[rng.integers(len(STRANGE))]
        if rng.random() < 0.15:
            del place[name]
        elif isinstance(place[name], list) and rng.random() < 0.5:
            place[name] = [*place[name], value] if rng.random() < 0.5 else [value] * len(place[name])
        else:
            place[name if rng.random() < 0.9 else f"{value}"[:20]] = value
    return told


def test_hundreds_of_altered_replies_get_logits_or_a_sentence(talk):
    (server, instead, last, film), rng, read, refused = talk, np.random.default_rng(0), 0, 0
    server.diagnose(film)
    good = last["diagnose"]
    instead["diagnose"] = lambda: hostile.altered(good, rng)
    for _ in range(400 if server.client.packing.kind == "linear" else 100):  # a CNN's films take long to encrypt
        try:
            logits = server.diagnose(film)
        except UserError as error:
            refused += 1
            assert str(error).isprintable() and len(str(error)) < 1001
        else:
            read += 1
            assert logits.shape == (3,) and np.isfinite(logits).all()
    instead.clear()
    assert min(read, refused) > 5


def test_hundreds_of_altered_descriptions_get_a_client_or_a_sentence():
    rng, fine = np.random.default_rng(0), 0
    cnn = {"class_names": ["a", "b"], "packing": spec_of(CNNPacking(12, 5, 3, 2, 0, 2))}
    for number in range(400):
        told = {"head": described(**(cnn if number % 2 else {}))}
        text = json.dumps(changed(told, rng)).encode()
        text = hostile.altered(text, rng) if number % 3 == 0 else text
        try:
            server = remote(lambda _, text=text: httpx.Response(200, content=text))
        except UserError as error:
            assert str(error).isprintable() and len(str(error)) < 1001
        else:
            fine += 1
            assert all(name.isprintable() for name in server.description["class_names"])
    assert 7 < fine < 333


def test_a_hundred_altered_answers_on_the_line():
    good, rng = said(MODELS, "200 OK", "Content-Type: application/json"), np.random.default_rng(0)
    with answering(lambda *_: hostile.altered(good, rng)) as (port, _):
        for _ in range(100):
            with contextlib.suppress(UserError):
                RemoteServer(f"http://127.0.0.1:{port}", retries=0, timeout_s=5)


# --- workers that were taken over -------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["pickles", "endless", "large", "empty", "another_kind"])
def test_what_no_worker_says_ends_it(card, monkeypatch, tmp_path, way):
    monkeypatch.setattr(workers, "work", getattr(hostile, way))
    worker = workers.Worker({"head": card}, BOUNDS, 1000)
    try:
        pid = worker.pid
        with pytest.raises(workers.WorkerDied):
            worker.call("close", f"<{tmp_path / 'payload'}>")
        assert worker.pid != pid and not (tmp_path / "payload").exists()
    finally:
        worker.stop()


def test_a_pickle_instead_of_a_start(card, monkeypatch, tmp_path):
    monkeypatch.setattr(workers, "work", hostile.pickles_at_once)
    monkeypatch.setenv("PAYLOAD", str(tmp_path / "payload"))
    with pytest.raises(UserError, match="start"):
        workers.Worker({"head": card}, BOUNDS, 1000)
    assert not (tmp_path / "payload").exists()


def test_a_worker_s_text_is_cleaned(card, monkeypatch):
    monkeypatch.setattr(workers, "work", hostile.controls)
    worker = workers.Worker({"head": card}, BOUNDS, 1000)
    try:
        with pytest.raises(CiphertextError) as caught:
            worker.call("close", "token")
        assert str(caught.value).isprintable() and len(str(caught.value)) < 501
    finally:
        worker.stop()
