"""The ``primia-lite`` command: exit statuses, messages, what it imports."""

from __future__ import annotations

import errno
import io
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from primia_lite import __version__, config
from primia_lite.apps import bench, cli, doctor

HEAVY = ("torch", "numpy", "matplotlib", "pandas", "scipy", "PIL", "papermill", "IPython", "ipywidgets")


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def seconds_since(before) -> float:
    """CPU seconds of processes that ended since: what a busy machine takes besides isn't theirs."""
    now = os.times()
    return now.children_user - before.children_user + now.children_system - before.children_system


@pytest.mark.parametrize(
    "module", ["primia_lite", "primia_lite.config", "primia_lite.apps.cli", "primia_lite.apps.doctor"]
)
def test_importing_it_imports_nothing_heavy(module):
    assert python(f"import sys, {module}; print([m for m in {HEAVY!r} if m in sys.modules])").strip() == "[]"


def test_help_is_instant_and_names_every_command():
    before = os.times()
    text = python("from primia_lite.apps import cli\ntry: cli.main(['--help'])\nexcept SystemExit: pass")
    assert seconds_since(before) < 2
    assert all(name in text for name in ("run", "doctor", "data", "bench"))


def test_the_installed_command_and_the_module_are_the_same():
    for command in ([str(Path(sys.executable).parent / "primia-lite")], [sys.executable, "-m", "primia_lite"]):
        done = subprocess.run([*command, "--version"], capture_output=True, text=True)
        assert (done.returncode, done.stdout.strip()) == (0, f"primia-lite {__version__}")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["run", "--profile", "papper"], "unknown profile 'papper'"),
        (["data", "nope"], "unknown data source 'nope'"),
        (["data", "phantom", "--size", "3"], "size=3"),
        (["data", "phantom", "--n-films", "60", "--size", "28", "--sheet", "a.jpg"], "ends in .png"),
        (["bench", "nope"], "unknown benchmark 'nope'"),
    ],
)
def test_wrong_use_is_one_message_and_exit_2(arguments, expected, capsys):
    assert cli.main(arguments) == 2
    printed = capsys.readouterr()
    assert expected in printed.err and "Traceback" not in printed.err


def test_unknown_commands_and_options_exit_2(capsys):
    for arguments in ([], ["nope"], ["run", "--nope"]):
        with pytest.raises(SystemExit) as exit_:
            cli.main(arguments)
        assert exit_.value.code == 2


def test_ctrl_c_exits_130(monkeypatch, capsys):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "doctor", interrupted)
    assert cli.main(["doctor"]) == 130
    assert "interrupted" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.EROFS, "Read-only file system", "/there/file"), "/there/file: Read-only.*choose another folder"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left"),
        (FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']"), "TMPDIR"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", b"/there/caf\xe9"), "No such file"),
    ],
)
def test_what_the_system_refuses_is_one_sentence(monkeypatch, capsys, error, said):
    def refused():
        raise error

    monkeypatch.setattr(doctor, "doctor", refused)
    assert cli.main(["doctor"]) == 2
    printed = capsys.readouterr().err
    assert re.search(said, printed) and printed.count("\n") == 1 and "Traceback" not in printed


@pytest.mark.parametrize("encoding", ["ascii"])
@pytest.mark.parametrize("arguments", [["bench"], ["data"], ["doctor"], ["--help"], ["deploy", "init", "--help"]])
def test_every_console_can_show_it(monkeypatch, encoding, arguments):
    monkeypatch.setenv("PYTHONIOENCODING", encoding)
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    monkeypatch.setattr(bench, "benchmarks", lambda folder=None: {"ε": "█ 肺"})
    try:
        cli.main(arguments)
    except SystemExit as exit_:
        assert not exit_.code
    sys.stdout.flush()
    assert sys.stdout.buffer.getvalue()


def test_data_lists_every_source(capsys):
    assert cli.main(["data"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in config.DATA_SOURCES)


def test_data_describes_a_source_and_saves_a_contact_sheet(tmp_path, capsys):
    from PIL import Image

    sheet = tmp_path / "sheet.png"
    assert cli.main(["data", "phantom", "--n-films", "90", "--size", "32", "--sheet", str(sheet)]) == 0
    text = capsys.readouterr().out
    assert "procedural, no patients" in text and "32 x 32 px" in text
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line.split()}
    assert rows["split"] == ["normal", "bacterial", "viral", "films", "patients"]
    counts = np.array([[int(c) for c in rows[s]] for s in ("train", "val", "test")])
    assert counts.sum(axis=0).tolist() == [int(c) for c in rows["all"]] and (counts[:, 3] == counts[:, :3].sum(1)).all()
    picture = np.asarray(Image.open(sheet))
    assert picture.shape == (3 * (32 + 16), 8 * 32) and picture.std() > 20


def test_contact_sheet_shows_different_patients_first():
    from primia_lite.apps.describe import sheet
    from primia_lite.data import ChestXrays

    # Two classes; patient "a" has four films, of brightness 10, and each other patient one, of brightness 200.
    patients = np.array(["a"] * 4 + ["b", "c", "d"] + ["n"])
    films = ChestXrays(
        images=np.repeat(np.where(patients == "a", 10, 200)[:, None, None], 8, 1).repeat(8, 2).astype(np.uint8),
        labels=np.array([1] * 7 + [0]),
        class_names=("normal", "pneumonia"),
        patient_id=patients,
        site=np.array(["A"] * 8),
        split=np.array(["train"] * 8),
        lung_mask=None,
        lesion_mask=None,
        source="phantom",
    )
    picture = sheet(films, per_class=4)
    assert picture.shape == (16, 32)
    assert sorted(picture[12, 4::8].tolist()) == [10, 200, 200, 200], "one film of each of the four patients"
    assert picture[4, 4::8].tolist() == [200, 0, 0, 0], "the rest of a short row is black"


def test_bench_lists_and_runs_scripts(tmp_path):
    (tmp_path / "add.py").write_text(
        '"""Adds numbers.\n\nMore."""\nimport sys\nsys.exit(sum(map(int, sys.argv[1:])))\n'
    )
    (tmp_path / "_helper.py").write_text("")
    assert bench.benchmarks(tmp_path) == {"add": "Adds numbers."}
    assert bench.listing(tmp_path) == "add  Adds numbers."
    assert bench.run("add", ["3", "4"], tmp_path) == 7
    with pytest.raises(config.UserError, match="choose"):
        bench.run("sub", [], tmp_path)


def test_a_benchmark_refuses_what_it_does_not_know(tmp_path):
    (tmp_path / "none.py").write_text(
        '"""Takes no ε."""\nfrom primia_lite.apps.bench import Options\nOptions("none", __doc__).read()\nprint("ε")\n',
        "utf-8",
    )
    assert bench.run("none", [], tmp_path) == 0
    assert bench.run("none", ["--help"], tmp_path) == 0
    assert bench.run("none", ["--nosuch"], tmp_path) == 2 and bench.run("none", ["nosuch"], tmp_path) == 2


def test_a_benchmark_measures_nothing_that_it_could_not_write(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PRIMIA_LITE_RESULTS", str(tmp_path / "file" / "results"))
    monkeypatch.setattr(sys, "argv", ["none"])
    with pytest.raises(SystemExit) as exit_:
        bench.Options("none", "Takes none.").read()
    assert exit_.value.code == 2 and "PRIMIA_LITE_RESULTS" in capsys.readouterr().err


def test_every_benchmark_of_ours_says_what_it_measures_and_reads_its_options_there(root):
    assert all(bench.benchmarks().values())
    for name in bench.benchmarks():
        text = (root / "benchmarks" / f"{name}.py").read_text("utf-8")
        assert f'Options("{name}", __doc__)' in text and ".read()" in text, name


def test_bench_gives_its_options_to_the_script(monkeypatch):
    calls = []
    monkeypatch.setattr(bench, "run", lambda name, arguments: calls.append((name, arguments)) or 0)
    assert cli.main(["bench", "training", "--films", "3"]) == 0
    assert calls == [("training", ["--films", "3"])]


# serve


@pytest.fixture
def offered(tmp_path, monkeypatch):
    """Models in files, and what a service of some of them would offer: name -> what it was trained on."""
    import torch

    from primia_lite.apps.service import commands
    from primia_lite.apps.service import server as service
    from primia_lite.encrypted.model_card import ModelCard

    for file in ("a.pt", "litenet-eps=8.pt", "8.pt", "sub=1/a.pt"):
        ModelCard("litenet", {}, ("x", "y"), 32, (5,), {"weight": torch.zeros(2, 5)}, file).save(tmp_path / file)
    monkeypatch.chdir(tmp_path)
    found = {}

    def run(sockets):  # without its protocol, answers wait 40 ms each
        assert [line.proto for line in sockets] == [socket.IPPROTO_TCP]

    quiet = SimpleNamespace(run=run)
    monkeypatch.setattr(service, "uvicorn_server", lambda cards, *_, **__: found.update(cards) or quiet)

    def offer(*entries):
        commands.serve(entries, port=0)
        return {name: card.trained_on for name, card in found.items()}

    return offer


@pytest.mark.parametrize(
    ("entry", "name", "file"),
    [
        ("a.pt", "a", "a.pt"),
        ("head=a.pt", "head", "a.pt"),
        ("./litenet-eps=8.pt", "litenet-eps=8", "litenet-eps=8.pt"),
        ("head=litenet-eps=8.pt", "head", "litenet-eps=8.pt"),
        ("sub=1/a.pt", "a", "sub=1/a.pt"),
        ("eps=8=a.pt", "eps=8", "a.pt"),
    ],
)
def test_an_equals_sign_may_stand_in_a_file_or_a_name(offered, entry, name, file):
    assert offered(entry) == {name: file}


@pytest.mark.parametrize("entry", ["b.pt", "head=b.pt", "litenet-eps=9.pt", "=a.pt", "head="])
def test_a_model_that_is_not_there_is_named_whole(offered, entry):
    with pytest.raises(config.UserError) as error:
        offered(entry)
    assert f"no {entry}" in str(error.value)


def test_two_models_of_one_name_are_refused(offered):
    with pytest.raises(config.UserError, match="named"):
        offered("a.pt", "sub=1/a.pt")


# doctor


def test_doctor_lists_everything_in_under_three_seconds():
    before = os.times()
    done = subprocess.run([sys.executable, "-m", "primia_lite", "doctor"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.rstrip().endswith("ready")
    for name in ("Python", "packages", "cores", "memory", "disk", "kernel", *config.DATA_SOURCES):
        assert name in done.stdout
    assert seconds_since(before) < 3


def lines() -> str:
    stream = io.StringIO()
    status = doctor.doctor(stream)
    return f"{status}\n{stream.getvalue()}"


def test_doctor_names_a_wrong_package_and_the_fix(monkeypatch, tmp_path):
    (tmp_path / "requirements.lock").write_text('numpy==0.1\nnot-there==1.0\nsix==9 ; sys_platform == "amiga"\n')
    monkeypatch.setattr(doctor, "repo_root", lambda: tmp_path)
    text = lines()
    assert text.startswith("1\n") and "broken: packages" in text
    assert f"numpy {np.__version__} (pinned 0.1), not-there not installed (pinned 1.0)" in text
    assert "make setup" in text and "amiga" not in text and "six" not in text


def test_doctor_names_other_breakage(monkeypatch, tmp_path):
    decoy = tmp_path / "jupyter" / "kernels" / "python3"
    decoy.mkdir(parents=True)
    (decoy / "kernel.json").write_text('{"argv": ["/opt/other/python"], "display_name": "x", "language": "python"}')
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PRIMIA_LITE_RUNS", str(tmp_path / "file" / "runs"))
    monkeypatch.setenv("PRIMIA_LITE_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setenv("PRIMIA_LITE_DATA", str(tmp_path / "nowhere"))
    text = lines()
    assert "starts /opt/other/python" in text and "ipykernel install --sys-prefix" in text
    assert "set PRIMIA_LITE_RUNS to a folder" in text and "set PRIMIA_LITE_CACHE to a folder" in text
    assert f"PRIMIA_LITE_DATA names {tmp_path / 'nowhere'}" in text
    assert "broken: runs, kernel, films" in text, "without a cache all works"


def test_doctor_says_how_to_get_films(monkeypatch, tmp_path):
    monkeypatch.setenv("PRIMIA_LITE_DATA", str(tmp_path))
    text = lines()
    assert text.startswith("0\n") and text.count("absent") >= 3 and "https://doi.org/10.17632/rscbjbr9sj" in text


def test_doctor_on_an_old_python_a_full_disk_and_little_memory(monkeypatch):
    assert doctor.check_python((3, 10, 4)).state == "BROKEN"
    monkeypatch.setattr(doctor, "MIN_DISK_GIB", 10**9)
    monkeypatch.setattr(doctor, "MIN_MEMORY_GIB", 10**9)
    assert doctor.check_disk(Path("/")).state == "BROKEN" and "free" in doctor.check_disk(Path("/")).fix
    assert doctor.check_memory().state == "note"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("03_nowhere: {}", "'03_nowhere'.*00_start_here"),
        ("00_start_here: [1, 2]", "00_start_here must map"),
        ("00_start_here: {n_films: [1", "not valid YAML"),
        ("00_start_here: {n_filmz: 3}", "'n_filmz'.*n_films"),
    ],
)
def test_a_profile_with_a_mistake_is_named(tmp_path, monkeypatch, text, message):
    from primia_lite import config
    from primia_lite.apps import runner

    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "mine.yaml").write_text(text)
    (tmp_path / "notebooks").symlink_to(config.repo_root() / "notebooks")
    monkeypatch.setattr(config, "repo_root", lambda: tmp_path)
    with pytest.raises(config.UserError, match=message):
        runner.plan("mine", notebooks=tmp_path / "notebooks")


def test_ledger_prints_charges_what_is_spent_and_the_rule(tmp_path, capsys):
    from primia_lite.privacy.accounting import Release
    from primia_lite.privacy.ledger import Ledger

    book = Ledger(tmp_path / "ledger-A.sqlite", 8.0, 1e-4)
    book.charge("round 1", Release(2.0, 0.5, 3))
    assert cli.main(["ledger", str(tmp_path / "ledger-A.sqlite")]) == 0
    out = capsys.readouterr().out
    assert "round 1" in out and "for one patient" in out and "an RDP filter of order 3 decides" in out
    assert f"epsilon {book.epsilon():.3f} of 8 at delta 0.0001" in out
    assert cli.main(["ledger", str(tmp_path / "nowhere.sqlite")]) == 2
    assert "there is no ledger" in capsys.readouterr().err
