"""All five parties over TLS, the servers as threads of one process."""

import shutil

import numpy as np
import pytest
import torch

from primia_lite import smpc
from primia_lite.models.networks import convnet
from primia_lite.smpc.connection import ROLES


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
