"""All five parties over TLS: what they agree on, what they refuse, and that a key serves once."""

import random
import shutil
import socket
import struct
import threading
import time
from contextlib import suppress

import numpy as np
import pytest
from conftest import Parties

from primia_lite import smpc
from primia_lite.config import UserError
from primia_lite.smpc.connection import Connection, PeerError, connect_both
from primia_lite.smpc.keys import KeyStore
from primia_lite.smpc.ring import encode, share


@pytest.fixture
def ready(parties, small):
    """Parties with a model and two keys."""
    _, program, weights, _ = small
    parties.send_model(program, weights)
    parties.dealing = parties.deal(program, 2)
    return parties


def key_file(parties, server, number):
    return parties.root / f"server{server}" / "keys" / parties.dealing / f"{number:06}.key"


def test_films_are_diagnosed_and_each_uses_up_one_key(ready, small):
    network, program, _, films = small
    want = network(films[:2]).detach().numpy()
    for i in range(2):
        found = ready.diagnose(films[i : i + 1], program=program)
        assert np.abs(found.logits - want[i]).max() < 0.005 and found.key == i
        assert found.costs[0]["rounds"] == found.costs[1]["rounds"] == 7
    assert not [path for b in range(2) for path in key_file(ready, b, 0).parent.glob("*.key")]
    with pytest.raises(PeerError, match="deal"):
        ready.diagnose(films[:1])
    ready.dealing = ready.deal(program, 1)
    assert np.abs(ready.diagnose(films[:1]).logits - want[0]).max() < 0.005


def test_a_key_for_several_films_serves_them_at_once(parties, small):
    network, program, weights, films = small
    parties.send_model(program, weights)
    parties.deal(program, 1, batch=4)
    with pytest.raises(UserError, match="films"):
        parties.diagnose(films[:5])
    found = parties.diagnose(films[:3])
    assert np.abs(found.logits - network(films[:3]).detach().numpy()).max() < 0.005


def test_servers_go_on_with_the_next_key_after_a_restart(ready, small):
    network, _, _, films = small
    ready.close()
    ready.start()
    assert ready.diagnose(films[:1]).key == 0
    ready.close()  # key 1 may have been prepared, and is lost then
    again = Parties(ready.root)
    try:
        again.deal(small[1], 1)
        assert np.abs(again.diagnose(films[:1]).logits - network(films[:1]).detach().numpy()).max() < 0.005
    finally:
        again.close()


def test_a_key_is_never_taken_twice_also_if_its_file_comes_back(ready, small, tmp_path):
    digest = small[1].digest
    ready.close()
    for server in range(2):
        copy = shutil.copy(key_file(ready, server, 0), tmp_path)
        store = KeyStore(ready.root / f"server{server}" / "keys", server)
        store.take(ready.dealing, 0, digest)
        for _ in range(2):
            with pytest.raises(UserError, match="used"):
                KeyStore(store.folder, server).take(ready.dealing, 0, digest)
            shutil.copy(copy, key_file(ready, server, 0))
        assert store.held("", digest)[ready.dealing] == [1]
        later = KeyStore(store.folder, server)
        later.take(ready.dealing, 1, digest)
        assert later.held("", digest) == {}


def spoil(path, how, other):
    data = bytearray(path.read_bytes())
    if how == "truncated":
        path.write_bytes(data[:-5])
    elif how == "altered":
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    else:
        shutil.copy(other, path)


@pytest.mark.parametrize("how", ["truncated", "altered", "of the other server", "of another dealing"])
def test_a_broken_key_is_refused_and_lost(ready, small, how):
    dealing = ready.deal(small[1], 1)
    ready.close()
    other = ready.root / "server0" / "keys" / dealing / "000000.key"
    spoil(key_file(ready, 0, 0), how, other if how == "of another dealing" else key_file(ready, 1, 0))
    store = KeyStore(ready.root / "server0" / "keys", 0)
    with pytest.raises(UserError, match="lost"):
        store.take(ready.dealing, 0, small[1].digest)
    with pytest.raises(UserError, match="used"):
        store.take(ready.dealing, 0, small[1].digest)


def test_a_broken_key_costs_its_film_a_sentence_and_the_next_one_works(ready, small):
    spoil(key_file(ready, 1, 0), "altered", None)
    with pytest.raises(PeerError, match="broken"):
        ready.diagnose(small[3][:1])
    assert ready.diagnose(small[3][:1]).key == 1


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda film: film[:, :, :-1], "films must be"),
        (lambda film: film[0], "films must be"),
        (lambda film: np.where(film > 1, np.nan, film), "finite"),
        (lambda film: film * 100, "calibration"),
        (lambda film: film[:0], "1 films"),
    ],
)
def test_a_film_that_does_not_fit_is_refused_before_it_is_sent(ready, small, change, word):
    with pytest.raises(UserError, match=word):
        ready.diagnose(change(small[3][:1].numpy()))
    assert key_file(ready, 0, 0).exists()


def test_a_program_that_the_owner_did_not_expect_is_refused(ready, small):
    network, _, _, films = small
    other, _ = smpc.compile(network, films * 1.5)
    with pytest.raises(PeerError, match="another"):
        ready.diagnose(films[:1], program=other)


def test_servers_with_two_models_refuse(ready, small):
    films = small[3]
    name = ready.root / "server1" / "model" / "name"
    name.write_text("0" * 32)
    ready.close()
    ready.start()
    with pytest.raises(PeerError, match="different"):
        ready.diagnose(films[:1])


def test_a_dealing_serves_one_model_only(parties, small):
    """The same masks over two models would show both servers their difference."""
    _, program, weights, films = small
    parties.send_model(program, weights)
    dealing = parties.deal(program, 4)
    parties.diagnose(films[:1])
    parties.send_model(program, {name: (2 * weight, bias) for name, (weight, bias) in weights.items()})
    with pytest.raises(PeerError, match="first"):
        parties.diagnose(films[:1])
    with pytest.raises(UserError, match="another"):
        parties.servers[0].keys.bind(dealing, "0" * 32)


def test_keys_for_another_program_or_that_came_before_are_refused(ready, small):
    network, _, _, films = small
    other, _ = smpc.compile(network, films * 1.5)
    with pytest.raises(PeerError, match="another"):
        ready.deal(other, 1)


def test_strangers_and_parties_in_another_role_get_no_answer(ready, small, tmp_path):
    smpc.make_identity(tmp_path / "stranger", "film")
    shutil.copytree(ready.root / "film" / "peers", tmp_path / "stranger" / "peers", dirs_exist_ok=True)
    with pytest.raises(PeerError):
        smpc.diagnose(small[3][:1].numpy(), smpc.Party(tmp_path / "stranger"), ready.addresses)
    with pytest.raises(PeerError, match="answers"):
        smpc.diagnose(small[3][:1].numpy(), ready.party["film"], ready.addresses[::-1])
    with pytest.raises(UserError, match="identity"):
        smpc.Party(tmp_path)


def test_a_server_that_is_not_there_is_named(ready, small):
    ready.servers[1].close()
    with pytest.raises(PeerError, match="server1"):
        ready.diagnose(small[3][:1])


@pytest.mark.parametrize("how", ["vanishes", "stalls", "garbage", "too much"])
def test_a_second_server_that_fails_costs_its_film_one_sentence(ready, small, how):
    """Server 0 tells the film's owner; its key is used up or still there, and the next film isn't held up."""
    listener, party = socket.create_server(("127.0.0.1", 0)), ready.party["server1"]
    done = threading.Event()

    def pretend():
        with suppress(PeerError), party.accept(listener.accept()[0], 5) as connection:
            connection.receive("film")
            if how == "stalls":
                done.wait(10)
            elif how == "garbage":
                connection.exchange(b"\xff" * 64)
            elif how == "too much":
                connection.send({"kind": "state"}, bytes(1 << 20))
                done.wait(10)

    thread = threading.Thread(target=pretend, daemon=True)
    thread.start()
    first = smpc.Server(ready.root / "server0", 0, listener.getsockname(), deadline_s=1.0)
    address = first.listen(("127.0.0.1", 0))
    with pytest.raises(PeerError, match="server"):
        smpc.diagnose(small[3][:1].numpy(), ready.party["film"], (address, ready.addresses[1]))
    done.set()
    first.close()
    thread.join(10)


def conversation(role, work):
    """The bytes that a party sends to a server in ``work(connection)``."""
    ours, theirs = socket.socketpair()
    work(Connection(ours, "server0"))
    ours.close()
    data = b""
    while piece := theirs.recv(1 << 16):
        data += piece
    return role, data


def test_ten_thousand_mutated_messages_do_no_harm(ready, small):
    """To a server from its dealer, a model's owner and a film's owner: refused with a sentence, and nothing is kept."""
    _, program, _, films = small
    server = ready.servers[0]
    key = {"kind": "key", "dealing": "a" * 32, "number": 0, "server": 0, "program": program.digest, "batch": 1,
           "seed": "b" * 32, "model_seed": "c" * 32}  # fmt: skip

    def dealer(connection):
        connection.send(key)
        connection.send({"kind": "part"}, bytes(64))
        connection.send({"kind": "end"})

    def model(connection):
        connection.send({"kind": "model", "name": "d" * 32}, program.to_json().encode())
        connection.send({"kind": "layer"}, bytes(64))

    def film(connection):
        connection.send({"kind": "film", "session": "e" * 31}, bytes(4 * 1024))

    talks = [conversation(*pair) for pair in (("dealer", dealer), ("model", model), ("film", film), ("server1", film))]
    rng, refused = random.Random(0), 0
    for i in range(10_000):
        role, data = talks[i % len(talks)]
        data = bytearray(data)
        for _ in range(rng.choice([1, 1, 2, 8])):
            at = rng.randrange(min(len(data), 400))  # the headers
            choice = rng.randrange(4)
            if choice == 0:
                data[at] ^= 1 << rng.randrange(8)
            elif choice == 1:
                del data[at : at + rng.randrange(1, 40)]
            elif choice == 2:
                data[at:at] = rng.randbytes(rng.randrange(1, 40))
            else:
                data[at : at + 4] = struct.pack("<I", rng.choice([0, 1, 2**31, 2**32 - 1]))
        ours, theirs = socket.socketpair()
        ours.sendall(data[:60_000])
        ours.shutdown(socket.SHUT_WR)
        try:
            server.answer(Connection(theirs, role, 0.5))
        except UserError:
            refused += 1
        ours.close()
        theirs.close()
    assert refused > 5_000  # a dealer's connection may end at any time
    assert server.model.name == (ready.root / "server0" / "model" / "name").read_text()
    assert set(server.keys.held(server.model.name, program.digest)) == {ready.dealing}
    assert ready.diagnose(films[:1]).key == 0


def close_to(found, network, films):
    return np.abs(found.logits - network(films).detach().numpy()).max() < 0.02


def test_keys_of_one_program_do_not_serve_another(parties, small):
    """A dealing that no film used yet is bound to no model."""
    network, program, weights, films = small
    parties.send_model(program, weights)
    for _ in range(2):
        parties.deal(program, 1)
    other, weights = smpc.compile(network, films * 50)  # fewer bits, other cuts
    assert other.fractions != program.fractions
    parties.send_model(other, weights)
    with pytest.raises(PeerError, match="deal"):
        parties.diagnose(films[:1])
    parties.deal(other, 1)
    assert close_to(parties.diagnose(films[:1]), network, films[:1])


def test_a_film_is_not_read_by_another_model_than_its_owner_was_offered(ready, small):
    _, program, weights, films = small

    def late(offered):
        ready.send_model(program, {name: (2 * weight, bias) for name, (weight, bias) in weights.items()})
        ready.deal(program, 1)
        return films[:1].numpy()

    with pytest.raises(PeerError, match="model"):
        smpc.diagnose(late, ready.party["film"], ready.addresses)


def test_a_server_that_fails_while_it_prepares_serves_the_next_film(ready, small, monkeypatch):
    network, _, _, films = small
    keys, calls = ready.servers[0].keys, []
    take = keys.take

    def sometimes(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise RuntimeError("a disk fell out")
        return take(*arguments)

    monkeypatch.setattr(keys, "take", sometimes)
    for _ in range(2):
        assert close_to(ready.diagnose(films[:1], deadline_s=5), network, films[:1])


def test_a_closed_connection_says_so():
    ours, theirs = socket.socketpair()
    connection = Connection(ours, "film")
    connection.close()
    for call in (lambda: connection.send({"kind": "error"}), lambda: connection.receive("film")):
        with pytest.raises(PeerError, match="film"):
            call()
    theirs.close()


def slow_deadlines(ready, deadline_s):
    ready.close()
    ready.deadline_s = deadline_s
    ready.start()


def test_strangers_and_idle_parties_leave_room_for_a_film(ready, small):
    network, _, _, films = small
    slow_deadlines(ready, 2.0)
    strangers = [socket.create_connection(address) for address in ready.addresses for _ in range(40)]
    assert close_to(ready.diagnose(films[:1]), network, films[:1])
    for stranger in strangers:
        stranger.close()
    idle = [ready.party["model"].connect(ready.addresses[1], "server1") for _ in range(31)]
    assert close_to(ready.diagnose(films[:1]), network, films[:1])
    for connection in idle:
        connection.close()


def send_film(ready, film, session, connections):
    """A film by hand: its shares to these of the servers."""
    for connection, own in zip(connections, share(encode(film, 10)), strict=False):
        connection.receive("program", most=1 << 20)
        connection.send({"kind": "film", "session": session, "batch": 1}, own.tobytes())


def test_a_film_waits_for_its_turn_and_one_whose_owner_left_costs_no_key(ready, small):
    """The first film came to server 0 alone, and keeps it waiting for 2 s; the second one's owner leaves."""
    network, _, _, films = small
    slow_deadlines(ready, 2.0)
    with connect_both(ready.party["film"], ready.addresses) as first:
        send_film(ready, films[:1].numpy(), "a" * 32, first[:1])
        with connect_both(ready.party["film"], ready.addresses) as second:
            send_film(ready, films[:1].numpy(), "b" * 32, second)
            time.sleep(0.2)
        found = ready.diagnose(films[:1], deadline_s=1.0)
    assert close_to(found, network, films[:1]) and found.key == 0


def test_a_film_that_had_no_turn_in_time_is_told_so_and_one_that_has_it_is_not(ready, small, monkeypatch):
    network, _, _, films = small
    slow_deadlines(ready, 2.0)
    monkeypatch.setattr("primia_lite.smpc.server.WAIT_S", 0.5)
    with connect_both(ready.party["film"], ready.addresses) as first:
        send_film(ready, films[:1].numpy(), "a" * 32, first[:1])
        with pytest.raises(PeerError, match="turn"):
            ready.diagnose(films[:1])
    keys = ready.servers[0].keys
    take = keys.take
    monkeypatch.setattr(keys, "take", lambda *arguments: time.sleep(1) or take(*arguments))
    time.sleep(2)
    found = ready.diagnose(films[:1])
    assert close_to(found, network, films[:1]) and found.key == 0


def lose(parties, server, dealing, *numbers):
    for number in numbers:
        (parties.root / f"server{server}" / "keys" / dealing / f"{number:06}.key").unlink()


def test_keys_that_one_server_lost_are_passed_over(parties, small):
    network, program, weights, films = small
    parties.send_model(program, weights)
    parties.deal(program, 1)
    lose(parties, 1, parties.deal(program, 1, batch=4), 0)
    assert close_to(parties.diagnose(films[:1]), network, films[:1])
    apart = parties.deal(program, 2)
    lose(parties, 0, apart, 0)
    lose(parties, 1, apart, 1)
    parties.deal(program, 1, batch=4)
    with pytest.raises(PeerError, match="deal"):
        parties.diagnose(films[:1])
    assert close_to(parties.diagnose(films[:1]), network, films[:1])


def test_very_many_keys_are_no_hindrance(ready, small, monkeypatch):
    network, _, _, films = small
    for server in ready.servers:
        many = {name * 32: list(range(90_000)) for name in "89" if server.number == 0}
        for name in many:
            folder = server.keys.folder / name
            folder.mkdir()
            shutil.copy(server.keys.folder / ready.dealing / "card.json", folder)
        held = server.keys.held
        monkeypatch.setattr(server.keys, "held", lambda *which, held=held, many=many: {**many, **held(*which)})
    assert close_to(ready.diagnose(films[:1]), network, films[:1])


@pytest.mark.parametrize("how", ["less", "more", "empty", "number for a name"])
def test_a_key_of_another_size_than_its_program_needs_is_not_kept(ready, small, how):
    program = small[1]
    server = ready.servers[1]
    before = server.keys.held(server.model.name, program.digest)
    header = {"kind": "key", "dealing": "a" * 32, "number": 0, "server": 1, "program": program.digest, "batch": 1,
              "seed": "b" * 32, "model_seed": "c" * 32}  # fmt: skip
    if how == "number for a name":
        header["dealing"] = int("1" * 32)
    size = program.key_bytes[1] if how == "more" else 100
    ours, theirs = socket.socketpair()
    dealer = Connection(ours, "server1")

    def deal():
        with suppress(PeerError):
            dealer.send(header)
            dealer.receive("go")
            dealer.send({"kind": "part"}, b"" if how == "empty" else bytes(size))
            dealer.send({"kind": "part" if how == "more" else "end"}, b"x" if how == "more" else b"")
            if how == "more":
                dealer.send({"kind": "end"})

    thread = threading.Thread(target=deal)
    thread.start()
    with pytest.raises(UserError):
        server.answer(Connection(theirs, "dealer", 2.0))
    theirs.close()
    thread.join()
    ours.close()
    assert server.keys.held(server.model.name, program.digest) == before


def test_one_party_cannot_vouch_for_another(ready, tmp_path):
    """A certificate signed with the dealer's key, in the name of a film's owner."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    pem = (ready.root / "dealer" / "identity.pem").read_bytes()
    issuer, signer = x509.load_pem_x509_certificate(pem), serialization.load_pem_private_key(pem, None)
    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name.from_rfc4514_string("CN=film")
    leaf = x509.CertificateBuilder(
        issuer.subject, name, key.public_key(), 7, issuer.not_valid_before_utc, issuer.not_valid_after_utc
    ).sign(signer, hashes.SHA256())
    encoded = [leaf.public_bytes(serialization.Encoding.PEM), issuer.public_bytes(serialization.Encoding.PEM)]
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    folder = shutil.copytree(ready.root / "film", tmp_path / "false")
    (folder / "identity.pem").write_bytes(private + b"".join(encoded))
    listener, errors = socket.create_server(("127.0.0.1", 0)), []

    def accept():
        try:
            ready.party["server0"].accept(listener.accept()[0], 5)
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=accept)
    thread.start()
    with suppress(PeerError), smpc.Party(folder).connect(listener.getsockname(), "server0", 5) as connection:
        connection.receive("program")
    thread.join()
    listener.close()
    assert isinstance(errors[0], PeerError)
    assert not x509.load_pem_x509_certificate(pem).extensions.get_extension_for_class(x509.BasicConstraints).value.ca


def test_a_logits_share_is_new_even_where_key_and_film_are_not(ready, small):
    """Dealer and film's owner know all masks of the last layer, and see both shares."""
    films = small[3]
    ready.close()
    copy, film = shutil.copytree(ready.root, ready.root.parent / "copy"), share(encode(films[:1].numpy(), 10))
    seen = []
    for root in (ready.root, copy):
        again = Parties(root)
        with connect_both(again.party["film"], again.addresses) as connections:
            for connection, own in zip(connections, film, strict=True):
                connection.receive("program", most=1 << 20)
                connection.send({"kind": "film", "session": "a" * 32, "batch": 1}, own.tobytes())
            seen.append([np.frombuffer(each.receive("logits", most=1 << 10)[1], np.uint32) for each in connections])
        again.close()
    assert np.array_equal(seen[0][0] + seen[0][1], seen[1][0] + seen[1][1])
    assert not np.any(seen[0][0] == seen[1][0]) and not np.any(seen[0][1] == seen[1][1])
