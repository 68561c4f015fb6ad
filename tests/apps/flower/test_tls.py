"""SuperLink and three SuperNodes as processes of their own, over TLS on loopback."""

import json
import signal
import socket
import threading
import time
from pathlib import Path

import pytest
import torch

from primia_lite.apps.flower import deploy as flower_deploy
from primia_lite.apps.flower import setup as flower_setup
from primia_lite.apps.flower.hospital import load_films
from primia_lite.apps.flower.worker import SOCKET
from primia_lite.federation.aggregation import SecureAggregation
from primia_lite.federation.hospital import Hospital
from primia_lite.federation.rounds import Schedule, federate
from primia_lite.federation.study import Study
from primia_lite.models import prepare

pytestmark = [pytest.mark.flower, pytest.mark.slow]
FILMS = {"source": "phantom", "size": 28, "n_films": 60}
SETTINGS = {
    "training": {"learning_rate": 0.1},
    "timeouts": {"step_timeout_s": 60.0, "mask_timeout_s": 60.0, "start_timeout_s": 60.0},
}
# An app of the server's operator that would run its own code at the hospitals.
THEIRS = {
    "pyproject.toml": """[project]
name = "theirs"
version = "1.0.0"
description = "not ours"
license = "Apache-2.0"
dependencies = []
[tool.flwr.app]
publisher = "somebody"
[tool.flwr.app.components]
serverapp = "theirs.app:server"
clientapp = "theirs.app:client"
[tool.flwr.app.config]
mark = ""
""",
    "theirs/__init__.py": "",
    "theirs/app.py": """from pathlib import Path
from flwr.app import Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
client = ClientApp()
server = ServerApp()

@client.train()
def train(message, context):
    Path(context.run_config["mark"]).touch()
    return Message(RecordDict(), reply_to=message)

@server.main()
def main(grid, context):
    Path(context.run_config["mark"] + "-asked").touch()
    messages = [Message(RecordDict(), node, "train") for node in grid.get_node_ids()]
    list(grid.send_and_receive(messages, timeout=8))
""",
}


def free_ports(n):
    """The first of so many free ports in a row."""
    for first in range(20000, 60000, 17):
        probes = []
        try:
            for port in range(first, first + n):
                probes.append(socket.create_server(("127.0.0.1", port)))
            return first
        except OSError:
            continue
        finally:
            for probe in probes:
                probe.close()
    raise AssertionError("no free ports")


def wait_for(condition, seconds, what):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"no {what} within {seconds} s"
        time.sleep(0.1)


def says(folder: Path, name: str, text: str) -> bool:
    path = folder / name / "hospital.log"
    return path.exists() and text in path.read_text()


@pytest.fixture
def federation(tmp_path):
    folder = tmp_path / "federation"
    options = {"target_epsilon": None, "rounds": 2, "model": "mlp", "settings": SETTINGS}
    flower_setup.make_all(folder, ["A", "B", "C"], FILMS, port=free_ports(4), **options)
    try:
        assert flower_deploy.start(folder) == ["superlink", "A", "B", "C"]
        wait_for(lambda: all((folder / name / SOCKET).exists() for name in "ABC"), 600, "hospitals' own processes")
        yield folder
    finally:
        flower_deploy.stop(folder)
    assert flower_deploy.running(folder) == {}


def test_a_supernode_killed_in_a_round_leaves_the_sum_of_the_others(federation, tmp_path):
    found, errors = {}, []

    def train():
        try:
            found.update(flower_deploy.run(federation, None, show=lambda line: None))
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=train)
    thread.start()
    # C has shared its secrets, so A and B mask for it; then it is gone, without a word.
    wait_for(lambda: says(federation, "C", "answered share") or errors, 600, "share of C")
    assert errors == []
    flower_deploy.end(flower_deploy.running(federation)["C"], signal.SIGKILL)
    assert not says(federation, "C", "answered mask")
    thread.join(600)
    assert errors == [] and found["done"] == 2
    assert [record["absent"] for record in found["rounds"]] == [["C"], ["C"]]
    assert all(says(federation, name, "answered unmask") for name in "AB")
    # It was the hospital's own process that trained and masked, and none of Flower's, which end with their message.
    (worker,) = [
        p for p in flower_deploy.running(federation)["A"].children() if "flower.worker" in " ".join(p.cmdline())
    ]
    masked = [line for line in (federation / "A" / "hospital.log").read_text().splitlines() if "answered mask" in line]
    assert len(masked) == 2 and all(f"[{worker.pid}]" in line for line in masked)

    # What came out is what two hospitals give in one process: the sum of exactly their updates, all masks gone.
    study = Study.from_bytes((federation / "server" / "study.json").read_bytes())
    group = []
    for i, name in enumerate("ABC"):
        films = prepare("mlp", load_films({**FILMS, "part": [i, 3]}))
        group.append(Hospital(name, films, declared_size=study.agreement.sizes[name]))
    aggregator = SecureAggregation(absent=lambda number, step: {"C"} if number > 1 or step == "mask" else ())
    here = federate(group, study.training, Schedule(2), aggregator=aggregator, progress=None)
    there = torch.load(federation / "server" / "run" / "model.pt", weights_only=True)
    assert here.state.keys() == there.keys()
    for key in there:
        torch.testing.assert_close(there[key], here.state[key], atol=1e-6, rtol=0)

    # Whoever reaches the server's control API may submit an app; at a hospital it doesn't run.
    app, mark = tmp_path / "theirs-app", tmp_path / "mark"
    for name, text in THEIRS.items():
        (app / name).parent.mkdir(parents=True, exist_ok=True)
        (app / name).write_text(text)
    number = flower_deploy.submit(federation, {"mark": str(mark)}, app)
    wait_for(lambda: flower_deploy.run_status(federation, number)[0].startswith("finished"), 600, "end of their run")
    assert (tmp_path / "mark-asked").exists() and not mark.exists()
    log = (federation / ".run" / "A.log").read_text()
    assert "another app than the one that this hospital has installed" in log

    status = flower_deploy.status(federation).splitlines()
    assert "C: stopped" in status and sum("finished:completed" in line for line in status) == 2
    assert json.loads((federation / "A" / "rounds.json").read_text())
