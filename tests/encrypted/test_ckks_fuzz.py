"""Bytes of strangers, altered in every way: an error of ours or an answer, never another error and never a crash."""

from __future__ import annotations

import contextlib
import json
import struct

import ckks_parties as networks
import numpy as np
import pytest
import zstandard
from ckks_parties import pair
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from primia_lite.config import UserError
from primia_lite.encrypted.seal import CiphertextError, payload
from primia_lite.encrypted.wire import (
    join,
    most_key_bytes,
    most_reply_bytes,
    most_upload_bytes,
    packing_from,
    spec_of,
    split,
    split_keys,
)

HEADER = struct.Struct("<HBBBBHQ")
NUMBERS = [0, 1, 2, 3, 81, 4096, 8192, 1 << 31, 1 << 32, 1 << 40, 1 << 63, (1 << 64) - 1]


def wrapped(body: bytes, compression: int = 0) -> bytes:
    return HEADER.pack(0xA15E, 16, 4, 3, compression, 0, 16 + len(body)) + body


def opened(data: bytes) -> bytes:
    """The same thing, not compressed: there altered bytes reach SEAL's parser."""
    return wrapped(payload(data))


class Parties:
    def __init__(self, model, shape):
        self.client, self.server, self.session = pair(model, shape)
        self.public = self.client.public()
        self.uploads = self.client.encrypt(np.full(self.server.packing.in_shape, 0.01))
        self.replies = self.session.diagnose(self.uploads)
        self.keys = split_keys(self.public, self.server.packing)

    def bundle(self, keys: list[bytes], *spec) -> bytes:
        head = {"packing": spec[0] if spec else spec_of(self.server.packing), "bytes": [len(key) for key in keys]}
        return self.headed(json.dumps(head).encode(), keys)

    def headed(self, head: bytes, keys: list[bytes]) -> bytes:
        return b"".join([b"PLCK0001", struct.pack("<I", len(head)), head, *keys])


@pytest.fixture(scope="module")
def wide():
    """Two ciphertexts a film."""
    parties = Parties(networks.head(1300), (1300,))
    assert parties.server.packing.uploads == 2
    return parties


@pytest.fixture(scope="module")
def cnn():
    """With keys for relinearisation and rotations."""
    return Parties(networks.cnn(12, 5, 3, 2, 0, 2), (1, 12, 12))


# Several edits of a text: where (from its start or its end), what, and how.
EDITS = st.lists(
    st.tuples(
        st.sampled_from(["flip", "cut", "insert", "number", "overwrite", "delete"]),
        st.one_of(st.integers(0, 160), st.integers(0, 1 << 22), st.integers(-100, -1)),
        st.binary(min_size=1, max_size=24),
        st.sampled_from(NUMBERS),
    ),
    min_size=1,
    max_size=3,
)


def altered(data: bytes, edits, keep_length: bool) -> bytes:
    out = bytearray(data)
    for kind, at, new, number in edits:
        at %= max(1, len(out))
        if kind == "flip" and out:
            out[at] ^= new[0] or 1
        elif kind == "cut":
            del out[at:]
        elif kind == "insert":
            out[at:at] = new
        elif kind == "number":
            out[at : at + 8] = struct.pack("<Q", number)
        elif kind == "overwrite":
            out[at : at + len(new)] = new
        else:
            del out[at : at + len(new)]
    if keep_length and len(out) >= 16:  # the header agrees, so that more is read
        out[8:16] = struct.pack("<Q", len(out))
    return bytes(out)


def fuzz(examples: int):
    def decorate(test):
        slow = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
        return settings(max_examples=examples, deadline=None, database=None, suppress_health_check=slow)(test)

    return decorate


@fuzz(500)
@given(edits=EDITS, raw=st.booleans(), keep_length=st.booleans(), which=st.integers(0, 1))
def test_uploads(wide, edits, raw, keep_length, which):
    uploads = list(wide.uploads)
    uploads[which] = altered(opened(uploads[which]) if raw else uploads[which], edits, keep_length)
    with contextlib.suppress(CiphertextError):
        assert len(wide.session.diagnose(uploads)) == 1


@fuzz(250)
@given(edits=EDITS, keep_length=st.booleans())
def test_replies(wide, edits, keep_length):
    with contextlib.suppress(CiphertextError):
        out = wide.client.decrypt([altered(wide.replies[0], edits, keep_length)])
        assert out.shape == (3,) and np.isfinite(out).all()


@fuzz(150)
@given(edits=EDITS, raw=st.booleans(), keep_length=st.booleans(), which=st.integers(0, 3))
def test_keys_and_their_head(cnn, edits, raw, keep_length, which):
    keys = list(cnn.keys)
    if which < 3:
        keys[which] = altered(opened(keys[which]) if raw else keys[which], edits, keep_length)
        data = cnn.bundle(keys)
    else:
        head = len(cnn.public) - sum(map(len, keys))
        data = altered(cnn.public[:head], edits, False) + cnn.public[head:]
    with contextlib.suppress(CiphertextError):
        cnn.server.open(data).diagnose(cnn.uploads)


# --- single cases -----------------------------------------------------------------------------------------------------


def test_bombs_are_not_inflated(wide):
    """Two of 64 MiB: one that says so, and one that says it is small."""
    bomb = zstandard.ZstdCompressor(write_content_size=True).compress(bytes(64 << 20))
    quiet = zstandard.ZstdCompressor(write_content_size=False).compressobj()
    small = zstandard.ZstdCompressor(write_content_size=True).compress(bytes(60_000))
    lying = bytearray(bomb)
    begin = 5 + (zstandard.get_frame_parameters(bomb).dict_id > 0)
    lying[begin - 1 : begin + 4] = small[begin - 1 : begin + 4]
    for data in (bomb, quiet.compress(bytes(64 << 20)) + quiet.flush(), bytes(lying)):
        with pytest.raises(CiphertextError):
            wide.session.diagnose([wrapped(data, 2), wide.uploads[1]])
        with pytest.raises(CiphertextError):
            wide.server.open(wide.bundle([wrapped(data, 2)]))


@pytest.mark.parametrize("ratio", [1 + 5e-7, np.nextafter(1, 2), 0.5, 0.0, -1.0, np.nan, np.inf])
def test_a_scale_that_is_off_by_a_little_is_refused(wide, ratio):
    """SEAL adds no ciphertexts of different scales: that must not come up in the middle of the work."""
    data = bytearray(opened(wide.uploads[1]))
    place = 16 + struct.calcsize("<4Q?QQQ")
    assert struct.unpack_from("<d", data, place)[0] == wide.server.packing.fresh_scale
    struct.pack_into("<d", data, place, 2.0**26 * ratio)
    with pytest.raises(CiphertextError, match="scale"):
        wide.session.diagnose([wide.uploads[0], bytes(data)])


def test_another_level_is_refused(cnn):
    lower = cnn.server.context.encode_slots(np.ones(8), cnn.server.packing.fresh_scale, 1)
    with pytest.raises(CiphertextError, match="another"):
        cnn.session.diagnose([cnn.client.key.encrypt(lower), *cnn.uploads[1:]])


@pytest.mark.parametrize(
    "spec",
    [
        {"kind": "linear", "features": 1e999, "classes": 3}, {"kind": "linear", "features": -1, "classes": 3},
        {"kind": "linear", "features": 40}, {"kind": "x"}, {"kind": []}, {}, [], None, 7, "linear",
        {"kind": "cnn", "side": 12, "kernel": 5, "stride": 3, "channels": 2, "hidden": -2, "classes": 2},
        {"kind": "cnn", "side": 10**9, "kernel": 1, "stride": 1, "channels": 1, "hidden": 0, "classes": 2},
        # Copies are worked out by halving: also for numbers this large.
        {"kind": "cnn", "side": 4096, "kernel": 1, "stride": 1, "channels": 4096, "hidden": 0, "classes": 3},
        {"kind": "linear", "features": 40, "classes": 3, "parameters": 1},
        {"kind": "linear", "features": {}, "classes": 3},
    ],
)  # fmt: skip
def test_descriptions_that_make_no_packing(wide, spec):
    with pytest.raises(UserError):
        packing_from(spec)
    with pytest.raises(CiphertextError):
        wide.server.open(wide.bundle(wide.keys, spec))


@pytest.mark.parametrize("text", ["[" * 4000, '{"packing":1', "\xff", '{"packing": {}, "bytes": [1e999]}', "null", ""])
def test_heads_that_are_no_json(wide, text):
    with pytest.raises(CiphertextError):
        wide.server.open(wide.headed(text.encode("latin-1"), wide.keys))


def test_keys_of_another_kind_or_number(cnn, wide):
    public, relin, galois = cnn.keys
    for keys in ([public], [public, relin], [relin, public, galois], [public, galois, relin], [*cnn.keys, public],
                 [wide.keys[0], relin, galois], [b"", relin, galois], [public, relin, b""]):  # fmt: skip
        with pytest.raises(CiphertextError):
            cnn.server.open(cnn.bundle(keys))


def test_lists_of_ciphertexts_come_back_or_are_refused(cnn):
    body = join(cnn.uploads)
    assert split(body) == cnn.uploads and split(join([])) == []
    assert len(body) <= most_upload_bytes(cnn.server.packing) and len(cnn.public) <= most_key_bytes(cnn.server.packing)
    assert len(join(cnn.replies)) <= most_reply_bytes(cnn.server.packing)
    for bad in (b"", b"abc", body[:-1], body + b"x", body[:20], struct.pack("<I", 1 << 31) + body[4:]):
        with pytest.raises(CiphertextError):
            split(bad)
