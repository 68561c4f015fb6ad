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
from primia_lite.encrypted.packing import CNNPacking
from primia_lite.encrypted.seal import CiphertextError, payload
from primia_lite.encrypted.wire import packing_from, spec_of, split_keys

HEADER = struct.Struct("<HBBBBHQ")
NUMBERS = [0, 1, 2, 3, 81, 4096, 8192, 1 << 31, 1 << 32, 1 << 40, 1 << 63, (1 << 64) - 1]


def stored(body: bytes) -> bytes:
    return HEADER.pack(0xA15E, 16, 4, 3, 0, 0, 16 + len(body)) + body


def packed(body: bytes) -> bytes:
    return HEADER.pack(0xA15E, 16, 4, 3, 2, 0, 16 + len(body)) + body


def opened(data: bytes) -> bytes:
    """The same thing, not compressed: there altered bytes reach SEAL's parser."""
    return stored(payload(data))


class Parties:
    def __init__(self, model, shape):
        self.client, self.server, self.session = pair(model, shape)
        self.public = self.client.public()
        self.uploads = self.client.encrypt(np.full(self.server.packing.in_shape, 0.01))
        self.replies = self.session.diagnose(self.uploads)
        self.keys = split_keys(self.public, self.server.packing)

    def bundle(self, keys: list[bytes], *spec) -> bytes:
        spec = spec[0] if spec else spec_of(self.server.packing)
        head = json.dumps({"packing": spec, "bytes": [len(key) for key in keys]}).encode()
        return b"".join([b"PLCK0001", struct.pack("<I", len(head)), head, *keys])


@pytest.fixture(scope="module")
def head():
    return Parties(networks.head(40), (40,))


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


@fuzz(1200)
@given(edits=EDITS, raw=st.booleans(), keep_length=st.booleans())
def test_uploads(head, edits, raw, keep_length):
    data = altered(opened(head.uploads[0]) if raw else head.uploads[0], edits, keep_length)
    try:
        replies = head.session.diagnose([data])
    except CiphertextError:
        return
    assert len(replies) == 1


@fuzz(300)
@given(edits=EDITS, keep_length=st.booleans())
def test_one_upload_of_two(wide, edits, keep_length):
    data = altered(opened(wide.uploads[1]), edits, keep_length)
    with contextlib.suppress(CiphertextError):
        wide.session.diagnose([wide.uploads[0], data])


@fuzz(500)
@given(edits=EDITS, keep_length=st.booleans())
def test_replies(head, edits, keep_length):
    try:
        out = head.client.decrypt([altered(head.replies[0], edits, keep_length)])
    except CiphertextError:
        return
    assert out.shape == (3,) and np.isfinite(out).all()


@fuzz(700)
@given(edits=EDITS)
def test_heads_of_keys(head, edits):
    with contextlib.suppress(CiphertextError):
        assert len(split_keys(altered(head.public[:140], edits, False), head.server.packing)) >= 0


@fuzz(250)
@given(edits=EDITS, raw=st.booleans(), keep_length=st.booleans(), which=st.integers(0, 2))
def test_keys(cnn, edits, raw, keep_length, which):
    keys = list(cnn.keys)
    keys[which] = altered(opened(keys[which]) if raw else keys[which], edits, keep_length)
    try:
        session = cnn.server.open(cnn.bundle(keys))
    except CiphertextError:
        return
    with contextlib.suppress(CiphertextError):
        session.diagnose(cnn.uploads)


# --- single cases -----------------------------------------------------------------------------------------------------


def test_bombs_are_not_inflated(head):
    """Two of 64 MiB: one that says so, and one that says it is small."""
    bomb = zstandard.ZstdCompressor(write_content_size=True).compress(bytes(64 << 20))
    quiet = zstandard.ZstdCompressor(write_content_size=False).compressobj()
    small = zstandard.ZstdCompressor(write_content_size=True).compress(bytes(60_000))
    lying = bytearray(bomb)
    begin = 5 + (zstandard.get_frame_parameters(bomb).dict_id > 0)
    lying[begin - 1 : begin + 4] = small[begin - 1 : begin + 4]
    for data in (bomb, quiet.compress(bytes(64 << 20)) + quiet.flush(), bytes(lying)):
        with pytest.raises(CiphertextError):
            head.session.diagnose([packed(data)])
        with pytest.raises(CiphertextError):
            head.server.open(head.bundle([packed(data)]))


@pytest.mark.parametrize("ratio", [1 + 5e-7, 1 + 2e-16, 0.5, 0.0, -1.0, np.nan, np.inf])
def test_a_scale_that_is_off_by_a_little_is_refused(wide, ratio):
    """SEAL adds no ciphertexts of different scales: that must not come up in the middle of the work."""
    data = bytearray(opened(wide.uploads[1]))
    place = 16 + struct.calcsize("<4Q?QQQ")
    assert struct.unpack_from("<d", data, place)[0] == wide.server.packing.fresh_scale
    struct.pack_into("<d", data, place, np.nextafter(2.0**26, np.inf) if ratio == 1 + 2e-16 else 2.0**26 * ratio)
    with pytest.raises(CiphertextError, match="scale"):
        wide.session.diagnose([wide.uploads[0], bytes(data)])


def test_another_level_is_refused(cnn):
    context, scale = cnn.server.context, cnn.server.packing.fresh_scale
    lower = context.encode_slots(np.ones(8), scale, 1)
    with pytest.raises(CiphertextError, match="another"):
        cnn.session.diagnose([cnn.client.key.encrypt(lower), *cnn.uploads[1:]])


@pytest.mark.parametrize(
    "spec",
    [
        {"kind": "linear", "features": 1e999, "classes": 3}, {"kind": "linear", "features": -1, "classes": 3},
        {"kind": "linear", "features": 40}, {"kind": "x"}, {"kind": []}, {}, [], None, 7, "linear",
        {"kind": "cnn", "side": 12, "kernel": 5, "stride": 3, "channels": 2, "hidden": -2, "classes": 2},
        {"kind": "cnn", "side": 10**9, "kernel": 1, "stride": 1, "channels": 1, "hidden": 0, "classes": 2},
        {"kind": "linear", "features": 40, "classes": 3, "parameters": 1},
        {"kind": "linear", "features": {}, "classes": 3},
    ],
)  # fmt: skip
def test_descriptions_that_make_no_packing(head, spec):
    with pytest.raises(UserError):
        packing_from(spec)
    with pytest.raises(CiphertextError):
        head.server.open(head.bundle(head.keys, spec))


@pytest.mark.parametrize("text", ["[" * 4000, '{"packing":1', "\xff", '{"packing": {}, "bytes": [1e999]}', "null", ""])
def test_heads_that_are_no_json(head, text):
    raw = text.encode("latin-1")
    with pytest.raises(CiphertextError):
        head.server.open(b"PLCK0001" + struct.pack("<I", len(raw)) + raw + head.keys[0])


def test_keys_of_another_kind_or_number(cnn, head):
    public, relin, galois = cnn.keys
    for keys in ([public], [public, relin], [relin, public, galois], [public, galois, relin], [*cnn.keys, public],
                 [head.keys[0], relin, galois], [b"", relin, galois], [public, relin, b""]):  # fmt: skip
        with pytest.raises(CiphertextError):
            cnn.server.open(cnn.bundle(keys))


def test_a_description_from_a_stranger_costs_nothing():
    """CNNPacking works its copies out by halving: also for huge numbers."""
    with pytest.raises(UserError):
        CNNPacking(4096, 1, 1, 4096, 0, 3)
