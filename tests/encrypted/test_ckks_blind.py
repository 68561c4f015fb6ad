"""What hides a reply, made before the film comes: the same logits, once, and as uniform as a mask."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from primia_lite.config import UserError
from primia_lite.encrypted.ckks import Client, Server
from primia_lite.encrypted.masks import Blind


@pytest.fixture(scope="module")
def parties():
    torch.manual_seed(0)
    head = nn.Linear(8, 3, bias=False)
    server = Server(head, (8,))
    client = Client(server.packing)
    return head, server, client, server.open(client.public())


def test_prepared_replies_tell_the_same(parties):
    head, _, client, session = parties
    film = np.linspace(-0.4, 0.4, 8)
    expected = head.weight.detach().double().numpy() @ film
    session.prepare(2)
    for _ in range(3):  # the third has nothing prepared
        assert np.abs(client.decrypt(session.diagnose(client.encrypt(film))) - expected).max() < 1e-3
    assert not session._blinds


def test_a_blind_is_used_once(parties):
    _, server, client, session = parties
    blind = Blind(server.context, session.encryptor, 0, server.packing.keep[0])
    scale = server.packing.fresh_scale
    [upload] = client.encrypt(np.zeros(8))
    blind.seal(server.context.receive(upload, scale=scale))
    with pytest.raises(UserError, match="used"):
        blind.seal(server.context.receive(upload, scale=scale))


def test_two_replies_to_one_upload_share_nothing(parties):
    _, server, client, session = parties
    packing, upload = server.packing, client.encrypt(np.ones(8) / 8)
    session.prepare(2)
    first, second = (
        server.context.integers(
            session.diagnose(upload)[0], scale=packing.reply_scale(server.context), level=packing.reply_level
        ).astype(object)
        for _ in range(2)
    )
    modulus, n = server.context.moduli[0], server.context.n
    difference = (first - second) % modulus
    for polynomial in difference:
        # Of n uniform numbers each quarter of the range has n / 4, and n / 2 are odd: within six standard deviations.
        quarters = np.bincount((4 * polynomial[0] // modulus).astype(int), minlength=4)
        assert np.abs(quarters - n / 4).max() < 6 * np.sqrt(n * 3 / 16)
        odd = (polynomial[0] % 2).astype(int).sum()
        assert abs(odd - n / 2) < 6 * np.sqrt(n / 4)
