"""Flower as the transport: seconds of a round over TLS, beside Flower's own time, and of both apps in one process.

Over TLS: a SuperLink and three SuperNodes on this machine, as `primia-lite deploy` starts them; litenet's head on
phantom films, with differential privacy. Counted are the rounds after the first, which have three exchanges each.
Flower's own time is that of three exchanges of empty messages through an app that does nothing, with the same processes
and settings: once with our way to wait for replies (a look every 0.2 s), once with Flower's (`send_and_receive`, every
3 s).

In one process: the same training by run_inline() and by federate(), in turns.

Without Flower in this environment the one that `make flower` made is used.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

from primia_lite import runtime
from primia_lite.apps.bench import Options
from primia_lite.config import UserError, repo_root

EXCHANGES, TLS_ROUNDS, INLINE_RUNS = 3, 6, 5
FILMS = {"source": "phantom", "size": 64, "n_films": 300}
EMPTY = {
    "pyproject.toml": """[project]
name = "empty"
version = "1.0.0"
description = "does nothing"
license = "Apache-2.0"
dependencies = []
[tool.flwr.app]
publisher = "primia-lite"
[tool.flwr.app.components]
serverapp = "empty.app:server"
clientapp = "empty.app:client"
[tool.flwr.app.config]
rounds = 1
exchanges = 1
out = ""
""",
    "empty/__init__.py": "",
    "empty/app.py": """import json
import time
from pathlib import Path
from flwr.app import Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
client = ClientApp()
server = ServerApp()

@client.train()
def train(message, context):
    return Message(RecordDict(), reply_to=message)

def exchange(grid, theirs):
    messages = [Message(RecordDict(), node, "train") for node in grid.get_node_ids()]
    if theirs:
        return list(grid.send_and_receive(messages, timeout=600))
    waiting, replies = set(grid.push_messages(messages)), []
    while waiting:
        for reply in grid.pull_messages(waiting):
            waiting.discard(reply.metadata.reply_to_message_id)
            replies.append(reply)
        time.sleep(0.2)
    return replies

@server.main()
def main(grid, context):
    config = context.run_config
    found = {}
    exchange(grid, False)
    for way in ("ours", "theirs"):
        found[way] = []
        for _ in range(config["rounds"]):
            started = time.monotonic()
            for _ in range(config["exchanges"]):
                assert len(exchange(grid, way == "theirs")) == 3
            found[way].append(time.monotonic() - started)
    Path(config["out"]).write_text(json.dumps(found), "utf-8")
""",
}


def federation(folder: Path, port: int, rounds: int) -> Path:
    from primia_lite.apps.flower import setup as flower_setup

    flower_setup.make_all(folder, ["A", "B", "C"], FILMS, port=port, target_epsilon=8.0, rounds=rounds)
    return folder


def tls_rounds_s(folder: Path, rounds: int = TLS_ROUNDS) -> list[float]:
    """Seconds of each round after the first."""
    from primia_lite.apps.flower import deploy as flower_deploy

    flower_deploy.start(folder)
    try:
        # So that asking for the run's status, a process of seconds, disturbs no round.
        ended = flower_deploy.run(folder, rounds, ask_s=3600.0, show=lambda line: print(line, flush=True))["ended_s"]
    finally:
        flower_deploy.stop(folder)
    return [after - before for before, after in itertools.pairwise(ended)]


def flower_s(folder: Path, rounds: int = TLS_ROUNDS) -> dict[str, list[float]]:
    """Seconds of as many exchanges as a round has, of an app that does nothing: waiting ``ours`` and ``theirs``."""
    from primia_lite.apps.flower import deploy as flower_deploy

    app, out = folder / "empty-app", folder / "empty.json"
    for name, text in EMPTY.items():
        (app / name).parent.mkdir(parents=True, exist_ok=True)
        (app / name).write_text(text, "utf-8")

    def stock(arguments):  # ours lets no other app in
        module, *others = arguments
        others = others[module == "supernode" :]  # the hospital's folder
        return [sys.executable, "-c", f"from flwr.{module}.cli import flower_{module} as f; f()", *others]

    with mock.patch.object(flower_deploy, "process_command", stock):
        flower_deploy.start(folder)
    try:
        settings = {"rounds": rounds - 1, "exchanges": EXCHANGES, "out": str(out.resolve())}
        run = flower_deploy.submit(folder, settings, app)
        deadline = time.monotonic() + 1800
        while not out.exists():
            if time.monotonic() > deadline:
                raise UserError(f"the empty app hasn't ended: {flower_deploy.run_status(folder, run)}")
            time.sleep(1)
        time.sleep(1)
        return json.loads(out.read_text("utf-8"))
    finally:
        flower_deploy.stop(folder)


def inline_s(runs: int = INLINE_RUNS, rounds: int = 10) -> tuple[list[float], list[float]]:
    """Seconds of training with three hospitals by run_inline() and by federate(), in turns; without DP."""
    import numpy as np
    import torch

    sys.path.append(str(repo_root() / "tests" / "apps" / "flower"))
    from flower_inline import run_inline

    from primia_lite.data.films import Films
    from primia_lite.federation.hospital import Hospital
    from primia_lite.federation.rounds import Schedule, federate
    from primia_lite.training import Training

    def films(seed: int, n: int = 1500, features: int = 2369) -> Films:  # as many as litenet has
        inputs = torch.randn(n, 1, features, generator=torch.Generator().manual_seed(seed))
        return Films(inputs, torch.arange(n) % 3, np.array([f"{seed}-{i}" for i in range(n)]), model="litenet")

    torch.set_num_threads(1)
    hospitals = [Hospital(name, films(seed)) for seed, name in enumerate("ABC")]
    training = Training(sample_rate=0.25, learning_rate=1.0, local_steps=None, local_epochs=1)
    found = ([], [])
    for _ in range(runs + 1):
        for times, way, options in zip(found, (run_inline, federate), ({}, {"progress": None}), strict=True):
            started = time.perf_counter()
            result = way(hospitals, training, Schedule(rounds), **options)
            times.append(time.perf_counter() - started)
            assert len(result.history) == rounds
    return found[0][1:], found[1][1:]  # the first ones import


def spread(values: list[float], unit: str) -> dict:
    values = [float(value) for value in values]
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "n": len(values), "unit": unit}


def measure(rounds: int = TLS_ROUNDS, port: int = 9400) -> dict[str, dict]:
    """Entries of a results file: ``flower_tls_round_s``, Flower's own time, what is on top, ``flower_inline_ratio``.

    Raises
    ------
    UserError
        Flower is installed neither here nor in ``.venv-flower``.
    """
    if find_spec("flwr") is None:
        return _elsewhere(rounds, port)
    with tempfile.TemporaryDirectory() as temporary:
        folder = federation(Path(temporary) / "federation", port, rounds)
        own = flower_s(folder, rounds)
        round_s = tls_rounds_s(folder, rounds)
    inline, here = inline_s()
    per_round = f"{EXCHANGES} exchanges, 3 hospitals on one machine"
    return {
        "flower_tls_round_s": spread(round_s, f"s a round over TLS, {per_round}"),
        "flower_own_s": spread(own["ours"], f"s, an app that does nothing, {per_round}, replies looked for as we do"),
        "flower_own_waiting_s": spread(own["theirs"], f"s, likewise, by Flower's send_and_receive, {per_round}"),
        "flower_tls_on_top_s": spread([value - statistics.median(own["ours"]) for value in round_s],
                                      "s a round on top of the median of flower_own_s"),
        "flower_inline_ratio": spread([a / b for a, b in zip(inline, here, strict=True)],
                                      "both apps in one process over federate(), time"),
    }  # fmt: skip


def _elsewhere(rounds: int, port: int) -> dict[str, dict]:
    python = repo_root() / ".venv-flower" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not python.exists():
        raise UserError("Flower isn't installed: run `make flower`, and start the benchmark again")
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary) / "out.json"
        command = [str(python), __file__, "--json", str(out), "--rounds", str(rounds), "--port", str(port)]
        if subprocess.run(command).returncode:
            raise UserError(f"the benchmark of Flower failed in {python.parent.parent.name}: see above")
        return json.loads(out.read_text("utf-8"))


def main() -> None:
    parser = Options("flower", __doc__)
    parser.add_argument("--rounds", type=int, default=TLS_ROUNDS, help=f"over TLS, at least 3 (default {TLS_ROUNDS})")
    parser.add_argument("--port", type=int, default=9400, help="the first of four (default 9400)")
    parser.add_argument("--json", type=Path, help="write what was found there, and no results file")
    options = parser.read()
    if options.rounds < 3:
        parser.error("--rounds must be at least 3")
    load = os.getloadavg() if hasattr(os, "getloadavg") else ()
    found = measure(options.rounds, options.port)
    for name, entry in found.items():
        print(f"{name:<22} {entry['median']:7.2f} ({entry['min']:.2f} to {entry['max']:.2f})  {entry['unit']}")
    if options.json:
        options.json.write_text(json.dumps(found), "utf-8")
        return
    origin = runtime.origin(
        data_source="phantom", data_fingerprint="drawn from the seeds", seeds=[0], command="primia-lite bench flower",
        load_average_before=list(load),
    )  # fmt: skip
    print(f"written to {runtime.write_results('flower', origin, found).name}")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
