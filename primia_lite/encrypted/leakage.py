"""What careless versions of encrypted inference give away: two attacks, to see why the library does what it does."""

from __future__ import annotations

import numpy as np
import tenseal.sealapi as sealapi

from primia_lite.encrypted.seal import Context, dump


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
