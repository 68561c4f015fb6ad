"""Encrypted inference: beside plain torch and TenSEAL's tensors, what each party holds, and what is refused."""

from __future__ import annotations

import struct
import types

import numpy as np
import pytest
import tenseal
import torch
from ckks_parties import cnn, diagnosed, head, holds_key, pair, unit, weights_of
from torch import nn

from primia_lite import models
from primia_lite.config import UserError
from primia_lite.encrypted.client import CkksClient
from primia_lite.encrypted.flooding import Flooding
from primia_lite.encrypted.kernels import packing_for
from primia_lite.encrypted.keys import SecretKey
from primia_lite.encrypted.packing import CNNPacking, LinearPacking
from primia_lite.encrypted.parameters import Parameters
from primia_lite.encrypted.seal import CiphertextError, Context, dump, payload
from primia_lite.encrypted.server import CkksServer, plan
from primia_lite.encrypted.wire import join_keys, packing_from, spec_of

SMALL = (12, 5, 3, 2, 0, 3)  # of a CNN


def pixels(side: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(side, side)).clip(-2, 2)


def plain(model: nn.Module, x: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model.double()(torch.from_numpy(x)[None] if x.ndim == 1 else torch.from_numpy(x)[None, None])[0].numpy()


@pytest.fixture(scope="module")
def small():
    """Client, server and session of a head of 40 features."""
    return pair(head(40), (40,))


# --- the result -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("features", "classes"), [(1, 1), (40, 2), (869, 3), (1280, 3), (2369, 3), (700, 10)])
def test_a_head_under_encryption_is_the_head(features, classes):
    model = head(features, classes)
    client, _, session = pair(model, (features,))
    for seed in range(3):
        x = unit(features, seed=seed)
        np.testing.assert_allclose(diagnosed(client, session, x), plain(model, x), atol=5e-6)


NETWORKS = {
    "tutorial": (28, 7, 3, 4, 64, 10),
    "shallow": (28, 7, 3, 4, 0, 3),
    "one channel": (16, 5, 2, 1, 8, 2),
    "hidden as wide as the convolution": (12, 5, 3, 2, 16, 3),
    "ckksnet's shape": (64, 9, 5, 8, 0, 3),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_cnn_under_encryption_is_the_cnn(name):
    shape = NETWORKS[name]
    model, side = cnn(*shape), shape[0]
    client, server, session = pair(model, (1, side, side))
    assert server.packing == client.packing == CNNPacking(*shape)
    if name == "ckksnet's shape":  # copies fewer than channels, and more logits than the last layer's inputs repeat
        assert server.packing.copies < server.packing.channels and len(server.packing.logit_places) == 2
    x = pixels(side)
    expected = plain(model, x)
    np.testing.assert_allclose(diagnosed(client, session, x), expected, atol=1e-3 * max(1, np.abs(expected).max()))


def test_ckksnet_is_packed_and_its_norms_are_folded():
    large = models.build("ckksnet", 3, (1, 64, 64), channels=4, hidden=64)
    assert packing_for(large, (1, 64, 64)) == CNNPacking(64, 9, 5, 4, 64, 3)
    model = models.build("ckksnet", 3, (1, 28, 28), channels=4, hidden=16)
    torch.nn.init.normal_(model[-1].weight, std=1.0)  # as large as trained ones
    client, _, session = pair(model, (1, 28, 28))
    x = models.catalogue.public_pixels(28)[0, 0].double().numpy()
    np.testing.assert_allclose(diagnosed(client, session, x), plain(model, x), atol=2e-3)
    assert packing_for(models.build("litenet", 3, (2369,)), (2369,)) == LinearPacking(2369, 3)


def test_tenseals_tensors_agree(small):
    """An independent implementation of the same head, on the same features."""
    client, _, session = small
    x = unit(40)
    context = tenseal.context(tenseal.SCHEME_TYPE.CKKS, 8192, coeff_mod_bit_sizes=[40, 30, 40])
    context.global_scale = 2.0**30
    context.generate_galois_keys()
    peer = tenseal.ckks_vector(context, x.tolist()).mm(head(40).weight.T.tolist()).decrypt()
    np.testing.assert_allclose(diagnosed(client, session, x), peer, atol=1e-4)


def test_tenseals_convolution_agrees():
    """TenSEAL's im2col, square and mm: the pattern of its tutorial, on the same small network."""
    model, x = cnn(*SMALL), pixels(12).clip(-1, 1)
    client, _, session = pair(model, (1, 12, 12))
    context = tenseal.context(tenseal.SCHEME_TYPE.CKKS, 8192, coeff_mod_bit_sizes=[40, 30, 30, 30, 30, 40])
    context.global_scale = 2.0**30
    context.generate_galois_keys()
    windows, columns = tenseal.im2col_encoding(context, x.tolist(), 5, 5, 3)
    weight, bias = model[0].weight.data, model[0].bias.data
    maps = [windows.conv2d_im2col(w.tolist(), columns) + float(b) for w, b in zip(weight[:, 0], bias, strict=True)]
    packed = tenseal.CKKSVector.pack_vectors(maps)
    packed.square_()
    peer = (packed.mm(model[-1].weight.data.T.tolist()) + model[-1].bias.data.tolist()).decrypt()
    np.testing.assert_allclose(diagnosed(client, session, x), peer, atol=2e-3)


@pytest.mark.parametrize("largest", [63, 66, 180])  # up to half of the 128 of room; the last wraps round, to 76
def test_large_logits_do_not_wrap_round_or_are_refused(largest):
    model, x = cnn(12, 5, 3, 2, 16, 3), pixels(12)
    with torch.no_grad():
        model[-1].bias.zero_()
        model[-1].weight *= largest / np.abs(plain(model, x)).max()
    client, server, session = pair(model, (1, 12, 12))
    assert server.packing.wrap_limit(server.context) > 120
    if largest < 64:
        np.testing.assert_allclose(diagnosed(client, session, x), plain(model, x), atol=0.05)
    else:
        with pytest.raises(UserError, match="normalise"):
            diagnosed(client, session, x)


@pytest.mark.parametrize("flooded", [False, True])
def test_a_head_that_was_compiled_is_never_refused_by_its_client(flooded):
    """Logits near the room, on the film that makes them largest."""
    model = head(40)
    server = CkksServer(model, (40,), flooded=flooded)
    most = server.packing.most_norm
    with torch.no_grad():
        model.weight *= 0.99 * server.packing.wrap_limit(server.context) / most / model.weight.norm(dim=1).max()
    x = weights_of(model)[model.weight.norm(dim=1).argmax()]
    x *= most * (1 - 1e-6) / np.linalg.norm(x)
    server = CkksServer(model, (40,), flooded=flooded)
    client = CkksClient(server.packing, flooding=Flooding() if flooded else None)
    read = diagnosed(client, server.open(client.public()), x)
    assert read.max() > 120
    np.testing.assert_allclose(read, weights_of(model) @ x, atol=2e-3)


# --- what is refused before it is encrypted or compiled ---------------------------------------------------------------


def test_films_that_do_not_fit_are_refused(small):
    client = small[0]
    for bad, word in (
        (unit(40) * 2, "norm"), (np.ones(41), "shape"), (np.ones((40, 1)), "shape"),
        (np.full(40, np.nan), "finite"), (np.full(40, np.inf), "finite"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=word):
            client.encrypt(bad)
    client, film = CkksClient(CNNPacking(*SMALL)), np.full((12, 12), 0.5)
    for largest in (8.0, -10.0):
        film[3, 4] = largest
        assert len(client.encrypt(film)) == client.packing.uploads
    for largest in (10.1, -255.0):
        film[3, 4] = largest
        with pytest.raises(UserError, match="normalise"):
            client.encrypt(film)


@pytest.mark.parametrize("decimals", [-1, 7, 2.5])
def test_more_decimals_than_are_safe_are_refused(decimals):
    with pytest.raises(UserError, match="decimals"):
        CkksClient(LinearPacking(40, 3), decimals)


def with_bias(layer: int, bias=None) -> nn.Module:
    model = cnn(*SMALL)
    model[layer].bias = bias
    return model


def scaled_head(factor: float) -> nn.Module:
    model = head(40)
    model.weight.data *= factor
    return model


@pytest.mark.parametrize("batch_size", [1, 8])
@pytest.mark.parametrize(
    ("model", "in_shape", "word"),
    [
        (with_bias(0), (1, 12, 12), "bias"),
        (with_bias(-1), (1, 12, 12), "bias"),
        (with_bias(-1, nn.Parameter(torch.full((3,), 1e6))), (1, 12, 12), "parameters"),
        (cnn(*SMALL), (40,), "square"),
        (cnn(*SMALL), (), "square"),
        (cnn(*SMALL), (3, 12, 12), "square"),
        (cnn(*SMALL), (1, 12, 16), "square"),
        (cnn(*SMALL), (1, 16, 16), "in_shape"),
        (head(40), (41,), "features"),
        (scaled_head(0), (40,), "train"),
        (scaled_head(1e4), (40,), "scale"),
        (nn.Linear(4, 2), (4,), "packing"),
        (nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), (1, 2, 2), "packing"),
    ],
)
def test_networks_that_do_not_fit_are_refused(model, in_shape, word, batch_size):
    with pytest.raises(UserError, match=word):
        CkksServer(model, in_shape, batch_size=batch_size)


@pytest.mark.parametrize(
    ("shape", "word"),
    [((28, 7, 3, 3, 0, 3), "power"), ((64, 3, 1, 4, 0, 3), "ciphertext"), ((12, 5, 3, 2, 64, 3), "wider"),
     ((4, 5, 1, 1, 0, 2), "kernel")],
)  # fmt: skip
def test_layouts_that_do_not_fit_are_refused(shape, word):
    with pytest.raises(UserError, match=word):
        CNNPacking(*shape)


# --- the layer below --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ring():
    context = Context(Parameters(4096, (39, 30, 39), 30))
    return context, SecretKey(context)


def test_coefficients_multiply_as_polynomials_and_slots_are_seals(ring):
    context, _ = ring
    a, b = np.random.default_rng(0).normal(size=(2, context.n))
    full = np.convolve(a, b)
    product = full[: context.n] - np.append(full[context.n :], 0.0)  # modulo X^N + 1
    slots = context.slots_of(a) * context.slots_of(b)
    np.testing.assert_allclose(context.coefficients_of(slots), product, atol=1e-8)
    decoded = np.array(context.encoder.decode_complex(context.encode_coefficients(a, 2.0**30)))
    np.testing.assert_allclose(decoded, context.slots_of(a), atol=1e-5)


def test_kept_coefficients_are_what_seal_decrypts(ring):
    context, key = ring
    assert set(np.unique(key.ternary)) == {-1, 0, 1}
    values = np.random.default_rng(2).normal(size=context.n)
    ciphertext = context.receive(key.encrypt(context.encode_coefficients(values, 2.0**30)), scale=2.0**30)
    peer = context.coefficients_of(key.decrypt(ciphertext))
    context.evaluator.transform_from_ntt_inplace(ciphertext)
    integers = context.integers(dump(ciphertext), scale=2.0**30)
    keep = [0, 1, 17, 2048, 4094, 4095]
    mine = np.array(key.coefficients(integers, keep), dtype=float) / 2.0**30
    np.testing.assert_allclose(mine, peer[keep], atol=1e-9)
    np.testing.assert_allclose(mine, values[keep], atol=1e-6)


# --- what each party holds --------------------------------------------------------------------------------------------


def test_the_server_holds_no_secret_key(small):
    client, server, session = small
    session.prepare()
    diagnosed(client, session, unit(40))
    session.prepare()
    assert not holds_key(server, client.key) and not holds_key(session, client.key)
    assert holds_key(client, client.key)


@pytest.mark.parametrize(
    "hide",
    [
        lambda key: [{"deep": (key,)}],
        lambda key: lambda found=key: found,
        lambda key: key.is_inside,
        lambda key: np.array([None, key], object),
        lambda key: b"before" + key.to_bytes() + b"after",
        lambda key: key.ternary.astype(np.int64),
    ],
)
def test_a_key_on_the_server_would_be_found(small, hide):
    client, server, _ = small
    assert holds_key(types.SimpleNamespace(server=server, hidden=hide(client.key)), client.key)


def test_what_is_sent_holds_neither_key_nor_film(small):
    client, _, session = small
    x = unit(40)
    sent = [client.public(), *client.encrypt(x)]
    for data in sent:
        client.refuse_secret(data)
    for data in (*sent, *session.diagnose(client.encrypt(x))):
        assert all(x.astype(form).tobytes()[:64] not in data for form in (np.float32, np.float64))


@pytest.mark.parametrize("piece", [slice(None), slice(0.5), slice(0.5, None)], ids=["whole", "first", "second"])
def test_a_secret_key_in_what_is_sent_is_refused(small, piece, monkeypatch):
    client, _, _ = small
    saved, ternary, other = client.key.to_bytes(), client.key.ternary, CkksClient(client.packing)
    for form in (saved, payload(saved), ternary.tobytes(), ternary.astype(np.int64).tobytes()):
        start, stop = (int(len(form) * (share or 0)) for share in (piece.start, piece.stop))
        planted = b"header" + form[start : stop or None] + b"trailer"
        with pytest.raises(UserError, match="secret"):
            client.refuse_secret(planted)
        other.refuse_secret(planted)  # another's key isn't found, so it isn't the form that is
    for part, send in (("encrypt", lambda: client.encrypt(np.zeros(40))), ("public_key", client.public)):
        with monkeypatch.context() as patch, pytest.raises(UserError, match="secret"):
            patch.setattr(client.key, part, lambda *_: planted)
            send()


# --- the error that is noted ------------------------------------------------------------------------------------------


def error_of(party, step: str) -> float:
    return [cost for cost in party.costs if cost.step == step][-1].error


@pytest.mark.parametrize("norm", [0.1, 50.0])
@pytest.mark.parametrize(("features", "flooded", "batch_size"), [(40, False, 1), (1280, False, 1), (40, True, 1),
                                                                 (5, False, 2048)])  # fmt: skip
def test_the_error_that_is_noted_is_that_of_the_logits(features, flooded, batch_size, norm):
    """The server's, with its weights, closely; the client's, for any weights and after rounding, from above."""
    model = head(features)
    with torch.no_grad():
        model.weight *= norm / model.weight.norm(dim=1).max()
    server = CkksServer(model, (features,), flooded=flooded, batch_size=batch_size)
    client = CkksClient(server.packing)
    session, exact, rounded = server.open(client.public()), [], []
    for seed in range(1 if batch_size > 1 else 20):
        x = unit(batch_size, features, seed=seed)
        replies = session.diagnose(client.encrypt(x if batch_size > 1 else x[0]))
        exact.append(client.decrypt_exact(replies) - x @ weights_of(model).T)
        rounded.append(client.decrypt(replies) - x @ weights_of(model).T)
    assert 1 / 3 < np.std(exact) / error_of(server, "compute") < 1.5
    assert 1 / 30 < np.std(rounded) / error_of(client, "decrypt") < 1.5


def test_the_error_of_a_client_counts_rounding_and_flooding():
    server = CkksServer(head(40), (40,), flooded=True)
    for client in (CkksClient(server.packing), CkksClient(server.packing, 6, Flooding(1000, 30))):
        diagnosed(client, server.open(client.public()), unit(40))
        expected = client.flooding_std or 1e-3 / np.sqrt(12)
        assert error_of(client, "decrypt") == pytest.approx(expected, rel=1e-3)


# --- strangers' bytes, single cases (see test_ckks_fuzz.py) -----------------------------------------------------------


def overwritten(data: bytes, at: int, value: bytes) -> bytes:
    return data[:at] + value + data[at + len(value) :]


def test_wrong_ciphertexts_are_refused_before_any_work(small):
    client, server, session = small
    context, scale = server.context, server.packing.fresh_scale
    (good,) = client.encrypt(unit(40))
    other = CkksClient(CNNPacking(*SMALL)).encrypt(np.ones((12, 12)))[0]
    scaled = client.key.encrypt(context.encode_coefficients(np.ones(40), 2.0**20))
    bomb = b"\x28\xb5\x2f\xfd" + bytes(64)
    # A coefficient beyond its prime.
    integers = context.integers(dump(context.receive(good, scale=scale)), scale=scale, ntt=True).copy()
    integers[1, 0, 5] = context.moduli[0]
    for bad in (
        b"", b"x", good[:-1], good + b"x", good[:100], bytes(len(good)), np.random.default_rng(0).bytes(len(good)),
        other, scaled, overwritten(good, 0, b"\0\0"), overwritten(good, 5, b"\x01"),
        struct.pack("<HBBBBHQ", 0xA15E, 16, 4, 3, 2, 0, 16 + len(bomb)) + bomb, bytes(10 << 20),
        context.compose(integers, scale=scale, ntt=True),
    ):  # fmt: skip
        with pytest.raises(CiphertextError):
            session.diagnose([bad])
    for number in (0, 2):
        with pytest.raises(CiphertextError, match="belong"):
            session.diagnose([good] * number)
    assert len(session.diagnose([good])) == 1


def test_wrong_keys_are_refused(small):
    client, server, _ = small
    good = client.public()
    for bad in (b"", good[:50], good[:-1], good + b"x", b"PLCK0001" + bytes(60), overwritten(good, 0, b"XXXX")):
        with pytest.raises(CiphertextError):
            server.open(bad)
    with pytest.raises(CiphertextError, match="another"):
        server.open(CkksClient(LinearPacking(41, 3)).public())
    deep = CkksServer(cnn(*SMALL), (1, 12, 12))
    owner = CkksClient(deep.packing)
    parts = [owner.key.public_key(), owner.key.relin_keys(), owner.key.galois_keys([*deep.packing.rotations[1:], 3])]
    with pytest.raises(CiphertextError, match="missing"):
        deep.open(join_keys(deep.packing, parts))
    deep.open(owner.public())


def test_replies_of_another_kind_are_refused(small):
    client, _, session = small
    (reply,) = session.diagnose(client.encrypt(unit(40)))
    for bad in ([], [reply, reply], [reply[:-1]], [reply[:16]], [bytes(len(reply))]):
        with pytest.raises(CiphertextError):
            client.decrypt(bad)


def test_a_plan_says_what_it_takes_and_why():
    text = str(plan(cnn(*SMALL), (1, 12, 12)))
    assert "N = 8192" in text and "patches" in text
    packing = plan(head(40), (40,), flooded=True).packing
    assert packing.flooded and packing_from(spec_of(packing)) == packing
