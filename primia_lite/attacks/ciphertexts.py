"""What careless versions of encrypted inference give away: attacks on the key and on the weights, to see
why the library does what it does."""

from __future__ import annotations

import math

import numpy as np
import tenseal.sealapi as sealapi
import torch
from torch import nn

from primia_lite.config import UserError
from primia_lite.encrypted.client import CkksClient
from primia_lite.encrypted.flooding import flooding_std, wide_gaussian
from primia_lite.encrypted.packing import NOISE_STD
from primia_lite.encrypted.seal import Context, dump
from primia_lite.encrypted.server import CkksServer

SHARED = ("whole", "logits", "flooded")
SENT, ATTACKS = ("bare", "re-randomised", "sealed"), ("ratio", "division")


def recover_key(weights: np.ndarray, film: np.ndarray, shared: str, statistical_bits: float = 30) -> float:
    """Share of a hospital's key that a server finds when the hospital decrypts a product for it and shares of that

    - ``whole``: all of it in full precision, which :class:`CkksClient` never does
    - ``logits``: the logits, to 3 decimals, as :meth:`CkksClient.decrypt` returns them
    - ``flooded``: all of it, with the noise of :func:`flooding_std` for one decryption

    The server knows the film here (it may have chosen it), so it fills in what isn't shared with what it computes.
    ``weights`` are a linear head's [classes, features]; the film's features [features] have norm 1.
    """
    if shared not in SHARED:
        raise UserError(f"shared is {shared!r}: choose one of {', '.join(SHARED)}")
    client, server = _parties(weights)
    context, packing, uploads = server.context, server.packing, client.encrypt(film)
    (product,) = server.kernel(server.receive(uploads), None)
    if shared == "logits":
        # The product as the server computes it in the clear, the hospital's rounded logits in their places.
        slots = sum(
            context.slots_of(film[part]) * context.slots_of(packing.reversed_rows(weights, part))
            for part in packing.parts
        )
        coefficients = context.coefficients_of(slots)
        coefficients[packing.logit_places[0]] = client.decrypt(server.open(client.public()).diagnose(uploads))
    else:
        coefficients = context.coefficients_of(client.key.decrypt(product))
    if shared == "flooded":
        # All coefficients are shared, so the bound is on the norm of the noise of all.
        size = np.linalg.norm(weights) * 2.0**packing.weight_bits
        std = flooding_std(10 * NOISE_STD * math.sqrt(context.n) * size, 1, statistical_bits)
        coefficients = coefficients + np.array(wide_gaussian(context.n, std), float) / product.scale
    guess = key_from_decryption(context, product, context.slots_of(coefficients))
    return float(np.mean(guess == client.key.ternary))


def weights_from_replies(weights: np.ndarray, films: np.ndarray, sent: str, attack: str) -> np.ndarray:
    """A linear head's weights [classes, features] as a hospital reads them out of replies.

    Parameters
    ----------
    weights : of a linear head [classes, features]
    films : [n, features] of norm 1; at least as many as a film has uploads. Each gives one equation
    sent : ``bare`` products, ``re-randomised`` ones, or ``sealed`` replies as the server sends them, masked as well
    attack
        ``ratio``: the second polynomial of a reply over that of the upload, exact. ``division``: the whole reply is
        decrypted, and divided by the films' polynomials, up to noise; more films lower it.
    """
    if sent not in SENT or attack not in ATTACKS:
        raise UserError(f"choose what is sent from {', '.join(SENT)}, and an attack from {', '.join(ATTACKS)}")
    client, server = _parties(weights)
    context, packing, session = server.context, server.packing, server.open(client.public())
    if len(films) < packing.uploads:
        raise UserError(f"a film has {packing.uploads} uploads here, so that many films are needed: give more of them")
    uploads, replies = [], []
    for film in films:
        data = client.encrypt(film)
        uploads.append(server.receive(data))
        (product,) = server.kernel(server.receive(data), None)  # read once more: the kernel computes in place
        if sent == "sealed":
            product = context.load(session.diagnose(data)[0], sealapi.Ciphertext)
            context.evaluator.transform_to_ntt_inplace(product)
        elif sent == "re-randomised":
            zero = sealapi.Ciphertext()
            session.encryptor.encrypt_zero(context.level_ids[0], zero)
            zero.scale = product.scale
            context.evaluator.add_inplace(product, zero)
        replies.append(product)
    if attack == "ratio":
        few = packing.uploads
        found = [v / 2.0**packing.weight_bits for v in _multipliers(context, uploads[:few], replies[:few])]
    else:
        found = _quotients(context, packing, client, films, replies)
    out = np.zeros((packing.classes, packing.features))
    for part, multiplier in zip(packing.parts, found, strict=True):
        rows = multiplier[: packing.classes * packing.part].reshape(packing.classes, packing.part)
        out[:, part] = rows[:, ::-1][:, : part.stop - part.start]
    return out


def _parties(weights: np.ndarray) -> tuple[CkksClient, CkksServer]:
    model = nn.Linear(weights.shape[1], weights.shape[0], bias=False)
    model.weight.data = torch.from_numpy(np.asarray(weights, np.float64))
    server = CkksServer(model, (weights.shape[1],))
    return CkksClient(server.packing), server


def key_from_decryption(context: Context, ciphertext: sealapi.Ciphertext, slots: np.ndarray) -> np.ndarray:
    """The secret key, int64 [N], from one decryption that was shared (Li and Micciancio, EUROCRYPT 2021).

    A CKKS decryption is message plus noise, m = c0 + c1 s, so s = (m - c0) / c1 modulo the prime, if it comes in
    full precision. Whether it worked the attacker sees by itself: the key's coefficients are -1, 0 and 1.

    Parameters
    ----------
    ciphertext : as it was sent, of a single prime, in NTT form
    slots : complex [N / 2], what was shared of its decryption
    """
    modulus = context.moduli[0]
    c0, c1 = context.integers(dump(ciphertext), scale=ciphertext.scale, ntt=True)[:, 0]
    message = context.ntt_values(context.encode_slots(slots, ciphertext.scale))[0]
    key = [(int(m) - int(a)) * _inverse(int(b), modulus) % modulus for m, a, b in zip(message, c0, c1, strict=True)]
    return context.from_ntt(np.array(key, np.uint64))


def _multipliers(context: Context, uploads: list[list], replies: list) -> list[np.ndarray]:
    """The plaintexts that uploads were multiplied by, int64 [N] each, if nobody re-randomised the replies: the second
    polynomial of a reply is the sum of those of the uploads, each times its plaintext. With as many films as uploads,
    that is a linear system modulo the prime, one for each point of the number-theoretic transform.

    Parameters
    ----------
    uploads, replies : ciphertexts [films][uploads of a film] and [films], of a single prime, in NTT form
    """
    modulus = context.moduli[0]

    def second(ciphertext: sealapi.Ciphertext) -> np.ndarray:
        return context.integers(dump(ciphertext), scale=ciphertext.scale, ntt=True)[1, 0].astype(object)

    rows = [[*map(second, film), second(reply)] for film, reply in zip(uploads, replies, strict=True)]
    for pivot in range(len(rows)):  # Gauss and Jordan, at all points at once
        inverse = np.array([_inverse(int(v), modulus) for v in rows[pivot][pivot]], object)
        rows[pivot] = [v * inverse % modulus for v in rows[pivot]]
        for other in range(len(rows)):
            if other != pivot:
                factor = rows[other][pivot]
                rows[other] = [(v - factor * w) % modulus for v, w in zip(rows[other], rows[pivot], strict=True)]
    return [context.from_ntt(row[-1].astype(np.uint64)) for row in rows]


def _quotients(context: Context, packing, client: CkksClient, films: np.ndarray, replies: list) -> list[np.ndarray]:
    """What the films' polynomials were multiplied by, [N] for each upload: least squares at each root of unity."""
    given = np.array([[context.slots_of(film[part]) for part in packing.parts] for film in films])
    matrix, right = given.transpose(2, 0, 1), np.array([client.key.decrypt(reply) for reply in replies]).T[:, :, None]
    adjoint = matrix.conj().transpose(0, 2, 1)
    solved = np.linalg.solve(adjoint @ matrix, adjoint @ right)[:, :, 0]
    return [context.coefficients_of(column) for column in solved.T]


def _inverse(value: int, modulus: int) -> int:
    return pow(value, -1, modulus) if value else 0
