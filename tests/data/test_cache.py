"""What is costly to make is made once, whichever process wants it, and made again where it was damaged."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from primia_lite.data import phantom
from primia_lite.data.cache import cached, cached_rows

# Notes that it makes an array, waits, and makes it; or is killed while it waits.
MAKER = """
import sys, time
from pathlib import Path
import numpy as np
from primia_lite.data.cache import cached, cached_rows
folder, name, seconds = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])
def make(places=(0, 1)):
    (folder / f"made-by-{name}").touch()
    time.sleep(seconds)
    return np.ones((len(places), 2), np.float32)
found = cached(folder / "a" / "one.npz", lambda: {"x": make()})["x"]
found = cached_rows(folder / "b", ["k", "l"], make) if sys.argv[4] == "rows" else found
assert (found == 1).all() and found.shape == (2, 2)
"""


def start(folder, name, seconds, kind="one"):
    return subprocess.Popen([sys.executable, "-c", MAKER, str(folder), name, str(seconds), kind])


def wait_for(path):
    until = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_the_second_process_waits_for_the_first_and_makes_nothing(tmp_path):
    first = start(tmp_path, "first", 0.5, "rows")
    wait_for(tmp_path / "made-by-first")
    second = start(tmp_path, "second", 0.0, "rows")
    assert first.wait(60) == second.wait(60) == 0
    assert not (tmp_path / "made-by-second").exists()


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_where_the_first_dies_the_second_makes_it(tmp_path):
    first = start(tmp_path, "first", 60)
    wait_for(tmp_path / "made-by-first")
    second = start(tmp_path, "second", 0.0)
    first.send_signal(signal.SIGKILL)
    assert first.wait(60) == -signal.SIGKILL and second.wait(60) == 0
    assert (tmp_path / "made-by-second").exists()


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-100],
        lambda content: b"",
        lambda content: b"PK\x03\x04" + content[40:],
        lambda content: (
            content[: len(content) // 2] + bytes([content[len(content) // 2] ^ 1]) + content[len(content) // 2 + 1 :]
        ),
    ],
    ids=["truncated", "empty", "no zip", "one byte"],
)
def test_a_damaged_file_is_made_again(tmp_path, damage):
    value, made = np.random.default_rng(0).random((8, 20)), []

    def make(places=range(8)):
        made.append(list(places))
        return value[list(places)]

    for _ in range(2):
        np.testing.assert_array_equal(cached(tmp_path / "one.npz", lambda: {"x": make()})["x"], value)
        np.testing.assert_array_equal(cached_rows(tmp_path / "rows", list("abcdefgh"), make), value)
        if len(made) == 2:
            for path in (tmp_path / "one.npz", next((tmp_path / "rows").glob("*.npz"))):
                path.write_bytes(damage(path.read_bytes()))
    assert made == [list(range(8))] * 4
    cached(tmp_path / "one.npz", lambda: {"x": make()})
    assert len(made) == 4


def test_phantom_films_are_drawn_once_and_a_shorter_series_is_the_start_of_a_longer(monkeypatch, tmp_path):
    monkeypatch.setenv("PRIMIA_LITE_CACHE", str(tmp_path))
    drawn = phantom.generate(120, 28, seed=2)
    monkeypatch.setattr(phantom.phantom, "draw", lambda *_: pytest.fail("drawn again"))
    assert phantom.generate(120, 28, seed=2).fingerprint() == drawn.fingerprint()
    assert phantom.generate(100, 28, seed=2).fingerprint() == drawn.subset(np.arange(100)).fingerprint()
    monkeypatch.undo()
    monkeypatch.setenv("PRIMIA_LITE_CACHE", str(tmp_path))
    short = phantom.generate(99, 28, seed=2)  # too few to keep: drawn
    assert short.fingerprint() == drawn.subset(np.arange(99)).fingerprint()
    longer = phantom.generate(121, 28, seed=2)
    assert longer.subset(np.arange(120)).fingerprint() == drawn.fingerprint()
    assert len(list((tmp_path / "phantom").glob("*.npz"))) == 1
    with monkeypatch.context() as patch:
        patch.setattr(phantom, "code_of_phantom", lambda: "new")
        phantom.generate(100, 28, seed=2)
    phantom.generate(100, 28, seed=3)
    assert len(list((tmp_path / "phantom").glob("*.npz"))) == 3
