"""A cryptographic generator for everything that differential privacy rests on: who is sampled, and the noise.

The stream is ChaCha20 (RFC 8439) under a 256-bit key from the operating system. Opacus's ``secure_mode`` serves the
same end but needs torchcsprng, which no longer installs. :mod:`primia_lite.privacy.noise` makes noise of its words.
"""

from __future__ import annotations

import hashlib
import hmac
import os

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

from primia_lite.config import UserError


class SecureGenerator:
    """ChaCha20's keystream as words and coin flips.

    The ``key`` has 32 bytes; left out, the operating system draws them, and nobody can repeat the stream. A generator
    by :meth:`from_seed` repeats, for teaching and tests: it is ``seeded``, and results must say "seeded: not private".
    """

    def __init__(self, key: bytes | None = None, *, seeded: bool = False):
        if key is not None and len(key) != 32:
            raise ValueError(f"a ChaCha20 key has 32 bytes, got {len(key)}")
        self._key = key or os.urandom(32)
        self.seeded = seeded
        self._served = False
        self._stream = Cipher(algorithms.ChaCha20(self._key, bytes(16)), mode=None).encryptor()

    @classmethod
    def from_seed(cls, seed: int) -> SecureGenerator:
        """A generator that repeats: not private."""
        return cls(hashlib.sha256(f"primia_lite seed {seed}".encode()).digest(), seeded=True)

    @classmethod
    def for_seed(cls, seed: int | None) -> SecureGenerator:
        """From the operating system for ``None``, else :meth:`from_seed`."""
        return cls() if seed is None else cls.from_seed(seed)

    def child(self, *labels: object) -> SecureGenerator:
        """An independent generator for one purpose, the same one for the same labels (HMAC-SHA256 of the key)."""
        name = "/".join(str(label) for label in labels).encode()
        return SecureGenerator(hmac.digest(self._key, name, "sha256"), seeded=self.seeded)

    def serve_once(self) -> None:
        """Mark this generator as used for a release; UserError if it was before and isn't seeded: its children repeat,
        and two releases with one noise give their difference away exactly."""
        if self._served and not self.seeded:
            raise UserError(
                "this SecureGenerator has made the noise of a release already, and would repeat it: take a new one, or "
                "a child of its own for each release, rng.child(round, hospital)"
            )
        self._served = True

    def __reduce__(self):
        # The state would let whoever reads the file subtract the noise.
        raise TypeError("a SecureGenerator is never written to disk or sent to another process")

    def bytes(self, n: int) -> bytes:
        return self._stream.update(bytes(n))

    def words(self, n: int) -> np.ndarray:
        """Uniform uint64 [n]."""
        return np.frombuffer(self.bytes(8 * n), dtype="<u8")

    def bernoulli(self, n: int, probability: float) -> np.ndarray:
        """bool [n], each true with ``probability``, up to 2^-53."""
        return ((self.words(n) >> np.uint64(11)).astype(np.float64) + 1.0) * 2.0**-53 <= probability

    def seed(self) -> int:
        """A 63-bit seed for a generator where privacy doesn't rest on it (shuffling, augmentation, initialisation)."""
        return int(self.words(1)[0] >> np.uint64(1))
