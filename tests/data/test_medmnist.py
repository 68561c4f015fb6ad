from __future__ import annotations

import hashlib
import http.server
import io
import socket
import threading
from pathlib import Path

import numpy as np
import pytest
from medmnist.info import INFO

from primia_lite.data import CLASSES_2, DataError, load
from primia_lite.data import medmnist as source

COUNTS = {"train": 40, "val": 8, "test": 12}


def npz(size: int, **changes) -> bytes:
    rng = np.random.default_rng(size)
    arrays = {}
    for split, n in COUNTS.items():
        arrays[f"{split}_images"] = rng.integers(0, 256, (n, size, size), dtype=np.uint8)
        arrays[f"{split}_labels"] = (np.arange(n, dtype=np.uint8) % 4 > 0).astype(np.uint8)[:, None]
    file = io.BytesIO()
    np.savez(file, **{**arrays, **changes})
    return file.getvalue()


@pytest.mark.parametrize("size", [28, 64])
def test_reads_a_file_of_each_size(tmp_path, size):
    name = "pneumoniamnist.npz" if size == 28 else f"pneumoniamnist_{size}.npz"
    (tmp_path / name).write_bytes(npz(size))
    films = load("pneumoniamnist", size, root=tmp_path)
    assert films.images.shape == (60, size, size) and films.class_names == CLASSES_2
    assert films.counts() == {
        "train": {"normal": 10, "pneumonia": 30},
        "val": {"normal": 2, "pneumonia": 6},
        "test": {"normal": 3, "pneumonia": 9},
    }
    assert films.n_patients == 60, "each film is its own patient"
    assert films.sites == ("pneumoniamnist",) and films.source == "pneumoniamnist"
    with np.load(tmp_path / name) as stored:
        np.testing.assert_array_equal(films.of_split("test").images, stored["test_images"])
    assert source.find(tmp_path) == (tmp_path, 1)


def test_n_films_and_a_folder_of_its_own(tmp_path):
    (tmp_path / "medmnist").mkdir()
    (tmp_path / "medmnist" / "pneumoniamnist.npz").write_bytes(npz(28))
    films = load("pneumoniamnist", 28, root=tmp_path, n_films=30)
    assert abs(len(films) - 30) <= 3 and set(films.counts()) == {"train", "val", "test"}


def test_a_missing_file_says_which_where_and_how(tmp_path):
    with pytest.raises(DataError) as error:
        load("pneumoniamnist", 64, root=tmp_path)
    for part in ("pneumoniamnist_64.npz", str(tmp_path), "https://zenodo.org/", "download=True"):
        assert part in str(error.value)
    with pytest.raises(DataError, match="size=32"):
        load("pneumoniamnist", 32, root=tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no zip",
        npz(28)[:2000],
        npz(28, test_images=np.zeros(3)),
        npz(64),
        npz(28, val_labels=np.zeros((8, 2), np.uint8)),
    ],
    ids=["empty", "garbage", "truncated", "shape", "another size", "labels"],
)
def test_a_damaged_file_is_named(tmp_path, content):
    (tmp_path / "pneumoniamnist.npz").write_bytes(content)
    with pytest.raises(DataError, match="pneumoniamnist.npz"):
        load("pneumoniamnist", 28, root=tmp_path)


@pytest.fixture
def server(monkeypatch):
    """A web server on the loopback interface that answers from ``files`` and notes what it was asked for."""
    files: dict[str, tuple[bytes, int]] = {}  # path -> content, bytes to send before the connection breaks
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            if self.path not in files:
                return self.send_error(404)
            content, n_sent = files[self.path]
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[:n_sent])

        def log_message(self, *_):
            pass

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    for variable in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)

    def serve(content: bytes, md5: str | None = None, n_sent: int | None = None) -> list[str]:
        url = f"http://127.0.0.1:{httpd.server_port}/pneumoniamnist.npz"
        files["/pneumoniamnist.npz"] = content, len(content) if n_sent is None else n_sent
        info = {"url": url, "MD5": md5 or hashlib.md5(content).hexdigest(), "url_64": url.replace("/pneu", "/none")}
        monkeypatch.setitem(INFO, "pneumoniamnist", {**INFO["pneumoniamnist"], **info, "MD5_64": "0"})
        return asked

    yield serve
    httpd.shutdown()
    httpd.server_close()
    thread.join()


def left_behind(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_download_once(server, tmp_path, capsys):
    asked = server(npz(28))
    films = load("pneumoniamnist", 28, root=tmp_path / "new", download=True)
    assert len(films) == 60 and left_behind(tmp_path / "new") == ["pneumoniamnist.npz"]
    assert capsys.readouterr().err == ""
    again = load("pneumoniamnist", 28, root=tmp_path / "new", download=True)
    assert asked == ["/pneumoniamnist.npz"] and again.fingerprint() == films.fingerprint()


@pytest.mark.parametrize("wrong", [{"md5": "0" * 32}, {"n_sent": 1000}])
def test_a_download_that_is_damaged_or_breaks_off_leaves_nothing(server, tmp_path, wrong):
    server(npz(28), **wrong)
    with pytest.raises(DataError, match=r"damaged|could not download"):
        load("pneumoniamnist", 28, root=tmp_path, download=True)
    assert left_behind(tmp_path) == []


def test_no_such_address_and_no_network_say_what_else_to_do(server, tmp_path, monkeypatch):
    server(npz(28))
    with pytest.raises(DataError, match="404.*pneumoniamnist_64.npz"):
        load("pneumoniamnist", 64, root=tmp_path, download=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # bound but not listening: the connection is refused
        url = f"http://127.0.0.1:{free.getsockname()[1]}/x"
        monkeypatch.setitem(INFO["pneumoniamnist"], "url", url)
        with pytest.raises(DataError, match="efused"):
            load("pneumoniamnist", 28, root=tmp_path, download=True)
    assert left_behind(tmp_path) == []


def test_the_packages_table_of_files_is_as_we_use_it():
    info = INFO["pneumoniamnist"]
    for size in source.SIZES:
        suffix = "" if size == 28 else f"_{size}"
        assert f"pneumoniamnist{suffix}.npz" in info[f"url{suffix}"] and len(info[f"MD5{suffix}"]) == 32
    assert list(info["label"].values()) == list(CLASSES_2)
