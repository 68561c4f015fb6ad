"""Two servers as threads of one process: engines over a pair of sockets, or all five parties over TLS."""

import io
import secrets
import shutil
import socket
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from primia_lite import smpc
from primia_lite.models.networks import convnet
from primia_lite.smpc.connection import ROLES, Connection
from primia_lite.smpc.engines import Dealer, Online, Preparation, Wire, open_weights, weight_masks
from primia_lite.smpc.program import ACTIVATION, run
from primia_lite.smpc.ring import encode, share


class Memory:
    """A server's keys, in memory."""

    def __init__(self, data):
        self.file = io.BytesIO(data)

    def read(self, shape, dtype):
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        return np.frombuffer(self.file.read(size), dtype).reshape(shape)

    def later(self, shape, dtype):
        words = self.read(shape, dtype)
        return lambda: words


class Watched(Connection):
    """Keeps what its server receives."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.seen = []

    def exchange(self, data):
        got = super().exchange(data)
        self.seen.append((bytes(data), bytes(got)))
        return got


def fresh_seeds():
    return tuple(secrets.token_bytes(16) for _ in range(2))


def together(work, seeds, weights=None, shapes=None, model_seeds=None, fractions=None):
    """``work(engine, input share or None)`` by a dealer and then by two servers.

    Returns both results, both connections, and the keys' bytes.
    """
    model_seeds = model_seeds or fresh_seeds()
    files = [io.BytesIO(), io.BytesIO()]
    masks = weight_masks(shapes or {}, model_seeds)
    work(Dealer(seeds, masks, lambda b, array: files[b].write(np.ascontiguousarray(array).tobytes())), None)
    shares = [{}, {}]
    for name, (weight, bias) in (weights or {}).items():
        pairs = share(encode(weight, fractions[name])), share(encode(bias, ACTIVATION + fractions[name]))
        for b in range(2):
            shares[b][name] = pairs[0][b], pairs[1][b]
    ends = [Watched(end, f"server{1 - b}") for b, end in enumerate(socket.socketpair())]

    def server(b):
        opened = open_weights(b, shares[b], model_seeds[b], ends[b].exchange)
        ends[b].seen.clear()
        engine = Preparation(b, seeds[b], opened, Memory(files[b].getvalue()))
        work(engine, None)
        return work(Online(b, opened, engine.ready, ends[b].exchange), b)

    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(server, range(2)))
    return results, ends, [file.getvalue() for file in files]


def infer(program, weights, film, seeds=None, model_seeds=None):
    """Both servers' shares of the logits, and their connections."""
    shares = share(encode(film, ACTIVATION))

    def work(engine, b):
        return run(program, engine, Wire(film.shape, None if b is None else shares[b]))

    wires, ends, _ = together(work, seeds or fresh_seeds(), weights, program.shapes, model_seeds, program.fractions)
    return [wire.share for wire in wires], ends


@pytest.fixture(scope="session")
def small():
    """A network, its program and weights, and public films."""
    torch.manual_seed(0)
    network, films = convnet(3, (1, 32, 32)).eval(), torch.randn(16, 1, 32, 32)
    return network, *smpc.compile(network, films), films


@pytest.fixture(scope="session")
def identities(tmp_path_factory):
    root = tmp_path_factory.mktemp("identities")
    for role in ROLES:
        smpc.make_identity(root / role, role)
    for role in ROLES:
        for other in ROLES:
            if other != role:
                shutil.copy(root / other / f"{other}.crt", root / role / "peers")
    return root


class Parties:
    """All five, at work in one folder."""

    def __init__(self, root, deadline_s=5.0):
        self.root, self.deadline_s, self.servers = root, deadline_s, [None, None]
        self.party = {role: smpc.Party(root / role) for role in ROLES}
        self.start()

    def start(self):
        second = smpc.Server(self.root / "server1", 1, deadline_s=self.deadline_s)
        address = second.listen(("127.0.0.1", 0))
        first = smpc.Server(self.root / "server0", 0, address, deadline_s=self.deadline_s)
        self.servers, self.addresses = [first, second], (first.listen(("127.0.0.1", 0)), address)

    def close(self):
        for server in self.servers:
            server.close()

    def diagnose(self, films, **options):
        return smpc.diagnose(np.asarray(films), self.party["film"], self.addresses, **options)

    def deal(self, program, n, **options):
        return smpc.deal(program, n, self.party["dealer"], self.addresses, **options)

    def send_model(self, program, weights):
        return smpc.send_model(program, weights, self.party["model"], self.addresses)


@pytest.fixture
def parties(identities, tmp_path):
    shutil.copytree(identities, tmp_path / "parties")
    found = Parties(tmp_path / "parties")
    yield found
    found.close()
