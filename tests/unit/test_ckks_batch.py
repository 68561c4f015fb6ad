"""Many films in one batch: as plain torch, within the error that is stated."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from primia_lite.config import UserError
from primia_lite.encrypted.batch import BatchCNNPacking, BatchLinearPacking
from primia_lite.encrypted.ckks import Client, Server, plan
from primia_lite.encrypted.packing import LinearPacking, packing_from, spec_of
from primia_lite.networks import Square


def network(side: int, kernel: int, stride: int, hidden: int = 0) -> nn.Sequential:
    torch.manual_seed(0)
    units = 2 * ((side - kernel) // stride + 1) ** 2
    dense = [nn.Linear(units, hidden), Square(), nn.Linear(hidden, 3)] if hidden else [nn.Linear(units, 3)]
    return nn.Sequential(nn.Conv2d(1, 2, kernel, stride), Square(), nn.Flatten(), *dense)


def diagnosed(model: nn.Module, films: np.ndarray) -> np.ndarray:
    server = Server(model, films.shape[1:], batch_size=len(films))
    client = Client(packing_from(server.describe()), decimals=6)
    return client.decrypt(server.open(client.public()).diagnose(client.encrypt(films)))[: len(films)]


def test_a_linear_head_on_a_full_batch():
    torch.manual_seed(0)
    films = np.random.default_rng(0).normal(size=(2048, 5))
    films /= np.linalg.norm(films, axis=1, keepdims=True)
    head = nn.Linear(5, 3, bias=False)
    expected = films @ head.weight.detach().double().numpy().T
    assert np.abs(diagnosed(head, films) - expected).max() < 2e-5


@pytest.mark.parametrize("hidden", [0, 4])
def test_a_cnn(hidden):
    model = network(6, 3, 3, hidden)
    films = np.random.default_rng(1).random((50, 6, 6))
    with torch.no_grad():
        expected = model.double()(torch.from_numpy(films)[:, None]).numpy()
    assert np.abs(diagnosed(model, films) - expected).max() < 1e-4


def test_the_plan_says_why():
    head = nn.Linear(1280, 3, bias=False)
    few, many = plan(head, (1280,), 100), plan(head, (1280,), 214)
    assert isinstance(few.packing, LinearPacking) and "one at a time" in str(few) and "214" in few.reason
    assert isinstance(many.packing, BatchLinearPacking) and "not masked" in str(many)
    assert packing_from(spec_of(many.packing)) == many.packing
    assert isinstance(plan(network(28, 7, 3), (1, 28, 28), 2).packing, BatchCNNPacking)


def test_films_that_are_too_large_for_a_batch_are_refused():
    with pytest.raises(UserError, match="a ciphertext for each pixel"):
        plan(network(64, 8, 8), (1, 64, 64), 100)


def test_only_what_the_kernel_sees_is_sent():
    assert plan(network(9, 3, 4), (1, 9, 9), 2).packing.uploads == 7**2


@pytest.mark.parametrize("shape", [(3, 6), (2049, 5), (0, 5)])
def test_wrong_batches_are_refused(shape):
    client = Client(BatchLinearPacking(5, 3))
    with pytest.raises(UserError, match="shape|split"):
        client.encrypt(np.zeros(shape))


def test_units_without_weights_are_refused():
    model = network(6, 3, 3)
    nn.init.zeros_(model[0].weight)
    with pytest.raises(UserError, match="zero"):
        diagnosed(model, np.zeros((4, 6, 6)))


def test_features_beyond_the_norm_that_was_compiled_for_are_refused():
    with pytest.raises(UserError, match="norm 2.236"):
        Client(BatchLinearPacking(5, 3)).encrypt(np.array([np.zeros(5), np.ones(5)]))
