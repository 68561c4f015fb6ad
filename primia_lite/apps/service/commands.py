"""The commands ``serve`` and ``diagnose``, and a service as another process."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from primia_lite.config import UserError
from primia_lite.runtime import cores


def serve(
    models: Sequence[str], *, demo: bool = False, host: str = "127.0.0.1", port: int = 8000, proxy: str | None = None,
    limits: bool = True, workers: int | None = None,
) -> int:  # fmt: skip
    """Offer models until stopped.

    Parameters
    ----------
    models : files saved by :meth:`primia_lite.encrypted.ModelCard.save`, with a name before it (``NAME=FILE``)
        or named as its file
    proxy : address of the reverse proxy before it; without one, only this machine is served
    workers : processes that compute; by default one for each core, at most 4
    """
    from primia_lite.apps.service.connection import on_this_machine
    from primia_lite.apps.service.server import NO_LIMITS, uvicorn_server
    from primia_lite.encrypted.model_card import ModelCard

    workers = min(4, cores()) if workers is None else workers
    if workers < 1:
        raise UserError(f"--workers is {workers}: at least one process must compute")
    if proxy is None and (host in ("0.0.0.0", "::") or not on_this_machine(host)):
        raise UserError(
            f"--host {host} can be reached from other machines: put a reverse proxy with TLS before it, as "
            "docs/service.md shows, and name its address by --behind-proxy"
        )
    with _bind(host, port) as line:
        files = [_named(entry) for entry in models]
        names = [name for name, _ in files] + ["demo"] * demo
        if len(set(names)) < len(names):
            raise UserError(f"two models are named {max(names, key=names.count)}: give one another name, as NAME=FILE")
        cards = {name: ModelCard.load(path) for name, path in files} | ({"demo": demo_card()} if demo else {})
        if not cards:
            raise UserError("name a model file to offer (notebook 05 saves some), or pass --demo")
        where = f"[{host}]" if ":" in host else host
        print(f"offering {', '.join(cards)} at http://{where}:{port} (Ctrl-C stops); not for clinical use", flush=True)
        server = uvicorn_server(cards, limits=None if limits else NO_LIMITS, workers=workers, proxy=proxy)
        with contextlib.suppress(KeyboardInterrupt):
            server.run(sockets=[line])
    return 0


def _named(entry: str) -> tuple[str, str]:
    """Name and file of ``FILE`` or ``NAME=FILE``. Either may hold ``=``: what counts is which file is there."""
    splits = [(entry[:i], entry[i + 1 :]) for i, letter in enumerate(entry) if letter == "="]
    ways = [(Path(entry).stem, entry), *((name, path) for name, path in splits if name and path and "/" not in name)]
    if found := [(name, path) for name, path in ways if Path(path).exists()]:
        return found[0]
    raise UserError(f"there is no {' and no '.join(path for _, path in ways)}: save a model there by ModelCard.save")


def _bind(host: str, port: int) -> socket.socket:
    # By its protocol asyncio tells that answers shouldn't wait for more of them: 40 ms each.
    line = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        if os.name == "posix":
            line.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        line.bind((host, port))
    except (OSError, OverflowError) as error:
        line.close()
        raise UserError(
            f"can't listen at {host}, port {port} ({error}): choose another with --port or --host"
        ) from error
    return line


def demo_card(n_films: int = 300, size: int = 64, seed: int = 0):
    """``litenet`` trained on phantom films, in a few seconds."""
    from primia_lite import models
    from primia_lite.data import load
    from primia_lite.encrypted.model_card import ModelCard
    from primia_lite.privacy.rng import SecureGenerator
    from primia_lite.training import Training, train

    print("training litenet on phantom films ...", flush=True)
    films = load("phantom", size, n_films=n_films, seed=seed)
    inputs = models.prepare("litenet", films.of_split("train"))
    recipe = Training(
        "litenet", len(films.class_names), sample_rate=0.25, local_steps=None, local_epochs=10, learning_rate=4.0
    )
    network = models.build("litenet", len(films.class_names), inputs.inputs.shape[2:])
    train(network, inputs, recipe, None, SecureGenerator.from_seed(seed), 1.0)
    return ModelCard(
        "litenet", {}, films.class_names, size, tuple(inputs.inputs.shape[2:]), network.state_dict(),
        f"{n_films} phantom films (computer-made, no patients), without DP, seed {seed}",
    )  # fmt: skip


def diagnose(film: str, url: str, model: str | None = None, ca_file: str | None = None) -> str:
    """A film from a file, encrypted here, diagnosed there: a table."""
    from primia_lite.apps.service.client import RemoteServer
    from primia_lite.data.pixels import decode, to_square

    try:
        content = Path(film).read_bytes()
    except OSError as error:
        raise UserError(f"the film {film} can't be read: {error.strerror}") from error
    image = decode(content, film)
    with RemoteServer(url, model, ca_file=ca_file) as server:
        described = server.description
        logits = server.diagnose(to_square(image, described["image_size"]))
        costs = {cost.step: cost for cost in server.client.costs}
    shares = np.exp(logits - logits.max())
    shares /= shares.sum()
    lines = [f"{name:>12}  {share:6.1%}" for name, share in zip(described["class_names"], shares, strict=True)]
    lines.append(f"model {server.name} ({described['model']}, {described['trained_on']})")
    lines.append(f"sent: {costs['encrypt'].kib:.0f} KiB of ciphertext")
    return "\n".join([*lines, "a demonstration, not for clinical use"])


@contextlib.contextmanager
def running(cards: dict, *, limits: bool = True, wait_s: float = 600.0) -> Iterator[tuple[str, subprocess.Popen]]:
    """The service as another process on a free port of this machine, while the context lasts: its address, and it.
    ModelCards by name; ``wait_s`` for its first answer, on a machine that has much else to do."""
    import httpx

    with tempfile.TemporaryDirectory() as folder:
        files = [f"{name}={card.save(Path(folder) / f'{name}.pt')}" for name, card in cards.items()]
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        log = Path(folder) / "log"
        command = [sys.executable, "-m", "primia_lite", "serve", *files, "--port", str(port)]
        with log.open("wb") as out:
            process = subprocess.Popen(
                [*command, *([] if limits else ["--no-limits"])], stdout=out, stderr=subprocess.STDOUT
            )
        url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + wait_s
        try:
            with httpx.Client(timeout=2, trust_env=False) as web:  # no proxy has anything to do with this machine
                while True:
                    with contextlib.suppress(httpx.TransportError):
                        if web.get(f"{url}/health").is_success:
                            break
                    if process.poll() is not None or time.monotonic() > deadline:
                        raise UserError(f"the service didn't start: {log.read_text('utf-8', 'replace')[-2000:]}")
                    time.sleep(0.1)
            yield url, process
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
