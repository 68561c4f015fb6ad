"""Encrypted inference: beside plain torch and TenSEAL's tensors, what each party holds, and what is refused."""

from __future__ import annotations

import struct
import types

import numpy as np
import pytest
import tenseal
import torch
from ckks_parties import cnn, diagnosed, head, holds_key, pair
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
from primia_lite.encrypted.server import CkksServer, Session, plan
from primia_lite.encrypted.wire import join_keys, spec_of
from primia_lite.models.networks import ckksnet


def film(shape, seed=0) -> torch.Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return x / x.norm() if len(shape) == 1 else x.clamp(-2, 2)


def encrypted(client, session, x) -> np.ndarray:
    return diagnosed(client, session, x.numpy() if x.ndim == 1 else x.numpy()[0])


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
        x = film((features,), seed)
        np.testing.assert_allclose(encrypted(client, session, x), model(x).detach().numpy(), atol=5e-6)


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
    model = cnn(*shape)
    packing = packing_for(model, (1, shape[0], shape[0]))
    assert spec_of(packing) == {"kind": "cnn"} | dict(
        zip(("side", "kernel", "stride", "channels", "hidden", "classes"), shape, strict=True)
    )
    if name == "ckksnet's shape":  # copies fewer than channels, and more logits than the last layer's inputs repeat
        assert packing.copies < packing.channels and len(packing.logit_places) == 2
    client, _, session = pair(model, (1, shape[0], shape[0]))
    for seed in range(2):
        x = film((1, shape[0], shape[0]), seed)
        plain = model(x[None])[0].detach().numpy()
        np.testing.assert_allclose(encrypted(client, session, x), plain, atol=1e-3 * max(1, np.abs(plain).max()))


@pytest.mark.parametrize("hidden", [0, 16])
def test_ckksnets_norms_are_folded_under_encryption(hidden):
    model = models.build("ckksnet", 3, (1, 28, 28), channels=4, hidden=hidden)
    torch.nn.init.normal_(model[-1].weight, std=1.0)  # as large as trained ones
    client, _, session = pair(model, (1, 28, 28), decimals=6)
    x = models.catalogue.public_pixels(28)[0]
    with torch.no_grad():
        plain = model.double()(x.double()[None])[0].numpy()
    np.testing.assert_allclose(encrypted(client, session, x), plain, atol=2e-3)


def test_ckksnet_itself_is_packed():
    for hidden in (0, 64):
        model = ckksnet(3, (1, 64, 64), channels=4, hidden=hidden)
        assert packing_for(model, (1, 64, 64)) == CNNPacking(64, 9, 5, 4, hidden, 3)
    assert packing_for(models.build("litenet", 3, (2369,)), (2369,)) == LinearPacking(2369, 3)


def test_tenseals_tensors_agree(small):
    """An independent implementation of the same head, on the same features."""
    client, _, session = small
    model, x = head(40), film((40,))
    context = tenseal.context(tenseal.SCHEME_TYPE.CKKS, 8192, coeff_mod_bit_sizes=[40, 30, 40])
    context.global_scale = 2.0**30
    context.generate_galois_keys()
    peer = tenseal.ckks_vector(context, x.tolist()).mm(model.weight.T.tolist()).decrypt()
    np.testing.assert_allclose(encrypted(client, session, x), peer, atol=1e-4)


def test_tenseals_convolution_agrees():
    """TenSEAL's im2col, square and mm: the pattern of its tutorial, on the same small network."""
    model, x = cnn(12, 5, 3, 2, 0, 3), film((1, 12, 12)).clamp(-1, 1)
    client, _, session = pair(model, (1, 12, 12))
    context = tenseal.context(tenseal.SCHEME_TYPE.CKKS, 8192, coeff_mod_bit_sizes=[40, 30, 30, 30, 30, 40])
    context.global_scale = 2.0**30
    context.generate_galois_keys()
    windows, columns = tenseal.im2col_encoding(context, x[0].tolist(), 5, 5, 3)
    weight, bias = model[0].weight.data, model[0].bias.data
    maps = [windows.conv2d_im2col(w.tolist(), columns) + float(b) for w, b in zip(weight[:, 0], bias, strict=True)]
    packed = tenseal.CKKSVector.pack_vectors(maps)
    packed.square_()
    peer = (packed.mm(model[-1].weight.data.T.tolist()) + model[-1].bias.data.tolist()).decrypt()
    np.testing.assert_allclose(encrypted(client, session, x), peer, atol=2e-3)


def loud(largest: float):
    """A network whose largest logit is of this size, and the film."""
    model, x = cnn(12, 5, 3, 2, 16, 3), film((1, 12, 12))
    with torch.no_grad():
        model[-1].bias.zero_()
        model[-1].weight *= largest / model(x[None]).abs().max()
    return model, x


def test_large_logits_do_not_wrap_round():
    """Up to half of the 128 that there is room for."""
    model, x = loud(63)
    client, server, session = pair(model, (1, 12, 12))
    assert server.packing.wrap_limit(server.context) > 120
    np.testing.assert_allclose(encrypted(client, session, x), model(x[None])[0].detach().numpy(), atol=0.05)


@pytest.mark.parametrize("largest", [66, 100, 180])  # the last wraps round, to 76
def test_logits_that_may_have_wrapped_round_are_refused(largest):
    model, x = loud(largest)
    client, _, session = pair(model, (1, 12, 12))
    with pytest.raises(UserError, match="normalise"):
        encrypted(client, session, x)


@pytest.mark.parametrize("flooded", [False, True])
def test_a_head_that_was_compiled_is_never_refused_by_its_client(flooded):
    """Logits near the room, on the film that makes them largest."""
    model = head(40)
    server = CkksServer(model, (40,), flooded=flooded)
    most = server.packing.most_norm
    with torch.no_grad():
        model.weight *= 0.99 * server.packing.wrap_limit(server.context) / most / model.weight.norm(dim=1).max()
    x = model.weight[model.weight.norm(dim=1).argmax()].detach().double().numpy()
    x *= most * (1 - 1e-6) / np.linalg.norm(x)
    server = CkksServer(model, (40,), flooded=flooded)
    client = CkksClient(server.packing, flooding=Flooding() if flooded else None)
    read = client.decrypt(server.open(client.public()).diagnose(client.encrypt(x)))
    assert read.max() > 120
    np.testing.assert_allclose(read, model.weight.detach().double().numpy() @ x, atol=2e-3)


def test_pixels_that_were_not_normalised_are_refused():
    packing = CNNPacking(12, 5, 3, 2, 0, 3)
    client, pixels = CkksClient(packing), np.full((12, 12), 0.5)
    for largest, good in ((8.0, True), (-10.0, True), (10.1, False), (-255.0, False)):
        pixels[3, 4] = largest
        if good:
            assert len(client.encrypt(pixels)) == packing.uploads
        else:
            with pytest.raises(UserError, match="normalise"):
                client.encrypt(pixels)


@pytest.mark.parametrize("decimals", [-1, 7, 15, 2.5])
def test_more_decimals_than_are_safe_are_refused(decimals):
    with pytest.raises(UserError, match=f"decimals is {decimals}: take 0 to 6"):
        CkksClient(LinearPacking(40, 3), decimals)


def test_numbers_without_room_are_refused(small):
    client, _, _ = small
    for bad, message in (
        (film((40,)).numpy() * 2, "norm"), (np.ones(41), "shape"), (np.ones((40, 1)), "shape"),
        (np.full(40, np.nan), "finite"), (np.full(40, np.inf), "finite"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            client.encrypt(bad)
    model = cnn(12, 5, 3, 2, 0, 3)
    model[-1].bias.data += 1e6
    with pytest.raises(UserError, match="parameters"):
        CkksServer(model, (1, 12, 12))


def test_networks_without_a_packing_are_refused():
    for model in (nn.Linear(4, 2), nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), cnn(28, 7, 3, 3, 0, 3)):
        with pytest.raises(UserError, match="packing"):
            plan(model, (1, 28, 28))
    with pytest.raises(UserError, match="ciphertext"):
        plan(cnn(64, 3, 1, 4, 0, 3), (1, 64, 64))
    with pytest.raises(UserError, match="train"):
        empty = head(40)
        empty.weight.data.zero_()
        CkksServer(empty, (40,))
    with pytest.raises(UserError, match="scale"):
        big = head(40)
        big.weight.data *= 1e4
        CkksServer(big, (40,))


def without_bias(model: nn.Sequential, layer: int) -> nn.Sequential:
    model[layer].bias = None
    return model


@pytest.mark.parametrize("batch_size", [1, 8])
@pytest.mark.parametrize(
    ("model", "in_shape", "message"),
    [
        (without_bias(cnn(12, 5, 3, 2, 0, 3), 0), (1, 12, 12), "bias"),
        (without_bias(cnn(12, 5, 3, 2, 0, 3), -1), (1, 12, 12), "bias"),
        (cnn(12, 5, 3, 2, 0, 3), (40,), "square"),
        (cnn(12, 5, 3, 2, 0, 3), (), "square"),
        (cnn(12, 5, 3, 2, 0, 3), (3, 12, 12), "square"),
        (cnn(12, 5, 3, 2, 0, 3), (1, 12, 16), "square"),
        (cnn(12, 5, 3, 2, 0, 3), (1, 16, 16), "in_shape"),
        (head(40), (41,), "features"),
    ],
)
def test_networks_that_do_not_fit_the_film_are_refused(model, in_shape, message, batch_size):
    with pytest.raises(UserError, match=message):
        CkksServer(model, in_shape, batch_size=batch_size)


# --- the layer below --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ring():
    context = Context(Parameters(4096, (39, 30, 39), 30))
    return context, SecretKey(context)


def test_coefficients_multiply_as_polynomials(ring):
    context, _ = ring
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=context.n), rng.normal(size=context.n)
    full = np.convolve(a, b)
    product = full[: context.n] - np.append(full[context.n :], 0.0)  # modulo X^N + 1
    slots = context.slots_of(a) * context.slots_of(b)
    np.testing.assert_allclose(context.coefficients_of(slots), product, atol=1e-8)


def test_slots_are_seals(ring):
    context, _ = ring
    a = np.random.default_rng(1).normal(size=context.n)
    plaintext = context.encode_coefficients(a, 2.0**30)
    decoded = np.array(context.encoder.decode_complex(plaintext))
    np.testing.assert_allclose(decoded, context.slots_of(a), atol=1e-5)


def test_kept_coefficients_are_what_seal_decrypts(ring):
    context, key = ring
    assert set(np.unique(key.ternary)) == {-1, 0, 1}
    values = np.random.default_rng(2).normal(size=context.n)
    ciphertext = context.receive(key.encrypt(context.encode_coefficients(values, 2.0**30)), scale=2.0**30)
    peer = context.coefficients_of(key.decrypt(ciphertext))
    context.evaluator.transform_from_ntt_inplace(ciphertext)
    integers = context.integers(dump(ciphertext), scale=2.0**30, level=0)
    keep = [0, 1, 17, 2048, 4094, 4095]
    mine = np.array(key.coefficients(integers, keep, 0), dtype=float) / 2.0**30
    np.testing.assert_allclose(mine, peer[keep], atol=1e-9)
    np.testing.assert_allclose(mine, values[keep], atol=1e-6)


# --- what each party holds --------------------------------------------------------------------------------------------


def test_the_server_holds_no_secret_key(small):
    client, server, session = small
    session.prepare()
    encrypted(client, session, film((40,)))
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
    x = film((40,)).numpy()
    sent = [client.public(), *client.encrypt(x)]
    for data in sent:
        client.refuse_secret(data)
        for form in (np.float32, np.float64):
            assert x.astype(form).tobytes()[:64] not in data
    replies = session.diagnose(client.encrypt(x))
    assert all(x.astype(np.float64).tobytes()[:64] not in reply for reply in replies)


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


def costs_of(party, step: str) -> list:
    return [cost for cost in party.costs if cost.step == step]


@pytest.mark.parametrize("norm", [0.1, 1.0, 50.0])
@pytest.mark.parametrize(("features", "flooded", "batch_size"), [(40, False, 1), (1280, False, 1), (40, True, 1),
                                                                 (5, False, 2048)])  # fmt: skip
def test_the_error_that_is_noted_is_that_of_the_logits(features, flooded, batch_size, norm):
    """The server's, with its weights, closely; the client's, for any weights and after rounding, from above."""
    model = head(features)
    with torch.no_grad():
        model.weight *= norm / model.weight.norm(dim=1).max()
    server = CkksServer(model, (features,), flooded=flooded, batch_size=batch_size)
    client = CkksClient(server.packing)
    session, weights, exact, rounded = server.open(client.public()), model.weight.detach().double().numpy(), [], []
    for seed in range(1 if batch_size > 1 else 20):
        x = torch.randn(batch_size, features, generator=torch.Generator().manual_seed(seed)).double().numpy()
        x /= np.linalg.norm(x, axis=1, keepdims=True)
        replies = session.diagnose(client.encrypt(x if batch_size > 1 else x[0]))
        exact.append(client.decrypt_exact(replies) - x @ weights.T)
        rounded.append(client.decrypt(replies) - x @ weights.T)
    known, most = costs_of(server, "compute")[-1].error, costs_of(client, "decrypt")[-1].error
    assert 1 / 3 < np.std(exact) / known < 1.5
    assert 1 / 30 < np.std(rounded) / most < 1.5


def test_the_error_of_a_client_counts_rounding_and_flooding():
    server = CkksServer(head(40), (40,), flooded=True)
    for client in (CkksClient(server.packing), CkksClient(server.packing, 6, Flooding(1000, 30))):
        client.decrypt(server.open(client.public()).diagnose(client.encrypt(film((40,)).numpy())))
        expected = client.flooding_std or 1e-3 / np.sqrt(12)
        assert costs_of(client, "decrypt")[-1].error == pytest.approx(expected, rel=1e-3)


# --- bad input --------------------------------------------------------------------------------------------------------


def changed(data: bytes, at: int, value: bytes) -> bytes:
    return data[:at] + value + data[at + len(value) :]


def test_wrong_ciphertexts_are_refused_before_any_work(small):
    client, server, session = small
    (good,) = client.encrypt(film((40,)).numpy())
    other = CkksClient(CNNPacking(12, 5, 3, 2, 0, 3)).encrypt(np.ones((12, 12)))[0]
    context = server.context
    scaled = client.key.encrypt(context.encode_coefficients(np.ones(40), 2.0**20))
    bomb = b"\x28\xb5\x2f\xfd" + bytes(64)
    for bad in (
        b"", b"x", good[:-1], good + b"x", good[:100], bytes(len(good)), np.random.default_rng(0).bytes(len(good)),
        other, scaled, changed(good, 0, b"\0\0"), changed(good, 5, b"\x01"),
        struct.pack("<HBBBBHQ", 0xA15E, 16, 4, 3, 2, 0, 16 + len(bomb)) + bomb,
        bytes(10 << 20),
    ):  # fmt: skip
        with pytest.raises(CiphertextError):
            session.diagnose([bad])
    for number in (0, 2):
        with pytest.raises(CiphertextError, match="belong"):
            session.diagnose([good] * number)
    # A coefficient beyond its prime.
    ciphertext = context.receive(good, scale=server.packing.fresh_scale)
    integers = context.integers(dump(ciphertext), scale=server.packing.fresh_scale, level=0, ntt=True).copy()
    integers[1, 0, 5] = context.moduli[0]
    with pytest.raises(CiphertextError):
        session.diagnose([context.compose(integers, scale=server.packing.fresh_scale, level=0, ntt=True)])
    assert len(session.diagnose([good])) == 1


def test_wrong_keys_are_refused(small):
    client, server, _ = small
    good = client.public()
    for bad in (b"", good[:50], good[:-1], good + b"x", b"PLCK0001" + bytes(60), changed(good, 0, b"XXXX")):
        with pytest.raises(CiphertextError):
            server.open(bad)
    other = CkksClient(LinearPacking(41, 3)).public()
    with pytest.raises(CiphertextError, match="another"):
        server.open(other)
    deep = CkksServer(cnn(12, 5, 3, 2, 0, 3), (1, 12, 12))
    owner = CkksClient(deep.packing)
    public = owner.public()
    parts = [owner.key.public_key(), owner.key.relin_keys(), owner.key.galois_keys([*deep.packing.rotations[1:], 3])]
    with pytest.raises(CiphertextError, match="missing"):
        deep.open(join_keys(deep.packing, parts))
    assert isinstance(deep.open(public), Session)


def test_replies_of_another_kind_are_refused(small):
    client, _, session = small
    (reply,) = session.diagnose(client.encrypt(film((40,)).numpy()))
    for bad in ([], [reply, reply], [reply[:-1]], [reply[:16]], [bytes(len(reply))]):
        with pytest.raises(CiphertextError):
            client.decrypt(bad)


@pytest.mark.parametrize("kind", ["linear", "cnn"])
def test_the_decision_is_the_same(kind):
    """50 films: the same class, but where the two largest logits are closer than the error."""
    shape, model = ((40,), head(40)) if kind == "linear" else ((1, 12, 12), cnn(12, 5, 3, 2, 0, 3))
    client, _, session = pair(model, shape)
    compared = 0
    for seed in range(50):
        x = film(shape, seed)
        plain = model(x[None])[0].detach().numpy()
        if np.diff(np.sort(plain))[-1] > 1e-3:
            compared += 1
            assert encrypted(client, session, x).argmax() == plain.argmax()
    assert compared > 40


def test_bad_films_are_refused(small):
    client, _, _ = small
    for bad, message in ((np.ones(41), "the model takes"), (np.ones((40, 1)), "the model takes")):
        with pytest.raises(UserError, match=message):
            client.encrypt(bad)
    for value in (np.nan, np.inf):
        with pytest.raises(UserError, match="aren't finite"):
            client.encrypt(np.full(40, value))
