"""The hospital's own process: it answers as its folder would, and gives nothing away when it can't."""

import os
import signal
import subprocess
import sys
import threading
import time
import tomllib
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from flower_inline import InlineGrid
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict

from primia_lite import secagg
from primia_lite.apps.flower import process as flower_process
from primia_lite.apps.flower import setup as flower_setup
from primia_lite.apps.flower.app import answer_in
from primia_lite.apps.flower.folder import CONFIG, IDENTITY, LOG, STUDY
from primia_lite.apps.flower.hospital import FolderHospital
from primia_lite.apps.flower.messages import replies, request
from primia_lite.apps.flower.worker import SOCKET, Held, connect
from primia_lite.federation.rounds import Schedule, ServerOptimizer
from primia_lite.federation.study import Study

pytestmark = pytest.mark.flower
FILMS = {"source": "phantom", "size": 28, "n_films": 60}


@contextmanager
def running(folder):
    """A study of three, and the process of hospital A."""
    flower_setup.make_all(folder, ["A", "B", "C"], FILMS, port=9300, target_epsilon=None, rounds=2, model="mlp")
    command = [sys.executable, "-m", "primia_lite.apps.flower.worker", str(folder / "A")]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
        try:
            wait_for(lambda: (folder / "A" / SOCKET).exists())
            yield folder, process
        finally:
            process.kill()


@pytest.fixture(scope="module")
def worker(tmp_path_factory):
    with running(tmp_path_factory.mktemp("worker") / "federation") as found:
        yield found


@pytest.fixture
def mortal(tmp_path):
    """One for a test that ends it."""
    with running(tmp_path / "federation") as found:
        yield found


def wait_for(condition, seconds=600):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


REFUSED = "refused: the hospital's log tells why"


def asked(folder: Path, content: RecordDict) -> Message:
    """What Flower's process at a hospital replies."""
    (reply,) = InlineGrid([lambda message: answer_in(folder, message)]).send_and_receive([Message(content, 1, "train")])
    return reply


def nothing(study: str) -> RecordDict:
    return request(study, [], 1, None)


def weights_of(folder: Path, agreed: Study) -> dict[str, np.ndarray]:
    config = tomllib.loads((folder / "server" / "server.toml").read_text())
    state = ServerOptimizer.start(agreed.training, Schedule(2), tuple(config["in_shape"]), agreed.seed).state
    return {name: value.numpy() for name, value in state.items()}


def a_round(folder: Path, session: int) -> secagg.SecAggServer:
    """Its hospital A is asked through its process."""
    agreed = Study.from_bytes((folder / "server" / "study.json").read_bytes())
    others = {name: FolderHospital(folder / name) for name in "BC"}
    weights, server = weights_of(folder, agreed), secagg.SecAggServer(agreed.agreement, session)

    def exchange(step, requests):
        given = weights if step == "mask" else None
        for name, text in requests.items():
            if name != "A":
                yield from others[name].answer(others[name].fingerprint, [text], 1, given)
                continue
            record = given and ArrayRecord({key: torch.from_numpy(value) for key, value in given.items()})
            yield from replies(asked(folder / "A", request(others["B"].fingerprint, [text], 1, record)))

    assert secagg.run_round(server, exchange) == []
    return server


def test_a_round_through_it_ends_with_the_sum(worker):
    folder, _ = worker
    server, agreed = a_round(folder, 2), FolderHospital(folder / "A").agreement
    assert list(server.survivors) == ["A", "B", "C"]
    expected = np.zeros(agreed.length, np.uint32)
    for name in "ABC":  # without DP a round's update is drawn from the study's seed
        site = FolderHospital(folder / name)
        update = site.compute_update(1, weights_of(folder, site.study))
        expected += agreed.fixed_point.quantise(update, agreed.weight(name))
    assert np.array_equal(server.total, expected.view(np.int32))
    # Its memory holds nothing that the folder doesn't: another process goes on where it was.
    again = request(site.fingerprint, [secagg.SecAggServer(agreed, 2).requests()["A"]], 0, None)
    assert asked(folder / "A", again).content["reply"] == ConfigRecord({"heads": [], "last": 2})
    assert FolderHospital(folder / "A").rounds.last_sessions() == (2, 0)


def test_nobody_else_can_reach_it(worker):
    folder, _ = worker
    place = Path((folder / "A" / SOCKET).read_text()).parent
    assert place.stat().st_mode & 0o777 == 0o700
    assert (folder / "A" / SOCKET).stat().st_mode & 0o777 == 0o600


def test_why_it_refuses_stays_in_the_hospitals_log(worker):
    folder, _ = worker
    own, identity = FolderHospital(folder / "A").fingerprint, folder / "A" / IDENTITY
    assert "study" in asked(folder / "A", nothing("0" * 64)).error.reason
    assert asked(folder / "A", request(own, [b"not a request"], 1, None)).error.reason == REFUSED
    identity.chmod(0o644)
    assert asked(folder / "A", nothing(own)).error.reason == REFUSED
    identity.chmod(0o600)
    assert "can be read by others" in (folder / "A" / LOG).read_text()


def test_a_study_joined_meanwhile_counts(mortal):
    folder, _ = mortal
    own, study = FolderHospital(folder / "A").fingerprint, folder / "A" / STUDY
    assert asked(folder / "A", nothing(own)).error.reason == REFUSED
    study.write_bytes(study.read_bytes() + b"\n")
    assert "agreed to study" in asked(folder / "A", nothing(own)).error.reason


def test_films_that_the_hospital_deletes_are_read_again(worker):
    folder, _ = worker
    first, again = a_round(folder, 12).total, a_round(folder, 14).total
    assert np.array_equal(first, again)
    (kept,) = (folder / "A").glob("films-*.npz")
    kept.unlink()
    assert np.array_equal(first, a_round(folder, 16).total)
    assert kept.exists(), "films that stay in memory write no file"


@pytest.mark.parametrize(
    ("before", "after", "again"), [("f", "f", False), ("", "f", False), ("f", "", True), ("f", "g", True)]
)
def test_films_deleted_while_a_message_is_answered_are_read_again(tmp_path, before, after, again):
    def films(names):
        for path in tmp_path.glob("films-*.npz"):
            if path.stem[-1] not in names:
                path.unlink()
        for name in names:
            (tmp_path / f"films-{name}.npz").touch(exist_ok=True)

    class Asked:
        name = "A"

        def reply(self, _):
            kept = {path.name: path.stat().st_ctime_ns for path in tmp_path.glob("films-*.npz")}
            if {f"films-{name}.npz" for name in after} != kept.keys():
                films(after)

    for name in (CONFIG, STUDY, IDENTITY):
        (tmp_path / name).touch()
    films(before)
    made = []
    held = Held(tmp_path, lambda folder: made.append(1) or Asked())
    for _ in range(2):
        held.reply(nothing("0"))
    assert len(made) == (2 if again else 1)


def test_a_socket_s_name_in_a_folder_of_others_is_not_trusted(worker, monkeypatch):
    folder, _ = worker
    place = Path((folder / "A" / SOCKET).read_text()).parent
    place.chmod(0o755)
    assert connect(folder / "A") is None
    place.chmod(0o700)
    own = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: own + 1)
    assert connect(folder / "A") is None


def test_one_that_dies_in_the_middle_of_a_message_leaves_a_refusal(mortal):
    folder, process = mortal
    own, found = FolderHospital(folder / "A").fingerprint, []
    process.send_signal(signal.SIGSTOP)
    thread = threading.Thread(target=lambda: found.append(asked(folder / "A", nothing(own))))
    thread.start()
    time.sleep(0.5)
    assert found == []
    process.kill()
    thread.join(600)
    assert found[0].error.reason == REFUSED


def test_it_is_started_again_when_it_dies(tmp_path):
    mark = tmp_path / "mark"
    code = f"import sys; open({str(mark)!r}, 'a').write('x'); sys.exit(3)"
    command = [sys.executable, "-c", code]
    threading.Thread(target=flower_process.keep_alive, args=(command, 0.05), daemon=True).start()
    wait_for(lambda: mark.exists() and len(mark.read_text()) >= 3)


@pytest.mark.parametrize("how", ["terminate", "closed"])
def test_when_it_ends_flowers_process_answers_by_itself(mortal, how):
    folder, process = mortal
    process.stdin.close() if how == "closed" else getattr(process, how)()
    process.wait(600)
    assert connect(folder / "A") is None
    assert not (folder / "A" / SOCKET).exists()
    site = FolderHospital(folder / "A")
    text = secagg.SecAggServer(site.agreement, 2).requests()["A"]
    reply = asked(folder / "A", request(site.fingerprint, [text], 1, None))
    assert [r.step for r in replies(reply)] == ["advertise"]


def test_flowers_process_imports_no_torch():
    code = "import sys; import primia_lite.apps.flower.app; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
