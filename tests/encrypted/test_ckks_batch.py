"""Many films in one batch: as plain torch, within the error that is stated."""

from __future__ import annotations

import ckks_parties as parties
import numpy as np
import pytest
import tenseal.sealapi as sealapi
import torch
from ckks_parties import cnn, pair, unit, weights_of
from torch import nn

from primia_lite.attacks.ciphertexts import key_from_decryption
from primia_lite.config import UserError
from primia_lite.encrypted.batch import BatchCNNPacking, BatchLinearPacking
from primia_lite.encrypted.client import CkksClient
from primia_lite.encrypted.packing import CNNPacking, LinearPacking
from primia_lite.encrypted.seal import Context
from primia_lite.encrypted.server import CkksServer, plan
from primia_lite.encrypted.wire import packing_from, spec_of


def diagnosed(model: nn.Module, films: np.ndarray) -> np.ndarray:
    client, _, session = pair(model, films.shape[1:], batch_size=len(films))
    return parties.diagnosed(client, session, films)[: len(films)]


def plain(model: nn.Module, films: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model.double()(torch.from_numpy(films)[:, None]).numpy()


def test_a_linear_head_on_a_full_batch():
    films, head = unit(2048, 5), parties.head(5)
    assert np.abs(diagnosed(head, films) - films @ weights_of(head).T).max() < 2e-5


@pytest.mark.parametrize("hidden", [0, 4])
def test_a_cnn(hidden):
    model, films = cnn(6, 3, 3, 2, hidden, 3), np.random.default_rng(1).random((50, 6, 6))
    assert np.abs(diagnosed(model, films) - plain(model, films)).max() < 1e-4


def test_the_plan_says_why():
    head = nn.Linear(1280, 3, bias=False)
    few, many = plan(head, (1280,), 100), plan(head, (1280,), 214)
    assert isinstance(few.packing, LinearPacking) and "214" in few.reason
    assert isinstance(many.packing, BatchLinearPacking) and "not masked" in str(many)
    assert packing_from(spec_of(many.packing)) == many.packing
    assert isinstance(plan(cnn(28, 7, 3, 2, 0, 3), (1, 28, 28), 2).packing, BatchCNNPacking)
    assert plan(cnn(9, 3, 4, 2, 0, 3), (1, 9, 9), 2).packing.uploads == 7**2  # what the kernel sees


def test_films_that_do_not_fit_a_batch_are_refused():
    with pytest.raises(UserError, match="ciphertext"):
        plan(cnn(64, 8, 8, 2, 0, 3), (1, 64, 64), 100)
    films = np.zeros((3, 6, 6))
    films[1, 2, 2] = -11
    with pytest.raises(UserError, match="pixels"):
        CkksClient(BatchCNNPacking(6, 3, 3, 2, 0, 3)).encrypt(films)
    client = CkksClient(BatchLinearPacking(5, 3))
    for bad, word in ((np.zeros((3, 6)), "shape"), (np.zeros((2049, 5)), "split"), (np.zeros((0, 5)), "split"),
                      (np.eye(2, 5) * 1.2, "norm")):  # fmt: skip
        with pytest.raises(UserError, match=word):
            client.encrypt(bad)


def test_units_without_weights_are_refused():
    model = cnn(6, 3, 3, 2, 0, 3)
    nn.init.zeros_(model[0].weight)
    with pytest.raises(UserError, match="zero"):
        diagnosed(model, np.zeros((4, 6, 6)))


@pytest.mark.parametrize(
    ("layer", "name", "value"),
    [(0, "weight", np.inf), (0, "bias", np.nan), (3, "weight", np.nan), (3, "bias", 1e30),
     (-1, "weight", 1e30), (-1, "bias", 1e6)],
)  # fmt: skip
def test_numbers_that_can_not_be_encoded_are_refused_when_the_network_is_compiled(layer, name, value):
    model = cnn(6, 3, 3, 2, 4, 3)
    getattr(model[layer], name).data.view(-1)[1] = value
    with pytest.raises(UserError, match="parameters"):
        CkksServer(model, (1, 6, 6), batch_size=8)


def one_coefficient(context) -> np.ndarray:
    """Signs of all films, so that their logits come together in one coefficient."""
    slots = context.slots_of(np.eye(1, context.n, context.n // 4)[0])
    return np.sign(np.concatenate([slots.real, slots.imag]))


def test_two_films_in_a_slot_have_room():
    """The largest head that is compiled, on the films that make a coefficient largest."""
    packing = BatchLinearPacking(2, 1)
    context = Context(packing.parameters)
    head = nn.Linear(2, 1, bias=False)
    head.weight.data = torch.tensor([[1.01 * packing.wrap_limit(context) / packing.most_norm, 0.0]])
    with pytest.raises(UserError, match="scale"):
        CkksServer(head, (2,), batch_size=2048)
    head.weight.data *= 0.98
    films = np.zeros((2048, 2))
    films[:, 0] = one_coefficient(context) * packing.most_norm
    assert np.abs(diagnosed(head, films) - films @ weights_of(head).T).max() < 2e-3  # noise of 1e-4, and 2,048 films


@pytest.mark.parametrize("largest", [60, 200])  # of 128
def test_logits_that_may_have_wrapped_round_are_refused(largest):
    model, films = cnn(6, 3, 3, 2, 0, 3), np.ones((4096, 6, 6))
    films *= one_coefficient(Context(BatchCNNPacking(6, 3, 3, 2, 0, 3).parameters))[:4096, None, None]
    with torch.no_grad():
        model[0].bias.zero_()
        model[0].weight.abs_()
        model[0].weight[0] *= 3
        model[-1].bias.zero_()
        model[-1].weight *= largest / np.abs(plain(model, films)).max()
    if largest > 64:
        with pytest.raises(UserError, match="wrapped"):
            diagnosed(model, films)
    else:
        assert np.abs(diagnosed(model, films) - plain(model, films)).max() < 0.01


@pytest.mark.parametrize(("hidden", "single", "batch"), [(0, 256, 128), (4, 128, 256)])
def test_room_is_as_documented(hidden, single, batch):
    for kind, room in ((CNNPacking, single), (BatchCNNPacking, batch)):
        packing = kind(6, 3, 3, 2, hidden, 3)
        assert packing.wrap_limit(Context(packing.parameters)) == pytest.approx(room, rel=0.01)


def test_what_a_client_returns_of_a_batch_does_not_give_the_key_away():
    """The attack works on whole slots, and on nothing that a client returns."""
    client, server, session = pair(parties.head(3, 2), (3,), batch_size=50)
    context, replies = server.context, session.diagnose(client.encrypt(unit(2048, 3)))
    reply = context.load(replies[0], sealapi.Ciphertext)
    context.evaluator.transform_to_ntt_inplace(reply)
    for logits, found in ((client.decrypt_exact(replies), 1.0), (client.decrypt(replies), 0.0)):
        first, second = np.split(logits[:, 0], 2)
        guess = key_from_decryption(context, reply, first + 1j * second)
        assert np.mean(guess == client.key.ternary) == pytest.approx(found, abs=0.01)
