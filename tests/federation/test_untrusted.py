"""What another party sent is read with bounds, and what can't be read is a sentence."""

from __future__ import annotations

import io
import json
import zipfile

import numpy as np
import pytest
import torch

from primia_lite.config import UserError
from primia_lite.data.films import Films
from primia_lite.federation.study import Study, films_from, write_films
from primia_lite.federation.untrusted import read_json

UNREADABLE = {
    "deep lists": b'{"a": ' + b"[" * 100_000,
    "deep objects": b'{"a":' * 5000,
    "deeper than anything of ours": b'{"a":' * 20 + b"1" + b"}" * 20,
    "cut short": b'{"a": 1',
    "empty": b"",
    "a list": b"[]",
    "a number": b"5",
    "not UTF-8": b'{"a": "\xff"}',
    "another encoding": '{"a": 1}'.encode("utf-16"),
    "half a pair": b'{"a": "\\ud800"}',
    "half a pair as a name": b'{"\\udfff": 1}',
    "not a number": b'{"a": NaN}',
    "infinite": b'{"a": -Infinity}',
    "infinite too": b'{"a": 1e999}',
    "a whole number of any length": b'{"a": ' + b"9" * 5000 + b"}",
    "a name twice": b'{"a": 1, "a": 2}',
    "large": b'{"a": "' + b"x" * 2**20 + b'"}',
}


@pytest.mark.parametrize("content", UNREADABLE.values(), ids=UNREADABLE)
def test_what_cant_be_meant_cant_be_read(content):
    with pytest.raises(UserError, match="letter") as error:
        read_json(content, "the letter")
    assert str(error.value).isprintable() and len(str(error.value)) < 300
    for study in (content, b"{}", b'{"name": "x"}'):
        with pytest.raises(UserError, match=r"study\.json"):
            Study.from_bytes(study)


def test_what_can_be_meant_is_read_as_json_reads_it():
    content = {"a": [1, 2.5, None, True, {"b": "ä\u0000"}], "c": -(2**62), "d": {}}
    assert read_json(json.dumps(content).encode(), "it") == content
    assert read_json(b'{"a": "' + b"x" * 2**20 + b'"}', "it", 2**21)["a"].startswith("x")


def packed(**arrays) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


def bomb() -> bytes:
    """An npz that says it unpacks to 2^50 bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", allowZip64=True) as z:
        z.writestr("inputs.npy", b"x")
        z.infolist()[0].file_size = 2**50
    return buffer.getvalue()


@pytest.mark.parametrize(
    "content",
    [b"", b"PK\x05\x06" + bytes(18), b"not a zip", packed(inputs=np.zeros(3)), bomb(),
     packed(inputs=np.array(["a"]), labels=np.zeros(1), patient_id=np.zeros(1), normalisation=np.zeros(2), model="x")],
    ids=["empty", "no arrays", "no zip", "one array", "bomb", "texts"],
)  # fmt: skip
def test_mock_films_that_arent_any_are_named(tmp_path, content):
    (tmp_path / "films.npz").write_bytes(content)
    with pytest.raises(UserError, match=r"films\.npz"):
        films_from(tmp_path / "films.npz")


def test_films_come_back(tmp_path):
    films = Films(torch.ones(4, 1, 3), torch.arange(4) % 3, np.array(list("abcd")), (0.5, 2.0), "litenet")
    write_films(tmp_path / "films.npz", films)
    found = films_from(tmp_path / "films.npz")
    assert torch.equal(found.inputs, films.inputs) and found.normalisation == (0.5, 2.0) and found.model == "litenet"
