"""All five parties over TLS: what they agree on, what they refuse, and that a key serves once."""

import random
import shutil
import socket
import struct
import threading
from contextlib import suppress

import numpy as np
import pytest
from conftest import Parties

from primia_lite import smpc
from primia_lite.config import UserError
from primia_lite.smpc.connection import Connection, PeerError
from primia_lite.smpc.keys import KeyStore


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
    ready.close()
    model, program = ready.servers[0].model.name, small[1].digest
    for server in range(2):
        copy = shutil.copy(key_file(ready, server, 0), tmp_path)
        store = KeyStore(ready.root / f"server{server}" / "keys", server)
        store.take(ready.dealing, 0)
        for _ in range(2):
            with pytest.raises(UserError, match="used"):
                KeyStore(store.folder, server).take(ready.dealing, 0)
            shutil.copy(copy, key_file(ready, server, 0))
        assert store.held(model, program)[ready.dealing] == [1]
        later = KeyStore(store.folder, server)
        later.take(ready.dealing, 1)
        assert later.held(model, program) == {}


def spoil(path, how, other):
    data = bytearray(path.read_bytes())
    if how == "truncated":
        path.write_bytes(data[:-5])
    elif how == "altered":
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    else:
        shutil.copy(other, path)


@pytest.mark.parametrize("how", ["truncated", "altered", "of the other server"])
def test_a_broken_key_is_refused_and_lost(ready, how):
    ready.close()
    spoil(key_file(ready, 0, 0), how, key_file(ready, 1, 0))
    store = KeyStore(ready.root / "server0" / "keys", 0)
    with pytest.raises(UserError, match="lost"):
        store.take(ready.dealing, 0)
    with pytest.raises(UserError, match="used"):
        store.take(ready.dealing, 0)


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
    for extra in set(server.keys.held(server.model.name, program.digest)) - {ready.dealing}:
        server.keys.forget(extra)
    assert ready.diagnose(films[:1]).key == 0


def test_keys_of_an_earlier_program_are_passed_over(ready, small):
    """Same sizes, another cut: with the wrong keys the logits would be wrong, and nobody would see it."""
    network, _, _, films = small
    for layer in network.modules():
        if hasattr(layer, "weight"):
            layer.weight.data *= 3
    try:
        program, weights = smpc.compile(network, films)
        assert program.digest != small[1].digest
        ready.send_model(program, weights)
        with pytest.raises(PeerError, match="keys"):
            ready.diagnose(films[:1])
        for _ in range(4):  # whatever their names' order
            ready.deal(program, 1)
            logits = ready.diagnose(films[:1]).logits
            assert np.abs(logits - network(films[:1]).detach().numpy()).max() < 0.05
    finally:
        for layer in network.modules():
            if hasattr(layer, "weight"):
                layer.weight.data /= 3


def test_a_film_whose_owner_has_left_stops_nobody(ready, small):
    films, share = small[3], bytes(4 * 32 * 32)
    for session in ("e" * 32, "f" * 32):
        with ready.party["film"].connect(ready.addresses[0], "server0") as connection:
            connection.receive("program", most=1 << 20)
            connection.send({"kind": "film", "session": session}, share)
    assert ready.diagnose(films[:1]).key == 0


def test_a_key_for_more_films_does_not_hide_those_for_one(ready, small):
    _, program, _, films = small
    ready.deal(program, 1, batch=2)
    keys = ready.servers[1].keys
    (larger,) = set(keys.held(ready.servers[1].model.name, program.digest)) - {ready.dealing}
    keys.forget(larger)
    assert ready.diagnose(films[:1]).key == 0


def test_a_stranger_who_bears_a_known_name_is_refused(ready, tmp_path):
    smpc.make_identity(tmp_path / "film", "film")
    for peer in (ready.root / "film" / "peers").iterdir():
        shutil.copy(peer, tmp_path / "film" / "peers")
    with pytest.raises(PeerError):
        smpc.diagnose(np.zeros((1, 1, 32, 32)), smpc.Party(tmp_path / "film"), ready.addresses)
