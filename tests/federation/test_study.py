"""What an approval is for, and a job's process: without a federation."""

from __future__ import annotations

import json
import time
from dataclasses import replace

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from primia_lite.apps.syft.approval import Approval, changes, difference, digest, verdict
from primia_lite.apps.syft.process import JobError, run_job
from primia_lite.config import UserError
from primia_lite.federation.study import CODE, REQUEST, ROUND, RUN, STUDY, Study, describe
from primia_lite.privacy.dpsgd import Privacy
from primia_lite.privacy.shared import SharedNoise
from primia_lite.secagg import Agreement
from primia_lite.training import Training

PUBLIC = {name: Ed25519PrivateKey.generate().public_key().public_bytes_raw() for name in "AB"}
AGREEMENT = Agreement(PUBLIC, {"A": 10, "B": 30}, 60)
PRIVACY = Privacy(1.5, 0.5, 8.0, planned=(0.5, 4))
TRAINING = Training(augmentation=("flip",), class_weights=(1.0, 2.0, 3.0), sample_rate=0.5)
STUDY_ = Study("lungs", "chest-xray", TRAINING, PRIVACY, 3, AGREEMENT)


SHARED = SharedNoise(2, 1, 60, (10, 30))


def sharing(shared=SHARED, **agreement) -> Study:
    agreement = replace(AGREEMENT, **{"weighted": False} | agreement)
    return replace(STUDY_, privacy=replace(PRIVACY, shared=shared), agreement=agreement)


def asking(step: str, **more: bytes) -> dict[str, bytes]:
    return {**STUDY_.files(), REQUEST: json.dumps({"step": step, "session": 1}).encode(), **more}


def approvals(used: int = 0) -> dict[str, Approval]:
    return {digest(STUDY_.files()): Approval("lungs", 3, used, STUDY_.files())}


def test_a_study_is_the_same_after_its_file():
    shared = sharing()
    for study in (STUDY_, replace(STUDY_, privacy=None, seed=7), shared):
        assert Study.from_bytes(study.to_bytes()) == study


@pytest.mark.parametrize(("change", "word"), [
    ({"name": "../lungs"}, "study"), ({"rounds": 0}, "rounds"), ({"rounds": True}, "rounds"), ({"more": 1}, "study"),
    ({"privacy": {"plan": 5}}, "study"), ({"training": None}, "study"), ({"agreement": {"identities": 5}}, "agreement"),
])  # fmt: skip
def test_odd_values_of_a_study_are_refused(change, word):
    with pytest.raises(UserError, match=word):
        Study.from_bytes(json.dumps(STUDY_.as_dict() | change).encode())


@pytest.mark.parametrize(
    ("shared", "message"),
    [
        (SharedNoise(1000, 0, 60, (10, 30) + (1,) * 998), "SharedNoise"),
        (SharedNoise(2, 1, 60, (10, 30, 1)), "SharedNoise"),
        (SharedNoise(2, 1, 60, (10, 31)), "SharedNoise"),
        (SharedNoise(2, 1, 60, (20, 20)), "SharedNoise"),
        (SharedNoise(1, 0, 60, (40,)), "SharedNoise"),
        (SharedNoise(2, 1, 61, (10, 30)), "agreed"),
        (SharedNoise(2, 1, 59, (10, 30)), "agreed"),
    ],
)
def test_shared_noise_that_does_not_fit_the_hospitals_is_refused_where_a_study_is_read(shared, message):
    with pytest.raises(UserError, match=message):
        sharing(shared)
    content = sharing().as_dict()
    content["privacy"]["shared"] |= {key: getattr(shared, key) for key in ("threshold", "parameters", "declared")}
    content["privacy"]["shared"]["colluding"] = shared.colluding
    with pytest.raises(UserError, match=message):
        Study.from_bytes(json.dumps(content).encode())


@pytest.mark.parametrize(
    "change",
    [{"threshold": 2.5}, {"threshold": "2"}, {"colluding": 0.5}, {"colluding": None}, {"parameters": 60.0},
     {"declared": [10.0, 30.0]}, {"declared": "13"}, {"threshold": 3}, {"colluding": 2}, {"colluding": -1}],
)  # fmt: skip
def test_shared_noise_in_a_study_s_file_is_of_whole_numbers_that_fit(change):
    content = sharing().as_dict()
    content["privacy"]["shared"] |= change
    with pytest.raises(UserError):
        Study.from_bytes(json.dumps(content).encode())


def test_shared_noise_goes_with_enough_hospitals_in_each_sum_and_masks_with_all():
    names = [f"h{i}" for i in range(6)]
    keys = {name: Ed25519PrivateKey.generate().public_key().public_bytes_raw() for name in names}
    sizes = dict.fromkeys(names, 10)
    shared = SharedNoise(5, 1, 60, (10,) * 6)
    agreed = {"identities": keys, "sizes": sizes, "threshold": 5, "degree": None, "share_threshold": None}
    assert sharing(shared, **agreed).integer_sum
    with pytest.raises(UserError, match="reveal"):
        sharing(shared, **agreed | {"threshold": 4})
    with pytest.raises(UserError, match="degree"):
        sharing(shared, **agreed | {"degree": 4, "share_threshold": 4})
    for summed in (True, False):
        with pytest.raises(UserError, match="weighted"):
            replace(sharing(weighted=summed), privacy=replace(PRIVACY, shared=SHARED if summed else None))
    many = {f"h{i}": Ed25519PrivateKey.generate().public_key().public_bytes_raw() for i in range(125)}
    assert Agreement(many, dict.fromkeys(many, 10), 60, weighted=False).degree == 124


def test_a_graph_of_neighbours_that_a_lying_server_may_break_is_refused():
    many = {f"h{i}": Ed25519PrivateKey.generate().public_key().public_bytes_raw() for i in range(200)}
    agreed = Agreement(many, dict.fromkeys(many, 10), 60)
    assert agreed.degree < 199 and replace(STUDY_, agreement=agreed).agreement == agreed
    for degree, shares in ((2, 2), (60, 35), (agreed.degree, 41)):
        with pytest.raises(UserError, match="share_threshold"):
            replace(STUDY_, agreement=replace(agreed, degree=degree, share_threshold=shares))


def test_a_hospital_reads_all_that_decides_its_privacy():
    study = sharing()
    study = replace(study, privacy=replace(study.privacy, target_delta=1e-12))
    words = describe(study)
    assert "SHARED by 2 hospitals (A, B)" in words and "t = 2" in words and "c = 1" in words
    assert "more than c = 1" in words and "with 2 the noise multiplier in a sum of 2 is 0" in words
    assert f"delta {study.privacy.promised_delta(4):.3g} in all" in words and study.privacy.promised_delta(4) > 2e-12
    assert "epsilon 8" in words and "each patient with all their films" in words and "all 1 others" in words
    own = describe(STUDY_)
    assert "ALL of the noise by itself" in own and "delta 0.0001 in all" in own and "SHARED" not in own
    none = describe(replace(STUDY_, privacy=None))
    assert "NO differential privacy" in none and "answers each round once" in none
    assert all(key.hex() in text for text in (words, own, none) for key in PUBLIC.values())


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
        ("raise ValueError('no film')", "ValueError"),
        ("import sys; sys.exit(7)", "nothing"),
        ("pass", "FileNotFoundError"),
        ("open('outputs/update.npy', 'w').write('x')", "update"),
        ("import numpy as np; np.save('outputs/update.npy', np.array([{}]))", "update"),  # pickled
    ],
)
def test_a_job_without_an_update_says_why(tmp_path, code, why):
    with pytest.raises(JobError, match=why):
        run_job(job(code), tmp_path / "job", "films.npz", "A")


def test_a_jobs_files_stay_in_its_folder(tmp_path):
    with pytest.raises(JobError, match="outside"):
        run_job(job("pass", **{"../../elsewhere": b""}), tmp_path / "a" / "job", "films.npz", "A")
    assert not (tmp_path / "elsewhere").exists()


def test_a_job_that_takes_too_long_is_ended_with_all_that_it_started(tmp_path):
    code = "import subprocess\nsubprocess.run(['bash', '-c', 'sleep 3; touch ../alive'])\n"
    with pytest.raises(JobError, match="longer"):
        run_job(job(code), tmp_path / "job", "films.npz", "A", timeout_s=1.5)
    time.sleep(3)
    assert not (tmp_path / "job" / "alive").exists()
