"""Folders, keys and certificates; the guards around Flower's processes; what deploy refuses."""

import asyncio
import json
import os
import shutil
import socket
import ssl
import stat
import threading
import tomllib
from contextlib import contextmanager
from unittest import mock

import httpx
import psutil
import pytest
import uvicorn
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_ssh_private_key,
    load_ssh_public_key,
)

from primia_lite.apps import cli
from primia_lite.apps.flower import card as flower_card
from primia_lite.apps.flower import deploy as flower_deploy
from primia_lite.apps.flower import folder as flower_folder
from primia_lite.apps.flower import process as flower_process
from primia_lite.apps.flower import setup as flower_setup
from primia_lite.apps.flower.card import write_new
from primia_lite.apps.flower.hospital import FolderHospital, read_identity
from primia_lite.config import UserError
from primia_lite.federation.study import Study, describe
from primia_lite.models import build
from primia_lite.secagg import SecAggServer

pytestmark = pytest.mark.flower
FILMS = {"source": "phantom", "size": 28, "n_films": 60}
SETTINGS = {"training": {"learning_rate": 0.1}}


@pytest.fixture(scope="module")
def federation(tmp_path_factory):
    """Server and hospitals A, B, C without DP, as `deploy init` makes them."""
    folder = tmp_path_factory.mktemp("deploy") / "federation"
    flower_setup.make_all(
        folder, ["A", "B", "C"], FILMS, port=9321, target_epsilon=None, rounds=3, model="mlp", settings=SETTINGS
    )
    return folder


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


# --- keys and certificates --------------------------------------------------------------------------------------------


def test_private_keys_are_for_their_owner_alone_and_of_the_kind_that_is_needed(federation):
    private = [federation / name / key for name in "ABC" for key in ("identity.pem", "supernode")]
    private += [federation / "server" / key for key in ("ca.key", "server.key")]
    assert all(mode(path) == 0o600 for path in private)
    assert all(mode(federation / part) == 0o700 for part in ("A", "B", "C", "server"))
    node = load_ssh_private_key((federation / "A" / "supernode").read_bytes(), None)
    assert isinstance(node.curve, ec.SECP384R1)
    public = load_ssh_public_key((federation / "server" / "hospitals" / "A.pub").read_bytes())
    assert public.public_numbers() == node.public_key().public_numbers()
    # The server has nothing of a hospital's but public keys.
    theirs = b"".join(path.read_bytes() for path in (federation / "server").rglob("*") if path.is_file())
    for path in private[:6]:
        assert path.read_bytes().splitlines()[1] not in theirs


def test_keys_are_never_overwritten(federation):
    before = {path: path.read_bytes() for path in federation.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="overwritten"):
        flower_setup.make_all(federation, ["A"], FILMS, port=1, target_epsilon=None, rounds=1)
    with pytest.raises(UserError, match="overwritten"):
        flower_card.make_hospital(federation / "A", FILMS)
    with pytest.raises(UserError, match="already"):
        flower_setup.make_server(federation / "server", [], hosts=["x"], port=1, rounds=1, target_epsilon=None)
    with pytest.raises(UserError, match="already"):
        write_new(federation / "A" / "identity.pem", b"x")
    assert before == {path: path.read_bytes() for path in federation.rglob("*") if path.is_file()}


def test_an_identity_that_others_can_read_is_refused(federation, tmp_path):
    copy = tmp_path / "identity.pem"
    copy.write_bytes((federation / "A" / "identity.pem").read_bytes())
    copy.chmod(0o640)
    with pytest.raises(UserError, match="chmod"):
        read_identity(copy)


@pytest.mark.parametrize("name, accepted", [("127.0.0.1", True), ("localhost", True), ("other.example", False)])
def test_the_certificate_holds_for_the_server_s_names_and_no_other(federation, name, accepted):
    home = federation / "server"
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(home / "server.crt", home / "server.key")
    client = ssl.create_default_context(cafile=str(federation / "A" / "ca.crt"))
    client.verify_flags |= getattr(ssl, "VERIFY_X509_STRICT", 0)
    listener = socket.create_server(("127.0.0.1", 0))

    def answer():
        connection, _ = listener.accept()
        try:
            with server.wrap_socket(connection, server_side=True) as secured:
                secured.sendall(b"hello")
        except (ssl.SSLError, OSError):
            connection.close()

    thread = threading.Thread(target=answer)
    thread.start()
    with socket.create_connection(listener.getsockname()) as plain:
        if accepted:
            with client.wrap_socket(plain, server_hostname=name) as secured:
                assert secured.recv(5) == b"hello"
        else:
            with pytest.raises(ssl.SSLCertVerificationError):
                client.wrap_socket(plain, server_hostname=name)
    thread.join()
    listener.close()


# --- what parties settle ----------------------------------------------------------------------------------------------


def test_all_have_the_same_study_and_it_says_what_it_is(federation):
    texts = {(federation / part / "study.json").read_bytes() for part in ("A", "B", "C", "server")}
    assert len(texts) == 1
    study = Study.from_bytes(texts.pop())
    words = describe(study)
    assert "NO differential privacy" in words and "at least 2 of 3" in words
    assert study.agreement.identities["B"].hex() in words
    config = tomllib.loads((federation / "server" / "server.toml").read_text())
    assert config["in_shape"] == [1, 28, 28] and config["port"] == 9321


def test_a_hospital_may_declare_a_number_of_its_own(tmp_path):
    assert flower_card.make_hospital(tmp_path / "D", FILMS, declared=77)["declared"] == 77
    with pytest.raises(UserError, match="declared"):
        flower_card.make_hospital(tmp_path / "E", FILMS, declared=0)
    assert not (tmp_path / "E").exists()


def test_a_hospital_joins_only_a_study_that_names_it_as_it_is(federation, tmp_path):
    card = flower_card.make_hospital(tmp_path / "D", FILMS, "film")
    study, ca = (federation / "server" / "study.json").read_bytes(), b"ca"
    with pytest.raises(UserError, match="study"):
        flower_setup.join(tmp_path / "D", study, ca, "127.0.0.1:9321")
    content = json.loads(study)
    content["agreement"]["identities"]["D"] = content["agreement"]["identities"].pop("C")
    content["agreement"]["sizes"]["D"] = content["agreement"]["sizes"].pop("C")
    with pytest.raises(UserError, match="another"):
        flower_setup.join(tmp_path / "D", json.dumps(content).encode(), ca, "127.0.0.1:9321")
    content["agreement"]["identities"]["D"] = card["identity"]
    content["agreement"]["sizes"]["D"] = card["declared"] + 10
    with pytest.raises(UserError, match="card"):
        flower_setup.join(tmp_path / "D", json.dumps(content).encode(), ca, "127.0.0.1:9321")
    content["agreement"]["sizes"]["D"] = card["declared"]
    with pytest.raises(UserError, match="host:port"):
        flower_setup.join(tmp_path / "D", json.dumps(content).encode(), ca, "nowhere")
    flower_setup.join(tmp_path / "D", json.dumps(content).encode(), ca, "server.example:9321")
    assert tomllib.loads((tmp_path / "D" / "hospital.toml").read_text())["superlink"] == "server.example:9321"
    with pytest.raises(UserError, match="already"):
        flower_setup.join(tmp_path / "D", json.dumps(content).encode(), ca, "server.example:9321")


def test_cards_that_do_not_fit_are_refused(federation):
    cards = [flower_card.read_card(federation / name / "card.json") for name in "ABC"]
    with pytest.raises(UserError, match="unit"):
        flower_setup.settle(cards, 3, 8.0, "mlp", SETTINGS)
    with pytest.raises(UserError, match="size"):
        flower_setup.settle([*cards[:2], cards[2] | {"size": 32}], 3, None, "mlp", SETTINGS)
    with pytest.raises(UserError, match="name"):
        flower_setup.settle([cards[0], cards[0]], 3, None, "mlp", SETTINGS)
    with pytest.raises(UserError, match="SuperNode"):  # one key logs one hospital in
        flower_setup.settle([*cards[:2], cards[2] | {"supernode": cards[0]["supernode"]}], 3, None, "mlp", SETTINGS)
    with pytest.raises(UserError, match="training"):
        flower_setup.settle(cards, 3, None, "mlp", {"training": {"learning_rat": 1.0}})
    with pytest.raises(UserError, match="name"):
        flower_card.make_hospital(federation / "server", FILMS)
    with pytest.raises(UserError, match="card"):
        flower_card.read_card(federation / "server" / "study.json")


P256 = ec.generate_private_key(ec.SECP256R1()).public_key()
SSH = P256.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


@pytest.mark.parametrize(
    "change",
    [
        {"name": "../evil"}, {"name": "/tmp/evil"}, {"name": "C\n"}, {"name": ""}, {"name": "-C"}, {"name": "C" * 41},
        {"name": "superlink"}, {"name": "Server"}, {"name": 5}, {"name": "\x1b[2J"}, {"name": "c\u0301"}, {"name": "a"},
        {"identity": "zz"}, {"identity": "0" * 62}, {"identity": " " + "0" * 63}, {"identity": 10**63},
        {"identity": None}, {"identity": ["0" * 64]},
        {"supernode": "ssh-rsa whatever"}, {"supernode": SSH}, {"supernode": ["x"]}, {"supernode": "\ud800"},
        {"supernode": lambda text: text + "\nsecond line"}, {"supernode": lambda text: text + " comment"},
        {"supernode": lambda text: "command=\"sh\" " + text},
        {"declared": True}, {"declared": 0}, {"declared": -10}, {"declared": 10**400}, {"declared": 30.0},
        {"declared": "30"},
        {"size": 10**9}, {"size": True}, {"unit": "hospital"}, {"unit": ["film"]},
    ],
)  # fmt: skip
def test_a_card_is_another_s_word(federation, tmp_path, change):
    cards = [flower_card.read_card(federation / name / "card.json") for name in "ABC"]
    odd = cards[2] | {key: value(cards[2][key]) if callable(value) else value for key, value in change.items()}
    (field,) = change
    with pytest.raises(UserError, match=field) as error:
        flower_setup.make_server(tmp_path / "server", [*cards[:2], odd], hosts=["127.0.0.1"], port=1, rounds=1,
                                 target_epsilon=None, model="mlp", settings=SETTINGS)  # fmt: skip
    assert str(error.value).isprintable() and len(str(error.value)) < 300
    assert list(tmp_path.rglob("*")) == []
    if odd["name"] != "a":  # which is one alone, but A is there
        path = tmp_path / "card.json"
        path.write_text(json.dumps(odd))
        with pytest.raises(UserError):
            flower_card.read_card(path)


@pytest.mark.parametrize(
    "content",
    [b"[" * 100_000, b"{" * 100, b'{"a":' * 20 + b"1" + b"}" * 20, b"[]", b"null", b"\xff\xfe", b'{"name": NaN}',
     b'{"name": "A", "name": "B"}', b'{"declared": 1e999}', b'{"declared": ' + b"9" * 5000 + b"}", b" " * 100_000,
     b'{"name": "\\ud800"}', b""],
)  # fmt: skip
def test_a_file_that_is_no_card_is_named(tmp_path, content):
    (tmp_path / "card-A.json").write_bytes(content)
    with pytest.raises(UserError, match="card-A.json"):
        flower_card.read_card(tmp_path / "card-A.json")
    with pytest.raises(UserError, match="card"):
        flower_card.read_card(tmp_path)  # a folder


def test_what_else_a_card_holds_goes_no_further(federation, tmp_path):
    card = json.loads((federation / "A" / "card.json").read_text())
    (tmp_path / "card.json").write_text(json.dumps(card | {"note": "\x1b[2J", "price": 5}))
    assert flower_card.read_card(tmp_path / "card.json") == card


# --- proxies ----------------------------------------------------------------------------------------------------------

PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy", "no_grpc_proxy", "grpc_proxy")


@pytest.fixture
def proxies(monkeypatch):
    """Sets variables of proxies, and no others are."""
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    return lambda **variables: [monkeypatch.setenv(name, value) for name, value in variables.items()]


def goes_through(environment, url) -> bool:
    """Whether httpx, which Flower's processes use, would take a proxy."""
    with mock.patch.dict(os.environ, environment, clear=True), httpx.Client() as client:
        return "Proxy" in type(client._transport_for_url(httpx.URL(url))._pool).__name__


@pytest.mark.parametrize("variables", [
    {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}, {"ALL_PROXY": "http://proxy.example:31"},
    {"HTTPS_PROXY": "http://proxy.example:3128", "NO_PROXY": "intern.example"},
    {"HTTPS_PROXY": "http://proxy.example:3128", "no_proxy": ""},
    {"https_proxy": "http://proxy.example:3128", "no_proxy": "intern.example, ,10.0.0.1", "no_grpc_proxy": "a.example"},
])  # fmt: skip
def test_no_proxy_gets_what_stays_on_this_machine(federation, proxies, variables):
    proxies(**variables)
    found = flower_folder.environment(federation)
    for host in ("127.0.0.1", "localhost", "[::1]"):
        assert not goes_through(found, f"https://{host}:9200/v1/fleet")
    assert goes_through(found, "https://server.example:9200/")
    for name in ("no_proxy", "NO_PROXY", "no_grpc_proxy"):
        before = [part.strip() for part in variables.get(name, "").split(",") if part.strip()]
        assert found.get(name, "").split(",")[: len(before)] == before or not before
    assert ("no_grpc_proxy" in found) == ("no_grpc_proxy" in variables)
    if "NO_PROXY" in variables:
        assert not goes_through(found, "https://intern.example:9200/")


def test_nor_what_goes_to_this_machine_by_another_address(federation, tmp_path, proxies):
    proxies(https_proxy="http://127.0.0.1:9")
    shutil.copytree(federation, tmp_path / "moved")
    changes = ("server/server.toml", '"127.0.0.1"', '"192.0.2.1"'), ("A/hospital.toml", "127.0.0.1", "127.8.0.9")
    for part, old, new in changes:
        path = tmp_path / "moved" / part
        path.write_text(path.read_text().replace(old, new, 1))
    found = flower_folder.environment(tmp_path / "moved")
    assert not goes_through(found, "https://192.0.2.1:9321") and not goes_through(found, "https://127.8.0.9:9321")


@pytest.mark.parametrize("variable", ["https_proxy", "HTTPS_PROXY", "all_proxy", None])
def test_a_server_elsewhere_that_isn_t_reached_is_named_and_the_proxy_too(federation, tmp_path, proxies, variable):
    proxies(**({variable: "http://user:secret@127.0.0.1:9"} if variable else {}))
    shutil.copytree(federation / "A", tmp_path / "A")
    path = tmp_path / "A" / "hospital.toml"
    path.write_text(path.read_text().replace("127.0.0.1:9321", "server.invalid:9321"))
    (line,) = flower_folder.unreached(tmp_path, ["A"])
    assert "server.invalid:9321" in line and "secret" not in line
    assert f"{variable} is set" in line if variable else "proxy" not in line


def test_a_hospital_s_processes_go_on_where_the_last_one_ended(federation):
    """Each message is answered by a FlowerHospital of its own, as by a new process; nothing but the folder is kept."""
    agreement = FolderHospital(federation / "A").agreement
    server, secrets = SecAggServer(agreement, 1), set()
    weights = None
    seen = b""
    while server.step is not None:
        requests = server.requests()
        if server.step == "mask":
            weights = {name: value.numpy() for name, value in build("mlp", 3, (1, 28, 28)).state_dict().items()}
        replies = []
        for name, text in requests.items():
            site = FolderHospital(federation / name)
            (reply,) = site.answer(site.fingerprint, [text], 1, weights)
            replies.append(reply)
            seen += reply.split()[0]
            path = federation / name / "rounds.json"
            assert mode(path) == 0o600
            kept = site.rounds.kept["clients"][1]["round"] or {}
            secrets |= {kept.get(key) for key in ("mask_key", "share_key", "own_seed")}
        for reply in replies:
            server.receive(reply)
        server.close()
    secrets -= {None, ""}
    assert len(secrets) == 9 and not any(secret.encode() in seen for secret in secrets)
    assert server.survivors == ("A", "B", "C") and abs(server.mean).max() > 0
    kept = FolderHospital(federation / "A").rounds.kept["clients"]
    assert [client.get("round") for client in kept] == [None, None]
    (films,) = (federation / "A").glob("films-*.npz")
    assert mode(films) == 0o600


# --- guards -----------------------------------------------------------------------------------------------------------


def test_a_supernode_takes_no_other_app_than_the_installed_one(monkeypatch):
    from flwr.supercore.fab import Fab
    from flwr.supercore.run import RunNotRunningException
    from flwr.supernode import start_client_internal as internal

    sent = {"ours": flower_process.app_bundle(), "theirs": flower_process.app_bundle() + b" "}

    @contextmanager
    def connect(*_):
        yield (1, None, None, None, lambda fab_hash, run_id: Fab(fab_hash, sent[fab_hash], {}), None, None, None)

    monkeypatch.setattr(internal, "_init_connection", connect)
    flower_process.guard_supernode()
    with internal._init_connection("server") as connection:
        get_fab = connection[4]
        assert get_fab("ours", 1).content == sent["ours"]
        with pytest.raises(RunNotRunningException):
            get_fab("theirs", 1)


@pytest.mark.parametrize("client, path, passes", [
    ("203.0.113.7", "/v1/fleet/pull-messages", True), ("203.0.113.7", "/v1/control/start-run", False),
    ("203.0.113.7", "/v1/runtime/acquire-task", False), ("203.0.113.7", "/v1/fleet", False),
    ("127.0.0.1", "/v1/control/start-run", True), ("::1", "/v1/control/start-run", True),
    ("192.0.2.1", "/v1/control/start-run", True),  # the server's own address
    ("", "/v1/control/start-run", False),
])  # fmt: skip
def test_other_machines_reach_the_fleet_api_alone(client, path, passes):
    reached, sent = [], []

    async def app(scope, receive, send):
        reached.append(scope["path"])

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "path": path, "client": (client, 5), "server": ("192.0.2.1", 9200)}
    asyncio.run(flower_process.FleetOnly(app)(scope, None, send))
    assert bool(reached) == passes
    assert passes or sent[0]["status"] == 404


def test_the_superlink_is_built_with_the_fence(monkeypatch):
    from flwr.superlink import extensions, main

    monkeypatch.setattr(extensions, "get_middleware", extensions.get_middleware)
    monkeypatch.setenv("FORWARDED_ALLOW_IPS", "*")
    flower_process.guard_superlink()
    # By a header any client could say that it is this machine.
    config = uvicorn.Config(lambda: None, headers=[])
    assert config.forwarded_allow_ips == ""
    assert main._get_middleware()[0].cls is flower_process.FleetOnly


# --- the command ------------------------------------------------------------------------------------------------------


def deploy(capsys, *arguments):
    code = cli.main(["deploy", *map(str, arguments)])
    return code, capsys.readouterr()


def test_mistakes_are_named(federation, tmp_path, capsys, monkeypatch):
    code, said = deploy(capsys, "start", tmp_path)
    assert code == 2 and "holds no federation" in said.err
    code, said = deploy(capsys, "run", federation)
    assert code == 2 and "no server runs" in said.err
    code, said = deploy(capsys, "run", federation, "--rounds", 4)
    assert code == 2 and "agreed to 1 to 3" in said.err
    code, said = deploy(capsys, "stop", federation)
    assert code == 0 and "nothing ran" in said.out
    code, said = deploy(capsys, "status", federation)
    assert code == 0 and said.out.splitlines() == ["superlink: stopped", *(f"{n}: stopped" for n in "ABC")]
    with socket.create_server(("127.0.0.1", 9321)):
        code, said = deploy(capsys, "start", federation)
    assert code == 2 and "can't listen at 127.0.0.1:9321" in said.err
    monkeypatch.setattr(flower_folder, "find_spec", lambda name: None)
    code, said = deploy(capsys, "start", federation)
    assert code == 2 and "pip install 'primia-lite[flower]'" in said.err


def test_the_steps_of_three_machines(tmp_path, capsys, monkeypatch):
    """Each party's commands in a folder of its own; the server sees cards only, a hospital its study only."""
    options = ("--data", "phantom", "--size", 28, "--n-films", 60)
    cards = []
    for name in "AB":
        place = tmp_path / f"hospital-{name}" / name
        code, said = deploy(capsys, "hospital", place, *options, "--unit", "film")
        assert code == 0 and f"hospital {name} declares" in said.out
        cards.append(place / "card.json")
    operator = tmp_path / "operator"
    code, said = deploy(capsys, "server", operator, "--cards", *cards, "--host", "127.0.0.1", "fl.example.org",
                        "--rounds", 2, "--no-dp", "--model", "mlp", "--port", 9377)  # fmt: skip
    assert code == 0 and "at least 2 of 2" in said.out
    given = ("--study", operator / "server" / "study.json", "--ca", operator / "server" / "ca.crt")
    for name in "AB":
        place = tmp_path / f"hospital-{name}" / name
        monkeypatch.setattr("builtins.input", lambda _: "n")
        code, said = deploy(capsys, "join", place, *given, "--superlink", "fl.example.org:9377")
        assert code == 2 and "not joined" in said.err and not (place / "study.json").exists()
        code, said = deploy(capsys, "join", place, *given, "--superlink", "fl.example.org:9377", "--yes")
        assert code == 0 and FolderHospital(place).agreement.identities[name].hex() in said.out
    studies = {(tmp_path / f"hospital-{n}" / n / "study.json").read_bytes() for n in "AB"}
    assert studies == {(operator / "server" / "study.json").read_bytes()}


def test_init_makes_all_of_them(tmp_path, capsys):
    options = ("--n-films", 60, "--size", 28, "--model", "mlp", "--no-dp", "--rounds", 2)
    code, said = deploy(capsys, "init", tmp_path / "trial", "--hospitals", "X, Y", *options)
    assert code == 0 and "primia-lite deploy start" in said.out
    assert flower_folder.parts(tmp_path / "trial") == (True, ["X", "Y"])


@pytest.mark.slow
def test_the_same_apps_on_flowers_simulation(federation, tmp_path, capsys):
    pytest.importorskip("ray", reason="Ray isn't installed: pip install 'primia-lite[flower-simulation]'")
    shutil.copytree(federation, tmp_path / "simulated")
    code, said = deploy(capsys, "simulate", tmp_path / "simulated", "--rounds", 2)
    assert code == 0 and "2 rounds are done" in said.out


def test_a_pid_file_of_a_process_that_is_gone_or_another_is_no_process_of_ours(tmp_path):
    run = tmp_path / ".run"
    run.mkdir()
    (run / "A.pid").write_text("999999999 1.0")
    (run / "B.pid").write_text(f"{os.getpid()} 1.0")  # the number was given to another process since
    (run / "C.pid").write_text("nonsense")
    (run / "D.pid").write_text(f"{os.getpid()} {psutil.Process().create_time()}")
    assert list(flower_deploy.running(tmp_path)) == ["D"]
    assert sorted(path.name for path in run.iterdir()) == ["D.pid"]


def test_what_is_running_is_not_started_again(federation, monkeypatch):
    names = dict.fromkeys(["superlink", "A", "B", "C"])
    monkeypatch.setattr(flower_deploy, "running", lambda folder: names)
    with pytest.raises(UserError, match="already"):
        flower_deploy.start(federation)
