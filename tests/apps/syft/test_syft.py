"""Governed federation: what a hospital approves is run, nothing else is; what it releases is masked."""

from __future__ import annotations

import base64
import io
import json
import shutil
import sys
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from syft.sync.utils.syftbox_utils import uncompress_data
from syft_job.client import JobClient

from primia_lite.apps.syft.approval import NotApproved, difference
from primia_lite.apps.syft.hospital import Datasite
from primia_lite.apps.syft.memory import Federation, in_memory
from primia_lite.apps.syft.process import JobError, run_job
from primia_lite.apps.syft.researcher import federate_with_syft
from primia_lite.apps.syft.runner import REPLY, quiet
from primia_lite.config import UserError
from primia_lite.data.films import Films
from primia_lite.federation.hospital import Hospital
from primia_lite.federation.rounds import Schedule, ServerOptimizer, federate
from primia_lite.federation.study import CODE, REQUEST, ROUND, STUDY, Study, job_code
from primia_lite.privacy.accounting import Release
from primia_lite.privacy.dpsgd import Privacy
from primia_lite.privacy.ledger import Ledger
from primia_lite.privacy.shared import SharedNoise
from primia_lite.secagg import Agreement, ProtocolError, Reply, TooFewSurvivors
from primia_lite.training import Training

NAMES, FEATURES = ("A", "B", "C"), 20
LENGTH = 3 * FEATURES
TRAINING = Training(sample_rate=0.5, local_steps=2)
PRIVACY = Privacy(1.0, 1.0, 1000.0)
# A job that is there at once: its update is a number that says how often the hospital's ledger was charged by now.
FAST = """
import os, sqlite3
import numpy as np
name = os.environ["PRIMIA_LITE_HOSPITAL"]
ledger = sqlite3.connect("LEDGERS/" + name + ".sqlite")
charges = ledger.execute("SELECT COUNT(*) FROM charges WHERE what LIKE 'STUDY:%'").fetchone()[0]
np.save("outputs/update.npy", np.full(60, charges, np.float32))
"""


def films(name: str, n: int, seed: int) -> Films:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 3
    inputs = 0.5 * torch.randn(n, 1, FEATURES, generator=generator)
    inputs[:, 0, :3] += torch.nn.functional.one_hot(labels, 3)
    return Films(inputs, labels, np.array([f"{name}-{i // 2}" for i in range(n)]), model="litenet")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("syft")


@pytest.fixture(scope="module")
def federation(folder) -> Federation:
    hospitals = [
        Hospital(name, films(f"PRIVATE-{name}", 60 + 20 * k, k),
                 lasting_ledger=Ledger(folder / "ledgers" / f"{name}.sqlite", 1000.0, 1e-4))
        for k, name in enumerate(NAMES)
    ]  # fmt: skip
    return in_memory(folder / "federation", hospitals, films("mock", 30, 9), timeout_s=120)


def study_of(federation, name: str, privacy=PRIVACY, rounds: int = 1, **changes) -> Study:
    sizes = {n: site.hospital.declared(privacy) for n, site in federation.sites.items()}
    keys = {n: site.public_key for n, site in federation.sites.items()}
    agreement = Agreement(keys, sizes, LENGTH, weighted=not (privacy and privacy.shared))
    return Study(name, "chest-xray", TRAINING.changed(**changes), privacy, rounds, agreement)


def propose(federation, study, code=None):
    federation.researcher.propose(study, code)
    federation.sync()
    return {name: site.review(study.name) for name, site in federation.sites.items()}


def approved(federation, study, code=None, **how) -> Study:
    for name, review in propose(federation, study, code).items():
        federation.sites[name].approve(review, **how)
    return study


def fast(folder, study: str, more: str = "") -> bytes:
    return (FAST + more).replace("LEDGERS", str(folder / "ledgers")).replace("STUDY", study).encode()


def weights() -> dict:
    return ServerOptimizer.start(TRAINING, Schedule(1), (FEATURES,), 0).state


def charges(federation, study: str) -> dict[str, int]:
    statements = {n: site.hospital.lasting_ledger.statement() for n, site in federation.sites.items()}
    return {n: sum(row["what"].startswith(f"{study}:") for row in rows) for n, rows in statements.items()}


def left(federation) -> bytes:
    """All that ever left a hospital's machine, unpacked: what the drive holds, and the researcher's folder."""
    parts = []
    for file in federation.store.files.values():
        try:
            parts.append(uncompress_data(file.content))
        except Exception:  # not packed
            parts.append(file.content)
    parts += [p.read_bytes() for p in federation.researcher.client.syftbox_folder.rglob("*") if p.is_file()]
    for part in list(parts):  # what is carried as bytes is in base64
        try:
            events = json.loads(part).get("events", [])
        except (ValueError, AttributeError):
            continue
        parts += [base64.b64decode(e["content"]) for e in events if e.get("content_type") == "binary"]
    return b"\n".join(parts)


# --- rounds that work -------------------------------------------------------------------------------------------------

LEAKY = """
import os, shutil
from pathlib import Path
from primia_lite.federation.study import Round
here = Round.here()
print("LEAK", here.films.patient_id[0])
print(os.environ, file=__import__("sys").stderr)
Path("beside.txt").write_text("LEAK " + here.films.patient_id[0])
Path("outputs/more.txt").write_text("LEAK " + here.films.patient_id[0])
"""


@pytest.mark.slow
def test_a_round_through_local_update_equals_one_in_process_and_what_jobs_print_or_write_stays(federation):
    code = job_code().replace(b'if __name__ == "__main__":\n', LEAKY.encode() + b'\nif __name__ == "__main__":\n')
    study = approved(federation, study_of(federation, "plain", None), code, without_noise=True)
    result = federate_with_syft(federation.researcher, study, progress=None)
    hospitals = [site.hospital for site in federation.sites.values()]
    alone = federate(hospitals, study.training, Schedule(1), progress=None)
    assert all(torch.equal(result.state[key], alone.state[key]) for key in alone.state)
    assert result.history == alone.history
    assert not federation.researcher.refused
    job = federation.sites["A"].folder / "jobs" / "plain-00001-mask"
    assert "LEAK PRIVATE-A-0" in (job / "stdout.txt").read_text()
    assert "PRIMIA_LITE_HOSPITAL" in (job / "stderr.txt").read_text()
    assert not (job / "code" / "outputs").exists()
    seen = left(federation)
    assert b"here.save(update)" in seen and b"masked" not in seen  # what should be found is found
    assert b"LEAK PRIVATE" not in seen
    assert b"PRIVATE-A-0" not in seen


@pytest.mark.slow
def test_a_researcher_tries_a_job_on_the_mock_half(federation):
    sizes = study_of(federation, "trial").agreement.sizes
    shared = replace(PRIVACY, shared=SharedNoise(2, 1, LENGTH, tuple(sizes.values())))
    update = federation.researcher.try_out(study_of(federation, "trial", shared, local_steps=1), "A", weights())
    assert update.dtype == np.int64 and update.shape == (LENGTH,) and update.any()
    assert charges(federation, "trial") == dict.fromkeys(NAMES, 0)


def test_ledgers_are_charged_before_the_job_and_the_researcher_sees_only_the_sum(federation, folder):
    study = approved(federation, study_of(federation, "seen", rounds=2), fast(folder, "seen"))
    federation.researcher.spans.clear()
    server = federation.researcher.round(study, weights(), 1)
    assert server.survivors == NAMES
    # Each job found its hospital's ledger charged once: each update is 1 throughout, and so is the mean.
    assert np.allclose(server.mean, 1.0, atol=1e-6)
    assert charges(federation, "seen") == dict.fromkeys(NAMES, 1)
    fixed, agreement = study.agreement.fixed_point, study.agreement
    manager = federation.researcher.client.job_client.manager
    total, job = np.zeros(LENGTH, np.uint32), f"seen-{federation.researcher.session:05d}-mask"
    for name, email in federation.researcher.emails.items():
        path = manager.review_dir(manager.find_submission_ref(email, job)) / "outputs" / REPLY
        vector = Reply.from_bytes(base64.b64decode(path.read_bytes())).vector
        quantised = fixed.quantise(np.ones(LENGTH, np.float32), agreement.weight(name))
        assert (vector != quantised).all()
        total += quantised
    assert np.array_equal(server.total.view(np.uint32), total)
    steps = {(span.step, span.what) for span in federation.researcher.spans}
    assert {("mask", "answer"), ("unmask", "sync"), ("advertise", "submit")} <= steps
    server = federation.researcher.round(study, weights(), 2)  # no second review
    assert np.allclose(server.mean, 2.0, atol=1e-6)
    site = federation.sites["A"]
    names = [ref.job_name for ref in site.client.job_client.manager.iter_submission_refs(site.email)]
    assert len([name for name in names if name.startswith("seen-")]) == 5  # the first round's files are gone
    assert "seen" in names


def test_shared_noise_is_summed_by_hospitals_whose_runners_start_anew_between_steps(federation):
    sizes = tuple(site.hospital.declared(PRIVACY) for site in federation.sites.values())
    shared = replace(PRIVACY, shared=SharedNoise(2, 1, LENGTH, sizes))
    code = b"import numpy as np\nnp.save('outputs/update.npy', np.full(60, -5, np.int64))\n"
    study = approved(federation, study_of(federation, "shared", shared, local_steps=1), code)
    turn = federation.researcher.turn

    def start_anew():
        for name, site in federation.sites.items():
            federation.sites[name] = Datasite(site.client, site.hospital, site.folder)
            federation.sites[name].trust(site.trusted)
        turn()

    federation.researcher.turn = start_anew
    try:
        server = federation.researcher.round(study, weights(), 1)
    finally:
        federation.researcher.turn = turn
    assert server.survivors == NAMES and (server.total == -15).all()


# --- what is refused --------------------------------------------------------------------------------------------------


def refusal(federation, study, gone: str = "") -> str:
    away = {name: federation.sites.pop(name) for name in gone}
    try:
        with pytest.raises(TooFewSurvivors) as error:
            federation.researcher.round(study, weights(), 1)
    finally:
        federation.sites.update(away)
    return str(error.value)


def test_a_study_that_nobody_approved_is_refused(federation):
    before = [len(site.seconds) for site in federation.sites.values()]
    message = refusal(federation, study_of(federation, "stranger"))
    assert "-advertise: A, B, C: study 'stranger' wasn't approved" in message
    propose(federation, study := study_of(federation, "waiting"))
    assert "study 'waiting' wasn't approved" in refusal(federation, study)
    assert federation.sites["A"].pending() == ["waiting"]
    federation.sites["A"].refuse(federation.sites["A"].review("waiting"), "not our question")
    federation.sync()
    assert federation.researcher.status("waiting")["A"] == "rejected: not our question"
    assert [len(site.seconds) for site in federation.sites.values()] == before  # nothing ran


def test_settings_or_code_that_changed_after_approval_are_refused(federation, folder):
    study = approved(federation, study_of(federation, "steady"), fast(folder, "steady"))
    less = replace(study, privacy=replace(PRIVACY, noise_multiplier=0.01))
    message = refusal(federation, less)
    assert "A, B, C: this isn't what was approved: privacy.noise_multiplier is 0.01, not 1.0" in message
    assert "A, B, C: this isn't what was approved: privacy is left out" in refusal(
        federation, replace(study, privacy=None)
    )
    code = federation.researcher.code
    federation.researcher.code = lambda name: code(name) + b"print('more')\n"
    try:
        assert "A, B, C: this isn't what was approved: code/main.py is another" in refusal(federation, study)
    finally:
        federation.researcher.code = code
    assert charges(federation, "steady") == dict.fromkeys(NAMES, 0)


def answered(federation) -> None:
    federation.turn()
    federation.researcher.sync()


def submitted(federation, name: str, files: dict[str, bytes], hospital: str = "A") -> Datasite:
    federation.researcher.submit(hospital, name, files)
    federation.sync()
    return federation.sites[hospital]


def change(federation, job: str, path: str, text: str) -> None:
    """As the researcher: write into a job that lies at hospital A."""
    science = federation.researcher.client
    ref = science.job_client.manager.find_submission_ref(federation.sites["A"].email, job)
    file = science.job_client.manager.submission_dir(ref) / path
    file.write_text(text)
    with quiet():
        science.sync_engine.datasite_watcher_syncer.on_file_change(file.relative_to(science.syftbox_folder))
    federation.sync()


def test_a_job_that_changes_while_a_person_reads_it_isnt_approved(federation):
    site = submitted(federation, "moving", study_of(federation, "moving").files())
    review = site.review("moving")
    change(federation, "moving", CODE, "print('something else')\n")
    with pytest.raises(NotApproved, match="changed"):
        site.approve(review)
    assert "+print('something else')" in site.review("moving").difference


def test_a_job_that_was_changed_after_syft_approved_it_isnt_run(federation, folder):
    """syft's own runner would run it."""
    study = approved(federation, study_of(federation, "late"), fast(folder, "late"))
    files = {**study.files(fast(folder, "late")), REQUEST: b'{"step": "mask", "session": 1}'}
    site = submitted(federation, "late-90001-mask", files)
    with quiet():
        (job,) = [job for job in site.client.job_client.jobs if job.name == "late-90001-mask"]
        job.approve()
    change(federation, "late-90001-mask", CODE, "open('ran', 'w')\n")
    with quiet():
        site.client.process_approved_jobs(stream_output=False, share_outputs_with_submitter=True)
    assert "this isn't what was approved: code/main.py is another" in site.journal[-1]
    federation.sync()
    assert federation.researcher.status("late-90001-mask")["A"] == "failed"
    assert "late-90001-mask" not in site.seconds


def test_a_job_that_asks_for_packages_is_refused_on_both_sides(federation):
    study = study_of(federation, "hungry")
    researcher, site = federation.researcher, federation.sites["A"]
    with pytest.raises(UserError, match="requests"):
        researcher.submit("A", "hungry", study.files(), ["requests"])
    with pytest.raises(UserError, match="pyproject"):
        researcher.submit("A", "hungry", {**study.files(), "code/pyproject.toml": b"[project]"})
    # With syft's own client: its run.sh installs what was asked for.
    ours = researcher.client.job_client
    researcher.client.job_client = JobClient.from_config(ours.config)
    draft = researcher.folder / "hungry"
    draft.mkdir()
    (draft / "main.py").write_text("print('hello')\n")
    (draft / "study.json").write_bytes(study.to_bytes())
    try:
        with quiet(), pytest.warns(UserWarning, match="install"):
            researcher.client.submit_python_job(site.email, str(draft), "hungry", ["requests"], "main.py", True)
        (draft / "request.json").write_text('{"step": "advertise", "session": 9}')
        with quiet(), pytest.warns(UserWarning, match="install"):
            researcher.client.submit_python_job(site.email, str(draft), "hungry-90002-advertise", [], "main.py", True)
    finally:
        researcher.client.job_client = ours
    federation.sync()
    review = site.review("hungry")
    assert len(review.problems) == 1 and "run.sh" in review.problems[0]
    with pytest.raises(NotApproved, match="run.sh"):
        site.approve(review)
    answered(federation)
    assert "run.sh" in researcher.status("hungry-90002-advertise")["A"]


def test_a_name_is_used_once(federation):
    study = study_of(federation, "twice")
    federation.researcher.propose(study)
    with pytest.raises(UserError, match="already"):
        federation.researcher.propose(study)
    site = federation.sites["A"]
    with pytest.raises(UserError, match="already"):
        site.add_dataset("chest-xray", films("mock", 30, 1), [])
    assert (site.films("chest-xray")).exists()


def test_a_rounds_job_comes_once(federation):
    """Also where a researcher's own client has forgotten it, and the hospital's runner started anew."""
    name, site = "again-00001-advertise", federation.sites["A"]
    files = {**study_of(federation, "again").files(), REQUEST: b"{}"}
    names = site.folder / "names.json"
    names.write_text(json.dumps([*(json.loads(names.read_text()) if names.exists() else []), name]))
    federation.sites["A"] = Datasite(site.client, site.hospital, site.folder)
    federation.sites["A"].trust(site.trusted)
    submitted(federation, name, files)
    answered(federation)
    assert federation.researcher.status(name)["A"] == "rejected: a job of this name came before"


def test_more_rounds_than_approved_are_refused(federation, folder):
    study = approved(federation, study_of(federation, "few", rounds=3), fast(folder, "few"), rounds=1)
    federation.researcher.round(study, weights(), 1)
    assert "A, B, C: 1 rounds were approved, and 1 have been taken" in refusal(federation, study)
    assert charges(federation, "few") == dict.fromkeys(NAMES, 1)
    with pytest.raises(UserError, match="rounds"):
        federate_with_syft(federation.researcher, study, Schedule(4), progress=None)
    review = propose(federation, study_of(federation, "fewer"))["A"]
    with pytest.raises(UserError, match="rounds"):
        federation.sites["A"].approve(review, rounds=2)


def test_a_job_that_crashes_counts_as_gone_and_only_its_hospital_learns_why(federation, folder):
    crash = "\nif name == 'C':\n    raise ValueError('film PRIVATE' + '-C-7 is odd')\n"
    study = approved(federation, study_of(federation, "crash", rounds=2), fast(folder, "crash", crash))
    server = federation.researcher.round(study, weights(), 1)
    assert server.survivors == ("A", "B") and np.allclose(server.mean, 1.0, atol=1e-6)
    assert charges(federation, "crash") == dict.fromkeys(NAMES, 1)  # it stays charged
    failed = [line for line in federation.sites["C"].journal if "failed" in line]
    assert failed[-1].endswith("the job ended with status 1: ValueError: film PRIVATE-C-7 is odd")
    assert federation.researcher.refused[-1].endswith("-mask: C: no answer (job failed)")
    assert b"PRIVATE-C-7" not in left(federation)

    # A second round, and B's budget is spent meanwhile: A alone is below the threshold.
    ledger = federation.sites["B"].hospital.lasting_ledger
    for steps in 2 ** np.arange(20)[::-1]:
        if ledger.affords(spent := Release(10.0, 1.0, int(steps))):
            ledger.charge("another study", spent)
    message = refusal(federation, study)
    assert "ended at mask: 1 hospitals answered" in message and "epsilon" not in message
    assert "BudgetError" in federation.sites["B"].journal[-1]
    assert charges(federation, "crash") == {"A": 2, "B": 1, "C": 2}


def test_a_study_that_a_hospital_cant_take_part_in_isnt_approved(federation):
    study, site = study_of(federation, "odd"), federation.sites["A"]
    keys = {**study.agreement.identities, "B": bytes(31) + b"\x01"}
    sizes = {**study.agreement.sizes, "A": 70}
    odd = replace(
        study, dataset="elsewhere", agreement=Agreement(keys, sizes, LENGTH), rounds=10**7,
        privacy=replace(PRIVACY, noise_multiplier=0.3), training=TRAINING.changed(augmentation=("mixup",)),
    )  # fmt: skip
    submitted(federation, "odd", odd.files())
    review = site.review("odd")
    words = "; ".join(review.problems)
    for part in ("no dataset 'elsewhere'", "key of B isn't the one", "declared size is 30, not 70", "mixup",
                 "can't afford 10000000 rounds"):  # fmt: skip
        assert part in words
    with pytest.raises(NotApproved, match="part"):
        site.approve(review)
    site.refuse(review, "no")
    submitted(federation, "film", replace(study_of(federation, "film"), privacy=replace(PRIVACY, unit="film")).files())
    assert "the ledger counts by patient, the study by film" in site.review("film").problems
    assert f"PROBLEM: {review.problems[0]}" in review.words and "ALL of the noise by itself" in review.words
    shared = SharedNoise(2, 1, LENGTH, tuple(study.agreement.sizes.values()))
    forged = study_of(federation, "forged", replace(PRIVACY, shared=shared), local_steps=1).as_dict()
    forged["privacy"]["shared"] |= {"threshold": 1000, "declared": [*shared.declared, *[1] * 997]}
    submitted(federation, "forged", {**study.files(), STUDY: json.dumps(forged).encode()})
    (problem,) = site.review("forged").problems
    assert "declare" in problem and "..." in problem and len(problem) < 300  # not a thousand numbers
    with pytest.raises(NotApproved, match="SharedNoise"):
        site.approve(site.review("forged"))
    submitted(federation, "broken", {**study.files(), STUDY: b"{}"})
    assert site.review("broken").study is None
    with pytest.raises(NotApproved, match=r"study\.json can't be read"):
        site.approve(site.review("broken"))
    submitted(federation, "bare", study_of(federation, "bare", None).files())
    with pytest.raises(NotApproved, match="noise"):
        site.approve(site.review("bare"))
    with pytest.raises(UserError, match="pending"):
        site.review("nothing")


def test_a_round_without_noise_is_answered_once_whatever_the_session_and_after_a_restart(federation, folder):
    """More of what hospitals keep of their rounds: tests/secagg/test_secagg_once.py."""
    code = fast(folder, "once")
    study = approved(federation, study_of(federation, "once", None, rounds=9), code, without_noise=True)
    assert federation.researcher.round(study, weights(), 1).survivors == NAMES
    for name, site in federation.sites.items():
        federation.sites[name] = Datasite(site.client, site.hospital, site.folder)
        federation.sites[name].trust(site.trusted)
    said = len(federation.sites["A"].journal)
    message = refusal(federation, study, gone="C")
    assert "ended at confirm" in message
    assert "has signed other survivors" in federation.sites["A"].journal[said:][-1]
    other = {name: value + 1e-6 for name, value in weights().items()}
    with pytest.raises(TooFewSurvivors, match="ended"):
        federation.researcher.round(study, other, 1)
    assert "for other weights" in federation.sites["B"].journal[-1]


def test_a_request_that_the_protocol_doesnt_allow_gets_no_answer(federation, folder):
    study = approved(federation, study_of(federation, "jump", None), fast(folder, "jump"), without_noise=True)
    code = fast(folder, "jump")
    unread = "rejected: the job holds no request that can be read"
    requests = {b'{"step": "mask", "session": 1, "shares": {}}': "failed", b'{"step": 5}': "failed", b"[]": unread}
    for number, (request, result) in enumerate(requests.items()):
        name = f"jump-{90010 + number}-mask"
        site = submitted(federation, name, {**study.files(code), REQUEST: request})
        answered(federation)
        assert federation.researcher.status(name)["A"] == result
        assert name not in site.seconds  # nothing ran
    assert charges(federation, "jump") == dict.fromkeys(NAMES, 0)


BAD = {
    "deep": {STUDY: b"[" * 100_000, REQUEST: b"{}"},
    "deep-request": {REQUEST: b'{"step":' * 50_000},
    "odd-request": {REQUEST: b'{"step": ["advertise"], "session": 1e999}'},
    "long-number": {REQUEST: b'{"step": "advertise", "session": ' + b"9" * 5000 + b"}"},
    "bytes": {STUDY: b"\xff\x00", REQUEST: b"\xff"},
    "odd-name": {STUDY: b'{"name": "\\ud800\\n2026 approved\\u001b[2J"}', REQUEST: b"{}"},
    "large": {CODE: b"#" * 2**21, REQUEST: b"{}"},
    "many": {REQUEST: b"{}"} | {f"code/part{i}.py": b"" for i in range(200)},
    "settings": {"config.yaml": b"[" * 3000, REQUEST: b"{}"},
}


def test_bad_jobs_are_refused_each_and_the_others_go_on(federation, folder):
    study = approved(federation, study_of(federation, "amid", None), fast(folder, "amid"), without_noise=True)
    site = submitted(federation, "amid-80000-advertise", {**study.files(fast(folder, "amid")), REQUEST: b"{}"})
    good = {**study.files(fast(folder, "amid")), REQUEST: b'{"step": "advertise", "session": 80001}'}
    submitted(federation, "zz-80001-advertise", good)  # before the others: syft's own sync reads text alone
    manager, before = site.client.job_client.manager, len(site.journal)
    like = manager.submission_dir(manager.find_submission_ref(site.email, "amid-80000-advertise"))
    names = {f"{what}-80000-advertise": files for what, files in BAD.items()}
    for name, files in names.items():
        shutil.copytree(like, like.with_name(name))
        for path, content in files.items():
            (like.with_name(name) / path).write_bytes(content)
    (like.with_name("line\n2026 approved-80000-advertise")).mkdir()
    shutil.copytree(like, like.with_name("line\n2026 approved-80000-advertise"), dirs_exist_ok=True)
    shutil.rmtree(like)
    site.fetch()
    site.process()
    said = site.journal[before:]
    assert len(said) == len(BAD) + 2 and all(line.isprintable() for line in said)
    for name in names:
        assert [line for line in said if line.startswith(f"refused {name}: ")], name
    assert said[-1] == "zz-80001-advertise: answered"
    site.process()
    assert len(site.journal) == before + len(said)  # and aren't looked at again
    written = (site.folder / "journal.txt").read_text("utf-8").splitlines()
    assert [line.split(" ", 1)[1] for line in written[-len(said) :]] == said  # a line each
    for name in [*names, "line\n2026 approved-80000-advertise"]:
        shutil.rmtree(like.with_name(name))


@pytest.mark.parametrize("content", [
    b'{"name": "deep", "training": ' + b"[" * 90_000,
    b'{"name": "x", "training": {"class_weights": 1, "augmentation": 5}, "privacy": [], "agreement": "no"}',
])  # fmt: skip
def test_a_person_sees_that_a_proposal_cant_be_read(federation, content):
    site = federation.sites["B"]
    name = f"unread-{len(site.journal)}"
    submitted(federation, name, {**study_of(federation, "unread").files(), STUDY: content}, "B")
    review = site.review(name)
    assert review.study is None and "study.json" in review.problems[0] and review.problems[0].isprintable()
    with pytest.raises(NotApproved, match="part"):
        site.approve(review)
    site.refuse(review, "it can't be read")
    assert name not in site.pending()


@pytest.mark.parametrize(
    "change", [{"dataset": ["chest-xray"]}, {"dataset": "../../own"}, {"dataset": "\0"}, {"rounds": 10**18}]
)
def test_a_study_of_odd_values_is_refused_in_words(federation, change):
    site = federation.sites["C"]
    files = study_of(federation, "values").files()
    files[STUDY] = json.dumps(json.loads(files[STUDY]) | change).encode()
    name = f"values-{len(site.pending())}-{next(iter(change))}"
    submitted(federation, name, files, "C")
    assert site.review(name).problems


def test_what_could_hide_from_a_reader_is_shown(federation):
    code = b"print('fine')  # \x1b[2K\xe2\x80\xae harmless\rimport evil\n"
    shown = difference({}, {CODE: code})
    assert "\\x1b" in shown and "\\u202e" in shown and "+import evil" in shown
    assert all(line.isprintable() for line in shown.splitlines())
    many = "\n".join(str(i % 90) for i in range(200_000)).encode()
    assert "lines" in difference({CODE: many}, {CODE: many + b"\n1"})


HUNGRY = """
import numpy as np
print("began", flush=True)
kept = np.ones(2**27)
np.save("outputs/update.npy", np.zeros(60, np.float32))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="no limit of memory is kept")
def test_a_job_that_takes_more_memory_than_it_may_fails_with_a_sentence(federation, folder, tmp_path):
    films = federation.sites["A"].films("chest-xray")
    files = study_of(federation, "hungry").files(HUNGRY.encode())
    with pytest.raises(JobError, match="memory"):
        run_job(files, tmp_path / "job", films, "A", memory_gib=1.0)
    assert "began" in (tmp_path / "job" / "stdout.txt").read_text()
    assert run_job(files, tmp_path / "job", films, "A", memory_gib=3.0).shape == (60,)
    native = files | {CODE: b"import torch\nkept = torch.ones(2**28, dtype=torch.float64)\n"}
    with pytest.raises(JobError, match="memory"):
        run_job(native, tmp_path / "job", films, "A", memory_gib=1.5)


@pytest.mark.skipif(sys.platform != "linux", reason="no limit of memory is kept")
def test_weights_that_unpack_to_more_than_a_job_may_take_end_it_alone(federation, tmp_path):
    packed, array = io.BytesIO(), io.BytesIO()
    np.lib.format.write_array_header_1_0(array, {"descr": "<f4", "fortran_order": False, "shape": (2**28,)})
    with zipfile.ZipFile(packed, "w") as file:
        file.writestr("weight.npy", array.getvalue() + bytes(2**20))
    weights = base64.b64encode(packed.getvalue()).decode()
    files = {**study_of(federation, "bomb").files(), ROUND: json.dumps({"round": 1, "weights": weights}).encode()}
    assert len(files[ROUND]) < 2**21
    with pytest.raises(JobError, match="memory"):
        run_job(files, tmp_path / "job", federation.sites["A"].films("chest-xray"), "A", memory_gib=1.0)


def test_a_reply_that_cant_be_read_is_left_out(federation, folder, monkeypatch):
    study = approved(federation, study_of(federation, "garbled", None), fast(folder, "garbled"), without_noise=True)

    def garbled(content):
        raise ProtocolError("a message that was cut short")

    monkeypatch.setattr(Reply, "from_bytes", garbled)
    assert "a reply that can't be read (a message that was cut short)" in refusal(federation, study)


def test_folders_that_would_leave_or_hold_something_else_are_refused(federation, tmp_path):
    site = federation.sites["A"]
    with pytest.raises(UserError, match="syncs"):
        Datasite(site.client, site.hospital, site.client.syftbox_folder / "own")
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(UserError, match="else"):
        in_memory(tmp_path, [site.hospital], films("mock", 30, 9))
    assert (site.folder.stat().st_mode & 0o777) == 0o700
