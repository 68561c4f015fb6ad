"""``primia-lite smpc``: a diagnosis between two servers, as processes of their own over mutual TLS. docs/smpc.md tells
the steps."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from primia_lite.config import UserError

CALIBRATION_FILMS, CALIBRATION_SEED = 200, 7919
PROGRAM = "program.json"
LARGEST = 4096  # px of a side, of a film


def add_arguments(parser) -> None:
    """The subcommands of ``primia-lite smpc``."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    def action(name: str, what: str, call, of_party: bool = True):
        added = actions.add_parser(name, help=what)
        if of_party:
            added.add_argument("folder", type=Path, metavar="FOLDER", help="the party's: its identity and peers/")
        added.set_defaults(smpc=call)
        return added

    def servers(parser) -> None:
        parser.add_argument("--servers", nargs=2, required=True, metavar="HOST:PORT", help="of server 0 and server 1")

    identity = action("identity", "make a party's key and certificate", _identity)
    identity.add_argument("role", help="server0, server1, dealer, model or film")
    server = action("server", "be one of the two servers", _server)
    server.add_argument("--listen", required=True, metavar="HOST:PORT")
    server.add_argument("--other", metavar="HOST:PORT", help="where server 1 listens; server 0 connects to it")
    share = action("share", "as the model's owner: send each server its shares of a model", _share)
    share.add_argument("model", type=Path, metavar="MODEL", help="a file saved by ModelCard.save")
    servers(share)
    deal = action("deal", "as the dealer: make keys, each good for one diagnosis", _deal)
    deal.add_argument("program", type=Path, metavar="PROGRAM", help=f"{PROGRAM}, which `share` wrote")
    deal.add_argument("--films", type=int, default=10, help="how many diagnoses (10)")
    deal.add_argument("--batch", type=int, default=1, help="films at a time (1)")
    servers(deal)
    diagnose = action("diagnose", "as the film's owner: have a film diagnosed", _diagnose)
    diagnose.add_argument("film", type=Path, metavar="FILM", help="a PNG or JPEG file")
    servers(diagnose)
    demo = action("demo", "all five parties on this machine, with a small network and phantom films", _demo, False)
    demo.add_argument("--films", type=int, default=2, help="how many are diagnosed (2)")


def _identity(args) -> None:
    from primia_lite.smpc import make_identity

    path = make_identity(args.folder, args.role)
    print(f"{path}: give it to the other parties, for their peers/; their certificates go into {args.folder / 'peers'}")


def _server(args) -> None:
    from primia_lite.runtime import torch_threads
    from primia_lite.smpc import Server
    from primia_lite.smpc.connection import address_of

    number, listen = 0 if args.other else 1, address_of(args.listen)
    with torch_threads(1):
        server = Server(args.folder, number, address_of(args.other) if args.other else None)
        host, port = server.listen(listen)
        print(f"server {number} listens at {host}:{port} (Ctrl-C stops); not for clinical use", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            while True:
                time.sleep(3600)


def _addresses(texts: Sequence[str]) -> list[tuple[str, int]]:
    from primia_lite.smpc.connection import address_of

    return [address_of(text) for text in texts]


def compiled(card):
    """A model's program and weights, calibrated on phantom films, which are public."""
    import torch

    from primia_lite import models, smpc
    from primia_lite.data import phantom

    films = phantom.generate(CALIBRATION_FILMS, card.image_size, CALIBRATION_SEED)
    inputs = models.prepare(card.model, films, standardise=card.standardise).inputs[:, 0]
    with torch.no_grad():
        return smpc.compile(card.network(), inputs, card.describe())


def _share(args) -> None:
    from primia_lite.encrypted.model_card import ModelCard
    from primia_lite.runtime import write_atomic
    from primia_lite.smpc import Party, send_model

    program, weights = compiled(ModelCard.load(args.model))
    send_model(program, weights, Party(args.folder), _addresses(args.servers))
    path = write_atomic(args.folder / PROGRAM, program.to_json().encode())
    print(f"both servers hold their shares of {len(weights)} layers; for the dealer: {path}")


def _deal(args) -> None:
    from tqdm import tqdm

    from primia_lite.smpc import Party, Program, deal

    try:
        program = Program.from_json(args.program.read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{args.program} can't be read: {error}") from error
    with tqdm(total=args.films, unit="key", disable=not sys.stderr.isatty()) as bar:
        deal(program, args.films, Party(args.folder), _addresses(args.servers), args.batch, lambda number: bar.update())
    print(f"both servers hold {args.films} more keys, each good for one diagnosis")


def _diagnose(args) -> None:
    from primia_lite.data.pixels import decode
    from primia_lite.smpc import Party

    try:
        image = decode(args.film.read_bytes(), str(args.film))
    except OSError as error:
        raise UserError(f"the film {args.film} can't be read: {error.strerror}") from error
    print(diagnosis(image, Party(args.folder), _addresses(args.servers)))


def diagnosis(image, party, servers: Sequence[tuple[str, int]]) -> str:
    """A film as a table: probabilities, and what the servers did. It is prepared here, as both servers say alike."""
    import numpy as np

    from primia_lite import smpc
    from primia_lite.data.pixels import to_square
    from primia_lite.encrypted.model_card import prepare_film

    described = {}

    def prepared(program):
        described.update(program.description)
        try:
            names, size = described["class_names"], described["image_size"]
            if len(names) != program.n_classes or not 0 < size <= LARGEST:
                raise ValueError(f"{names} of films of {size} px")
            film = prepare_film(described, to_square(image, size)).reshape(1, *program.in_shape)
        except (LookupError, TypeError, ValueError) as error:
            raise smpc.PeerError(f"the servers' program doesn't say how to prepare a film: {error!r}") from error
        return film

    found = smpc.diagnose(prepared, party, servers)
    shares = np.exp(found.logits[0] - found.logits[0].max())
    lines = [
        f"{name:>12}  {share:6.1%}" for name, share in zip(described["class_names"], shares / shares.sum(), strict=True)
    ]
    first = found.costs[0]
    lines.append(
        f"key {found.key}; {first.get('rounds')} rounds and {first.get('sent_bytes', 0) / 1e6:.2f} MB each way, "
        f"{first.get('online_cpu_s', 0):.2f} CPU s a server"
    )
    return "\n".join([*lines, f"model: {described['model']}, {described.get('trained_on')}; not for clinical use"])


def demo_card(n_films: int = 600, size: int = 64, seed: int = 0):
    """A ``convnet`` trained on phantom films, in half a minute."""
    from primia_lite import models
    from primia_lite.data import load
    from primia_lite.encrypted.model_card import ModelCard
    from primia_lite.privacy.rng import SecureGenerator
    from primia_lite.training import Training, train

    films = load("phantom", size, n_films=n_films, seed=seed)
    inputs = models.prepare("convnet", films.of_split("train"), standardise=True)
    recipe = Training(
        "convnet", len(films.class_names), sample_rate=0.1, local_steps=None, local_epochs=15, learning_rate=0.05
    )
    network = models.build("convnet", len(films.class_names), inputs.inputs.shape[2:], seed=seed)
    train(network, inputs, recipe, None, SecureGenerator.from_seed(seed), 1.0)
    return ModelCard(
        "convnet", {}, films.class_names, size, tuple(inputs.inputs.shape[2:]), network.state_dict(),
        f"{n_films} phantom films (computer-made, no patients), without DP, seed {seed}", standardise=True,
    )  # fmt: skip


def make_parties(root: Path) -> None:
    """Folders of all five parties who know one another, for a trial on one machine."""
    from primia_lite.smpc import make_identity
    from primia_lite.smpc.connection import ROLES

    for role in ROLES:
        make_identity(root / role, role)
    for role in ROLES:
        for other in ROLES:
            if other != role:
                shutil.copy(root / other / f"{other}.crt", root / role / "peers")


@contextlib.contextmanager
def running(root: Path, wait_s: float = 120.0) -> Iterator[list[str]]:
    """Both servers as processes on free ports of this machine while the context lasts: their addresses."""
    processes, addresses = [], []
    try:
        for number in (1, 0):
            log = root / f"server{number}.log"
            command = [sys.executable, "-m", "primia_lite", "smpc", "server", str(root / f"server{number}")]
            command += ["--listen", "127.0.0.1:0"] + (["--other", addresses[0]] if addresses else [])
            with log.open("wb") as out:
                environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
                processes.append(subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment))
            addresses.append(_listening(processes[-1], log, wait_s))
        yield addresses[::-1]
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait()


def _listening(process: subprocess.Popen, log: Path, wait_s: float) -> str:
    deadline = time.monotonic() + wait_s
    while time.monotonic() < deadline and process.poll() is None:
        text = log.read_text("utf-8", "replace")
        if " listens at " in text:
            return text.split(" listens at ")[1].split()[0]
        time.sleep(0.05)
    raise UserError(f"a server didn't start: {log.read_text('utf-8', 'replace')[-2000:]}")


def _demo(args) -> None:
    from PIL import Image

    from primia_lite.data import load

    def step(*command: str) -> None:
        print(f"\n$ primia-lite smpc {' '.join(command)}".replace(f"{root}/", ""), flush=True)
        subprocess.run([sys.executable, "-m", "primia_lite", "smpc", *command], check=True)

    with tempfile.TemporaryDirectory(prefix="primia-lite-smpc-") as folder:
        root = Path(folder)
        print("training convnet on phantom films ...", flush=True)
        card = demo_card()
        card.save(root / "model.pt")
        make_parties(root)
        with running(root) as addresses:
            print(f"server 0 at {addresses[0]}, server 1 at {addresses[1]}: two processes")
            step("share", f"{root}/model", f"{root}/model.pt", "--servers", *addresses)
            step(
                "deal", f"{root}/dealer", f"{root}/model/{PROGRAM}", "--films", str(args.films), "--servers", *addresses
            )
            films = load("phantom", card.image_size, n_films=600, seed=0).of_split("test")
            for number in range(args.films):
                Image.fromarray(films.images[number]).save(root / f"film{number}.png")
                print(f"\na phantom film, {films.class_names[films.labels[number]]}:")
                step("diagnose", f"{root}/film", f"{root}/film{number}.png", "--servers", *addresses)
