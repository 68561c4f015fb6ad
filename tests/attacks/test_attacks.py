"""The attacks: what an attacker is given, and what each attack makes of it, on phantoms of 32 px."""

from __future__ import annotations

import ast
import copy
import functools
import gc
import itertools
import math
import subprocess
import sys
import types
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import kstest, norm
from torch import nn
from torch.nn import functional as F

from primia_lite import metrics, models
from primia_lite.attacks import inversion
from primia_lite.attacks.identify import clipped_gradients
from primia_lite.attacks.imprint import imprint_state, marked_state, read_imprint
from primia_lite.attacks.inversion import (
    cosine_distance,
    deep_leakage,
    dense_layer,
    expected_update,
    infer_labels,
    invert_gradients,
)
from primia_lite.attacks.prior import (
    FilmPrior,
    _noisy_likelihood,
    class_image,
    head_features,
    invert_features,
    map_films,
)
from primia_lite.attacks.simulate import clipping_alone, initial_state, observe
from primia_lite.attacks.view import AttackerView, ThreatModel
from primia_lite.config import UserError
from primia_lite.data import phantom
from primia_lite.data.films import Films
from primia_lite.federation.hospital import local_update
from primia_lite.privacy.dpsgd import Privacy
from primia_lite.privacy.rng import SecureGenerator
from primia_lite.training import Training

SIDE, PIXELS = 32, 32 * 32
TANH, RELU = {"activation": "tanh"}, {"activation": "relu"}
RECIPE = Training("convnet", sample_rate=1.0, learning_rate=0.1, model_options=TANH)
GUESSING = ThreatModel()
KNOWING = ThreatModel("knows labels", knows_labels=True)
SUM = ThreatModel("sees a sum", sees="sum", knows_labels=True)


@pytest.fixture(scope="module")
def chest():
    return phantom.generate(40, SIDE, seed=5)


@pytest.fixture(scope="module")
def films(chest):
    return models.prepare("convnet", chest)


@pytest.fixture(scope="module")
def public():
    """Films that the attacker owns."""
    return phantom.generate(120, SIDE, seed=77).images


@pytest.fixture(scope="module")
def prior(public):
    return FilmPrior.fit(public, 48)


@pytest.fixture(scope="module")
def gallery(chest, public):
    return metrics.Gallery(chest.images, public.mean(0) / 255.0)


def seen(films, index, threat=KNOWING, privacy=None, state=None, recipe=RECIPE, **changes) -> AttackerView:
    """What an attacker sees of some films' update; randomness from seed 0."""
    recipe = recipe.changed(**changes)
    own = films.subset(index)
    return observe(own, recipe, state or initial_state(recipe, own), threat, privacy, seed=0)


def psnrs(gallery, reconstruction, index) -> np.ndarray:
    return np.array([row["psnr"] for row in gallery.score(reconstruction.images.numpy(), index)])


# --- separation: by the text of the modules ---------------------------------------------------------------------------

ATTACKERS = ("view", "inversion", "imprint", "prior", "estimate")
GRANTED = ("primia_lite.config", "primia_lite.runtime", "primia_lite.models.networks", "primia_lite.attacks.view",
           "primia_lite.attacks.inversion")  # fmt: skip


def imported(source: str) -> set[str]:
    """Dotted names of what a module of the attacks imports from the package, wherever in its text."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = ["primia_lite", "attacks"]
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            found |= {f"{base}.{node.module or ''}.{a.name}".replace("..", ".").strip(".") for a in node.names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and " " not in node.value.strip():
            found |= {node.value}  # import_module("primia_lite.data")
    return {name for name in found if name.split(".")[0] == "primia_lite"}


def forbidden(source: str) -> list[str]:
    return sorted(name for name in imported(source) if not f"{name}.".startswith(tuple(f"{g}." for g in GRANTED)))


@pytest.mark.parametrize("module", ATTACKERS)
def test_the_attackers_code_imports_nothing_that_has_films(root, module):
    assert forbidden((root / f"primia_lite/attacks/{module}.py").read_text("utf-8")) == []


@pytest.mark.parametrize(
    "text",
    [
        "from primia_lite.data import load", "from primia_lite import models", "import primia_lite.federation.hospital",
        "from primia_lite.models import Films, prepare", "from primia_lite.attacks.simulate import observe",
        "def f():\n    from .simulate import observe", "from . import simulate", "from ..training import train",
        "import_module('primia_lite.data.phantom')", "import primia_lite",
    ],
)  # fmt: skip
def test_that_check_sees_every_way_to_import(text):
    assert forbidden("from primia_lite.config import UserError\nfrom .view import AttackerView\n" + text) != []


def test_nor_does_what_it_imports_in_turn():
    text = "import sys; from primia_lite.attacks import {}; print(*(m for m in sys.modules if m[:6] == 'primia'))"
    done = subprocess.run(
        [sys.executable, "-c", text.format(", ".join(ATTACKERS))], capture_output=True, text=True, check=True
    )
    loaded = {name.removeprefix("primia_lite").strip(".") for name in done.stdout.split()}
    granted = {name.removeprefix("primia_lite.") for name in GRANTED} | {f"attacks.{name}" for name in ATTACKERS}
    assert {f"attacks.{name}" for name in ATTACKERS} <= loaded <= granted | {"", "attacks", "models"}


def test_in_the_identification_game_only_the_candidates_gradients_touch_films(root):
    """That attacker holds all candidates; the rest of the game is played with their gradients."""
    tree = ast.parse((root / "primia_lite/attacks/identify.py").read_text("utf-8"))
    held = {"models", "Films", "private_rows", "clipped_sum", "PoissonBatch", "check_model"}
    users = {
        node.name
        for node in tree.body
        if isinstance(node, (ast.FunctionDef, ast.ClassDef))
        for part in ast.walk(node)
        if isinstance(part, ast.Name) and part.id in held
    }
    assert users == {"clipped_gradients"}
    names = {part.id for part in ast.walk(tree) if isinstance(part, ast.Name)}
    assert not names & {"observe", "local_update", "Hospital", "federate", "load", "prepare"}


# --- separation: by what can be reached from a view -------------------------------------------------------------------


def reachable(root) -> list:
    """Every object that can be reached from ``root``, but not through modules, classes or functions' globals."""
    found, stack = {}, [root]
    while stack:
        thing = stack.pop()
        if id(thing) in found or isinstance(thing, (types.ModuleType, type, types.CodeType)):
            continue
        found[id(thing)] = thing
        if isinstance(thing, types.FunctionType):
            for cell in thing.__closure__ or ():
                try:
                    stack.append(cell.cell_contents)
                except ValueError:  # empty
                    continue
            stack += [thing.__defaults__, thing.__kwdefaults__, thing.__dict__]
            continue
        stack += gc.get_referents(thing)
        if isinstance(thing, torch.Tensor):
            stack += [thing.grad_fn, thing._base, thing.grad if thing.is_leaf else None, thing._backward_hooks]
        elif isinstance(thing, np.ndarray):
            stack.append(thing.base)
        elif isinstance(thing, torch.autograd.graph.Node):
            stack += [node for node, _ in thing.next_functions]
            for name in dir(thing):  # saved for the backward pass
                if name.startswith("_saved") or name in ("variable", "saved_tensors"):
                    try:
                        stack.append(getattr(thing, name))
                    except RuntimeError:  # freed
                        continue
    return list(found.values())


def numbers(thing) -> np.ndarray | None:
    """All numbers in the memory behind a tensor (its whole storage), an array or bytes, as float64 [n]."""
    if isinstance(thing, torch.Tensor):
        whole = torch.empty(0, dtype=thing.dtype).set_(thing.detach().untyped_storage())
        return whole.double().numpy()
    if isinstance(thing, np.ndarray):
        return thing.ravel().astype(np.float64) if thing.dtype.kind in "biuf" else None
    return np.frombuffer(thing, np.uint8).astype(np.float64) if isinstance(thing, (bytes, bytearray)) else None


def holds(memory: np.ndarray, film: np.ndarray) -> bool:
    """Whether a film's pixels lie in that memory, one after the other."""
    if len(memory) < len(film):
        return False
    rare = int(np.abs(film - np.median(film)).argmax())
    places = np.flatnonzero(np.isclose(memory[rare : len(memory) - len(film) + rare + 1], film[rare], atol=1e-5))
    return any(np.allclose(memory[p : p + len(film)], film, atol=1e-5) for p in places)


def leaks(view, films) -> list[str]:
    """What in a view shares memory with films, or equals one: its inputs, its pixels, or its bytes."""
    own = films.inputs.untyped_storage()
    begin, end = own.data_ptr(), own.data_ptr() + own.nbytes()
    pixels = films.denormalise(films.inputs.double()).flatten(1).numpy()
    forms = [films.inputs.double().flatten(1).numpy(), pixels, (255.0 * pixels).round()]
    out = []
    for thing in reachable(view):
        if isinstance(thing, torch.Tensor) and begin <= thing.untyped_storage().data_ptr() < end:
            out.append("shares memory")
        if isinstance(thing, np.ndarray) and begin <= thing.__array_interface__["data"][0] < end:
            out.append("shares memory")
        if (memory := numbers(thing)) is not None:
            out += ["holds a film" for film in itertools.chain(*forms) if holds(memory, film)]
        if thing is films or thing is films.patient_id:
            out.append("the films themselves")
    return out


@pytest.mark.parametrize("case", ["plain", "private", "sum", "rounds", "local steps", "patients"])
def test_nothing_of_a_film_can_be_reached_from_a_view(case, films):
    own = films.subset(range(4))
    state = initial_state(RECIPE, own)
    if case == "sum":
        view = observe([own, films.subset(range(4, 8))], RECIPE, state, SUM)
    elif case == "rounds":
        view = observe(own, RECIPE, [state, state], ThreatModel(sees="rounds", knows_labels=True))
    elif case == "local steps":
        view = observe(own, RECIPE.changed(sample_rate=0.5, local_steps=3), state)
    else:
        unit = "film" if case == "private" else "patient"
        view = observe(own, RECIPE, state, KNOWING, None if case == "plain" else Privacy(1.0, 1.0, 100.0, unit=unit))
    things = reachable(view)
    tensors = [thing for thing in things if isinstance(thing, torch.Tensor)]
    assert all(any(t is p for t in tensors) for p in view.network.parameters())  # it does walk through the network
    assert all(any(t is v for t in tensors) for update in view.updates for v in update.values())
    assert leaks(view, own) == []
    assert own.labels.data_ptr() not in {t.data_ptr() for t in tensors}
    assert not any(isinstance(thing, (Films, SecureGenerator)) for thing in things)


def hook(keeper):
    return lambda *_: keeper


SMUGGLED = {
    "attribute": lambda view, films: setattr(view.network, "memo", films.inputs),
    "bytes in a buffer": lambda view, films: view.network.register_buffer(
        "memo", films.denormalise(films.inputs).mul(255).round().to(torch.uint8)
    ),
    "closure": lambda view, films: view.network[0].register_forward_hook(hook([films.inputs.clone()])),
    "default": lambda view, films: setattr(view.network, "act", lambda x, memo=films: x),
    "partial": lambda view, films: setattr(view.network, "act", functools.partial(print, {"a": (films,)})),
    "bound method": lambda view, films: setattr(view.network, "act", films.denormalise),
    "graph": lambda view, films: view.updates[0].update(more=(torch.ones(1, requires_grad=True) * films.inputs).sum()),
    "rest of a storage": lambda view, films: view.updates[0].update(
        more=torch.cat([torch.zeros(3), films.denormalise(films.inputs).flatten()])[:3]
    ),
    "array": lambda view, films: setattr(view.network, "memo", {"a": films.inputs.numpy()[:1, 0, 0]}),
    "array's base": lambda view, films: setattr(view.network, "memo", films.inputs.double().numpy().ravel()[:2]),
    "raw bytes": lambda view, films: setattr(
        view.network, "memo", bytes((films.denormalise(films.inputs) * 255).round().byte().numpy())
    ),
    "gradient": lambda view, films: setattr(
        view.network[0].weight, "grad", films.inputs[0, :, 0].flatten()[:400].view(16, 1, 5, 5)
    ),
    "patients": lambda view, films: setattr(view.network, "memo", films.patient_id),
}


@pytest.mark.parametrize("way", SMUGGLED)
def test_that_check_finds_a_smuggled_film(way, films):
    own = films.subset([0, 1])
    view = seen(films, [0, 1])
    SMUGGLED[way](view, own)
    assert leaks(view, own) != []


# --- what the threat model grants -------------------------------------------------------------------------------------


def test_labels_without_their_number_are_refused():
    with pytest.raises(UserError, match="grant the batch size, too"):
        ThreatModel(knows_batch_size=False, knows_labels=True)


@pytest.mark.parametrize(("size", "labels"), [(True, True), (True, False), (False, False)])
def test_a_view_keeps_what_the_threat_model_grants_and_no_more(size, labels, films):
    view = seen(films, [0, 1], ThreatModel(knows_batch_size=size, knows_labels=labels))
    assert view.n_films == (2 if size else None)
    assert (view.labels.tolist() if labels else view.labels) == (films.labels[:2].tolist() if labels else None)
    rows = view.describe()
    assert rows["number of films"] == ("2 in a step" if size else "guessed")
    assert rows["labels"] == ("known" if labels else "inferred from the update")
    assert rows["privacy"] == "none" and "BatchNorm" not in rows
    if not size:
        with pytest.raises(UserError, match="the number of films isn't known .*: pass a guess as n_films"):
            view.total_films  # noqa: B018


@pytest.mark.parametrize("n", [3, 8, 14])
def test_a_denominator_doesnt_give_a_withheld_number_of_films_away(n, films):
    """It is what a hospital declares, in tens, and the step was really divided by it."""
    own, state, privacy = films.subset(range(n)), initial_state(RECIPE, films), clipping_alone(0.5)
    known = observe(own, RECIPE, state, ThreatModel(), privacy)
    view = observe(own, RECIPE, state, ThreatModel(knows_batch_size=False), privacy)
    assert known.denominator == n and view.denominator == 10 and view.n_films is None
    assert n not in (view.denominator, len(view.labels or ()), view.hospitals)
    torch.testing.assert_close(flat(view.gradient()), flat(known.gradient()) * n / 10, rtol=1e-3, atol=1e-6)
    assert infer_labels(view, n).tolist() == infer_labels(known).tolist()  # the sum is known, whatever it is over


def test_attacks_use_the_declared_size_for_what_it_is(films, prior, gallery):
    """A denominator of ten over one film: the gradient is ten times too short, and its length is explained."""
    blind = ThreatModel(knows_batch_size=False)
    view = seen(films, [0], blind, clipping_alone(1e3))
    assert psnrs(gallery, deep_leakage(view, n_films=1), [0]) > 35
    for sigma, least in ((0.01, 4), (1e-9, 2)):
        noisy = seen(films, [0], blind, Privacy(sigma, 1.0, 1e30, unit="film"))
        out = map_films(noisy, prior, iterations=80, n_films=1)
        assert gallery.score(out.images.numpy(), [0])[0]["psnr_gain"] > least
    with pytest.raises(UserError, match="isn't known under this threat model: pass a guess as n_films"):
        map_films(noisy, prior)


def test_hospitals_of_other_numbers_of_patients_have_no_one_denominator(films):
    one, two = films.subset([0, 1]), films.subset([2, 3])
    two = replace(two, patient_id=np.array(["a", "a"]))
    state, patients = initial_state(RECIPE, films), Privacy(1.0, 1.0, 100.0, unit="patient")
    with pytest.raises(UserError, match="hospitals that declare 2, 1 patients: .*; give each as many"):
        observe([one, two], RECIPE, state, SUM, patients)
    blind = ThreatModel("blind", sees="sum", knows_batch_size=False)
    assert observe([one, two], RECIPE, state, blind, patients).denominator == 10  # both declare ten


def test_of_poisson_batches_no_labels_are_known(films):
    view = seen(films, range(4), KNOWING, sample_rate=0.5)
    assert view.labels is None and view.n_films == 2


@pytest.mark.parametrize("field", ["server", "sees"])
def test_an_unknown_threat_is_refused(field):
    with pytest.raises(UserError, match=f"{field} is 'all': choose one of"):
        ThreatModel(**{field: "all"})


def test_more_than_the_threat_model_lets_see_is_refused(films):
    own, state = films.subset([0, 1]), initial_state(RECIPE, films)
    with pytest.raises(UserError, match="'knows labels' sees one round; 2 were given"):
        observe(own, RECIPE, [state, state], KNOWING)
    with pytest.raises(UserError, match="'knows labels' sees one hospital; a sum over 2 was given"):
        observe([own, own], RECIPE, state, KNOWING)
    with pytest.raises(UserError, match="'sees a sum' sees one round"):
        observe([own, own], RECIPE, [state, state], SUM)


def changed(view, name, value) -> AttackerView:
    return replace(view, updates=({**view.updates[0], name: value},))


def test_an_update_that_cant_be_used_is_refused(films):
    view = seen(films, [0, 1])
    bias = view.updates[0]["0.bias"]
    for bad in (float("nan"), float("inf")):
        with pytest.raises(UserError, match="the update's '0.bias' has values that aren't finite"):
            changed(view, "0.bias", torch.full_like(bias, bad))
    with pytest.raises(UserError, match="the update's '0.bias' \\(3,\\) doesn't fit the network: is it another's?"):
        changed(view, "0.bias", torch.ones(3))
    with pytest.raises(UserError, match="the update's 'else' .* doesn't fit the network"):
        changed(view, "else", torch.ones(3))
    with pytest.raises(UserError, match="the update lacks '0.bias'"):
        replace(view, updates=({n: v for n, v in view.updates[0].items() if n != "0.bias"},))
    other = seen(films, [0, 1], model_options={"width": (4, 4)})
    with pytest.raises(UserError, match="doesn't fit the network"):
        replace(view, updates=other.updates)
    rounds = {"threat": ThreatModel(sees="rounds"), "weights": view.weights * 2}
    with pytest.raises(UserError, match="doesn't fit the network"):  # the second round's, too
        replace(view, updates=view.updates + other.updates, **rounds)
    with pytest.raises(UserError, match="the update lacks '0.weight'"):
        replace(view, updates=(*view.updates, {}), **rounds)
    for updates in ((), view.updates * 2):
        with pytest.raises(UserError, match=f"{len(updates)} updates and 1 sets of weights: give one pair a round"):
            replace(view, updates=updates)


@pytest.mark.parametrize("shape", [(1, 28, 28), (SIDE, SIDE), (2, 1, SIDE, SIDE), (3, SIDE, SIDE), (5,), (-1, 2), ()])
def test_films_that_the_network_doesnt_take_are_refused(shape, films):
    with pytest.raises(UserError, match="the network doesn't take films of shape .*: give in_shape as it takes them"):
        replace(seen(films, [0]), in_shape=shape)


def test_a_network_that_gives_no_logits_is_refused():
    network = nn.Conv2d(1, 3, 3)
    with pytest.raises(UserError, match=r"of one it makes \(1, 3, 6, 6\) in place of \(1, classes\)"):
        AttackerView.from_gradient(network, [torch.randn_like(p) for p in network.parameters()], (1, 8, 8))


def test_a_batchnorm_doesnt_notice_that_check():
    network = nn.Sequential(nn.Conv2d(1, 4, 4), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 3)).train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    view = AttackerView.from_gradient(network, [torch.randn_like(p) for p in network.parameters()], (1, 4, 4))
    assert network.training and view.network.training
    assert all(torch.equal(value, before[name]) for name, value in view.network.state_dict().items())


def test_a_private_step_has_a_bound_and_a_denominator(films):
    view = seen(films, [0, 1], privacy=clipping_alone(2.0))
    for changes in ({"denominator": 0.0}, {"max_grad_norm": 0.0}, {"max_grad_norm": -1.0, "denominator": -1.0}):
        with pytest.raises(UserError, match="a private step has both, and they are public"):
            replace(view, **changes)
    with pytest.raises(UserError, match="noise_std is 1, but max_grad_norm 0"):
        replace(view, max_grad_norm=0.0, denominator=0.0, noise_std=1.0)


def test_a_batch_of_another_size_is_refused(films):
    view = seen(films, [0, 1])
    with pytest.raises(UserError, match="the batch size doesn't match the view: 2 labels for 3 films"):
        replace(view, n_films=3)
    with pytest.raises(UserError, match="n_films is 0: an update of no film shows none"):
        replace(view, n_films=0)
    with pytest.raises(UserError, match="n_films is 3, but the view has labels of 2 films"):
        invert_gradients(view, n_films=3)


@pytest.mark.parametrize(
    "attack", [invert_gradients, deep_leakage, dense_layer, read_imprint, lambda view: head_features(view, 0.1)]
)
def test_an_attack_that_takes_one_round_doesnt_pass_over_others(attack, films):
    own = films.subset([0])
    states = [initial_state(RECIPE, own, seed) for seed in (0, 1, 2)]
    view = observe(own, RECIPE, states, ThreatModel(sees="rounds"))
    with pytest.raises(UserError, match=r"has 3 rounds, and this attack takes one: pass view.of_round\(0\).*map_films"):
        attack(view)


def test_a_round_of_several_is_a_view_of_its_own(films, gallery):
    own, recipe = films.subset([0]), RECIPE.changed(learning_rate=1.0)
    states = [initial_state(recipe, own, seed) for seed in (0, 1)]
    view = observe(own, recipe, states, ThreatModel(sees="rounds"))
    second, alone = view.of_round(1), observe(own, recipe, states[1])
    assert len(second.updates) == 1 and leaks(second, own) == []
    assert all(torch.equal(value, states[1][name]) for name, value in second.network.state_dict().items())
    assert torch.equal(flat(second.gradient()), flat(alone.gradient()))
    assert not torch.equal(flat(view.of_round(0).gradient()), flat(alone.gradient()))
    assert psnrs(gallery, invert_gradients(second, iterations=80), [0]) > 35


@pytest.mark.parametrize("attack", [invert_gradients, deep_leakage, infer_labels, dense_layer, read_imprint])
def test_an_update_that_says_nothing_is_refused(attack, films):
    view = seen(films, [0])
    empty = replace(view, updates=({n: torch.zeros_like(v) for n, v in view.updates[0].items()},))
    with pytest.raises(UserError, match="the update is all zeros: there is nothing to invert"):
        attack(empty)
    flat = replace(view, updates=({n: torch.full_like(v, 0.5) for n, v in view.updates[0].items()},))
    with pytest.raises(UserError, match="the update is constant in every layer: there is nothing to invert"):
        attack(flat)


def test_a_learning_rate_of_nothing_is_named(films):
    with pytest.raises(UserError, match="the update is all zeros.*was the learning rate 0"):
        seen(films, [0], learning_rate=0.0).gradient()


def test_a_view_of_a_shared_gradient(films):
    network = models.build("convnet", 3, (1, SIDE, SIDE), **TANH)
    loss = F.cross_entropy(network(films.inputs[:2, 0]), films.labels[:2])
    gradient = torch.autograd.grad(loss, list(network.parameters()))
    view = AttackerView.from_gradient(network, gradient, (1, SIDE, SIDE), n_films=2, labels=films.labels[:2])
    assert view.threat.knows_labels and view.local_steps == 1 and not view.denominator
    assert all(torch.equal(a, b) for a, b in zip(view.gradient(), gradient, strict=True))
    memory = {p.data_ptr() for p in network.parameters()} | {g.data_ptr() for g in gradient}
    assert not memory & {t.data_ptr() for t in reachable(view) if isinstance(t, torch.Tensor) and t.numel()}
    assert leaks(view, films.subset([0, 1])) == []
    assert not AttackerView.from_gradient(network, gradient, (1, SIDE, SIDE)).threat.knows_labels
    with pytest.raises(UserError, match="5 gradients for 6 parameters: give one each, in their order"):
        AttackerView.from_gradient(network, gradient[:5], (1, SIDE, SIDE))


def test_batchnorm_gives_the_batchs_statistics_away(films):
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.BatchNorm2d(1), nn.Conv2d(1, 4, 5, 2), nn.BatchNorm2d(4, momentum=0.3), nn.Flatten(), nn.Linear(784, 3)
    )
    x, y = films.inputs[:4, 0], films.labels[:4]
    before = {name: value.clone() for name, value in network.state_dict().items()}
    gradient = torch.autograd.grad(F.cross_entropy(network(x), y), list(network.parameters()))
    shared = AttackerView.from_gradient(network, gradient, (1, SIDE, SIDE), n_films=4)
    assert shared.batch_statistics() == {} and "BatchNorm" not in shared.describe()
    network.load_state_dict(before)
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    F.cross_entropy(network(x), y).backward()
    optimizer.step()
    update = {name: value - before[name] for name, value in network.state_dict().items()}
    view = AttackerView(
        GUESSING, copy.deepcopy(network), (before,), (update,), 0.1, 1, (1, SIDE, SIDE), films.normalisation, 4
    )
    with torch.no_grad():
        fresh = nn.BatchNorm2d(1)
        fresh.load_state_dict({n.removeprefix("0."): v for n, v in before.items() if n.startswith("0.")})
        hidden = F.conv2d(fresh(x), before["1.weight"], before["1.bias"], stride=2)
    want = {
        "0.running_mean": x.mean((0, 2, 3)), "0.running_var": x.var((0, 2, 3), unbiased=True),
        "2.running_mean": hidden.mean((0, 2, 3)), "2.running_var": hidden.var((0, 2, 3), unbiased=True),
    }  # fmt: skip
    got = view.batch_statistics()
    assert got.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-5)
    assert view.describe()["BatchNorm"].startswith("4 vectors more")
    assert all(torch.isfinite(g).all() for g in view.gradient())


def test_a_view_denormalises_what_it_normalises(films):
    view = seen(films, [0])
    x = torch.rand(2, 1, SIDE, SIDE)
    torch.testing.assert_close(view.denormalise(view.normalise(x)), x)
    torch.testing.assert_close(view.normalise(films.denormalise(films.inputs)), films.inputs)


# --- observing --------------------------------------------------------------------------------------------------------


def flat(gradient) -> torch.Tensor:
    return torch.cat([g.flatten() for g in gradient])


def film_gradients(films, recipe, state) -> torch.Tensor:
    """[N, P], by autograd, a film at a time."""
    model = models.build(recipe.model, recipe.n_classes, films.inputs.shape[2:], **recipe.model_options)
    model.load_state_dict(state)
    return torch.stack([
        flat(torch.autograd.grad(F.cross_entropy(model(x), y[None]), list(model.parameters())))
        for x, y in zip(films.inputs, films.labels, strict=True)
    ])  # fmt: skip


@pytest.mark.parametrize("private", [False, True])
def test_an_observed_update_is_the_products_own(private, films):
    own, recipe = films.subset(range(6)), RECIPE.changed(sample_rate=0.5, local_steps=2)
    privacy = Privacy(1.0, 1.0, 100.0, unit="film") if private else None
    state = initial_state(recipe, own)
    view = observe(own, recipe, state, privacy=privacy, seed=3)
    rng = SecureGenerator.from_seed(3).child(0, 0)
    delta = local_update(state, own, recipe, privacy, rng, declared_size=6 if private else None).delta
    assert view.updates[0].keys() == delta.keys()
    assert all(torch.equal(view.updates[0][name], value) for name, value in delta.items())
    assert all(torch.equal(view.weights[0][name], value) for name, value in state.items())
    assert all(torch.equal(value, state[name]) for name, value in view.model().state_dict().items())
    assert (view.local_steps, view.learning_rate, view.in_shape) == (2, 0.1, (1, SIDE, SIDE))
    assert (view.max_grad_norm, view.noise_std, view.denominator) == ((1.0, 1.0, 3.0) if private else (0.0, 0.0, 0.0))


def test_the_gradient_is_autograds(films):
    own, state = films.subset(range(5)), initial_state(RECIPE, films)
    each = film_gradients(own, RECIPE, state)
    plain = flat(observe(own, RECIPE, state).gradient())
    torch.testing.assert_close(plain, each.mean(0), rtol=1e-3, atol=1e-6)
    bound = float(each.norm(dim=1).median())
    clipped = (each * (bound / each.norm(dim=1, keepdim=True)).clamp(max=1)).sum(0) / 5
    assert not torch.allclose(clipped, each.mean(0), rtol=0.01)
    view = observe(own, RECIPE, state, privacy=clipping_alone(bound))
    torch.testing.assert_close(flat(view.gradient()), clipped, rtol=1e-3, atol=1e-6)
    assert view.denominator == 5 and view.max_grad_norm == bound


def test_the_noise_is_what_was_promised(films):
    own, recipe = films.subset(range(4)), RECIPE.changed(learning_rate=1.0)
    state = initial_state(recipe, own)
    view = observe(own, recipe, state, privacy=Privacy(2.0, 0.5, 100.0, unit="film"), seed=0)
    assert view.noise_std == 1.0 and view.denominator == 4
    exact = flat(observe(own, recipe, state, privacy=clipping_alone(0.5)).gradient())
    noise = ((flat(view.gradient()) - exact) * view.denominator / view.noise_std).double()
    assert len(noise) > 15000
    assert abs(float(noise.std()) - 1) < 4 / math.sqrt(2 * len(noise))
    assert abs(float(noise.mean())) < 4 / math.sqrt(len(noise))
    assert kstest(noise.numpy(), "norm").pvalue > 1e-4


@pytest.mark.parametrize("bound", [1e-4, 1.0, 1e4, 1e8])
def test_what_counts_as_noise_is_relative_to_the_bound(bound, films):
    own, state = films.subset([0, 1]), initial_state(RECIPE, films)
    alone = observe(own, RECIPE, state, KNOWING, clipping_alone(bound))
    assert alone.noise_std > 0 and not alone.noisy and alone.describe()["privacy"].endswith("no noise")
    little = observe(own, RECIPE, state, KNOWING, Privacy(1e-3, bound, 1e30, unit="film"), seed=0)
    assert little.noisy and "noise σC = " in little.describe()["privacy"]
    assert not observe(own, RECIPE, state, KNOWING).noisy
    assert inversion._DenseInputs(alone, alone.model(), 1).basis is not None
    assert inversion._DenseInputs(little, little.model(), 1).basis is None


def test_a_sum_is_the_sum_of_the_hospitals_updates(films):
    places = [films.subset(range(3 * k, 3 * k + 3)) for k in range(3)]
    state = initial_state(RECIPE, films)
    view = observe(places, RECIPE, state, SUM)
    single = [observe(own, RECIPE, state).updates[0] for own in places]
    for name, value in view.updates[0].items():
        torch.testing.assert_close(value, sum(update[name] for update in single), rtol=1e-4, atol=1e-7)
    assert view.hospitals == 3 and view.n_films == 3 and view.total_films == 9
    assert view.labels.tolist() == films.labels[:9].tolist()
    each = film_gradients(films.subset(range(9)), RECIPE, state)
    torch.testing.assert_close(flat(view.gradient()), 3 * each.mean(0), rtol=1e-3, atol=1e-6)


def test_the_noise_of_a_sum_and_of_rounds_is_independent(films):
    own, state = films.subset(range(4)), initial_state(RECIPE, films)
    privacy, alone = Privacy(1.0, 1.0, 100.0, unit="film"), clipping_alone()
    exact = flat(observe(own, RECIPE, state, privacy=alone).gradient())
    total = flat(observe([own] * 4, RECIPE, state, SUM, privacy, seed=0).gradient()) - 4 * exact
    assert abs(float(total.std()) * 4 / 2.0 - 1) < 4 / math.sqrt(2 * len(total))  # a noise each: σC sqrt(4), over 4
    rounds = observe(own, RECIPE, [state, state], ThreatModel(sees="rounds"), privacy, seed=0)
    first, second = (flat(rounds.gradient(t)) - exact for t in range(2))
    assert abs(float(torch.corrcoef(torch.stack([first, second]))[0, 1])) < 4 / math.sqrt(len(first))


def test_seeds_repeat_and_the_operating_system_doesnt(films):
    own, state, privacy = films.subset(range(4)), initial_state(RECIPE, films), Privacy(1.0, 1.0, 100.0, unit="film")

    def noisy(seed):
        return flat(observe(own, RECIPE, state, privacy=privacy, seed=seed).gradient())

    assert torch.equal(noisy(1), noisy(1)) and not torch.equal(noisy(1), noisy(2))
    assert not torch.equal(noisy(None), noisy(None))
    other = initial_state(RECIPE, films, seed=1)
    assert not torch.equal(other["0.weight"], state["0.weight"])
    assert torch.equal(initial_state(RECIPE, films, seed=1)["0.weight"], other["0.weight"])


def test_a_view_and_an_attack_leave_the_weights_as_they_were(films):
    state = initial_state(RECIPE, films)
    kept = {name: value.clone() for name, value in state.items()}
    view = seen(films, [0], state=state)
    update = {name: value.clone() for name, value in view.updates[0].items()}
    invert_gradients(view, iterations=3)
    for now, before in ((state, kept), (view.weights[0], kept), (view.updates[0], update)):
        assert all(torch.equal(now[name], value) for name, value in before.items())
    assert all(torch.equal(value, kept[name]) for name, value in view.network.state_dict().items())
    state["0.weight"].zero_()  # the server's next weights
    assert torch.equal(view.weights[0]["0.weight"], kept["0.weight"])


# --- closed forms -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"activation": "tanh", "hidden": 8}])
def test_a_dense_layer_on_the_pixels_gives_its_film_away(options, films, gallery):
    view = seen(films, [3], GUESSING, recipe=RECIPE.changed(model="mlp", model_options=options, learning_rate=1.0))
    out = dense_layer(view)
    assert psnrs(gallery, out, [3]) > 100
    assert out.labels.tolist() == films.labels[[3]].tolist() and out.loss == 0


def test_a_dense_layer_blends_the_films_of_a_batch(films, gallery):
    view = seen(films, [3, 4], recipe=RECIPE.changed(model="mlp", model_options={}))
    assert psnrs(gallery, dense_layer(view), [3]) < 40


def test_where_no_dense_layer_sees_the_pixels_that_is_said(films):
    with pytest.raises(UserError, match="no dense layer with a bias sees the film's 1024 pixels: use invert_gradients"):
        dense_layer(seen(films, [0]))


def test_a_dead_dense_layer_is_named(films):
    recipe = RECIPE.changed(model="mlp", model_options={})
    state = initial_state(recipe, films)
    state["1.bias"] = torch.full_like(state["1.bias"], -1e3)
    with pytest.raises(UserError, match="no unit of the dense layer was active"):
        dense_layer(seen(films, [0], state=state, recipe=recipe))


@pytest.mark.parametrize("n", [1, 3])
def test_a_convnet_of_dead_relus_is_named(n, films, prior):
    recipe = RECIPE.changed(model_options=RELU)
    state = initial_state(recipe, films)
    state["2.bias"] = torch.full_like(state["2.bias"], -1e3)
    view = seen(films, range(n), state=state, recipe=recipe)
    assert float(flat(view.gradient()).abs().max()) > 0  # the last bias still moves, and tells labels
    assert infer_labels(replace(view, labels=None)).tolist() == sorted(films.labels[:n].tolist())
    for attack in (
        invert_gradients, functools.partial(invert_gradients, closed_form=False), deep_leakage,
        functools.partial(map_films, prior=prior),
    ):  # fmt: skip
        with pytest.raises(UserError, match="only biases moved: no unit .* was active, there is nothing to invert"):
            attack(view)


def test_the_label_of_one_film_is_inferred_for_every_class(films):
    for label in range(3):
        i = int((films.labels == label).nonzero()[0])
        for privacy in (None, clipping_alone(0.1)):
            assert infer_labels(seen(films, [i], GUESSING, privacy)).tolist() == [label]


@pytest.mark.parametrize("options", [TANH, RELU, {"hidden": 64}])
def test_the_labels_of_a_batch_are_counted(options, films):
    rng = np.random.default_rng(0)
    for n in (2, 5, 12):
        index = rng.choice(len(films), n, replace=False)
        view = seen(films, index, GUESSING, model_options=options)
        assert infer_labels(view).tolist() == sorted(films.labels[index].tolist())
    only = (films.labels == 2).nonzero()[:6, 0]
    assert infer_labels(seen(films, only, GUESSING)).tolist() == [2] * 6


def label_accuracy(view, labels) -> float:
    """Share of a batch's labels that are right, matched as well as can be."""
    found = torch.bincount(infer_labels(view), minlength=3)
    return float(torch.minimum(found, torch.bincount(labels, minlength=3)).sum()) / len(labels)


@pytest.mark.parametrize("options", [TANH, RELU, {**TANH, "hidden": 64}])
@pytest.mark.parametrize(("n", "least"), [(2, 1.0), (4, 1.0), (12, 0.9)])
def test_labels_are_counted_where_clipping_cuts_every_film(n, least, options, films):
    rng, recipe, accuracy, chance = np.random.default_rng(0), RECIPE.changed(model_options=options), [], []
    for seed in range(6):
        own = films.subset(rng.choice(len(films), n, replace=False))
        state = initial_state(recipe, own, seed)
        assert film_gradients(own, recipe, state).norm(dim=1).min() > 2 * 0.2
        view = observe(own, recipe, state, GUESSING, clipping_alone(0.2))
        accuracy.append(label_accuracy(view, own.labels))
        even = torch.full((3,), n / 3)
        chance.append(float(torch.minimum(even, torch.bincount(own.labels, minlength=3)).sum()) / n)
    assert np.mean(accuracy) >= least and np.mean(accuracy) > np.mean(chance) + 0.05


def test_the_labels_of_rounds_are_counted_from_all_of_them(films):
    own = films.subset(range(8))
    states = [initial_state(RECIPE, own, seed) for seed in range(12)]
    privacy, rounds = Privacy(0.3, 1.0, 1e9, unit="film"), ThreatModel(sees="rounds")
    view = observe(own, RECIPE, states, rounds, privacy, seed=0)
    each = [label_accuracy(view.of_round(t), own.labels) for t in range(12)]
    assert label_accuracy(view, own.labels) > np.mean(each)


def test_the_labels_of_a_sum_are_counted(films):
    places = [films.subset(range(4)), films.subset(range(4, 8))]
    state = initial_state(RECIPE, films)
    for privacy in (None, clipping_alone(1e3)):
        view = observe(places, RECIPE, state, ThreatModel(sees="sum"), privacy)
        assert infer_labels(view).tolist() == sorted(films.labels[:8].tolist())


def test_labels_from_an_update_that_is_mostly_noise_are_as_many_as_films(films):
    for seed in range(5):
        view = observe(
            films.subset(range(9)), RECIPE, initial_state(RECIPE, films), GUESSING,
            Privacy(100.0, 1.0, 1e3, unit="film"), seed=seed,
        )  # fmt: skip
        labels = infer_labels(view)
        assert len(labels) == 9 and labels.tolist() == sorted(labels.tolist()) and 0 <= labels.min() <= labels.max() < 3


def test_shares_beyond_the_batch_are_scaled_to_it():
    # A class whose share is below nothing: what is left of the others fits the batch, and none is cut off.
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    nn.init.zeros_(network[1].weight), nn.init.zeros_(network[1].bias)
    bias = 1 / 3 - torch.tensor([-1.2, 3.1, 2.1]) / 4
    gradient = [torch.arange(12.0).view(3, 4), bias]
    view = AttackerView.from_gradient(network, gradient, (1, 2, 2), n_films=4)
    assert infer_labels(view).tolist() == [1, 1, 2, 2]


def test_labels_that_cant_be_inferred_are_asked_for(films):
    bare = nn.Sequential(nn.Flatten(), nn.Linear(PIXELS, 3, bias=False))
    view = AttackerView.from_gradient(bare, [torch.randn(3, PIXELS)], (1, SIDE, SIDE))
    with pytest.raises(UserError, match="layer '1' has no bias, whose gradient would tell the labels: give them"):
        infer_labels(view)
    convolutions = nn.Sequential(nn.Conv2d(1, 3, SIDE), nn.Flatten())
    gradient = [torch.randn_like(p) for p in convolutions.parameters()]
    with pytest.raises(UserError, match="the network has no dense layer.*: give them"):
        infer_labels(AttackerView.from_gradient(convolutions, gradient, (1, SIDE, SIDE)))


# --- matching updates -------------------------------------------------------------------------------------------------


def test_the_expected_update_is_autograds_and_differentiable(films):
    view = seen(films, range(3))
    x = films.inputs[:3, 0].clone().requires_grad_()
    got = expected_update(view, view.model(), x, view.labels)
    torch.testing.assert_close(flat(got), flat(view.gradient()), rtol=1e-3, atol=1e-6)
    (slope,) = torch.autograd.grad(sum((g * g).sum() for g in got), x)
    assert slope.abs().max() > 0


def test_the_expected_update_follows_the_products_local_steps(films):
    view = seen(films, range(3), learning_rate=1.0, local_steps=3, model_options={**TANH, "hidden": 16})
    model, x = view.model(), films.inputs[:3, 0]
    torch.testing.assert_close(
        flat(expected_update(view, model, x, view.labels)), flat(view.gradient()), rtol=1e-3, atol=1e-5
    )
    naive = expected_update(view, model, x, view.labels, unroll=False)
    assert float(cosine_distance(naive, view.gradient()).detach()) > 0.1
    assert all(torch.equal(value, view.weights[0][name]) for name, value in model.state_dict().items())


def test_distances_by_hand():
    a, b = [torch.tensor([3.0]), torch.tensor([[4.0, 0.0]])], [torch.tensor([0.0]), torch.tensor([[2.0, 0.0]])]
    assert float(cosine_distance(a, b)) == pytest.approx(1 - 8 / (5 * 2))
    assert float(cosine_distance(a, [-3 * x for x in a])) == pytest.approx(2)
    film = torch.tensor([[[[0.0, 1.0], [0.5, 0.5]]]])
    assert float(inversion.total_variation(film)) == pytest.approx(0.5 + 0.5)
    assert float(inversion.smooth_variation(film)) == pytest.approx(1.0, abs=1e-3)
    assert float(inversion.smooth_variation(torch.zeros(1, 1, 3, 3))) < 1e-3


@pytest.mark.parametrize(
    ("options", "least", "how"),
    [
        (TANH, 50, {}),
        (RELU, 35, {"iterations": 120}),
        (TANH, 35, {"closed_form": False}),
        ({"activation": "sigmoid"}, 30, {}),
    ],
    ids=["tanh", "relu", "tanh, not closed form", "sigmoid"],
)
def test_one_film_is_inverted(options, least, how, films, gallery):
    view = seen(films, [0], GUESSING, model_options=options)
    out = invert_gradients(view, **how)
    assert psnrs(gallery, out, [0]) > least
    assert out.labels.tolist() == films.labels[:1].tolist()
    assert out.images.shape == (1, 1, SIDE, SIDE) and 0 <= out.images.min() <= out.images.max() <= 1
    assert abs(out.loss) < 1e-3 and not out.stopped and out.cpu_s > 0
    steps = [step for step, _, _ in out.history]
    assert steps == sorted(steps) and out.iterations == max(steps) and len(steps) > 10
    assert out.history[0][1] > 100 * max(out.loss, 1e-9) and out.history[0][2].shape == out.images.shape


def test_a_batch_before_a_hidden_layer_is_inverted(films, gallery):
    view = seen(films, range(4), model_options={**TANH, "hidden": 64})
    assert psnrs(gallery, invert_gradients(view, iterations=150), range(4)).min() > 30


def test_films_of_a_sum_are_inverted(films, gallery):
    recipe = RECIPE.changed(model_options={**TANH, "hidden": 64})
    places = [films.subset([0]), films.subset([4])]
    view = observe(places, recipe, initial_state(recipe, films), SUM)
    for attack in (functools.partial(invert_gradients, iterations=100), deep_leakage):
        assert psnrs(gallery, attack(view), [0, 4]).min() > 35


def test_without_noise_clipping_hinders_nobody(films, gallery):
    state = initial_state(RECIPE, films)
    plain, clipped = (seen(films, [0], GUESSING, privacy, state) for privacy in (None, clipping_alone(0.1)))
    shorter = flat(clipped.gradient()).norm() / flat(plain.gradient()).norm()
    assert shorter < 0.5
    plain, clipped = (invert_gradients(view, iterations=80) for view in (plain, clipped))
    got, want = psnrs(gallery, clipped, [0]), psnrs(gallery, plain, [0])
    assert want > 35 and abs(got - want) < 3


def test_noise_hinders(films, gallery):
    """The same attack on the same film: noise is all that differs. Under noise there is no closed form to use."""
    state = initial_state(RECIPE, films)
    alone, noisy = (
        invert_gradients(seen(films, [0], KNOWING, privacy, state), closed_form=False)
        for privacy in (clipping_alone(1.0), Privacy(0.05, 1.0, 1e9, unit="film"))
    )
    assert psnrs(gallery, noisy, [0]) < 25 < 35 < psnrs(gallery, alone, [0])


def test_several_local_steps_are_better_followed_through(films, gallery):
    view = seen(films, [0, 1], learning_rate=1.0, local_steps=4, model_options={**TANH, "hidden": 64})
    truth = films.denormalise(films.inputs[:2, 0])
    start = (truth + 0.05 * torch.randn(truth.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    how = {"start": start, "iterations": 40, "step": 0.01, "total_variation_weight": 1e-3}
    unrolled, naive = (invert_gradients(view, unroll=unroll, **how) for unroll in (True, False))
    assert psnrs(gallery, unrolled, [0, 1]).min() > psnrs(gallery, naive, [0, 1]).max() + 5


def test_one_film_survives_several_local_steps(films, gallery):
    view = seen(films, [0], GUESSING, learning_rate=0.3, local_steps=3)
    assert psnrs(gallery, invert_gradients(view, iterations=120, unroll=False), [0]) > 35


def test_deep_leakage_inverts_a_film(films, gallery):
    out = deep_leakage(seen(films, [0], GUESSING))
    assert psnrs(gallery, out, [0]) > 35 and out.loss < 1e-6 and out.labels.tolist() == films.labels[:1].tolist()
    assert out.iterations > 0 and not out.stopped


def test_a_start_is_used_and_one_of_another_size_refused(films, gallery):
    view = seen(films, [0])
    truth = films.denormalise(films.inputs[:1, 0])
    assert psnrs(gallery, invert_gradients(view, start=truth, iterations=1), [0]) > 60
    for shape in ((1, 1, SIDE, SIDE - 1), (2, 1, SIDE, SIDE), (SIDE, SIDE)):
        with pytest.raises(UserError, match="start has shape .*, the attack needs \\(1, 1, 32, 32\\)"):
            invert_gradients(view, start=torch.zeros(shape))


@pytest.mark.parametrize("attack", [invert_gradients, deep_leakage])
def test_an_unknown_number_of_films_needs_a_guess(attack, films):
    view = seen(films, [0, 1], ThreatModel(knows_batch_size=False))
    with pytest.raises(UserError, match="isn't known under this threat model: pass a guess as n_films"):
        attack(view)
    assert attack(view, n_films=3, iterations=2).images.shape == (3, 1, SIDE, SIDE)


def test_of_several_starts_the_one_with_the_least_own_loss_is_kept(films):
    view = seen(films, [0])
    for attack in (functools.partial(invert_gradients, closed_form=False), deep_leakage):
        each = [attack(view, iterations=15, seed=seed) for seed in (5, 6, 7)]
        best = min(each, key=lambda out: out.loss)
        assert len({out.loss for out in each}) == 3
        together = attack(view, iterations=15, seed=5, restarts=3)
        assert together.loss == best.loss and torch.equal(together.images, best.images)
        assert together.iterations == sum(out.iterations for out in each)


@pytest.fixture
def stop_after(monkeypatch):
    """Make a user press stop in the k-th step of a search."""

    def arm(k):
        class Bar:
            def __init__(self, **_):
                self.n = 0

            def update(self):
                self.n += 1
                if self.n == k:
                    raise KeyboardInterrupt

            def close(self):
                pass

        monkeypatch.setattr("tqdm.auto.tqdm", Bar)

    return arm


@pytest.mark.parametrize(("attack", "k"), [("adam", 12), ("polish", 40), ("deep leakage", 10), ("adam", 1)])
def test_an_attack_that_is_stopped_ends_with_its_best(attack, k, films, stop_after):
    view = seen(films, [0])
    stop_after(k)
    attack = deep_leakage if attack == "deep leakage" else functools.partial(invert_gradients, iterations=30)
    out = attack(view, restarts=3)
    assert out.stopped and out.iterations == k and math.isfinite(out.loss)
    if attack is not deep_leakage:
        assert out.history and out.history[0][0] == 1
    start = inversion._noise_films((1, 1, SIDE, SIDE), 0)
    film = films.denormalise(films.inputs[:1, 0])
    assert out.images.shape == film.shape and 0 <= out.images.min() <= out.images.max() <= 1
    assert k == 1 or metrics.psnr(out.images, film) > metrics.psnr(start, film)


def test_a_stop_in_the_middle_of_a_loss_is_caught(films, monkeypatch):
    view, calls, whole = seen(films, [0]), [], cosine_distance

    def stopping(a, b):
        calls.append(None)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return whole(a, b)

    monkeypatch.setattr(inversion, "cosine_distance", stopping)
    out = invert_gradients(view, iterations=30, closed_form=False)
    assert out.stopped and out.iterations == 8 and len(out.history) > 3
    assert out.loss <= out.history[0][1]


@pytest.fixture
def nan_after(monkeypatch):
    """Let the distance of gradients be no number from its k-th call on."""

    def arm(k, until=10**9):
        calls = itertools.count()
        whole, unrolled = cosine_distance, expected_update

        def broken(*args, **how):
            out = unrolled(*args, **how)
            return [g * torch.nan for g in out] if k <= next(calls) < until else out

        monkeypatch.setattr(inversion, "expected_update", broken)
        return whole

    return arm


@pytest.mark.parametrize("attack", [functools.partial(invert_gradients, closed_form=False), deep_leakage])
def test_a_loss_that_is_no_number_ends_a_search_with_its_best(attack, films, nan_after):
    view = seen(films, [0])
    clean = attack(view, iterations=40)
    nan_after(12, until=13)
    with pytest.warns(RuntimeWarning, match="the loss wasn't finite after 12 steps, this start ends there"):
        out = attack(view, iterations=40)
    assert out.iterations == 12 < clean.iterations and not out.stopped
    assert math.isfinite(out.loss) and torch.isfinite(out.images).all()
    assert out.history and all(math.isfinite(value) for _, value, _ in out.history)
    assert out.loss < out.history[0][1]


@pytest.mark.filterwarnings("ignore:.*wasn't finite:RuntimeWarning")
def test_of_starts_those_without_a_number_are_passed_over(films, nan_after):
    view = seen(films, [0])
    for attack in (functools.partial(invert_gradients, closed_form=False), deep_leakage):
        want = attack(view, iterations=10, seed=1)
        nan_after(0, until=2)  # all of the first start, and its end
        got = attack(view, iterations=10, seed=0, restarts=2)
        assert got.loss == want.loss and torch.equal(got.images, want.images)


@pytest.mark.filterwarnings("ignore:.*wasn't finite:RuntimeWarning")
def test_where_no_loss_is_a_number_that_is_said(films, prior, nan_after):
    view = seen(films, [0])
    blind = lambda x: x.flatten(1) * torch.nan  # noqa: E731
    with pytest.raises(UserError, match="inverting features: no finite loss was seen"):
        invert_features(torch.ones(PIXELS), blind, prior)
    with pytest.raises(UserError, match="model inversion: no finite loss was seen"):
        class_image(nn.Sequential(nn.Flatten(), nn.Linear(PIXELS, 3)), 0, prior, lambda x: x * torch.nan)
    nan_after(0)
    for attack in (functools.partial(invert_gradients, closed_form=False), invert_gradients, deep_leakage):
        with pytest.raises(UserError, match="no finite loss was seen, .*: check the weights and the update"):
            attack(view, restarts=2, iterations=5)


# --- imprint ----------------------------------------------------------------------------------------------------------

IMPRINT = Training("imprintnet", sample_rate=1.0, learning_rate=1.0, model_options={"bins": 512})


def exact_share(gallery, reconstruction, index) -> float:
    """Of the films, found at more than 40 dB."""
    return float(np.mean(_best(gallery, reconstruction, index) > 40))


def _best(gallery, reconstruction, index) -> np.ndarray:
    images = reconstruction.images.numpy()
    return np.array([max(metrics.psnr(image, gallery.films[i]) for image in images) for i in index])


@pytest.fixture(scope="module")
def malicious(films, public):
    return imprint_state(initial_state(IMPRINT, films), public, films.normalisation)


@pytest.mark.parametrize("privacy", [None, clipping_alone(1.0)], ids=["plain", "clipped"])
def test_an_imprint_layer_copies_the_films_of_a_batch(privacy, films, malicious, gallery):
    out = read_imprint(seen(films, range(16), GUESSING, privacy, malicious, IMPRINT))
    assert exact_share(gallery, out, range(16)) >= 0.9
    assert len(out.images) <= 16 and out.labels.tolist() == [-1] * len(out.images)
    assert 0 <= out.loss <= 1 and 0 <= out.images.min() <= out.images.max() <= 1


def test_secure_aggregation_alone_doesnt_hide_films_from_an_imprint_layer(films, malicious, gallery):
    places = [films.subset(range(8 * k, 8 * k + 8)) for k in range(3)]
    out = read_imprint(observe(places, IMPRINT, malicious, ThreatModel("malicious", "malicious", "sum")))
    assert exact_share(gallery, out, range(24)) >= 0.9 and len(out.images) <= 24


def test_nor_do_local_steps(films, malicious, gallery):
    recipe = IMPRINT.changed(
        sample_rate=0.5, local_steps=None, local_epochs=2, learning_rate=0.01, model_options={"bins": 512, "gain": 0.1}
    )
    view = seen(films, range(16), GUESSING, None, malicious, recipe)
    assert view.local_steps == 4 and view.n_films == 8
    assert exact_share(gallery, read_imprint(view, 16), range(16)) >= 0.8
    assert len(read_imprint(view).images) <= 8


def test_but_noise_does(films, malicious, gallery):
    alone, noisy = (
        _best(gallery, read_imprint(seen(films, range(16), GUESSING, privacy, malicious, IMPRINT)), range(16))
        for privacy in (clipping_alone(1.0), Privacy(0.5, 1.0, 1e9, unit="film"))
    )
    assert np.median(alone) > 40 and noisy.max() < 25


def test_weights_without_an_imprint_copy_few_films(films, gallery):
    view = seen(films, range(16), GUESSING, None, initial_state(IMPRINT, films), IMPRINT)
    assert exact_share(gallery, read_imprint(view), range(16)) < 0.2


def test_an_imprint_needs_only_public_films_and_keeps_the_rest(films, public, malicious):
    state = initial_state(IMPRINT, films)
    assert all(torch.equal(malicious[n], v) for n, v in state.items() if not n.startswith("imprint."))
    again = imprint_state(state, public, films.normalisation)
    assert all(torch.equal(again[name], value) for name, value in malicious.items())
    # Windows hold equal shares: a public film's units, saturated up to its window, are spread over all bins.
    x = films.normalise(torch.from_numpy(public).flatten(1).float() / 255)
    below = ((x @ malicious["imprint.weight"].T + malicious["imprint.bias"]) > 0).double()
    for half in (below[:, :256], below[:, 256:]):
        quantiles = half.mean(1).sort().values
        assert (quantiles - torch.linspace(0, 1, len(public), dtype=torch.float64)).abs().max() < 0.15


def test_candidates_gradients_hardly_overlap_under_marked_weights(films, chest):
    recipe = IMPRINT.changed(model_options={"bins": 40})
    state = initial_state(recipe, films)

    def largest(state):
        g = F.normalize(clipped_gradients(state, films, recipe, 1.0).double(), dim=1)
        return float((g @ g.T - torch.eye(40)).abs().max())

    marked = marked_state(state, chest.images, films.normalisation)
    assert marked.keys() == state.keys() and largest(marked) < 0.1 < 0.5 < largest(state)
    twice = np.concatenate([chest.images[:10], chest.images[:10]])  # equal films share a window
    assert all(torch.isfinite(v).all() for v in marked_state(state, twice, films.normalisation).values())


def test_what_an_imprint_cant_do_is_said(films, public, chest, malicious):
    state = initial_state(IMPRINT, films)
    with pytest.raises(UserError, match="the attacker's films have 900 pixels, the network takes 1024: use one size"):
        imprint_state(state, public[:, :30, :30], films.normalisation)
    few = initial_state(IMPRINT.changed(model_options={"bins": 8}), films)
    with pytest.raises(UserError, match="40 candidates need as many bins, the network has 8: set bins=40"):
        marked_state(few, chest.images, films.normalisation)
    with pytest.raises(UserError, match="the network has no imprint layer: build imprintnet"):
        read_imprint(seen(films, [0]))
    blind = {**malicious, "imprint.bias": torch.full_like(malicious["imprint.bias"], 1e6)}
    with pytest.raises(UserError, match="no film lies in a window of the imprint layer"):
        read_imprint(seen(films, [0, 1], GUESSING, None, blind, IMPRINT))


# --- an attacker who knows how films look -----------------------------------------------------------------------------


def test_the_prior_is_the_films_covariance(public, prior):
    assert prior.mean.shape == (SIDE, SIDE) and prior.components.shape == (PIXELS, 48)
    torch.testing.assert_close(prior.components.T @ prior.components, torch.eye(48), rtol=0, atol=1e-4)
    pixels = public.reshape(len(public), -1) / 255.0
    np.testing.assert_allclose(prior.mean.flatten(), pixels.mean(0), atol=1e-6)
    covariance = np.cov(pixels.T, bias=True)
    fitted = ((prior.components * prior.spread**2) @ prior.components.T).numpy()
    assert np.linalg.norm(fitted - covariance) < 0.05 * np.linalg.norm(covariance)
    exact = np.linalg.eigvalsh(covariance)[::-1][:10]
    np.testing.assert_allclose(prior.spread[:10].numpy() ** 2, exact, rtol=0.02)
    assert prior.spread.tolist() == sorted(prior.spread.tolist(), reverse=True)


def test_the_prior_draws_films_like_those(public, prior):
    z = torch.randn(4000, 48, generator=torch.Generator().manual_seed(0))
    drawn = prior.films(z)
    assert drawn.shape == (4000, 1, SIDE, SIDE)
    torch.testing.assert_close(drawn.mean((0, 1)), prior.mean, rtol=0, atol=0.02)
    spread = (public / 255.0).std(0).mean()
    assert float(drawn.std(0).mean()) == pytest.approx(spread, rel=0.1)
    assert torch.equal(prior.films(torch.zeros(1, 48))[0, 0], prior.mean)


def test_a_prior_repeats_and_needs_more_films_than_components(public):
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    one, two = FilmPrior.fit(public[:30], 8), FilmPrior.fit(public[:30], 8)
    assert torch.equal(one.components, two.components) and torch.equal(torch.random.get_rng_state(), before)
    with pytest.raises(UserError, match="8 films can't give 8 components: take fewer, or more films"):
        FilmPrior.fit(public[:8], 8)


def test_a_prior_of_another_size_is_refused(public, films):
    with pytest.raises(UserError, match="the prior's films are \\(30, 30\\), the view's \\(32, 32\\): use one size"):
        map_films(seen(films, [0]), FilmPrior.fit(public[:20, :30, :30], 4))


def test_a_prior_refuses_private_local_steps_whose_likelihood_it_does_not_know(films, prior):
    view = seen(films, [0], privacy=Privacy(0.5, 1.0, 1e9, unit="film"), local_steps=4)
    with pytest.raises(UserError, match="several private local steps"):
        map_films(view, prior)


@pytest.mark.parametrize("n", [-1, 0, 5])
def test_a_wrong_number_of_films_is_refused_with_inferred_labels(films, n):
    with pytest.raises(UserError, match="n_films is"):
        invert_gradients(seen(films, [0, 1], GUESSING), n_films=n, iterations=1)


def test_a_prior_beats_the_mean_film_under_little_noise_alone(films, prior, gallery):
    gains = []
    for sigma in (0.01, 5.0):
        view = seen(films, [0], GUESSING, Privacy(sigma, 1.0, 1e9, unit="film"))
        out = map_films(view, prior, iterations=80)
        (score,) = gallery.score(out.images.numpy(), [0])
        gains.append(score["psnr_gain"])
        assert out.history and not out.stopped and out.iterations == 80
    assert gains[0] > 4 and score["identified"] == 0
    assert metrics.psnr(out.images, prior.mean) > 35  # 5.0: nothing but the prior is left


def test_a_prior_inverts_without_noise_and_a_batch(films, prior, gallery):
    for index in ([0], [0, 1]):
        view = seen(films, index, model_options={**TANH, "hidden": 64})
        scores = gallery.score(map_films(view, prior, iterations=80).images.numpy(), index)
        assert np.mean([row["psnr_gain"] for row in scores]) > 2


def test_the_noise_of_a_sum_weighs_as_much_as_it_is(films, prior):
    """At the true films the misfit of n coordinates is n / 2, however many hospitals add noise."""
    for n in (1, 3):
        places = [films.subset([k]) for k in range(n)]
        state = initial_state(RECIPE, films)
        view = observe(places, RECIPE, state, SUM, Privacy(1.0, 1.0, 100.0, unit="film"), seed=0)
        value, _ = _noisy_likelihood(view, view.model(), films.inputs[:n, 0], view.labels, view.gradient())
        count = len(flat(view.gradient()))
        assert abs(2 * float(value.detach()) / count - 1) < 4 * math.sqrt(2 / count)


def test_the_likelihood_of_rounds_is_a_gaussian_density(films, prior):
    """Of three rounds with weights of their own, against densities of independently clipped gradients."""
    own, sigma, bound, n = films.subset([0, 1]), 0.7, 0.8, 2
    states = [initial_state(RECIPE, own, seed) for seed in range(3)]
    threat, privacy = ThreatModel(sees="rounds", knows_labels=True), Privacy(sigma, bound, 1e9, unit="film")
    view = observe(own, RECIPE, states, threat, privacy, seed=0)

    def density(candidates) -> float:
        total = 0.0
        for t, state in enumerate(states):
            each = film_gradients(candidates, RECIPE, state).double().numpy()
            each = each * np.minimum(1, bound / np.linalg.norm(each, axis=1, keepdims=True))
            seen_t = flat(view.gradient(t)).double().numpy()
            total += norm.logpdf(seen_t, each.sum(0) / n, sigma * bound / n).sum()
        return total

    def likelihood(candidates) -> float:
        parts = (
            _noisy_likelihood(view, view.model(t), candidates.inputs[:, 0], view.labels, view.gradient(t))[0]
            for t in range(3)
        )
        return float(sum(part.detach().double() for part in parts))

    other = replace(films.subset([7, 9]), labels=own.labels)
    assert density(own) > density(other)
    gap = density(own) - density(other)
    assert likelihood(other) - likelihood(own) == pytest.approx(gap, rel=0.01, abs=0.1)
    # And map_films adds them up: its first step of one film is at the prior's mean, where the prior pulls nowhere.
    one = replace(view, labels=view.labels[:1], n_films=1, denominator=1.0)
    mean = replace(films.subset([0]), inputs=films.normalise(prior.mean)[None, None, None])
    parts = (_noisy_likelihood(one, one.model(t), mean.inputs[:, 0], one.labels, one.gradient(t))[0] for t in range(3))
    assert map_films(one, prior, iterations=1).loss == pytest.approx(float(sum(p.detach() for p in parts)), rel=1e-4)


def test_rounds_add_up(films, prior, gallery):
    state, privacy = initial_state(RECIPE, films), Privacy(0.3, 1.0, 1e9, unit="film")
    gain = []
    for n in (1, 4):
        view = observe(films.subset([0]), RECIPE, [state] * n, ThreatModel(sees="rounds", knows_labels=True), privacy,
                       seed=0)  # fmt: skip
        out = map_films(view, prior, iterations=30)
        gain.append(gallery.score(out.images.numpy(), [0])[0]["pncc"])
    assert gain[1] > gain[0] + 0.1


@pytest.mark.parametrize("privacy", [None, clipping_alone(0.5)], ids=["plain", "clipped"])
def test_a_linear_heads_update_holds_the_features(privacy):
    generator = torch.Generator().manual_seed(0)
    features = torch.cat([F.normalize(torch.randn(1, 40, generator=generator)), torch.full((1, 1), 0.1)], 1)
    own = Films(features[:, None], torch.tensor([1]), np.array(["a"]), model="scatternet")
    recipe = Training("scatternet", sample_rate=1.0)
    view = observe(own, recipe, initial_state(recipe, own), privacy=privacy)
    torch.testing.assert_close(head_features(view, 0.1), features[0], rtol=1e-5, atol=1e-6)
    assert leaks(view, own) == []


def test_features_of_another_length_are_refused(prior):
    for features in (torch.ones(7), torch.ones(1, PIXELS), torch.ones(())):
        with pytest.raises(UserError, match=r"features of shape .*, but extract makes \(1, 1024\) of one film"):
            invert_features(features, lambda x: x.flatten(1), prior)
    with pytest.raises(UserError, match=r"doesn't take films of \(32, 32\) pixels, the prior's"):
        invert_features(torch.ones(3), lambda x: nn.Linear(900, 3)(x.flatten(1)), prior)


def test_a_class_image_needs_a_prior_of_the_models_size_and_a_class_that_it_has(public, films):
    network = models.build("convnet", 3, (1, SIDE, SIDE))
    small = FilmPrior.fit(public[:20, :28, :28], 4)
    with pytest.raises(UserError, match=r"doesn't take films of \(28, 28\) pixels, the prior's: fit the prior to"):
        class_image(network, 0, small, films.normalise)
    for label in (-1, 3):
        with pytest.raises(UserError, match=f"label is {label}: the model has classes 0 to 2"):
            class_image(network, label, FilmPrior.fit(public[:20], 4), films.normalise)


def test_features_that_an_update_doesnt_hold():
    head = nn.Linear(5, 3, bias=False)
    gradient = torch.randn(3, 5)
    gradient[:, -1] = 0
    with pytest.raises(UserError, match="says nothing about the constant feature"):
        head_features(AttackerView.from_gradient(head, [gradient], (5,)), 0.1)


@pytest.mark.parametrize("free_pixels", [False, True])
def test_features_are_inverted(free_pixels, films, chest, prior, gallery):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 8, 5, 2, 2), nn.Softplus(), nn.Flatten()).requires_grad_(False)

    def extract(images):  # grey values, as an extractor of the package takes them
        assert images.dim() == 3
        return network(images[:, None] / 127.5 - 1)

    features = extract(torch.from_numpy(chest.images[:1]).float())[0]
    out = invert_features(features, extract, prior, iterations=60, free_pixels=free_pixels)
    losses = [value for _, value, _ in out.history]
    assert out.loss < 0.3 * losses[0] and out.loss <= min(losses) + 1e-7
    (score,) = gallery.score(out.images.numpy(), [0])
    assert score["psnr_gain"] > 2 and out.labels.tolist() == [-1] and out.iterations == 60


def test_a_class_image_is_what_the_model_takes_for_that_class(films, prior):
    network = models.build("convnet", 3, (1, SIDE, SIDE))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    for label in range(3):
        out = class_image(network, label, prior, films.normalise, iterations=40)
        with torch.no_grad():
            mean, found = (
                network(films.normalise(x)).softmax(1)[0, label] for x in (prior.mean[None, None], out.images)
            )
        assert found > mean + 0.02 and out.labels.tolist() == [label]
        assert out.loss < out.history[0][1] and 0 <= out.images.min() <= out.images.max() <= 1
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_attacks_with_a_prior_can_be_stopped(films, prior, stop_after):
    view = seen(films, [0])
    stop_after(7)
    for attack in (
        lambda: map_films(view, prior), lambda: class_image(view.model(), 1, prior, view.normalise),
        lambda: invert_features(torch.ones(PIXELS), lambda x: x.flatten(1), prior),
    ):  # fmt: skip
        out = attack()
        assert out.stopped and out.iterations == 7 and out.history and math.isfinite(out.loss)
