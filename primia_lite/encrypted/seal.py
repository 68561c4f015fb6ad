"""A thin layer over Microsoft SEAL, by ``tenseal.sealapi``: encoding, bytes in and out, and a ciphertext's integers.

TenSEAL's tensors choose the packing themselves; here it is ours, so their lower layer is used. Bytes are SEAL's own
format (version 4); they are checked here before SEAL reads them, so that nothing a stranger sends reaches its parser
with a size, a level or a scale that wasn't asked for.
"""

from __future__ import annotations

import contextlib
import os
import struct
import tempfile
from collections.abc import Iterator

import numpy as np
import tenseal.sealapi as sealapi
import zstandard

from primia_lite.config import UserError
from primia_lite.encrypted.parameters import Parameters

_HEADER = struct.Struct("<HBBBBHQ")  # magic, header's size, version (two), compression, reserved, size of all
_FIELDS = struct.Struct("<4Q?QQQdQ")  # parms_id, NTT form, polynomials, N, primes, scale, correction factor
_MAGIC, _VERSION, _STORED, _ZSTD = 0xA15E, (4, 3), 0, 2
_SEED_BYTES = 81  # what stands for the second polynomial of a seeded ciphertext: header, generator's name, seed


class CiphertextError(UserError):
    """Bytes that aren't the ciphertext that was asked for."""


class Context:
    """SEAL's context with evaluator and encoder.

    Attributes
    ----------
    moduli : the primes, the special one last
    level_ids : SEAL's name for the parameters at each level, from a fresh ciphertext on
    """

    def __init__(self, parameters: Parameters):
        self.parameters = parameters
        self.n = parameters.poly_modulus_degree
        inner = sealapi.EncryptionParameters(sealapi.SCHEME_TYPE.CKKS)
        inner.set_poly_modulus_degree(self.n)
        inner.set_coeff_modulus(sealapi.CoeffModulus.Create(self.n, list(parameters.coeff_mod_bit_sizes)))
        self.seal = sealapi.SEALContext(inner, True, sealapi.SEC_LEVEL_TYPE.TC128)
        if not self.seal.parameters_set():
            raise UserError(f"SEAL refuses these parameters: {self.seal.parameters_error_message()}")
        self.moduli = [modulus.value() for modulus in inner.coeff_modulus()]
        self.level_ids, data = [], self.seal.first_context_data()
        while data is not None:
            self.level_ids.append(list(data.parms_id()))
            data = data.next_context_data()
        self.evaluator = sealapi.Evaluator(self.seal)
        self.encoder = sealapi.CKKSEncoder(self.seal)
        # Slot i is the value at the root of unity's power 3^i (Cheon et al. 2017), its conjugate at the inverse.
        power = np.array([pow(3, i, 2 * self.n) for i in range(self.n // 2)])
        self._root, self._conjugate = (power - 1) // 2, (2 * self.n - power - 1) // 2
        # Half of the roots have a power 4m + 1; there X^(N/2) = i, so half as long a transform does for a real
        # polynomial. The others are conjugates.
        self._place = np.where(self._root % 2, self._conjugate, self._root) // 2
        self._sign = np.where(self._root % 2, -1.0, 1.0)
        self._twist = np.exp(1j * np.pi * np.arange(self.n) / self.n)

    def moduli_at(self, level: int) -> list[int]:
        """Primes of a ciphertext after ``level`` rescalings."""
        return self.moduli[: len(self.level_ids) - level]

    # --- encoding -----------------------------------------------------------------------------------------------------

    def encode_slots(self, values, scale: float, level: int = 0) -> sealapi.Plaintext:
        """Real or complex [up to N / 2], or one real number for all slots; a UserError if they are too large for the
        modulus at this level."""
        out = sealapi.Plaintext()
        try:
            self.encoder.encode(np.asarray(values).tolist(), self.level_ids[level], scale, out)
        except ValueError as error:
            raise UserError(f"numbers are too large for these parameters ({error}): scale them down") from error
        return out

    def encode_coefficients(self, values: np.ndarray, scale: float, level: int = 0) -> sealapi.Plaintext:
        """Real [up to N], the polynomial's coefficients themselves: products of polynomials are convolutions."""
        return self.encode_slots(self.slots_of(values), scale, level)

    def slots_of(self, coefficients: np.ndarray) -> np.ndarray:
        """Values of a real polynomial [up to N] at the slots' roots, complex [N / 2]."""
        whole, half = np.zeros(self.n), self.n // 2
        whole[: len(coefficients)] = coefficients
        folded = (whole[:half] + 1j * whole[half:]) * self._twist[:half]
        out = np.fft.ifft(folded, norm="forward")[self._place]
        out.imag *= self._sign
        return out

    def coefficients_of(self, slots: np.ndarray) -> np.ndarray:
        """The inverse of :meth:`slots_of`."""
        whole = np.empty(self.n, complex)
        whole[self._root], whole[self._conjugate] = slots, np.conj(slots)
        return np.real(np.fft.fft(whole) / self.n * np.conj(self._twist))

    # --- bytes --------------------------------------------------------------------------------------------------------

    def load(self, data: bytes, kind: type):
        """An object of SEAL, from bytes of this process or of a trusted one; for ciphertexts of strangers:
        :meth:`receive`."""
        out = kind()
        with _file(data) as path:
            out.load(self.seal, path)
        return out

    def receive(self, data: bytes, *, scale: float, level: int = 0, seeded: bool = True) -> sealapi.Ciphertext:
        """A ciphertext of two polynomials in NTT form that a stranger sent, of just this scale and level; anything else
        (other parameters, cut, altered, coefficients beyond their primes) is a CiphertextError."""
        out = self._loaded(self._body(data, scale, level, True, seeded), sealapi.Ciphertext)
        if out.is_transparent():
            raise CiphertextError("this ciphertext isn't encrypted, its second polynomial is 0")
        return out

    def receive_keys(self, data: bytes, kind: type, elements: int = 0):
        """A stranger's public key, relinearisation keys, or Galois keys for just so many elements; else a
        CiphertextError. SEAL trusts the numbers of keys that such bytes tell, so they are counted here first."""
        each = self._size(2, len(self.moduli))
        seeded = self._size(1, len(self.moduli)) + _SEED_BYTES
        if kind is sealapi.PublicKey:
            body = _unwrap(data, each)
            fits = len(body) == each
        else:
            rows, full = (1, 1) if kind is sealapi.RelinKeys else (self.n, elements)
            digits = len(self.moduli) - 1
            body = _unwrap(data, 40 + 8 * rows + full * digits * (_HEADER.size + each))
            fits = _keys_fit(body, rows, full, digits, {_HEADER.size + each, _HEADER.size + seeded})
        if not fits:
            raise CiphertextError("keys that were cut, altered, or of other parameters: send CkksClient.public()")
        return self._loaded(body, kind)

    def _loaded(self, body: bytes, kind: type):
        try:
            return self.load(_wrap(body), kind)
        except (RuntimeError, ValueError, IndexError, MemoryError) as error:
            raise CiphertextError(f"SEAL can't read these bytes: {error}") from error

    def integers(self, data: bytes, *, scale: float, level: int = 0, ntt: bool = False) -> np.ndarray:
        """Coefficients (or NTT values) of a ciphertext's two polynomials, uint64 [2, primes, N], from its bytes, which
        are checked as :meth:`receive` does."""
        body, moduli = self._body(data, scale, level, ntt, seeded=False), self.moduli_at(level)
        out = np.frombuffer(body, np.uint64, offset=_FIELDS.size + _HEADER.size + 8).reshape(2, len(moduli), self.n)
        if (out >= np.array(moduli, np.uint64)[None, :, None]).any():
            raise CiphertextError("coefficients of this ciphertext are beyond their prime: was it altered?")
        return out

    def compose(self, integers: np.ndarray, *, scale: float, level: int = 0, ntt: bool = False) -> bytes:
        """:meth:`integers` undone."""
        polynomials, primes, n = integers.shape
        fields = _FIELDS.pack(*self.level_ids[level], ntt, polynomials, n, primes, scale, 1)
        inner = _HEADER.pack(_MAGIC, _HEADER.size, *_VERSION, _STORED, 0, _HEADER.size + 8 + integers.nbytes)
        return _wrap(fields + inner + struct.pack("<Q", integers.size) + np.ascontiguousarray(integers).tobytes())

    def from_ntt(self, values: np.ndarray) -> np.ndarray:
        """Coefficients of the polynomial with these number-theoretic transforms, uint64 [N], modulo the first prime:
        int64 [N] in (-q/2, q/2]."""
        last, first = len(self.level_ids) - 1, self.moduli[0]
        pair = np.zeros((2, 1, self.n), np.uint64)
        pair[:, 0] = values
        # As a ciphertext's polynomial, SEAL transforms it.
        holder = self.load(self.compose(pair, scale=1.0, level=last, ntt=True), sealapi.Ciphertext)
        self.evaluator.transform_from_ntt_inplace(holder)
        found = self.integers(dump(holder), scale=1.0, level=last)[0, 0].astype(np.int64)
        return np.where(found > first // 2, found - first, found)

    def ntt_values(self, plaintext) -> np.ndarray:
        """Number-theoretic transforms of a plaintext or secret key modulo each of its primes, uint64 [primes, N]."""
        body = payload(dump(plaintext))
        primes = (len(body) - _HEADER.size) // (8 * self.n)
        return np.frombuffer(body[-8 * primes * self.n :], np.uint64).reshape(primes, self.n)

    def _size(self, polynomials: int, primes: int) -> int:
        return _FIELDS.size + _HEADER.size + 8 + 8 * polynomials * primes * self.n

    def _body(self, data: bytes, scale: float, level: int, ntt: bool, seeded: bool) -> bytes:
        """What is inside a ciphertext's bytes, if it is of two polynomials of this level, scale and form."""
        primes = len(self.moduli_at(level))
        full = self._size(2, primes)
        body = _unwrap(data, full)
        if len(body) < _FIELDS.size:
            raise CiphertextError(f"{len(body)} bytes are no ciphertext: was it cut?")
        *parms, form, polynomials, n, count, found, _ = _FIELDS.unpack_from(body)
        if parms != self.level_ids[level] or (n, count) != (self.n, primes):
            raise CiphertextError("this ciphertext was made with other parameters, or is at another level")
        if (form, polynomials, found) != (ntt, 2, scale):
            raise CiphertextError("this ciphertext's form, size or scale isn't that of the plan: encrypt by the plan")
        if len(body) != full and not (seeded and len(body) == self._size(1, primes) + _SEED_BYTES):
            raise CiphertextError(f"this ciphertext has {len(body)} bytes inside instead of {full}: was it cut?")
        return body


def _keys_fit(body: bytes, rows: int, full: int, digits: int, sizes: set[int]) -> bool:
    """Whether this is a table of at most ``rows`` rows, just ``full`` of them with ``digits`` keys of one of these
    sizes, the others empty: SEAL reads emptier tables, too, and fails when it needs a key."""
    try:
        (found,) = struct.unpack_from("<Q", body, 32)
        place, seen = 40, 0
        if found > rows:
            return False
        for _ in range(found):
            (keys,) = struct.unpack_from("<Q", body, place)
            place, seen = place + 8, seen + bool(keys)
            if keys not in (0, digits) or seen > full:
                return False
            for _ in range(keys):
                size = _HEADER.unpack_from(body, place)[-1]
                if size not in sizes:
                    return False
                place += size
    except struct.error:
        return False
    return seen == full and place == len(body)


def dump(thing) -> bytes:
    """An object of SEAL as bytes."""
    with _file(b"") as path:
        thing.save(path)
        with open(path, "rb", buffering=0) as file:
            return file.read()


@contextlib.contextmanager
def _file(data: bytes) -> Iterator[str]:
    """SEAL reads and writes files only: a nameless one, private to this process, in memory where the system has it."""
    if hasattr(os, "memfd_create"):
        handle = os.memfd_create("seal")
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(handle, rest) :]
            yield f"/proc/self/fd/{handle}"
        finally:
            os.close(handle)
    else:
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "seal")
            with open(path, "wb") as file:
                file.write(data)
            yield path


def payload(data: bytes) -> bytes:
    """SEAL's bytes of an object of our own, decompressed."""
    body = data[_HEADER.size :]
    return zstandard.ZstdDecompressor().decompress(body) if data[5] == _ZSTD else body


def _wrap(body: bytes) -> bytes:
    return _HEADER.pack(_MAGIC, _HEADER.size, *_VERSION, _STORED, 0, _HEADER.size + len(body)) + body


def _unwrap(data: bytes, most: int) -> bytes:
    """What follows the header, decompressed, if that is at most ``most`` bytes."""
    if len(data) < _HEADER.size:
        raise CiphertextError(f"{len(data)} bytes are no ciphertext: was it cut?")
    magic, header, major, _, compression, _, total = _HEADER.unpack_from(data)
    if (magic, header, major) != (_MAGIC, _HEADER.size, _VERSION[0]) or compression not in (_STORED, _ZSTD):
        raise CiphertextError("these bytes are no ciphertext of SEAL 4: send what CkksClient.encrypt returned")
    if total != len(data) or total > most + 4096:
        raise CiphertextError(f"the header tells of {total} bytes, {len(data)} came, {most} are the most: was it cut?")
    body = data[_HEADER.size :]
    if compression == _STORED:
        return body
    try:
        if not 0 < zstandard.frame_content_size(body) <= most:
            raise CiphertextError(f"this ciphertext would be larger than {most} bytes: it isn't one of this plan")
        return zstandard.ZstdDecompressor().decompress(body, max_output_size=most)
    except zstandard.ZstdError as error:
        raise CiphertextError("this ciphertext can't be decompressed: was it altered?") from error
