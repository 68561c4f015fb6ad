"""What an approval is for, and a job's process: without a federation."""

from __future__ import annotations

import json
import time
from dataclasses import replace

import numpy as np
import pytest

from primia_lite.config import UserError
from primia_lite.federation.secagg import Agreement
from primia_lite.federation.study import CODE, REQUEST, ROUND, RUN, STUDY, Study, job_code
from primia_lite.federation.syft_approval import Approval, changes, difference, digest, verdict
from primia_lite.federation.syft_process import JobError, run_job
from primia_lite.privacy.accounting import Release
from primia_lite.privacy.dpsgd import Privacy
from primia_lite.privacy.shared import SharedNoise
from primia_lite.training import Training

AGREEMENT = Agreement({"A": bytes(32), "B": bytes([1] * 32)}, {"A": 10, "B": 30}, 60)
PRIVACY = Privacy(1.5, 0.5, 8.0, plan=(Release(1.5, 0.5, 4),))
TRAINING = Training(augmentation=("flip",), class_weights=(1.0, 2.0, 3.0), sample_rate=0.5)
STUDY_ = Study("lungs", "chest-xray", TRAINING, PRIVACY, 3, AGREEMENT)


def asking(step: str, **more: bytes) -> dict[str, bytes]:
    return {**STUDY_.files(), REQUEST: json.dumps({"step": step, "session": 1}).encode(), **more}


def approvals(used: int = 0) -> dict[str, Approval]:
    return {digest(STUDY_.files()): Approval("lungs", 3, used, STUDY_.files())}


def test_a_study_is_the_same_after_its_file():
    shared = replace(STUDY_, privacy=replace(PRIVACY, shared=SharedNoise(2, 1, 60, (10, 30))))
    for study in (STUDY_, replace(STUDY_, privacy=None, seed=7), shared):
        assert Study.from_bytes(study.to_bytes()) == study


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"\xff", b'{"name": "x"}'])
def test_a_study_that_cant_be_read_is_named(content):
    with pytest.raises(UserError, match=r"study\.json can't be read"):
        Study.from_bytes(content)


def test_names_and_rounds_of_a_study_are_checked():
    with pytest.raises(UserError, match="a study's name is '../lungs'"):
        replace(STUDY_, name="../lungs")
    with pytest.raises(UserError, match="rounds is 0"):
        replace(STUDY_, rounds=0)


def test_an_approval_is_for_all_files_but_a_rounds_own():
    fixed = digest(STUDY_.files())
    assert digest(asking("mask", **{ROUND: b"{}"})) == fixed
    for path in (CODE, STUDY, RUN):
        assert digest({**STUDY_.files(), path: b"x"}) != fixed
    assert digest({**STUDY_.files(), "code/more.py": b""}) != fixed
    # No two lists of files look alike, however their names and contents are cut.
    assert digest({"a": b"bc"}) != digest({"ab": b"c"}) != digest({"a": b"b", "c": b""})


def test_every_round_of_an_approved_study_may_run_up_to_its_number():
    assert [verdict(asking(step), approvals(2)) for step in ("advertise", "share", "mask", "confirm", "unmask")] == [
        ""] * 5  # fmt: skip
    spent = approvals(3)
    assert verdict(asking("advertise"), spent) == "3 rounds were approved, and 3 have been taken: propose another study"
    assert verdict(asking("mask"), spent) and not verdict(asking("unmask"), spent)  # the last one still ends
    assert verdict({**STUDY_.files()}, approvals()) == "the job holds no request that can be read"


def test_what_was_changed_is_named():
    less = replace(STUDY_, privacy=replace(PRIVACY, noise_multiplier=0.1), rounds=5)
    assert verdict(asking("mask", **{STUDY: less.to_bytes()}), approvals()) == (
        "this isn't what was approved: privacy.noise_multiplier is 0.1, not 1.5; rounds is 5, not 3"
    )
    assert verdict(asking("mask", **{CODE: b"print()"}), approvals()).endswith("code/main.py is another")
    assert verdict(asking("mask", **{"code/more.py": b""}), approvals()).endswith("code/more.py is new")
    assert changes(STUDY_.files(), {RUN: STUDY_.files()[RUN]}) == ["code/main.py is gone", "code/study.json is gone"]
    other = replace(STUDY_, name="hearts")
    assert "study 'hearts' wasn't approved" in verdict(asking("mask", **{STUDY: other.to_bytes()}), approvals())
    assert "study '(without a name)' wasn't approved" in verdict(asking("mask", **{STUDY: b"?"}), approvals())
    assert "-        here.weights" in difference(STUDY_.files(), {**STUDY_.files(), CODE: b"print()\n"})
    assert difference(STUDY_.files(), asking("mask")) == ""


@pytest.mark.parametrize("path", ["code/pyproject.toml", "code/requirements.txt", "code/src/setup.py"])
def test_a_job_that_asks_for_packages_is_refused_even_if_somebody_approved_it(path):
    files = {**asking("mask"), path: b""}
    yes = {digest(files): Approval("lungs", 3, 0, files)}
    assert verdict(files, yes) == f"{path} asks for packages: hospitals run jobs in an environment of their own"
    assert "run.sh isn't the agreed one" in verdict(asking("mask", **{RUN: b"uv pip install requests"}), approvals())


# --- a job's process --------------------------------------------------------------------------------------------------


def job(code: str, **more: bytes) -> dict[str, bytes]:
    return {**STUDY_.files(code.encode()), **more}


def test_a_job_gets_a_few_variables_and_none_of_its_starters(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "x")
    code = """import os
import numpy as np
assert "SECRET_TOKEN" not in os.environ and os.environ["HOME"].endswith("job")
assert os.environ["PRIMIA_LITE_FILMS"] == "films.npz" and os.environ["MORE"] == "1"
print("words")
np.save("outputs/update.npy", np.arange(3, dtype=np.float32))
"""
    found = run_job(job(code), tmp_path / "job", "films.npz", "A", environment={"MORE": "1"})
    assert found.tolist() == [0, 1, 2] and found.dtype == np.float32
    assert (tmp_path / "job" / "stdout.txt").read_text() == "words\n"
    assert not (tmp_path / "job" / "code" / "outputs").exists()


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("raise ValueError('no film')", "the job ended with status 1: ValueError: no film"),
        ("import sys; sys.exit(7)", "the job ended with status 7: it said nothing"),
        ("pass", r"left no update in outputs/update\.npy \(FileNotFoundError\)"),
        ("open('outputs/update.npy', 'w').write('x')", "left no update"),
        ("import numpy as np; np.save('outputs/update.npy', np.array([{}]))", "left no update"),  # pickled
    ],
)
def test_a_job_without_an_update_says_why(tmp_path, code, why):
    with pytest.raises(JobError, match=why):
        run_job(job(code), tmp_path / "job", "films.npz", "A")


def test_a_job_that_takes_too_long_is_ended_with_all_that_it_started(tmp_path):
    code = "import subprocess\nsubprocess.run(['bash', '-c', 'sleep 5; touch ../alive'])\n"
    with pytest.raises(JobError, match=r"took longer than 1\.5 s"):
        run_job(job(code), tmp_path / "job", "films.npz", "A", timeout_s=1.5)
    time.sleep(5)
    assert not (tmp_path / "job" / "alive").exists()


def test_a_jobs_files_stay_in_its_folder(tmp_path):
    with pytest.raises(JobError, match=r"a file \.\./\.\./elsewhere outside its folder"):
        run_job(job("pass", **{"../../elsewhere": b""}), tmp_path / "a" / "job", "films.npz", "A")
    assert not (tmp_path / "elsewhere").exists()


def test_the_librarys_job_is_short_enough_to_be_read():
    assert len(job_code().decode().splitlines()) <= 15
