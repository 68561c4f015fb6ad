"""Atomic writes, results files, seeds and threads."""

from __future__ import annotations

import errno
import json
import os
import stat
import subprocess
import sys

import numpy as np
import pytest
import torch

from primia_lite import runtime
from primia_lite.config import UserError
from primia_lite.runtime import write_atomic, write_results


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


@pytest.mark.parametrize("step", ["writer", "fsync", "chmod", "replace"])
def test_old_content_survives_a_full_disk_and_the_message_says_what_to_do(tmp_path, monkeypatch, step):
    path = write_atomic(tmp_path / "kept", b"old")
    content = b"new"
    if step == "writer":
        content = half_then(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    else:
        monkeypatch.setattr(os, step, no_space)
    with pytest.raises(UserError, match="could not write kept in .*No space left on device.*Free space or choose") as e:
        write_atomic(path, content)
    assert str(tmp_path) in str(e.value) and "what was saved before is intact" in str(e.value)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["kept"]


def test_content_is_on_disk_before_it_is_renamed(tmp_path, monkeypatch):
    order = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, real=real, name=name: order.append(name) or real(*a))
    write_atomic(tmp_path / "a", b"content")
    assert order == ["fsync", "replace", "fsync"]  # the file, the rename, the folder


def test_a_folder_that_is_a_file_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="could not write a in .*file"):
        write_atomic(tmp_path / "file" / "a", b"content")


@pytest.mark.skipif(os.name != "posix", reason="permission bits")
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
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
        ({"mean": 1.0, "n": 3}, "metric 'auroc' needs mean or median, n and unit"),
        ({"mean": 1.0, "unit": "1"}, "metric 'auroc' needs mean or median, n and unit"),
        ({"std": 1.0, "n": 3, "unit": "1"}, "metric 'auroc' needs mean or median, n and unit"),
        ({"mean": float("nan"), "n": 3, "unit": "1"}, "metric 'auroc' is not finite: ['mean']"),
        ({"mean": 1.0, "std": np.float64("inf"), "n": 3, "unit": "1"}, "metric 'auroc' is not finite: ['std']"),
    ],
)
def test_results_that_say_too_little_are_refused(results, entry, message):
    with pytest.raises(UserError) as error:
        write_results("02", {}, {"auroc": entry})
    assert message in str(error.value)
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
    import hashlib

    assert runtime.seed_for(7, "a", 1) == int(hashlib.sha256(b"7/a/1").hexdigest()[:16], 16) // 2


def test_setup_seeds_numpy_and_torch():
    threads = torch.get_num_threads()
    draws = []
    for seed in (1, 1, 2):
        runtime.setup(seed)
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
