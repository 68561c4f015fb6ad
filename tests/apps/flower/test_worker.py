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
from flwr.app import Message
from flwr.clientapp import ClientApp

from primia_lite import secagg
from primia_lite.apps.flower import (
    app as flower_app,
)
from primia_lite.apps.flower import (
    grid as flower_grid,
)
from primia_lite.apps.flower import (
    process as flower_process,
)
from primia_lite.apps.flower import (
    setup as flower_setup,
)
from primia_lite.apps.flower import (
    worker as flower_worker,
)
from primia_lite.apps.flower.hospital import CONFIG, IDENTITY, STUDY, Behind, OtherStudy, SiteInFolder
from primia_lite.apps.flower.worker import SOCKET, Relay
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


def weights_of(folder: Path, agreed: Study) -> dict[str, np.ndarray]:
    config = tomllib.loads((folder / "server" / "server.toml").read_text())
    state = ServerOptimizer.start(agreed.training, Schedule(2), tuple(config["in_shape"]), agreed.seed).state
    return {name: value.numpy() for name, value in state.items()}


def test_a_round_through_it_ends_with_the_sum(worker):
    folder, _ = worker
    agreed = Study.from_bytes((folder / "server" / "study.json").read_bytes())
    sites = {name: SiteInFolder(folder / name) for name in "ABC"}
    weights = weights_of(folder, agreed)
    server = secagg.SecAggServer(agreed.agreement, 2)

    def exchange(step, requests):
        for name, request in requests.items():
            site = Relay.to(folder / "A") if name == "A" else sites[name]
            (reply,) = site.answer(sites[name].fingerprint, [request], 1, weights if step == "mask" else None)
            assert (reply.sender, reply.step) == (name, step)
            yield reply

    assert secagg.run_round(server, exchange) == []
    assert list(server.survivors) == ["A", "B", "C"]
    expected = np.zeros(agreed.agreement.length, np.uint32)
    for name, site in sites.items():  # without DP a round's update is drawn from the study's seed
        update = site._update(1, weights)
        expected += agreed.agreement.fixed_point.quantise(update, agreed.agreement.weight(name))
    assert np.array_equal(server.total, expected.view(np.int32))
    # Its memory holds nothing that the folder doesn't: another process goes on where it was.
    request = secagg.SecAggServer(agreed.agreement, 2).requests()["A"]
    for site in (sites["A"], Relay.to(folder / "A")):
        with pytest.raises(Behind) as caught:
            site.answer(sites["A"].fingerprint, [request])
        assert caught.value.last == 2


def test_nobody_else_can_reach_it(worker):
    folder, _ = worker
    place = Path((folder / "A" / SOCKET).read_text()).parent
    assert place.stat().st_mode & 0o777 == 0o700
    assert (folder / "A" / SOCKET).stat().st_mode & 0o777 == 0o600


def test_why_it_refuses_stays_in_the_hospitals_log(worker):
    folder, _ = worker
    relay = lambda: Relay.to(folder / "A")  # noqa: E731
    with pytest.raises(OtherStudy, match="need the same study.json"):
        relay().answer("0" * 64, [])
    own = SiteInFolder(folder / "A").fingerprint
    assert relay().answer(own, [b"not a request"]) == []
    identity = folder / "A" / "identity.pem"
    identity.chmod(0o644)
    with pytest.raises(EOFError) as caught:
        relay().answer(own, [])
    assert str(caught.value) == ""
    assert "can be read by others" in (folder / "A" / "hospital.log").read_text()
    identity.chmod(0o600)
    assert relay().answer(own, []) == []


def test_a_study_joined_meanwhile_counts(mortal):
    folder, _ = mortal
    own = SiteInFolder(folder / "A").fingerprint
    assert Relay.to(folder / "A").answer(own, []) == []
    study = folder / "A" / "study.json"
    study.write_bytes(study.read_bytes() + b"\n")
    with pytest.raises(OtherStudy):
        Relay.to(folder / "A").answer(own, [])


def test_films_that_the_hospital_deletes_are_read_again(worker):
    folder, _ = worker
    agreed = Study.from_bytes((folder / "server" / "study.json").read_bytes())
    weights = weights_of(folder, agreed)
    sites = {name: SiteInFolder(folder / name) for name in "BC"}

    def a_round(session):
        server = secagg.SecAggServer(agreed.agreement, session)

        def exchange(step, requests):
            for name, request in requests.items():
                site = Relay.to(folder / "A") if name == "A" else sites[name]
                yield from site.answer(sites["B"].fingerprint, [request], 1, weights if step == "mask" else None)

        assert secagg.run_round(server, exchange) == []
        return server.total

    first, again = a_round(12), a_round(14)
    assert np.array_equal(first, again)
    (kept,) = (folder / "A").glob("films-*.npz")
    kept.unlink()
    assert np.array_equal(first, a_round(16)) and kept.exists(), "films that stay in memory write no file"


@pytest.mark.parametrize(
    ("before", "after", "again"), [(["f"], ["f"], False), ([], ["f"], False), (["f"], [], True), (["f"], ["g"], True)]
)
def test_films_deleted_while_a_message_is_answered_are_read_again(monkeypatch, tmp_path, before, after, again):
    made, seen = [], iter([before, after, after, after])
    folder = tmp_path
    for name in (CONFIG, STUDY, IDENTITY):
        (folder / name).touch()
    monkeypatch.setattr(flower_worker, "_films", lambda _: next(seen))
    monkeypatch.setattr(flower_worker, "SiteInFolder", lambda _: made.append(1))
    monkeypatch.setattr(flower_worker, "_answer", lambda site, parts: [b"{}"])
    state = flower_worker.Held(folder)
    state.answer([])
    state.answer([])
    assert len(made) == (2 if again else 1)


def test_a_socket_s_name_in_a_folder_of_others_is_not_trusted(worker, monkeypatch):
    folder, _ = worker
    place = Path((folder / "A" / SOCKET).read_text()).parent
    place.chmod(0o755)
    assert Relay.to(folder / "A") is None
    place.chmod(0o700)
    own = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: own + 1)
    assert Relay.to(folder / "A") is None


def test_one_that_dies_in_the_middle_of_a_message_leaves_a_refusal(mortal):
    folder, process = mortal
    own = SiteInFolder(folder / "A").fingerprint
    process.send_signal(signal.SIGSTOP)
    content, replies = flower_app.request(own, [b"{}"], 1, None), []
    thread = threading.Thread(target=lambda: replies.extend(ask(folder / "A", content)))
    thread.start()
    time.sleep(0.5)
    assert replies == []
    process.kill()
    thread.join(600)
    (reply,) = replies
    assert reply.has_error() and reply.error.reason == "refused: the hospital's log tells why"


def test_it_is_started_again_when_it_dies(tmp_path):
    mark = tmp_path / "mark"
    code = f"import sys; open({str(mark)!r}, 'a').write('x'); sys.exit(3)"
    command = [sys.executable, "-c", code]
    threading.Thread(target=flower_process.keep_alive, args=(command, 0.05), daemon=True).start()
    wait_for(lambda: mark.exists() and len(mark.read_text()) >= 3)


@pytest.mark.parametrize("how", ["kill", "terminate", "closed"])
def test_when_it_ends_flowers_process_answers_by_itself(mortal, how):
    folder, process = mortal
    process.stdin.close() if how == "closed" else getattr(process, how)()
    process.wait(600)
    assert Relay.to(folder / "A") is None
    if how != "kill":
        assert not (folder / "A" / SOCKET).exists()
    site = SiteInFolder(folder / "A")
    request = secagg.SecAggServer(site.agreement, 2).requests()["A"]
    (reply,) = ask(folder / "A", flower_app.request(site.fingerprint, [request], 1, None))
    assert [r.step for r in flower_app.replies(reply)] == ["advertise"]


def ask(folder, content):
    """What Flower's process at a hospital replies."""
    app = ClientApp()
    app.train()(lambda message, context: flower_app.answer_in(folder, message))
    return flower_grid.InlineGrid([app]).send_and_receive([Message(content, 1, "train")])


def test_flowers_process_imports_no_torch():
    code = "import sys; import primia_lite.apps.flower.app; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
