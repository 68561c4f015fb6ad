"""How well and how fast films are rebuilt from a gradient, beside `breaching` 0.1.2 on the same gradients.

Films of 64 px, the package's convnet, labels known. In turns on one thread: ours with its default settings; ours with
the cosine alone (`closed_form=False`, else its defaults) and breaching's `invertinggradients`, each with as many
iterations as fit in the CPU seconds that ours took for that film (the equal-time numbers): between the first two lies
what the closed form brings. Then breaching with a long budget of its own; `DeepLeakage` and breaching's `deepleakage`,
equal time again. Breaching gets the total-variation weight that suits it best in each row and budget, chosen on films
that aren't scored (`--chosen-on`); ours gets no such choice. PSNR is
that of pixels in [0, 1], a batch's films matched to the true ones. Real films where PRIMIA_LITE_DATA has them, else
phantoms.

Breaching (Jonas Geiping, MIT) is no dependency of the package: it is installed the first time, with what it needs,
into a folder of its own under the cache (PRIMIA_LITE_CACHE).
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"

import contextlib
import copy
import functools
import importlib.machinery
import io
import math
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import types
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import nn
from torch.nn import functional as F

from primia_lite import models, runtime, training
from primia_lite.apps.bench import Options
from primia_lite.attacks import AttackerView, DeepLeakage, InvertingGradients, reconstruct
from primia_lite.config import UserError, cache_dir, check_writable
from primia_lite.data import ChestXrays, DataError, load
from primia_lite.data.films import PIXEL_MEAN, PIXEL_STD
from primia_lite.privacy.rng import SecureGenerator

SIDE, SHAPE, SCALE = 64, (1, 64, 64), (PIXEL_MEAN, PIXEL_STD)
PEER = ("breaching==0.1.2", "hydra-core==1.3.2", "omegaconf==2.3.0", "antlr4-python3-runtime==4.9.3")
TV_WEIGHTS = (1e-4, 1e-3, 1e-2, 5e-2, 0.2)  # the last is breaching's own default


@dataclass(frozen=True)
class Row:
    """A network and a batch size.

    Attributes
    ----------
    ours, long : iterations of ours, and of breaching's long budget
    trained : learning rate and momentum of an epoch on films that aren't attacked; None leaves the network as drawn
    deep_leakage : iterations of ours; 0 leaves that pair of attacks out
    """

    network: dict
    batch: int
    ours: int
    long: int
    trained: tuple[float, float] | None = None
    deep_leakage: int = 0


ROWS = {
    "tanh": Row({"activation": "tanh"}, 1, 200, 1000, deep_leakage=150),
    "relu": Row({"activation": "relu"}, 1, 400, 1000),
    "relu_trained": Row({"activation": "relu"}, 1, 400, 1000, trained=(0.01, 0.0)),
    # So large a step leaves 3 % of the dense layer's inputs alive (of the other, 56 %).
    "relu_dying": Row({"activation": "relu"}, 1, 400, 1000, trained=(0.03, 0.9)),
    "tanh_batch4": Row({"activation": "tanh", "hidden": 64}, 4, 250, 1000),
}


# --- the peer ---------------------------------------------------------------------------------------------------------


def install_peer() -> Path:
    """Folder with breaching and what it needs besides our own packages."""
    folder = cache_dir() / "peers" / PEER[0].replace("==", "-")
    if folder.is_dir():
        return folder
    print(f"installing {', '.join(PEER)} into {folder}", flush=True)
    check_writable(folder.parent)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".partial-"))
    # Without dependencies: they would bring a torchvision that doesn't fit our torch.
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--target"]
    try:
        done = subprocess.run([*pip, str(partial), *PEER], capture_output=True, text=True)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
            raise UserError(
                f"could not install the peer {PEER[0]}: {last}. It is fetched once from PyPI: go online (or set pip's "
                "index) and start again"
            )
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


class _NoTorchvision:
    """Stands in for torchvision, which breaching imports for its models and data sets, and no attack here uses."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "torchvision":
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        module = types.ModuleType(spec.name)

        def attribute(name: str):
            if name.startswith("__"):
                raise AttributeError(name)
            return MagicMock() if name[0].islower() else type(name, (), {})  # a module or function, or a class

        module.__path__, module.__getattr__ = [], attribute
        return module

    def exec_module(self, module):
        pass


@functools.cache
def peer():
    """The module breaching."""
    folder = install_peer()
    sys.path.append(str(folder))
    sys.meta_path.append(_NoTorchvision())
    try:
        import breaching
    except ImportError as error:
        raise UserError(
            f"breaching can't be imported from {folder}: {error}. Delete that folder and start again"
        ) from error
    return breaching


@functools.cache
def peer_settings(attack: str):
    # Where hydra looks depends on its caller; it also prints.
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peer().get_attack_config(attack)


def breaching_attack(
    attack: str, view: AttackerView, iterations: int, tv_weight: float | None, seed: int
) -> torch.Tensor:
    """Films as breaching rebuilds them, [B, 1, H, W] in [0, 1]."""
    config = copy.deepcopy(peer_settings(attack))
    config.optim.max_iterations = iterations
    config.attack_type = "optimization"  # with labels given breaching's deepleakage wants this
    if tv_weight is not None:
        config.regularization.total_variation.scale = tv_weight
    network = view.model()
    cpu = {"dtype": torch.float, "device": torch.device("cpu")}
    attacker = peer().attacks.prepare_attack(network, nn.CrossEntropyLoss(), config, cpu)
    for regularizer in attacker.regularizers:  # its total variation is written for three channels
        regularizer.groups, regularizer.weight = 1, regularizer.weight[:2]
    metadata = types.SimpleNamespace(shape=view.in_shape, mean=[SCALE[0]], std=[SCALE[1]], modality="vision", classes=3)
    payload = [{"parameters": list(network.parameters()), "buffers": [], "metadata": metadata}]
    known = {"num_data_points": view.total_films, "labels": view.labels, "local_hyperparams": None}
    shared = [{"gradients": view.gradient(), "buffers": None, "metadata": known}]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        found, _ = attacker.reconstruct(payload, shared, {})
    return view.denormalise(found["data"].detach()).clamp(0, 1)


# --- films and networks -----------------------------------------------------------------------------------------------


def source_films() -> tuple[ChestXrays, str]:
    with contextlib.suppress(DataError):
        return load("kermany", SIDE), "kermany"
    return load("phantom", SIDE, n_films=3000), "phantom"


def trained_network(row: Row, films: ChestXrays, seed: int) -> tuple[nn.Module, float]:
    """A network after one epoch on the training films, and its accuracy on the test films."""
    train, test = (models.prepare("convnet", films.of_split(name)) for name in ("train", "test"))
    network = models.build("convnet", 3, SHAPE, seed=seed, **row.network)
    rate, momentum = row.trained
    recipe = training.Training(
        model="convnet", learning_rate=rate, momentum=momentum, sample_rate=min(1.0, 32 / len(train)),
        local_steps=None, local_epochs=1,
    )  # fmt: skip
    training.train(network, train, recipe, None, SecureGenerator.from_seed(seed), 0)
    with torch.no_grad():
        right = network(test.inputs[:, 0]).argmax(1) == test.labels
    return network, float(right.float().mean())


@dataclass
class Case:
    """Films to rebuild: the pixels, and what the attacker sees."""

    pixels: torch.Tensor
    view: AttackerView
    seed: int


def cases(row: Row, films: ChestXrays, n: int, network: nn.Module | None) -> list[Case]:
    """The ``n``-th case has network number ``n``, unless one is given, and test films that no other case has."""
    test = films.of_split("test")
    order = np.random.default_rng(0).permutation(len(test))
    if n * row.batch > len(order):
        raise UserError(f"{n} cases of {row.batch} films: there are {len(order)} test films, ask for fewer")
    out = []
    for seed in range(n):
        index = order[seed * row.batch : (seed + 1) * row.batch]
        pixels = torch.from_numpy(test.images[index]).float()[:, None] / 255
        labels = torch.from_numpy(test.labels[index])
        model = network or models.build("convnet", 3, SHAPE, seed=seed, **row.network)
        loss = F.cross_entropy(model((pixels - SCALE[0]) / SCALE[1]), labels)
        gradient = torch.autograd.grad(loss, list(model.parameters()))
        view = AttackerView.from_gradient(
            model, list(gradient), SHAPE, n_films=row.batch, labels=labels, normalisation=SCALE
        )
        out.append(Case(pixels, view, seed))
    return out


# --- measuring --------------------------------------------------------------------------------------------------------


def psnr(found: torch.Tensor, true: torch.Tensor) -> list[float]:
    """dB of each true film, the found ones matched to them so that the squared error is least."""
    error = ((found[:, None] - true[None]) ** 2).flatten(2).mean(2).numpy().astype(float)
    pairs = linear_sum_assignment(error)
    return [-10 * math.log10(max(error[i, j], 1e-12)) for i, j in zip(*pairs, strict=True)]


@dataclass
class Scores:
    """Of one attack in one row: dB of each film, CPU seconds of each case, iterations of each case."""

    psnr: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    iterations: list[int] = field(default_factory=list)

    def run(self, case: Case, iterations: int, attack) -> float:
        """Attack, score, and return the CPU seconds."""
        started = time.process_time()
        found = attack()
        self.cpu_s.append(time.process_time() - started)
        self.psnr += psnr(found, case.pixels)
        self.iterations.append(iterations)
        return self.cpu_s[-1]


class Duel:
    """One row, ours and breaching in turns.

    Attributes
    ----------
    scores : ``ours``, ``ours_cosine`` and ``breaching`` (equal time), ``breaching_long``, and perhaps ``dlg_ours`` and
        ``dlg_breaching``
    weights : breaching's total-variation weight at equal time, and for long
    """

    def __init__(self, row: Row, chosen_on: list[Case]):
        self.row = row
        self.scores: dict[str, Scores] = {}
        self.paces: dict[str, list[float]] = {}  # CPU seconds of an iteration, in runs of equal time
        self.weights = dict(zip(("breaching", "breaching_long"), self._best_weights(chosen_on), strict=True))

    def _ours(self, case: Case, scores: Scores) -> float:
        def attack():
            return reconstruct(case.view, InvertingGradients(self.row.ours), seed=case.seed).images

        return scores.run(case, self.row.ours, attack)

    def _cosine(self, case: Case, scores: Scores, iterations: int) -> None:
        def attack():
            return reconstruct(case.view, InvertingGradients(iterations, closed_form=False), seed=case.seed).images

        self.paces.setdefault("ours_cosine", []).append(scores.run(case, iterations, attack) / iterations)

    def _theirs(self, case: Case, scores: Scores, iterations: int, weight: float | None, attack: str) -> float:
        seconds = scores.run(
            case, iterations, lambda: breaching_attack(attack, case.view, iterations, weight, case.seed)
        )
        if iterations < self.row.long:
            self.paces.setdefault(attack, []).append(seconds / iterations)
        return seconds

    def _best_weights(self, chosen_on: list[Case]) -> tuple[float, float]:
        """For both budgets."""
        self._theirs(chosen_on[0], Scores(), 20, TV_WEIGHTS[0], "invertinggradients")
        self._ours(chosen_on[0], Scores())
        self._cosine(chosen_on[0], Scores(), 20)
        self.paces.clear()  # the first run of anything is slow
        self._cosine(chosen_on[0], Scores(), 50)
        self._theirs(chosen_on[0], Scores(), 50, TV_WEIGHTS[0], "invertinggradients")
        found: dict[tuple[str, float], Scores] = {(b, w): Scores() for b in ("equal", "long") for w in TV_WEIGHTS}
        for case in chosen_on:
            seconds = self._ours(case, Scores())
            budget = self._fitting("invertinggradients", seconds)
            self._cosine(case, Scores(), self._fitting("ours_cosine", seconds))  # for its pace alone
            for (name, weight), scores in found.items():
                steps = budget if name == "equal" else self.row.long
                self._theirs(case, scores, steps, weight, "invertinggradients")
        return tuple(
            max(TV_WEIGHTS, key=lambda w, name=name: statistics.median(found[name, w].psnr))
            for name in ("equal", "long")
        )

    def _fitting(self, attack: str, seconds: float) -> int:
        """Iterations of an attack that take as long as ours did, at its mean pace in such runs, rounded up."""
        return max(1, math.ceil(seconds / statistics.mean(self.paces[attack])))

    def play(self, case: Case) -> None:
        of = self.scores.setdefault
        seconds = self._ours(case, of("ours", Scores()))
        self._cosine(case, of("ours_cosine", Scores()), self._fitting("ours_cosine", seconds))
        for name in ("breaching", "breaching_long"):
            steps = self._fitting("invertinggradients", seconds) if name == "breaching" else self.row.long
            self._theirs(case, of(name, Scores()), steps, self.weights[name], "invertinggradients")
        if steps := self.row.deep_leakage:
            seconds = of("dlg_ours", Scores()).run(
                case, steps, lambda: reconstruct(case.view, DeepLeakage(steps), seed=case.seed).images
            )
            if "deepleakage" not in self.paces:
                self._theirs(case, Scores(), 3, None, "deepleakage")
            steps = self._fitting("deepleakage", seconds)
            self._theirs(case, of("dlg_breaching", Scores()), steps, None, "deepleakage")

    def gains(self, over: str, of: str = "ours") -> list[float]:
        """dB that ours is better, film by film."""
        return [a - b for a, b in zip(self.scores[of].psnr, self.scores[over].psnr, strict=True)]

    def ratios(self, to: str) -> list[float]:
        """CPU seconds of ours over another's, case by case."""
        return [a / b for a, b in zip(self.scores["ours"].cpu_s, self.scores[to].cpu_s, strict=True)]


def spread(values: list[float], unit: str) -> dict:
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "n": len(values), "unit": unit}


def metrics(duels: dict[str, Duel]) -> dict[str, dict]:
    gains = {name: duel.gains("breaching") for name, duel in duels.items()}
    least = min(gains, key=lambda name: statistics.median(gains[name]))
    ratios = {name: statistics.median(duel.ratios("breaching_long")) for name, duel in duels.items()}
    found = {
        "psnr_gain_over_breaching_db": spread(gains[least], f"dB at equal CPU seconds, least row: {least}"),
        "cpu_s_ratio_to_breaching": spread(
            list(ratios.values()), "CPU seconds, ours / breaching at its long budget, over rows"
        ),
    }
    for name, duel in duels.items():
        found[f"psnr_gain_{name}_db"] = spread(gains[name], "dB over breaching at equal CPU seconds")
        found[f"psnr_gain_{name}_over_long_db"] = spread(
            duel.gains("breaching_long"), "dB over breaching at its long budget"
        )
        found[f"psnr_gain_{name}_over_cosine_db"] = spread(
            duel.gains("ours_cosine"), "dB over ours with the cosine alone at equal CPU seconds"
        )
        found[f"psnr_gain_{name}_cosine_over_breaching_db"] = spread(
            duel.gains("breaching", "ours_cosine"), "dB, ours with the cosine alone over breaching at equal CPU seconds"
        )
        found[f"cpu_s_ratio_{name}"] = spread(
            duel.ratios("breaching_long"), "CPU seconds, ours / breaching at its long budget"
        )
        found[f"cpu_s_ratio_{name}_equal"] = spread(
            duel.ratios("breaching"), "CPU seconds, ours / breaching, meant to be equal"
        )
        found[f"cpu_s_ratio_{name}_cosine"] = spread(
            duel.ratios("ours_cosine"), "CPU seconds, ours / ours with the cosine alone, meant to be equal"
        )
        for attack, scores in duel.scores.items():
            what, _, budget = attack.partition("breaching_")
            label = f"{'breaching_' if budget else ''}{budget or what}_{name}"
            found[f"psnr_{label}_db"] = spread(scores.psnr, "dB")
            found[f"cpu_s_{label}"] = spread(scores.cpu_s, f"CPU seconds for a batch of {duel.row.batch}")
            found[f"iterations_{label}"] = spread(scores.iterations, "iterations")
    return found


SHOWN = {"ours_cosine": "ours, cosine alone", "breaching_long": "breaching, long"}


def table(duels: dict[str, Duel]) -> str:
    head = f"{'row':<14}{'attack':<20}{'TV weight':>10}{'iterations':>12}{'CPU s':>8}"
    lines = [f"{head}{'PSNR: median':>14}{'min':>7}{'max':>7}  n"]
    for name, duel in duels.items():
        for attack, s in duel.scores.items():
            weight = f"{duel.weights[attack]:g}" if attack in duel.weights else ""
            lines.append(
                f"{name:<14}{SHOWN.get(attack, attack):<20}{weight:>10}{statistics.median(s.iterations):>12g}"
                f"{statistics.median(s.cpu_s):>8.2f}{statistics.median(s.psnr):>14.2f}{min(s.psnr):>7.2f}"
                f"{max(s.psnr):>7.2f}  {len(s.psnr)}"
            )
    return "\n".join(lines)


def main() -> None:
    parser = Options("attacks", __doc__)
    parser.add_argument("--films", type=int, default=16, help="cases of the rows with one film each (default 16)")
    parser.add_argument("--batches", type=int, default=4, help="cases of the rows with several films (default 4)")
    parser.add_argument(
        "--chosen-on",
        type=int,
        default=4,
        help="cases of each row, none of them scored, to choose breaching's weights on (default 4)",
    )
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="default all")
    options = parser.read()
    if min(options.films, options.batches, options.chosen_on) < 1:
        parser.error("--films, --batches and --chosen-on must be at least 1")
    torch.set_num_threads(1)
    peer()
    films, source = source_films()
    duels, accuracy = {}, {}
    for name in options.rows:
        row, network = ROWS[name], None
        if row.trained is not None:
            network, accuracy[name] = trained_network(row, films, 0)
            print(f"{name}: {accuracy[name]:.2f} of the test films right", flush=True)
        n = options.films if row.batch == 1 else options.batches
        drawn = cases(row, films, n + options.chosen_on, network)
        duels[name] = Duel(row, drawn[n:])
        for number, case in enumerate(drawn[:n]):
            duels[name].play(case)
            last = "  ".join(
                f"{attack} {np.median(s.psnr[-row.batch :]):.1f} dB {s.cpu_s[-1]:.1f} s"
                for attack, s in duels[name].scores.items()
            )
            print(f"{name} {number + 1}/{n}: {last}", flush=True)
    found = metrics(duels)
    origin = runtime.origin(
        data_source=source, data_fingerprint=films.fingerprint(), seeds=list(range(options.films)),
        command=" ".join(["primia-lite bench attacks", *sys.argv[1:]]), threads=1, films=f"test split, {SIDE} px",
        peer=list(PEER), peer_tv_weights={name: duel.weights for name, duel in duels.items()},
        peer_tv_weights_tried=list(TV_WEIGHTS), trained_accuracy=accuracy,
    )  # fmt: skip
    path = runtime.write_results("attacks", origin, found)
    print(f"\n{table(duels)}\n\nfilms: {source}, test split")
    for name in ("psnr_gain_over_breaching_db", "cpu_s_ratio_to_breaching"):
        print(f"{name} {found[name]['median']:.3g}  {found[name]['unit']}")
    print(f"written to {path.name}")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
