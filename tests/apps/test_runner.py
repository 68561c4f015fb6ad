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

import nbformat
import psutil
import pytest

from primia_lite.apps import notebook
from primia_lite.apps import runner as reproduce
from primia_lite.config import UserError
from primia_lite.runtime import cores


@pytest.fixture
def notebooks(tmp_path, monkeypatch, write_notebook):
    """Three notebooks and a profile that knows two of them."""
    folder = tmp_path / "notebooks"
    write_notebook(folder / "00_first.ipynb", 'source = "phantom"\nn_films = 3', "x = n_films * 2\nprint(source, x)")
    write_notebook(folder / "01_second.ipynb", "rate = 0.5  # 1/s", "import os\nprint(os.getcwd(), rate)")
    write_notebook(folder / "02_third.ipynb", 'source = "phantom"\nskip_bad = False', "print(source, skip_bad)")
    profiles = {"smoke": {}, "paper": {"00_first": {"source": "kermany", "n_films": 7}, "01_second": {"rate": 1.5}}}

    def load_profile(name):
        if name not in profiles:
            raise UserError(f"unknown profile {name!r}: choose one of paper, smoke")
        return profiles[name]

    monkeypatch.setattr(reproduce, "load_profile", load_profile)
    return folder, profiles


def outputs(path) -> str:
    cells = nbformat.read(path, as_version=4).cells
    return "".join(o.get("text", "") for c in cells if c.cell_type == "code" for o in c.outputs)


def test_runs_in_order_with_parameters_and_writes_a_summary(notebooks, tmp_path):
    folder, _ = notebooks
    out, log = tmp_path / "out", io.StringIO()
    assert reproduce.run_notebooks("paper", only="00,01", out=out, notebooks=folder, stream=log) == 0
    assert "kermany 14" in outputs(out / "00_first.ipynb")
    assert f"{folder} 1.5" in outputs(out / "01_second.ipynb"), "a notebook runs in its own folder"
    summary = json.loads((out / "summary.json").read_text())
    assert [(r["notebook"], r["status"]) for r in summary["notebooks"]] == [("00_first", "ok"), ("01_second", "ok")]
    assert all(r["peak_memory_mib"] > 20 and r["seconds"] > 0 for r in summary["notebooks"])
    assert "| 00_first" in (out / "summary.md").read_text()
    assert "[1/2] 00_first" in log.getvalue() and "\r" not in log.getvalue()


def test_a_failing_notebook_is_named_and_does_not_stop_the_next(notebooks, tmp_path, write_notebook):
    folder, _ = notebooks
    write_notebook(folder / "01_second.ipynb", "rate = 1", "a = 1", "# comment\nb = a / 0\nprint(b)", "print('never')")
    out, log = tmp_path / "out", io.StringIO()
    assert reproduce.run_notebooks("smoke", source="phantom", out=out, notebooks=folder, stream=log) == 1
    rows = {r["notebook"]: r for r in json.loads((out / "summary.json").read_text())["notebooks"]}
    assert [r["status"] for r in rows.values()] == ["ok", "failed", "ok"]
    failed = rows["01_second"]
    assert (failed["cell"], failed["first_line"]) == (4, "b = a / 0")
    assert failed["error"] == "ZeroDivisionError: division by zero"
    assert "cell 4 (b = a / 0): ZeroDivisionError" in log.getvalue()
    assert "never" not in outputs(out / "01_second.ipynb")


def test_cell_numbers_do_not_count_the_injected_parameters(notebooks, tmp_path, write_notebook):
    folder, profiles = notebooks
    write_notebook(folder / "00_first.ipynb", 'source = "phantom"', "raise ValueError(source)")
    profiles["smoke"] = {"00_first": {"source": "dicom"}}
    reproduce.run_notebooks("smoke", only="00", out=tmp_path / "out", notebooks=folder, stream=io.StringIO())
    row = json.loads((tmp_path / "out" / "summary.json").read_text())["notebooks"][0]
    assert (row["cell"], row["error"]) == (3, "ValueError: dicom")


@pytest.mark.parametrize(
    ("cell", "error"), [("import os; os._exit(9)", "kernel died"), ("import time; time.sleep(600)", "longer than 10 s")]
)
def test_a_dead_kernel_and_an_endless_cell_are_named(notebooks, tmp_path, write_notebook, cell, error):
    folder, _ = notebooks
    write_notebook(folder / "00_first.ipynb", "a = 1", cell)
    status = reproduce.run_notebooks(
        "smoke", only="00", out=tmp_path / "out", notebooks=folder, stream=io.StringIO(), cell_timeout_s=10
    )
    row = json.loads((tmp_path / "out" / "summary.json").read_text())["notebooks"][0]
    assert status == 1 and row["cell"] == 3 and error in row["error"], row


def test_the_kernel_is_this_interpreter_whatever_is_installed(notebooks, tmp_path, write_notebook, monkeypatch):
    folder, _ = notebooks
    decoy = tmp_path / "jupyter" / "kernels" / "python3"
    decoy.mkdir(parents=True)
    (decoy / "kernel.json").write_text('{"argv": ["false"], "display_name": "decoy", "language": "python"}')
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    write_notebook(folder / "00_first.ipynb", "a = 1", "import sys; print(sys.prefix)")
    assert reproduce.run_notebooks("smoke", only="00", out=tmp_path / "o", notebooks=folder, stream=io.StringIO()) == 0
    assert outputs(tmp_path / "o" / "00_first.ipynb").strip() == sys.prefix
    assert os.environ["JUPYTER_PATH"] == str(tmp_path / "jupyter")


def test_where_a_notebook_writes(notebooks, tmp_path, write_notebook):
    folder, _ = notebooks
    names = ("FIGURES", "RESULTS", "RUNS", "DATA", "HEADLESS")
    cell = f"import os\nprint([os.environ['PRIMIA_LITE_' + n] for n in {names!r}])"
    write_notebook(folder / "00_first.ipynb", "a = 1", cell)
    reproduce.run_notebooks("smoke", only="00", out=tmp_path / "out", notebooks=folder, stream=io.StringIO())
    figures, results, runs, data, headless = eval(outputs(tmp_path / "out" / "00_first.ipynb"))
    out = str(tmp_path / "out")
    assert (figures, results, runs) == (f"{out}/figures", f"{out}/results", f"{out}/state")
    assert os.path.isabs(data) and headless == "1"


def test_figures_appear_in_the_executed_notebook(notebooks, tmp_path, write_notebook, monkeypatch):
    folder, _ = notebooks
    monkeypatch.setenv("MPLBACKEND", "Agg")
    write_notebook(folder / "00_first.ipynb", "a = 1", "import matplotlib.pyplot as plt\nplt.plot([1, 2]);")
    assert reproduce.run_notebooks("smoke", only="00", out=tmp_path / "o", notebooks=folder, stream=io.StringIO()) == 0
    cells = nbformat.read(tmp_path / "o" / "00_first.ipynb", as_version=4).cells
    assert any("image/png" in o.get("data", {}) for c in cells if c.cell_type == "code" for o in c.outputs)


def test_only_real_films_of_the_paper_profile_are_published(notebooks):
    folder, _ = notebooks

    def published(profile, source=None, publish=True):
        plans = reproduce.plan(profile, source=source, notebooks=folder, publish=publish)
        return [p.path.stem for p in plans if p.publish]

    assert published("paper") == ["00_first"]
    assert published("paper", source="kermany") == ["00_first"]
    assert published("paper", source="phantom") == published("smoke") == published("paper", publish=False) == []


def test_command_line_options_reach_the_parameters(notebooks):
    folder, _ = notebooks
    plans = reproduce.plan("paper", source="dicom", skip_bad=True, notebooks=folder)
    assert [p.parameters for p in plans] == [
        {"source": "dicom", "n_films": 7},
        {"rate": 1.5},
        {"source": "dicom", "skip_bad": True},
    ]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"profile": "papper"}, "unknown profile 'papper': choose one of paper, smoke"),
        ({"source": "nope"}, "unknown data source 'nope': choose one of phantom, kermany"),
        ({"only": "00,07"}, "no notebook '07': there are 00_first, 01_second, 02_third"),
        ({"only": ","}, "names no notebook"),
        ({"jobs": 0}, "--jobs must be at least 1"),
    ],
)
def test_wrong_use_names_what_is_valid(notebooks, options, expected):
    folder, _ = notebooks
    with pytest.raises(UserError, match=expected):
        reproduce.run_notebooks(**{"profile": "smoke", "notebooks": folder, **options})


def test_a_parameter_that_the_notebook_lacks_is_an_error(notebooks):
    folder, profiles = notebooks
    profiles["smoke"] = {"01_second": {"rte": 2.0}}
    with pytest.raises(UserError, match=r"01_second.ipynb the parameter 'rte', which .* doesn't have: rate"):
        reproduce.plan("smoke", notebooks=folder)


def test_choose_takes_numbers_starts_and_names(notebooks):
    folder, _ = notebooks
    assert [p.stem for p in reproduce.choose(folder, "02, 00_first.ipynb,02_third")] == ["00_first", "02_third"]
    with pytest.raises(UserError, match="no notebooks in"):
        reproduce.choose(folder / "empty", None)


def test_an_output_folder_that_cannot_be_made(notebooks, tmp_path, monkeypatch):
    folder, _ = notebooks
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--out"):
        reproduce.run_notebooks("smoke", out=tmp_path / "file" / "out", notebooks=folder, stream=io.StringIO())
    for profile, variable in (("smoke", "RUNS"), ("smoke", "FIGURES"), ("paper", "RESULTS")):
        with monkeypatch.context() as patch, pytest.raises(UserError, match=f"set PRIMIA_LITE_{variable} to"):
            patch.setenv(f"PRIMIA_LITE_{variable}", str(tmp_path / "file" / "folder"))
            reproduce.run_notebooks(profile, notebooks=folder, stream=io.StringIO())


def test_published_figures_are_asked_for_before_hours_of_work(notebooks, tmp_path, monkeypatch):
    folder, _ = notebooks
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(reproduce, "repo_root", lambda: tmp_path / "file")
    monkeypatch.delenv("PRIMIA_LITE_FIGURES")
    with pytest.raises(UserError, match="set PRIMIA_LITE_FIGURES to"):
        reproduce.run_notebooks("paper", notebooks=folder, stream=io.StringIO())


def test_without_out_the_variables_say_where_a_run_writes(notebooks, tmp_path, write_notebook, monkeypatch):
    folder, _ = notebooks
    monkeypatch.setenv("PRIMIA_LITE_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("PRIMIA_LITE_FIGURES", str(tmp_path / "pictures"))
    monkeypatch.delenv("PRIMIA_LITE_RESULTS")
    cell = "import os\nprint([os.environ['PRIMIA_LITE_' + n] for n in ('RUNS', 'FIGURES', 'RESULTS')])"
    write_notebook(folder / "00_first.ipynb", 'source = "phantom"', cell)
    assert reproduce.run_notebooks("smoke", only="00", notebooks=folder, stream=io.StringIO()) == 0
    out = tmp_path / "runs" / "smoke-phantom"
    assert eval(outputs(out / "00_first.ipynb")) == [str(out / "state"), str(tmp_path / "pictures"), f"{out}/results"]


def test_no_home_folder_is_needed(notebooks, tmp_path, write_notebook, monkeypatch):
    folder, _ = notebooks
    (tmp_path / "file").write_text("")
    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "XDG_DATA_HOME", "XDG_RUNTIME_DIR", "JUPYTER_DATA_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "file" / "home"))
    write_notebook(folder / "00_first.ipynb", "a = 1", "print(a + 1)")
    log = io.StringIO()
    assert reproduce.run_notebooks("smoke", only="00", out=tmp_path / "o", notebooks=folder, stream=log) == 0, log
    assert outputs(tmp_path / "o" / "00_first.ipynb") == "2\n"
    assert "IPYTHONDIR" not in os.environ and "JUPYTER_RUNTIME_DIR" not in os.environ


def test_a_notebook_that_cannot_be_written_is_one_sentence(notebooks, tmp_path):
    folder, _ = notebooks
    (tmp_path / "out" / "00_first.ipynb").mkdir(parents=True)  # where a file is to lie
    log = io.StringIO()
    assert reproduce.run_notebooks("smoke", only="00,01", out=tmp_path / "out", notebooks=folder, stream=log) == 1
    first, second = json.loads((tmp_path / "out" / "summary.json").read_text())["notebooks"]
    assert "can't be written" in first["error"] and second["status"] == "ok"


def test_no_cell_meets_its_limit_on_a_slow_and_busy_laptop(root):
    assert reproduce.CELL_TIMEOUT_S["smoke"] >= 1800
    checked = (root / "Makefile").read_text("utf-8")
    assert int(re.search(r"--nbval-cell-timeout (\d+)", checked)[1]) >= 1800
    assert int(re.search(r"--nbval-kernel-startup-timeout (\d+)", checked)[1]) >= 600


def test_state_is_kept_for_what_was_killed_and_deleted_for_what_ended_well(tmp_path):
    for stem in ("00_a", "01_b", "02_c"):
        (tmp_path / "state" / stem).mkdir(parents=True)
    rows = [{"notebook": "00_a", "status": "ok"}, {"notebook": "01_b", "status": "failed"}]
    (tmp_path / "summary.json").write_text(json.dumps({"notebooks": rows}))
    left = lambda: sorted(p.name for p in (tmp_path / "state").iterdir())  # noqa: E731
    reproduce.forget_finished(tmp_path, ["01_b", "02_c"])
    assert left() == ["00_a", "01_b", "02_c"], "00_a isn't run now: what it left may be read"
    (tmp_path / "summary.json").write_text(json.dumps({"notebooks": rows}))
    reproduce.forget_finished(tmp_path, ["00_a", "01_b", "02_c"])
    assert left() == ["01_b", "02_c"]
    reproduce.forget_finished(tmp_path, ["01_b"], everything=True)
    assert left() == ["02_c"]


def start_sleepers(tmp_path, folder, write_notebook, jobs):
    """`primia-lite run` of notebooks of which the first ``jobs`` never end; their kernels' processes."""
    flags = [tmp_path / f"pid{number}" for number in range(jobs)]
    for flag, name in zip(flags, ("00_first", "01_second"), strict=False):
        cell = f"import os, pathlib, time\npathlib.Path({str(flag)!r}).write_text(str(os.getpid()))\ntime.sleep(2000)"
        write_notebook(folder / f"{name}.ipynb", "a = 1", cell)
    code = (
        "import sys, pathlib; from primia_lite.apps import cli, runner as reproduce\n"
        "reproduce.load_profile = lambda name: {}\n"
        f"reproduce.repo_root = lambda: pathlib.Path({str(tmp_path)!r})\n"
        f"sys.exit(cli.main(['run', '--jobs', '{jobs}', '--out', {str(tmp_path / 'out')!r}]))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it
    )  # fmt: skip
    deadline = time.monotonic() + 600
    while not all(flag.exists() and flag.read_text() for flag in flags) and time.monotonic() < deadline:
        time.sleep(0.1)
    return process, [int(flag.read_text()) for flag in flags]


def wait_for_the_end_of(kernels):
    deadline = time.monotonic() + 600
    while any(map(psutil.pid_exists, kernels)):
        assert time.monotonic() < deadline, kernels
        time.sleep(0.1)


@pytest.mark.skipif(os.name == "nt", reason="sends SIGINT")
@pytest.mark.parametrize("jobs", [1, 2])
def test_ctrl_c_stops_the_kernels_saves_the_summary_and_exits_130(notebooks, tmp_path, write_notebook, jobs):
    process, kernels = start_sleepers(tmp_path, notebooks[0], write_notebook, jobs)
    os.killpg(process.pid, signal.SIGINT)  # what a terminal does
    stdout, stderr = process.communicate(timeout=600)
    assert process.returncode == 130, (stdout, stderr)
    assert stderr.strip() == "interrupted"
    rows = json.loads((tmp_path / "out" / "summary.json").read_text())["notebooks"]
    assert [(row["notebook"], row["status"]) for row in rows] == [
        (name, "interrupted") for name in ("00_first", "01_second")[:jobs]
    ], "and none of the others begins"
    wait_for_the_end_of(kernels)


@pytest.mark.skipif(os.name == "nt", reason="sends SIGKILL")
def test_kernels_side_by_side_end_with_a_run_that_is_killed(notebooks, tmp_path, write_notebook):
    """Or a run that goes on from there would share its state with them."""
    process, kernels = start_sleepers(tmp_path, notebooks[0], write_notebook, 2)
    process.kill()
    wait_for_the_end_of(kernels)


def test_two_run_at_once_and_the_summary_keeps_their_order(notebooks, tmp_path, write_notebook):
    folder, _ = notebooks
    # Each waits for the other, and the first ends last.
    meet = (
        f"import os, pathlib, time\nhere = pathlib.Path({str(tmp_path)!r})\n(here / mine).touch()\n"
        "while not (here / other).exists(): time.sleep(0.05)\ntime.sleep(late)\n"
        "print(os.environ['OMP_NUM_THREADS'], os.environ['PRIMIA_LITE_COMMAND'])"
    )
    write_notebook(folder / "00_first.ipynb", "mine, other, late = 'a', 'b', 2", meet)
    write_notebook(folder / "01_second.ipynb", "mine, other, late = 'b', 'a', 0", meet)
    out, log = tmp_path / "out", io.StringIO()
    options = {"only": "00,01", "jobs": 2, "cell_timeout_s": 600}
    assert reproduce.run_notebooks("smoke", out=out, notebooks=folder, stream=log, **options) == 0
    rows = json.loads((out / "summary.json").read_text())["notebooks"]
    assert [(r["notebook"], r["status"]) for r in rows] == [("00_first", "ok"), ("01_second", "ok")]
    assert all(r["peak_memory_mib"] > 20 for r in rows), "each its own"
    assert "2 at a time" in log.getvalue()
    threads, command = outputs(out / "00_first.ipynb").split(maxsplit=1)
    assert int(threads) == max(1, cores() // 2)
    assert command.strip() == "primia-lite run --profile smoke --data phantom --only 00_first"


@pytest.mark.skipif(os.name == "nt", reason="kills a process")
def test_a_process_that_dies_is_named_and_the_next_runs(notebooks, tmp_path, write_notebook):
    folder, _ = notebooks
    kill = "import os, signal, psutil\nos.kill(psutil.Process().ppid(), signal.SIGKILL)"
    write_notebook(folder / "00_first.ipynb", "a = 1", kill)
    write_notebook(folder / "01_second.ipynb", "a = 1", "1 / 0")
    log = io.StringIO()
    assert reproduce.run_notebooks("smoke", out=tmp_path / "out", notebooks=folder, stream=log, jobs=2) == 1
    rows = json.loads((tmp_path / "out" / "summary.json").read_text())["notebooks"]
    assert [r["status"] for r in rows] == ["failed", "failed", "ok"]
    assert "ended with status -9" in rows[0]["error"]
    assert "ZeroDivisionError" in rows[1]["error"] and "ZeroDivisionError" in log.getvalue()


@pytest.mark.parametrize(("profile", "jobs"), [("smoke", 2), ("paper", 1)])
def test_published_timings_are_of_one_notebook_at_a_time(monkeypatch, profile, jobs):
    monkeypatch.setattr(reproduce, "cores", lambda: 4)
    assert reproduce.default_jobs(profile) == (jobs if os.name == "posix" else 1)
    monkeypatch.setattr(reproduce, "cores", lambda: 1)
    assert reproduce.default_jobs(profile) == 1


def test_live_progress_counts_cells_on_one_line():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    progress = reproduce.Progress(stream, 2)
    progress.start(1, "00_first")
    progress.start(2, "01_second")
    progress.cell(1, 3, 9)
    assert "cell 3/9" in stream.getvalue()
    last = stream.getvalue().split(reproduce.CLEAR)[-1]
    assert last.startswith("[1/2] 00_first  cell 3/9  0 s; [2/2] 01_second  cell 0/0")
    progress.end(2, notebook.Outcome("01_second", "ok", 1.0, 90.0, 5))
    progress.end(1, notebook.Outcome("00_first", "ok", 1.5, 100.0, 9))
    assert stream.getvalue().count("\n") == 2
    assert stream.getvalue().endswith("[1/2] 00_first  ok  1.5 s, 100 MiB\n")


def test_first_line_is_code():
    assert notebook.first_line("%%time\n\n# why\n  y = 2\nz") == "y = 2"
    assert notebook.first_line("# only a comment") == "# only a comment"
    assert notebook.first_line("") == ""


KILLED_RUN = """
import numpy as np, torch, time
from primia_lite.config import runs_dir
from primia_lite.federation.hospital import Hospital
from primia_lite.federation.rounds import Schedule, federate
from primia_lite.models import Films
from primia_lite.training import Training
inputs = torch.randn(40, 1, 5, generator=torch.Generator().manual_seed(1))
films = Films(inputs, torch.arange(40) % 3, np.arange(40).astype(str))
result = federate(
    [Hospital("A", films)], Training(), Schedule(12, server_momentum=0.9), seed=1, folder=runs_dir() / "00_long",
    progress=lambda record: time.sleep(pause))
print("weights", result.state["weight"].sum().item(), "rounds", len(result.history))
"""


@pytest.mark.skipif(os.name != "posix", reason="kills a process group")
def test_a_killed_run_goes_on_and_ends_in_the_same_weights(tmp_path, write_notebook, monkeypatch, capsys):
    """SIGKILL of `primia-lite run` and its kernel in the middle of the rounds; the same command finishes the run."""
    monkeypatch.setenv("PRIMIA_LITE_RUNS", str(tmp_path / "whole"))
    exec(KILLED_RUN, {"pause": 0.0})
    whole = capsys.readouterr().out
    folder = tmp_path / "notebooks"
    write_notebook(folder / "00_long.ipynb", "pause = 0.3", KILLED_RUN)

    def start(out):
        code = (
            "import sys; from primia_lite.apps.runner import run_notebooks; from pathlib import Path; "
            f"sys.exit(run_notebooks('smoke', out={str(out)!r}, notebooks=Path({str(folder)!r})))"
        )
        return subprocess.Popen([sys.executable, "-c", code], start_new_session=True, stdout=subprocess.DEVNULL)

    process = start(tmp_path / "killed")
    checkpoint = tmp_path / "killed" / "state" / "00_long" / "checkpoint.pt"
    deadline = time.time() + 600
    while not checkpoint.exists() and time.time() < deadline:
        time.sleep(0.05)
    for child in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
        child.kill()
    process.wait()
    assert checkpoint.exists() and not (tmp_path / "killed" / "summary.json").exists()
    first = torch_rounds(checkpoint)
    assert 1 <= first < 12
    assert start(tmp_path / "killed").wait(timeout=600) == 0
    assert outputs(tmp_path / "killed" / "00_long.ipynb").strip() == whole.strip().splitlines()[-1]


def torch_rounds(checkpoint) -> int:
    import torch

    return torch.load(checkpoint, weights_only=True)["round"]


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
