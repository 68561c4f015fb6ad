"""Atomic writes, folders that can't be written, results files, consoles, seeds and threads."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import stat
import subprocess
import sys
import warnings
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from primia_lite import config, runtime, session
from primia_lite.config import UserError
from primia_lite.runtime import write_atomic, write_cache, write_results


def no_space(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def half_then(error):
    def writer(file):
        file.write(b"half of the n")
        raise error

    return writer


# --- atomic writes ---


def test_bytes_and_writers_write_the_same(tmp_path):
    assert write_atomic(tmp_path / "new" / "folder" / "a", b"content").read_bytes() == b"content"
    assert write_atomic(str(tmp_path / "b"), lambda file: file.write(b"content")).read_bytes() == b"content"
    write_atomic(tmp_path / "b", b"x")
    assert (tmp_path / "b").read_bytes() == b"x"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b", "new"]


@pytest.mark.parametrize("error", [ValueError("bad array"), KeyboardInterrupt()])
def test_old_content_survives_a_writer_that_fails(tmp_path, error):
    path = write_atomic(tmp_path / "kept", b"old")
    with pytest.raises(type(error)):
        write_atomic(path, half_then(error))
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["kept"]


@pytest.mark.parametrize("step", ["writer", "fsync", "replace"])
def test_old_content_survives_a_full_disk_and_the_message_says_what_to_do(tmp_path, monkeypatch, step):
    path = write_atomic(tmp_path / "kept", b"old")
    content = b"new"
    if step == "writer":
        content = half_then(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    else:
        monkeypatch.setattr(os, step, no_space)
    with pytest.raises(UserError, match="space") as e:
        write_atomic(path, content)
    assert str(tmp_path) in str(e.value) and "what was saved before is intact" in str(e.value)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["kept"]


@contextmanager
def small_files(most=20_000):
    """No file may hold more bytes: as on a full disk, but for the name of the error."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def picture(file):
    from PIL import Image

    Image.fromarray(np.random.default_rng(0).integers(0, 255, (400, 400), np.uint8)).save(file, "PNG")


@pytest.mark.parametrize("writer", [
    lambda file: torch.save({"a": torch.zeros(10**6)}, file),
    lambda file: torch.save({k: torch.zeros(2000) for k in "abcdefgh"}, file),
    lambda file: np.savez(file, a=np.zeros(10), b=np.zeros(10**6)),
    picture,
], ids=["torch", "torch, many", "npz", "png"])  # fmt: skip
def test_whatever_writes_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path, writer):
    path = write_atomic(tmp_path / "kept", b"old")
    with small_files(), pytest.raises(UserError, match="space"):
        write_atomic(path, writer)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["kept"]
    assert len(write_atomic(path, writer).read_bytes()) > 20_000


def test_content_is_on_disk_before_it_is_renamed(tmp_path, monkeypatch):
    order = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, real=real, name=name: order.append(name) or real(*a))
    write_atomic(tmp_path / "a", b"content")
    assert order == ["fsync", "replace", "fsync"]  # the file, the rename, the folder


# --- folders that can't be written: a file in the place of a folder, which stops root, too ---


def save_a_figure(folder):
    from primia_lite import plotting

    plotting.save_figure(plotting.plt.figure(), "a")


def make_a_ledger(folder):
    from primia_lite.privacy.ledger import Ledger

    Ledger(folder / "ledger-A.sqlite", 8.0, 1e-4)


def begin_a_federation(folder):
    from primia_lite.data.films import Films
    from primia_lite.federation.hospital import Hospital
    from primia_lite.federation.rounds import Schedule, federate
    from primia_lite.training import Training

    films = Films(torch.randn(6, 1, 5), torch.arange(6) % 3, np.arange(6).astype(str))
    federate([Hospital("A", films)], Training(), Schedule(1), seed=0, folder=folder / "run", progress=None)


@pytest.mark.parametrize(("variable", "work"), [
    ("RESULTS", lambda folder: write_results("a", {}, {})),
    ("FIGURES", save_a_figure),
    ("RUNS", make_a_ledger),
    ("RUNS", begin_a_federation),
    ("RUNS", lambda folder: write_atomic(folder / "a" / "checkpoint.pt", b"")),
    ("RUNS", config.check_writable),
])  # fmt: skip
def test_the_variable_that_moves_a_folder_is_named(tmp_path, monkeypatch, variable, work):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(f"PRIMIA_LITE_{variable}", str(tmp_path / "file" / "folder"))
    with pytest.raises(UserError, match=f"set PRIMIA_LITE_{variable} to"):
        work(tmp_path / "file" / "folder")


def test_one_variable_moves_figures_and_results_too(tmp_path, monkeypatch):
    monkeypatch.setenv("PRIMIA_LITE_RUNS", str(tmp_path))
    monkeypatch.delenv("PRIMIA_LITE_FIGURES")
    monkeypatch.delenv("PRIMIA_LITE_RESULTS")
    assert config.figures_dir() == tmp_path / "figures" and config.results_dir() == tmp_path / "results"


def test_a_notebook_of_a_run_is_moved_by_the_runs_option(tmp_path, monkeypatch):
    monkeypatch.setenv("PRIMIA_LITE_RUNS", str(tmp_path / "state"))
    monkeypatch.setenv("PRIMIA_LITE_COMMAND", "primia-lite run")
    assert "--out" in config.elsewhere(tmp_path / "state" / "a")
    assert "PRIMIA_LITE_CACHE" in config.elsewhere(config.cache_dir() / "a")
    assert "PRIMIA" not in config.elsewhere(tmp_path / "a")


def test_trying_a_folder_leaves_nothing(tmp_path):
    config.check_writable(tmp_path / "new" / "folder")
    assert os.listdir(tmp_path) == []


def test_a_full_disk_is_noticed_though_it_takes_empty_files(tmp_path):
    with small_files(100), pytest.raises(UserError, match="written"):
        config.check_writable(tmp_path)


def test_a_home_folder_that_is_nowhere_is_named(monkeypatch):
    def nowhere(self):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(config.Path, "expanduser", nowhere)
    monkeypatch.setenv("PRIMIA_LITE_RUNS", "~/runs")
    with pytest.raises(UserError, match="PRIMIA_LITE_RUNS"):
        config.runs_dir()


def test_a_cache_that_cannot_be_written_warns_once_and_names_the_variable(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PRIMIA_LITE_CACHE", str(tmp_path / "file" / "cache"))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("default")
        for name in "abc":
            write_cache(config.cache_dir() / name, lambda file: file.write(b"content"))
    assert len(seen) == 1 and "set PRIMIA_LITE_CACHE to" in str(seen[0].message)


# --- consoles ---


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-8"])
def test_any_text_can_be_printed_on_any_console(monkeypatch, encoding):
    monkeypatch.setenv("PYTHONIOENCODING", encoding)
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", io.StringIO())  # one that can't be changed
    runtime.any_console()
    print("ε = 8 █ 肺 caf\udce9.png", flush=True)
    assert rb"caf\udce9.png" in out.buffer.getvalue()
    child = [sys.executable, "-c", "print('ε = 8 █ 肺 caf\\udce9.png')"]
    assert rb"caf\udce9.png" in subprocess.run(child, capture_output=True, check=True).stdout


@pytest.mark.skipif(os.name != "posix", reason="permission bits")
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_permissions_follow_the_umask(tmp_path, umask, mode):
    code = (
        f"import os; os.umask({umask}); from primia_lite.runtime import write_atomic; write_atomic('a', b''); "
        f"assert os.umask(0) == {umask}"
    )
    environment = {**os.environ, "PYTHONPATH": str(runtime.Path(runtime.__file__).parent.parent)}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == mode


# --- results ---


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setenv("PRIMIA_LITE_RESULTS", str(tmp_path / "results"))
    return tmp_path / "results"


def test_results_hold_origin_and_metrics(results):
    origin = runtime.origin(
        data_source="phantom", data_fingerprint="0123", seeds=range(3), command="primia-lite run", profile="quick"
    )
    metrics = {"auroc": runtime.summary([0.8, 0.9]), "time": {"median": 1.5, "n": 5, "unit": "s"}}
    path = write_results("02", origin, metrics)
    assert path == results / "02.json"
    read = json.loads(path.read_text())
    assert read == {"origin": origin, "metrics": metrics}
    assert origin["data_source"] == "phantom" and origin["seeds"] == [0, 1, 2] and origin["profile"] == "quick"
    assert {"python", "torch", "opacus", "dp-accounting"} <= origin["versions"].keys()
    assert origin["cores"] >= 1 and origin["seconds_since_start"] >= 0 and origin["time"].endswith("Z")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"mean": 1.0, "n": 3}, "unit"),
        ({"mean": 1.0, "unit": "1"}, "needs"),
        ({"std": 1.0, "n": 3, "unit": "1"}, "median"),
        ({"mean": 1.0, "std": np.float64("inf"), "n": 3, "unit": "1"}, "'std'"),
    ],
)
def test_results_that_say_too_little_are_refused(results, entry, message):
    with pytest.raises(UserError, match=message):
        write_results("02", {}, {"auroc": entry})
    assert not results.exists()


def test_summary_is_mean_and_sample_standard_deviation():
    values = [0.1, 0.4, 0.7, 0.75]
    assert runtime.summary(np.array(values), "s") == {
        "mean": pytest.approx(np.mean(values)),
        "std": pytest.approx(np.std(values, ddof=1)),
        "n": 4,
        "unit": "s",
    }
    assert runtime.summary(iter([2.0])) == {"mean": 2.0, "std": 0.0, "n": 1, "unit": "1"}


# --- seeds, threads, front end ---


def test_seeds_differ_by_purpose_and_stay_the_same():
    assert runtime.seed_for(0, "numpy") == runtime.seed_for(0, "numpy")
    seeds = {runtime.seed_for(seed, label, k) for seed in range(5) for label in ("numpy", "torch") for k in range(5)}
    assert len(seeds) == 50 and all(0 <= seed < 2**63 for seed in seeds)
    assert runtime.seed_for(7, "a", 1) == int(hashlib.sha256(b"7/a/1").hexdigest()[:16], 16) // 2


def test_setup_seeds_numpy_and_torch():
    threads = torch.get_num_threads()
    draws = []
    for seed in (1, 1, 2):
        session.setup(seed)
        assert torch.get_num_threads() == 1
        draws.append((np.random.rand(), float(torch.rand(()))))
    torch.set_num_threads(threads)
    assert draws[0] == draws[1] != draws[2]


def test_torch_threads_are_put_back():
    before = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError), runtime.torch_threads(before + 1):
        assert torch.get_num_threads() == before + 1
        raise ZeroDivisionError
    assert torch.get_num_threads() == before


def test_nobody_watches_a_test(monkeypatch):
    assert not runtime.in_notebook()
    monkeypatch.delenv("PRIMIA_LITE_HEADLESS", raising=False)
    monkeypatch.setitem(sys.modules, "ipykernel", object())
    assert not runtime.in_notebook()  # no IPython runs here
    monkeypatch.setattr("IPython.get_ipython", object)
    assert runtime.in_notebook()
    monkeypatch.setenv("PRIMIA_LITE_HEADLESS", "1")
    assert not runtime.in_notebook()
