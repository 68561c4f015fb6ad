"""``primia-lite run``: what runs, with which parameters, what it says of failures. Real kernels, small notebooks."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest
import torch

from primia_lite.apps import notebook, runner, summary
from primia_lite.config import UserError
from primia_lite.runtime import cores


class Notebooks:
    """Three notebooks, profiles that know two of them, and a run into ``out``."""

    def __init__(self, tmp_path, write):
        self.folder, self.out, self.profiles = tmp_path / "notebooks", tmp_path / "out", {}
        self.write = lambda name, *cells: write(self.folder / f"{name}.ipynb", *cells)

    def run(self, profile="smoke", **options):
        return runner.run_notebooks(profile, **{"notebooks": self.folder, "out": self.out, **options})

    def rows(self):
        return json.loads((self.out / "summary.json").read_text())["notebooks"]

    def printed(self, name):
        cells = nbformat.read(self.out / f"{name}.ipynb", as_version=4).cells
        return "".join(o.get("text", "") for c in cells if c.cell_type == "code" for o in c.outputs)


@pytest.fixture
def notebooks(tmp_path, monkeypatch, write_notebook):
    books = Notebooks(tmp_path, write_notebook)
    books.write("00_first", 'source = "phantom"\nn_films = 3', "x = n_films * 2\nprint(source, x)")
    books.write("01_second", "rate = 0.5  # 1/s", "import os\nprint(os.getcwd(), rate)")
    books.write("02_third", 'source = "phantom"\nskip_bad = False', "print(source, skip_bad)")
    books.profiles |= {
        "smoke": {},
        "paper": {"00_first": {"source": "kermany", "n_films": 7}, "01_second": {"rate": 1.5}},
    }
    monkeypatch.setattr(runner, "load_profile", lambda name: books.profiles[name])
    return books


def test_runs_in_order_with_parameters_and_writes_a_summary(notebooks, capsys):
    assert notebooks.run("paper", only="00,01", jobs=1) == 0
    assert "kermany 14" in notebooks.printed("00_first")
    assert f"{notebooks.folder} 1.5" in notebooks.printed("01_second"), "a notebook runs in its own folder"
    assert [(r["notebook"], r["status"]) for r in notebooks.rows()] == [("00_first", "ok"), ("01_second", "ok")]
    assert all(r["peak_memory_mib"] > 20 and r["seconds"] > 0 for r in notebooks.rows())
    table = (notebooks.out / "summary.md").read_text().splitlines()
    assert table[2].startswith("| 00_first") and len({len(line) for line in table}) == 1
    log = capsys.readouterr().out
    assert "[1/2] 00_first" in log and "\r" not in log


def test_a_failing_notebook_is_named_and_does_not_stop_the_next(notebooks, capsys):
    """Cell numbers don't count the injected parameters. A copy that can't be written is one sentence."""
    notebooks.profiles["smoke"] = {"01_second": {"rate": 2}}
    notebooks.write("01_second", "rate = 1", "a = 1", "# comment\nb = a / 0\nprint(b)", "print('never')")
    (notebooks.out / "00_first.ipynb").mkdir(parents=True)  # where a file is to lie
    assert notebooks.run(source="phantom") == 1
    unwritten, failed, last = notebooks.rows()
    assert "can't be written" in unwritten["error"] and last["status"] == "ok"
    assert (failed["status"], failed["cell"], failed["first_line"]) == ("failed", 4, "b = a / 0")
    assert failed["error"] == "ZeroDivisionError: division by zero"
    assert "cell 4 (b = a / 0): ZeroDivisionError" in capsys.readouterr().out
    assert "never" not in notebooks.printed("01_second")


def test_a_dead_kernel_and_an_endless_cell_are_named(notebooks, monkeypatch):
    monkeypatch.setitem(runner.CELL_TIMEOUT_S, "smoke", 3)
    notebooks.write("00_first", "a = 1", "import os; os._exit(9)")
    notebooks.write("01_second", "a = 1", "import time; time.sleep(600)")
    assert notebooks.run(only="00,01", jobs=2) == 1
    dead, endless = notebooks.rows()
    assert dead["cell"] == endless["cell"] == 3
    assert "kernel died" in dead["error"] and "longer than 3 s" in endless["error"]


def test_a_kernel_has_this_interpreter_folders_of_its_own_and_no_need_of_a_home(notebooks, tmp_path, monkeypatch):
    decoy = tmp_path / "jupyter" / "kernels" / "python3"
    decoy.mkdir(parents=True)
    (decoy / "kernel.json").write_text('{"argv": ["false"], "display_name": "decoy", "language": "python"}')
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "XDG_DATA_HOME", "XDG_RUNTIME_DIR", "JUPYTER_DATA_DIR"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HOME", str(tmp_path / "file" / "home"))
    monkeypatch.setenv("MPLBACKEND", "Agg")
    names = ("FIGURES", "RESULTS", "RUNS", "DATA", "HEADLESS")
    cell = f"import os, sys\nprint([sys.prefix] + [os.environ['PRIMIA_LITE_' + n] for n in {names!r}])"
    notebooks.write("00_first", "a = 1", cell, "import matplotlib.pyplot as plt\nplt.plot([1, 2]);")
    assert notebooks.run(only="00") == 0, notebooks.rows()
    prefix, figures, results, runs, data, headless = eval(notebooks.printed("00_first").splitlines()[0])
    out = str(notebooks.out)
    assert prefix == sys.prefix and (figures, results, runs) == (f"{out}/figures", f"{out}/results", f"{out}/state")
    assert os.path.isabs(data) and headless == "1"
    cells = nbformat.read(notebooks.out / "00_first.ipynb", as_version=4).cells
    assert any("image/png" in o.get("data", {}) for c in cells if c.cell_type == "code" for o in c.outputs)
    assert os.environ["JUPYTER_PATH"] == str(tmp_path / "jupyter") and "IPYTHONDIR" not in os.environ


def test_only_real_films_of_the_paper_profile_are_published(notebooks):
    def published(profile, source=None, publish=True):
        plans = runner.plan(profile, source=source, notebooks=notebooks.folder, publish=publish)
        return [p.path.stem for p in plans if p.publish]

    assert published("paper") == published("paper", source="kermany") == ["00_first"]
    assert published("paper", source="phantom") == published("smoke") == published("paper", publish=False) == []


def test_command_line_options_reach_the_parameters(notebooks):
    plans = runner.plan("paper", source="dicom", skip_bad=True, notebooks=notebooks.folder, only="02, 00_first.ipynb")
    assert [p.parameters for p in plans] == [{"source": "dicom", "n_films": 7}, {"source": "dicom", "skip_bad": True}]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"source": "nope"}, "'nope'.*kermany"),
        ({"only": "00,07"}, "'07'.*02_third"),
        ({"only": ","}, "--only"),
        ({"jobs": 0}, "--jobs"),
        ({"notebooks": Path("empty")}, "no notebooks"),
        ({"profile": "typo"}, "'rte'.*rate"),
    ],
)
def test_wrong_use_names_what_is_valid(notebooks, options, expected):
    notebooks.profiles["typo"] = {"01_second": {"rte": 2.0}}
    with pytest.raises(UserError, match=expected):
        notebooks.run(**options)


def test_folders_that_cannot_be_made_are_named_before_hours_of_work(notebooks, tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(UserError, match="--out"):
        notebooks.run(out=file / "out")
    for profile, variable in (("smoke", "RUNS"), ("smoke", "FIGURES"), ("paper", "RESULTS")):
        with monkeypatch.context() as patch, pytest.raises(UserError, match=f"set PRIMIA_LITE_{variable} to"):
            patch.setenv(f"PRIMIA_LITE_{variable}", str(file / "folder"))
            notebooks.run(profile, out=None)
    monkeypatch.setattr(runner, "repo_root", lambda: file)  # where published figures go
    monkeypatch.delenv("PRIMIA_LITE_FIGURES")
    with pytest.raises(UserError, match="PRIMIA_LITE_FIGURES"):
        notebooks.run("paper", out=None)


def test_without_out_the_variables_say_where_a_run_writes(notebooks, tmp_path, monkeypatch):
    monkeypatch.setenv("PRIMIA_LITE_RUNS", str(tmp_path))
    monkeypatch.setenv("PRIMIA_LITE_FIGURES", str(tmp_path / "pictures"))
    monkeypatch.delenv("PRIMIA_LITE_RESULTS")
    cell = "import os\nprint([os.environ['PRIMIA_LITE_' + n] for n in ('RUNS', 'FIGURES', 'RESULTS')])"
    notebooks.write("00_first", 'source = "phantom"', cell)
    assert notebooks.run(only="00", out=None) == 0
    notebooks.out = out = tmp_path / "smoke-phantom"
    assert eval(notebooks.printed("00_first")) == [str(out / "state"), str(tmp_path / "pictures"), f"{out}/results"]


def test_no_cell_meets_its_limit_on_a_slow_and_busy_laptop(root):
    assert runner.CELL_TIMEOUT_S["smoke"] >= 1800
    checked = (root / "Makefile").read_text("utf-8")
    assert int(re.search(r"--nbval-cell-timeout (\d+)", checked)[1]) >= 1800
    assert int(re.search(r"--nbval-kernel-startup-timeout (\d+)", checked)[1]) >= 600


def test_state_is_kept_for_what_was_killed_and_deleted_for_what_ended_well(tmp_path):
    for stem in ("00_a", "01_b", "02_c"):
        (tmp_path / "state" / stem).mkdir(parents=True)
    rows = [{"notebook": "00_a", "status": "ok"}, {"notebook": "01_b", "status": "failed"}]
    for stems, everything, left in (
        (["01_b", "02_c"], False, ["00_a", "01_b", "02_c"]),  # 00_a isn't run now: what it left may be read
        (["00_a", "01_b", "02_c"], False, ["01_b", "02_c"]),
        (["01_b"], True, ["02_c"]),
    ):
        (tmp_path / "summary.json").write_text(json.dumps({"notebooks": rows}))
        runner.forget_finished(tmp_path, stems, everything=everything)
        assert sorted(p.name for p in (tmp_path / "state").iterdir()) == left


def start(notebooks, ready, before=""):
    """`primia-lite run --jobs 2` of the notebooks as a process, once the files ``ready`` are there: it, and the kernels
    and other processes that it has started."""
    code = (
        "import sys, pathlib; from primia_lite.apps import cli, notebook, runner\n"
        "runner.load_profile = lambda name: {}\n"
        f"runner.repo_root = lambda: pathlib.Path({str(notebooks.folder.parent)!r})\n{before}\n"
        f"sys.exit(cli.main(['run', '--jobs', '2', '--out', {str(notebooks.out)!r}]))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it
    )  # fmt: skip
    wait(lambda: all(file.exists() for file in ready) or process.poll() is not None)
    assert process.poll() is None, process.communicate()
    return process, [child.pid for child in psutil.Process(process.pid).children(recursive=True)]


def wait(over):
    deadline = time.monotonic() + 600
    while not over():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def sleeper(flag: Path) -> str:
    return f"import pathlib, time\npathlib.Path({str(flag)!r}).touch()\ntime.sleep(2000)"


@pytest.mark.skipif(os.name == "nt", reason="sends SIGINT")
def test_ctrl_c_stops_the_kernels_saves_the_summary_and_exits_130(notebooks, tmp_path):
    flags = [tmp_path / "first", tmp_path / "second"]
    for flag, name in zip(flags, ("00_first", "01_second"), strict=True):
        notebooks.write(name, "a = 1", sleeper(flag))
    process, started = start(notebooks, flags, "runner.own_kernel = lambda warm: notebook.own_kernel()")
    os.killpg(process.pid, signal.SIGINT)  # what a terminal does
    stdout, stderr = process.communicate(timeout=600)
    assert process.returncode == 130, (stdout, stderr)
    assert "interrupted" in stderr and "Traceback" not in stderr, stderr
    assert [(row["notebook"], row["status"]) for row in notebooks.rows()] == [
        (name, "interrupted") for name in ("00_first", "01_second")
    ], "and none of the others begins"
    wait(lambda: not any(map(psutil.pid_exists, started)))


def test_two_run_at_once_and_the_summary_keeps_their_order(notebooks, tmp_path, capsys):
    meet = (  # each waits for the other, and the first ends last
        f"import os, pathlib, time\nhere = pathlib.Path({str(tmp_path)!r})\n(here / mine).touch()\n"
        "while not (here / other).exists(): time.sleep(0.05)\ntime.sleep(late)\n"
        "print(os.environ['OMP_NUM_THREADS'], os.environ['PRIMIA_LITE_COMMAND'])"
    )
    notebooks.write("00_first", "mine, other, late = 'a', 'b', 0.3", meet)
    notebooks.write("01_second", "mine, other, late = 'b', 'a', 0", meet)
    before = os.environ.get("OMP_NUM_THREADS")
    assert notebooks.run(jobs=2) == 0
    assert [(r["notebook"], r["status"]) for r in notebooks.rows()] == [
        (name, "ok") for name in ("00_first", "01_second", "02_third")
    ]
    assert all(r["peak_memory_mib"] > 20 for r in notebooks.rows()), "each its own"
    assert "2 at a time" in capsys.readouterr().out
    threads, command = notebooks.printed("00_first").split(maxsplit=1)
    assert threads == before or int(threads) == max(1, cores() // 2)
    assert command.strip() == "primia-lite run --profile smoke --data phantom --only 00_first"


@pytest.mark.parametrize(("profile", "jobs"), [("smoke", 2), ("paper", 1)])
def test_published_timings_are_of_one_notebook_at_a_time(monkeypatch, profile, jobs):
    monkeypatch.setattr(runner, "cores", lambda: 4)
    assert runner.default_jobs(profile) == jobs
    monkeypatch.setattr(runner, "cores", lambda: 1)
    assert runner.default_jobs(profile) == 1


def test_live_progress_counts_cells_on_one_line():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    progress = summary.Progress(stream, 2)
    progress.cell(1, "00_first", 0, 0)
    progress.cell(2, "01_second", 0, 0)
    progress.cell(1, "00_first", 3, 9)
    assert "cell 3/9" in stream.getvalue()
    last = stream.getvalue().split(summary.CLEAR)[-1]
    assert last.startswith("[1/2] 00_first  cell 3/9  0 s; [2/2] 01_second  cell 0/0")
    progress.end(2, notebook.Outcome("01_second", "ok", 1.0, 90.0, 5))
    progress.end(1, notebook.Outcome("00_first", "ok", 1.5, 100.0, 9))
    assert stream.getvalue().count("\n") == 2
    assert stream.getvalue().endswith("[1/2] 00_first  ok  1.5 s, 100 MiB\n")


KILLED_RUN = """
import numpy as np, torch, time
from primia_lite.config import runs_dir
from primia_lite.federation.hospital import Hospital
from primia_lite.federation.rounds import Schedule, federate
from primia_lite.data.films import Films
from primia_lite.training import Training
inputs = torch.randn(40, 1, 5, generator=torch.Generator().manual_seed(1))
films = Films(inputs, torch.arange(40) % 3, np.arange(40).astype(str))
result = federate(
    [Hospital("A", films)], Training(), Schedule(12, server_momentum=0.9), seed=1, folder=runs_dir() / "00_first",
    progress=lambda record: time.sleep(pause))
print("weights", result.state["weight"].sum().item(), "rounds", len(result.history))
"""


@pytest.mark.skipif(os.name == "nt", reason="sends SIGKILL")
def test_a_killed_run_leaves_no_kernel_goes_on_and_ends_in_the_same_weights(notebooks, tmp_path, monkeypatch, capsys):
    """SIGKILL of `primia-lite run` in the middle of the rounds, while another kernel runs: both kernels end by
    themselves, or a run that goes on from there would share its state with them. The same notebook finishes the run."""
    monkeypatch.setenv("PRIMIA_LITE_RUNS", str(tmp_path / "whole"))
    exec(KILLED_RUN, {"pause": 0.0})
    whole = capsys.readouterr().out
    flag, checkpoint = tmp_path / "second", notebooks.out / "state" / "00_first" / "checkpoint.pt"
    meet = f"import pathlib, time\nwhile not pathlib.Path({str(flag)!r}).exists(): time.sleep(0.05)"
    notebooks.write("00_first", "pause = 0.1", meet, KILLED_RUN)
    notebooks.write("01_second", "a = 1", sleeper(flag))
    process, started = start(notebooks, [checkpoint])
    process.kill()
    process.communicate()
    wait(lambda: not any(map(psutil.pid_exists, started)))
    assert len(started) >= 2 and not (notebooks.out / "summary.json").exists()
    assert 1 <= torch.load(checkpoint, weights_only=True)["round"] < 12
    assert notebooks.run(only="00,02", jobs=1) == 0
    assert notebooks.printed("00_first").strip() == whole.strip().splitlines()[-1]


def test_a_message_whose_arrival_was_missed_is_found():
    """A socket that sleeps until its timeout though a message came after 0.1 s, as asyncio on ZeroMQ may."""
    import asyncio
    import queue

    came = time.monotonic() + 0.1

    class Channel:
        async def get_msg(self, timeout=None):
            if time.monotonic() >= came:  # looked for when asked, but not woken up by it
                return "message"
            await asyncio.sleep(timeout)
            raise queue.Empty

    class Client:
        shell_channel, iopub_channel = Channel(), Channel()

    notebook.look_again(Client, every_s=0.05)
    started = time.monotonic()
    assert asyncio.run(Client.shell_channel.get_msg(timeout=600)) == "message"
    assert asyncio.run(Client.iopub_channel.get_msg()) == "message"
    assert time.monotonic() - started < 150
    came = time.monotonic() + 60
    with pytest.raises(queue.Empty):
        asyncio.run(Client.shell_channel.get_msg(timeout=0.2))
