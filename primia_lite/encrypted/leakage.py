"""What careless versions of encrypted inference give away: two attacks, to see why the library does what it does."""

from __future__ import annotations

import math

import numpy as np
import tenseal.sealapi as sealapi
import torch
from torch import nn

from primia_lite.config import UserError
from primia_lite.encrypted.ckks import Client, Server
from primia_lite.encrypted.flooding import flooding_std, rounded_gaussian
from primia_lite.encrypted.seal import Context, dump

SHARED = ("whole", "logits", "flooded")


def recover_key(weights: np.ndarray, film: np.ndarray, shared: str, statistical_bits: float = 30) -> float:
    """Share of a hospital's key that a server finds when the hospital decrypts a product for it and shares of that

    - ``whole``: all of it in full precision, which :class:`Client` never does
    - ``logits``: the logits, to 3 decimals, as :meth:`Client.decrypt` returns them
    - ``flooded``: all of it, with the noise of :func:`flooding_std` for one decryption

    The server knows the film here (it may have chosen it), so it fills in what isn't shared with what it computes.

    Parameters
    ----------
    weights, film : of a linear head [classes, features] in one upload, features [features]
    """
    if shared not in SHARED:
        raise UserError(f"shared is {shared!r}: choose one of {', '.join(SHARED)}")
    client, server, upload = _parties(weights, film)
    context = server.context
    received = context.receive(upload, scale=server.packing.fresh_scale)
    (product,) = server.kernel([received], None)
    scale, keep = product.scale, server.packing.keep[0]
    if shared == "logits":
        # The product as the server computes it in the clear, the hospital's rounded logits in their places.
        rows = np.pad(weights, ((0, 0), (0, server.packing.part - weights.shape[1])))[:, ::-1].ravel()
        coefficients = context.coefficients_of(
            context.slots_of(_padded(film, context)) * context.slots_of(_padded(rows, context))
        )
        reply = server.open(client.public()).diagnose([upload])
        coefficients[keep] = client.decrypt(reply)
    else:
        plaintext = sealapi.Plaintext()
        sealapi.Decryptor(context.seal, client._key._key).decrypt(product, plaintext)
        coefficients = context.coefficients_of(np.array(context.encoder.decode_complex(plaintext)))
    if shared == "flooded":
        # All coefficients are shared, so the bound is on the norm of the noise of all.
        size = np.linalg.norm(weights) * 2.0**server.packing.weight_bits
        std = flooding_std(10 * 3.24 * math.sqrt(context.n) * size, 1, statistical_bits)
        coefficients = coefficients + np.array(rounded_gaussian(context.n, std), float) / scale
    guess = key_from_decryption(context, dump(product), context.slots_of(coefficients), scale)
    return float(np.mean(guess == client._key._ternary))


def weights_from_reply(weights: np.ndarray, film: np.ndarray, masked: bool) -> np.ndarray:
    """A linear head's weights [classes, features] as a hospital reads them out of one reply.

    Parameters
    ----------
    weights, film : as of :func:`recover_key`
    masked : the reply as the server sends it, or the bare product
    """
    client, server, upload = _parties(weights, film)
    context, packing = server.context, server.packing
    if masked:
        (reply,) = server.open(client.public()).diagnose([upload])
        product = context.load(reply, sealapi.Ciphertext)
        context.evaluator.transform_to_ntt_inplace(product)
    else:
        (product,) = server.kernel([context.receive(upload, scale=packing.fresh_scale)], None)
    ratio = ratio_of_replies(context, upload, product, packing.fresh_scale)
    rows = ratio[: packing.classes * packing.part].reshape(packing.classes, packing.part)
    return rows[:, ::-1] / 2.0**packing.weight_bits


def _parties(weights: np.ndarray, film: np.ndarray) -> tuple[Client, Server, bytes]:
    model = nn.Linear(weights.shape[1], weights.shape[0], bias=False)
    model.weight.data = torch.from_numpy(np.asarray(weights, np.float64))
    server = Server(model, (weights.shape[1],))
    if server.packing.uploads != 1:
        raise UserError("the attacks are shown on a head of one upload: take fewer features or classes")
    client = Client(server.packing)
    return client, server, client.encrypt(film)[0]


def _padded(values: np.ndarray, context: Context) -> np.ndarray:
    return np.pad(values, (0, context.n - len(values)))


def key_from_decryption(context: Context, ciphertext: bytes, slots: np.ndarray, scale: float) -> np.ndarray:
    """The secret key from one decryption that was shared (Li and Micciancio, EUROCRYPT 2021), int64 [N].

    A CKKS decryption is message plus noise, m = c0 + c1 s, so s = (m - c0) / c1 modulo the prime, if it comes in
    full precision. Whether it worked the attacker sees by itself: the key's coefficients are -1, 0 and 1.

    Parameters
    ----------
    ciphertext : as it was sent, of a single prime
    slots : complex [N / 2], what was shared of its decryption
    """
    modulus = context.moduli[0]
    loaded = context.receive(ciphertext, scale=scale, level=len(context.level_ids) - 1)
    c0, c1 = context.integers(dump(loaded), scale=scale, level=len(context.level_ids) - 1, ntt=True)[:, 0]
    message = context.ntt_values(context.encode_slots(slots, scale, len(context.level_ids) - 1))[0]
    key = [(int(m) - int(a)) * _inverse(int(b), modulus) % modulus for m, a, b in zip(message, c0, c1, strict=True)]
    return _signed(context.inverse_ntt(np.array(key, np.uint64)), modulus)


def ratio_of_replies(context: Context, upload: bytes, reply: sealapi.Ciphertext, scale: float) -> np.ndarray:
    """What the second polynomial of a reply is, over that of the upload: the plaintext it was multiplied by, int64 [N],
    if nobody re-randomised it.

    Parameters
    ----------
    upload, reply : of a single prime, the reply in NTT form
    scale : of the upload
    """
    modulus, level = context.moduli[0], len(context.level_ids) - 1
    loaded = context.receive(upload, scale=scale, level=level)
    below = context.integers(dump(loaded), scale=scale, level=level, ntt=True)[1, 0]
    above = context.integers(dump(reply), scale=reply.scale, level=level, ntt=True)[1, 0]
    ratio = [int(a) * _inverse(int(b), modulus) % modulus for a, b in zip(above, below, strict=True)]
    return _signed(context.inverse_ntt(np.array(ratio, np.uint64)), modulus)


def _inverse(value: int, modulus: int) -> int:
    return pow(value, -1, modulus) if value else 0


def _signed(values: np.ndarray, modulus: int) -> np.ndarray:
    values = values.astype(np.int64)
    return np.where(values > modulus // 2, values - modulus, values)
