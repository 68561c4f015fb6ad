"""Distributed comparison functions: two keys, each random to its holder, whose outputs at a public x differ if and only
if x < α (Boyle et al., Function Secret Sharing for Mixed-Mode and Fixed-Point Secure Computation, Eurocrypt 2021).

A binary tree of 128-bit blocks grows from each key's seed. Off the path to α both trees are equal, so that outputs
cancel; one correction word a level, the same in both keys, keeps it so. The last 7 levels are one block, whose 128 bits
are the outputs for 128 neighbours (early termination).

Of a block's lowest three bits, 0 is the control bit, 1 the node's output; 125 bits are seed. A child is AES(u) ^ u
under one fixed public key (Matyas, Meyer, Oseas) with u the seed and 0 (left), 1 (right) or 2 (leaf) below it. As all
gates share that key, T trials of a block meet one of N seeds with probability T N / 2¹²⁵: 2⁻¹⁰⁰ a trial for 2²⁵ nodes.
"""

from __future__ import annotations

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

CHUNK = 4096  # gates at a time: what they need stays in the second-level cache
LEAF_LEVELS = 7
ONE, SEED, LEAF = np.uint64(1), np.uint64(~np.uint64(7)), np.uint64(2)
_AES = Cipher(algorithms.AES(b"primia-lite fss!"), modes.ECB())


def _hash(aes, u: np.ndarray, out: np.ndarray) -> np.ndarray:
    """AES(u) ^ u for blocks [n, 2], in the buffer ``out`` of 16 n + 16 bytes. ``aes``: a thread's own encryptor, as a
    shared one raises "Already borrowed"."""
    n = len(u)
    aes.update_into(memoryview(u).cast("B"), out)
    blocks = out[: 16 * n].view(np.uint64).reshape(n, 2)
    blocks ^= u
    return blocks


def _both(column: np.ndarray, out: np.ndarray) -> np.ndarray:
    """A column as both halves of blocks."""
    out[:, 0] = out[:, 1] = column
    return out


def depth(bits: int) -> int:
    """Levels above the leaves."""
    return max(0, bits - LEAF_LEVELS)


def key_bytes(bits: int) -> int:
    """Bytes of a key without its seed, which each server draws from its own stream."""
    return 16 * (depth(bits) + 1)


def generate(alpha: np.ndarray, bits: int, seeds: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Correction words [depth + 1, gates, 2] for comparisons with ``alpha`` [gates] of ``bits`` bits.

    ``seeds``: the two servers' blocks, uint64 [gates, 2].
    """
    words = np.empty((depth(bits) + 1, len(alpha), 2), np.uint64)
    for start in range(0, len(alpha), CHUNK):
        part = slice(start, start + CHUNK)
        _generate(alpha[part].astype(np.uint64), bits, [seed[part].copy() for seed in seeds], words[:, part])
    return words


def _generate(alpha: np.ndarray, bits: int, seeds: list[np.ndarray], words: np.ndarray) -> None:
    n, aes = len(alpha), _AES.encryptor()
    buffers = [np.empty(16 * n + 16, np.uint8) for _ in range(4)]
    control, value = [np.zeros(n, np.uint64), np.ones(n, np.uint64)], np.zeros(n, np.uint64)
    right_mask, control_mask = np.empty((n, 2), np.uint64), np.empty((n, 2), np.uint64)
    for level in range(depth(bits)):
        right = (alpha >> np.uint64(bits - 1 - level)) & ONE
        _both(np.negative(right), right_mask)
        lefts, rights = [], []
        for b, u in enumerate(seeds):
            u[:, 0] &= SEED
            lefts.append(_hash(aes, u, buffers[2 * b]))
            u[:, 0] |= ONE
            rights.append(_hash(aes, u, buffers[2 * b + 1]))
        left, lost = lefts[0] ^ lefts[1], rights[0] ^ rights[1]
        on_left = (left[:, 0] & ONE) ^ right ^ ONE  # control bits differ on the path, and agree beside it
        on_right = (lost[:, 0] & ONE) ^ right
        left ^= lost
        left &= right_mask
        lost ^= left  # the left children where the path goes right, else the right ones
        output = ((lost[:, 0] >> ONE) & ONE) ^ value ^ right  # left of the path 1, right of it 0
        word = words[level]
        word[:, 1] = lost[:, 1]
        word[:, 0] = (lost[:, 0] & SEED) | on_left | (output << ONE) | ((on_left ^ on_right) << np.uint64(2))
        applied = word.copy()
        applied[:, 0] ^= right & (on_left ^ on_right)
        value ^= output
        for b in range(2):
            kept = rights[b]
            kept ^= lefts[b]
            kept &= right_mask
            kept ^= lefts[b]
            value ^= (kept[:, 0] >> ONE) & ONE
            _both(np.negative(control[b]), control_mask)
            control_mask &= applied
            np.bitwise_xor(kept, control_mask, out=seeds[b])
            control[b] = seeds[b][:, 0] & ONE
    leaves = []
    for b, u in enumerate(seeds):
        u[:, 0] = (u[:, 0] & SEED) | LEAF
        leaves.append(_hash(aes, u, buffers[b]))
    below, full = alpha & np.uint64(127), np.uint64(0xFFFFFFFFFFFFFFFF)
    part, high = (ONE << (below & np.uint64(63))) - ONE, below >= 64
    word = np.bitwise_xor(*leaves, out=words[-1])
    value = np.negative(value)
    word[:, 0] ^= np.where(high, full, part) ^ value
    word[:, 1] ^= np.where(high, part, np.uint64(0)) ^ value


def evaluate(server: int, x: np.ndarray, bits: int, seeds: np.ndarray, words: np.ndarray) -> np.ndarray:
    """The bit of ``server`` (0 or 1) for each gate at the public ``x`` [gates]: one AES block a level and one for the
    leaf. The two servers' bits differ where x < α."""
    out = np.empty(len(x), np.uint8)
    for start in range(0, len(x), CHUNK):
        part = slice(start, start + CHUNK)
        out[part] = _evaluate(server, x[part].astype(np.uint64), bits, seeds[part], words[:, part])
    return out


def _evaluate(server: int, x: np.ndarray, bits: int, seeds: np.ndarray, words: np.ndarray) -> np.ndarray:
    n, levels, aes = len(x), depth(bits), _AES.encryptor()
    u, mask, direction = seeds.copy(), np.empty((n, 2), np.uint64), np.empty(n, np.uint64)
    buffers = [np.empty(16 * n + 16, np.uint8) for _ in range(2)]
    u[:, 0] &= SEED
    control, value = np.full(n, server, np.uint64), np.zeros(n, np.uint64)
    for level in range(levels + 1):
        if level < levels:
            np.right_shift(x, np.uint64(bits - 1 - level), out=direction)
            direction &= ONE
            u[:, 0] |= direction
        else:
            u[:, 0] |= LEAF
        block = _hash(aes, u, buffers[level % 2])
        np.negative(control, out=control)  # all ones where it is set: masks are faster than np.where
        _both(control, mask)
        mask &= words[level]
        block ^= mask
        if level == levels:
            break
        low = block[:, 0].copy()
        mask[:, 0] >>= np.uint64(2)
        low ^= mask[:, 0] & direction
        value ^= low  # the output bit lies at position 1, and is read after the last level
        np.bitwise_and(low, ONE, out=control)
        low &= SEED
        block[:, 0] = low
        u = block
    place = x & np.uint64(127)
    leaf = np.where(place >= 64, block[:, 1], block[:, 0]) >> (place & np.uint64(63))
    return ((leaf ^ (value >> ONE)) & ONE).astype(np.uint8)
