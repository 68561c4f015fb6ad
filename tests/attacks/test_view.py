"""What an attacker is given: nothing that has films, what the threat model grants, and the product's own updates."""

from __future__ import annotations

import ast
import contextlib
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
from attack_cases import GUESSING, KNOWING, RECIPE, ROUNDS, SIDE, SUM, TANH, film_gradients, flat, seen
from scipy.stats import kstest
from torch import nn
from torch.nn import functional as F

from primia_lite import models
from primia_lite.attacks import (
    AttackerView,
    InvertingGradients,
    ThreatModel,
    clipping_alone,
    infer_labels,
    initial_state,
    reconstruct,
    simulate_view,
)
from primia_lite.config import UserError
from primia_lite.data.films import Films
from primia_lite.federation.hospital import local_update
from primia_lite.privacy.dpsgd import Privacy
from primia_lite.privacy.rng import SecureGenerator

# --- separation: by the text of the modules ---------------------------------------------------------------------------

ATTACKERS = ("view", "search", "gradients", "labels", "inversion", "imprint", "prior", "estimate")
GRANTED = (
    "primia_lite.config", "primia_lite.runtime", "primia_lite.models.networks",
    *(f"primia_lite.attacks.{name}" for name in ATTACKERS),
)  # fmt: skip


def forbidden(source: str) -> set[str]:
    """What a module's text imports from the package and may not, wherever in the text; by whole names only."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{'primia_lite.' * bool(node.level)}{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and " " not in node.value.strip():
            found.add(node.value)  # import_module("primia_lite.data")
    granted = tuple(f"{name}." for name in GRANTED)
    return {name for name in found if name.split(".")[0] == "primia_lite" and not f"{name}.".startswith(granted)}


@pytest.mark.parametrize("module", ATTACKERS)
def test_the_attackers_code_imports_nothing_that_has_films(root, module):
    assert not forbidden((root / f"primia_lite/attacks/{module}.py").read_text("utf-8"))


def test_nor_does_what_it_imports_in_turn():
    text = "import sys; from primia_lite.attacks import {}; print(*(m for m in sys.modules if m[:6] == 'primia'))"
    done = subprocess.run(
        [sys.executable, "-c", text.format(", ".join(ATTACKERS))], capture_output=True, text=True, check=True
    )
    needed = {f"primia_lite.attacks.{name}" for name in ATTACKERS}
    packages = {"primia_lite", "primia_lite.attacks", "primia_lite.models"}
    assert needed <= set(done.stdout.split()) <= {*GRANTED, *packages}


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
            stack += [thing.__closure__, thing.__defaults__, thing.__kwdefaults__, thing.__dict__]
            continue
        stack += gc.get_referents(thing)
        if isinstance(thing, torch.Tensor):
            stack += [thing.grad_fn, thing._base, thing.grad if thing.is_leaf else None, thing._backward_hooks]
        elif isinstance(thing, np.ndarray):
            stack.append(thing.base)
        elif isinstance(thing, torch.autograd.graph.Node):
            stack += [node for node, _ in thing.next_functions]
            saved = [name for name in dir(thing) if name.startswith("_saved") or name in ("variable", "saved_tensors")]
            with contextlib.suppress(RuntimeError):  # freed
                stack += [getattr(thing, name) for name in saved]
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
        at = thing.untyped_storage().data_ptr() if isinstance(thing, torch.Tensor) else 0
        at = thing.__array_interface__["data"][0] if isinstance(thing, np.ndarray) else at
        if begin <= at < end:
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
        view = simulate_view([own, films.subset(range(4, 8))], RECIPE, state, SUM)
    elif case == "rounds":
        view = simulate_view(own, RECIPE, [state, state], ROUNDS)
    elif case == "local steps":
        view = simulate_view(own, RECIPE.changed(sample_rate=0.5, local_steps=3), state)
    else:
        unit = "film" if case == "private" else "patient"
        view = simulate_view(
            own, RECIPE, state, KNOWING, None if case == "plain" else Privacy(1.0, 1.0, 100.0, unit=unit)
        )
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
    "closure": lambda view, films: view.network[0].register_forward_hook(hook([films.inputs.clone()])),
    "graph": lambda view, films: view.updates[0].update(more=(torch.ones(1, requires_grad=True) * films.inputs).sum()),
    "rest of a storage": lambda view, films: view.updates[0].update(more=films.inputs.clone().flatten()[:3]),
    "array's base": lambda view, films: setattr(view.network, "memo", films.inputs.double().numpy().ravel()[:2]),
    "raw bytes": lambda view, films: setattr(
        view.network, "memo", bytes((films.denormalise(films.inputs) * 255).round().byte().numpy())
    ),
}


@pytest.mark.parametrize("way", SMUGGLED)
def test_that_check_finds_a_smuggled_film(way, films):
    own = films.subset([0, 1])
    view = seen(films, [0, 1])
    SMUGGLED[way](view, own)
    assert leaks(view, own) != []


# --- what the threat model grants -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong", [{"server": "all"}, {"sees": "all"}, {"knows_batch_size": False, "knows_labels": True}], ids=str
)
def test_an_unknown_threat_is_refused(wrong):
    with pytest.raises(UserError, match="choose|grant"):
        ThreatModel(**wrong)


@pytest.mark.parametrize(("size", "labels"), [(True, True), (True, False), (False, False)])
def test_a_view_keeps_what_the_threat_model_grants_and_no_more(size, labels, films):
    view = seen(films, [0, 1], ThreatModel(knows_batch_size=size, knows_labels=labels))
    assert view.n_films == (2 if size else None)
    assert (view.labels.tolist() if labels else view.labels) == (films.labels[:2].tolist() if labels else None)
    rows = view.describe()
    assert rows["number of films"] == ("2 in a step" if size else "guessed")
    assert rows["labels"] == ("known" if labels else "inferred from the update")
    assert rows["privacy"] == "none"
    if not size:
        with pytest.raises(UserError, match="guess"):
            view.total_films  # noqa: B018


@pytest.mark.parametrize("n", [3, 8, 14])
def test_a_denominator_doesnt_give_a_withheld_number_of_films_away(n, films):
    """It is what a hospital declares, in tens, and the step was really divided by it."""
    own, state, privacy = films.subset(range(n)), initial_state(RECIPE, films), clipping_alone(0.5)
    known = simulate_view(own, RECIPE, state, GUESSING, privacy)
    view = simulate_view(own, RECIPE, state, ThreatModel(knows_batch_size=False), privacy)
    assert known.denominator == n and view.denominator == 10 and view.n_films is None
    assert n not in (view.denominator, len(view.labels or ()), view.hospitals)
    torch.testing.assert_close(flat(view.gradient()), flat(known.gradient()) * n / 10, rtol=1e-3, atol=1e-6)
    assert infer_labels(view, n).tolist() == infer_labels(known).tolist()  # the sum is known, whatever it is over


def test_hospitals_of_other_numbers_of_patients_have_no_one_denominator(films):
    one, two = films.subset([0, 1]), films.subset([2, 3])
    two = replace(two, patient_id=np.array(["a", "a"]))
    state, patients = initial_state(RECIPE, films), Privacy(1.0, 1.0, 100.0, unit="patient")
    with pytest.raises(UserError, match="denominator"):
        simulate_view([one, two], RECIPE, state, SUM, patients)
    blind = ThreatModel("blind", sees="sum", knows_batch_size=False)
    assert simulate_view([one, two], RECIPE, state, blind, patients).denominator == 10  # both declare ten


def test_more_than_the_threat_model_lets_see_is_refused(films):
    own, state = films.subset([0, 1]), initial_state(RECIPE, films)
    for hospitals, states, threat in (
        (own, [state] * 2, KNOWING),
        ([own] * 2, state, KNOWING),
        ([own] * 2, [state] * 2, SUM),
    ):
        with pytest.raises(UserError, match="sees"):
            simulate_view(hospitals, RECIPE, states, threat)


def test_an_update_that_cant_be_used_is_refused(films):
    view = seen(films, [0, 1])
    (update,) = view.updates
    bias, other = update["0.bias"], seen(films, [0, 1], model_options={"width": (4, 4)})
    rounds = {"threat": ROUNDS, "weights": view.weights * 2}
    for changes, word in (
        ({"updates": ({**update, "0.bias": torch.full_like(bias, torch.nan)},)}, "finite"),
        ({"updates": ({**update, "0.bias": torch.full_like(bias, torch.inf)},)}, "finite"),
        ({"updates": ({**update, "else": torch.ones(3)},)}, "fit"),
        ({"updates": ({n: v for n, v in update.items() if n != "0.bias"},)}, "fit"),
        ({"updates": view.updates + other.updates, **rounds}, "fit"),  # the second round's, too
        ({"weights": other.weights}, "fit"),
        ({"updates": ()}, "pair"),
        ({"updates": view.updates * 2}, "pair"),
        ({"n_films": 3}, "labels"),
    ):
        with pytest.raises(UserError, match=word):
            replace(view, **changes)


@pytest.mark.parametrize("shape", [(1, 28, 28), (2, 1, SIDE, SIDE), (5,), (-1, 2), ()])
def test_films_that_the_network_doesnt_take_are_refused(shape, films):
    with pytest.raises(UserError, match="in_shape"):
        replace(seen(films, [0]), in_shape=shape)


def test_a_network_that_gives_no_logits_is_refused_and_a_batchnorm_doesnt_notice_that_check():
    def view_of(network: nn.Module, in_shape) -> AttackerView:
        return AttackerView.from_gradient(network, [torch.randn_like(p) for p in network.parameters()], in_shape)

    with pytest.raises(UserError, match="logits"):
        view_of(nn.Conv2d(1, 3, 3), (1, 8, 8))
    network = nn.Sequential(nn.Conv2d(1, 4, 4), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 3)).train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    view = view_of(network, (1, 4, 4))
    assert network.training and view.network.training
    assert all(torch.equal(value, before[name]) for name, value in view.network.state_dict().items())


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
    with pytest.raises(UserError, match="gradients"):
        AttackerView.from_gradient(network, gradient[:5], (1, SIDE, SIDE))


# --- simulating -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("private", [False, True])
def test_an_observed_update_is_the_products_own(private, films):
    own, recipe = films.subset(range(6)), RECIPE.changed(sample_rate=0.5, local_steps=2)
    privacy = Privacy(1.0, 1.0, 100.0, unit="film") if private else None
    state = initial_state(recipe, own)
    view = simulate_view(own, recipe, state, privacy=privacy, seed=3)
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
    plain = flat(simulate_view(own, RECIPE, state).gradient())
    torch.testing.assert_close(plain, each.mean(0), rtol=1e-3, atol=1e-6)
    bound = float(each.norm(dim=1).median())
    clipped = (each * (bound / each.norm(dim=1, keepdim=True)).clamp(max=1)).sum(0) / 5
    assert not torch.allclose(clipped, each.mean(0), rtol=0.01)
    view = simulate_view(own, RECIPE, state, privacy=clipping_alone(bound))
    torch.testing.assert_close(flat(view.gradient()), clipped, rtol=1e-3, atol=1e-6)
    assert view.denominator == 5 and view.max_grad_norm == bound


def test_the_noise_is_what_was_promised(films):
    own, recipe = films.subset(range(4)), RECIPE.changed(learning_rate=1.0)
    state = initial_state(recipe, own)
    view = simulate_view(own, recipe, state, privacy=Privacy(2.0, 0.5, 100.0, unit="film"), seed=0)
    assert view.noise_std == 1.0 and view.denominator == 4
    exact = flat(simulate_view(own, recipe, state, privacy=clipping_alone(0.5)).gradient())
    noise = ((flat(view.gradient()) - exact) * view.denominator / view.noise_std).double()
    assert len(noise) > 15000
    assert abs(float(noise.std()) - 1) < 4 / math.sqrt(2 * len(noise))
    assert abs(float(noise.mean())) < 4 / math.sqrt(len(noise))
    assert kstest(noise.numpy(), "norm").pvalue > 1e-4


@pytest.mark.parametrize("bound", [1e-4, 1e8])
def test_what_counts_as_noise_is_relative_to_the_bound(bound, films):
    alone, little, none = (
        seen(films, [0, 1], privacy=privacy)
        for privacy in (clipping_alone(bound), Privacy(1e-3, bound, 1e30, unit="film"), None)
    )
    assert alone.noise_std > 0 and not alone.noisy and alone.describe()["privacy"].endswith("no noise")
    assert little.noisy and "noise σC = " in little.describe()["privacy"]
    assert not none.noisy


def test_a_sum_is_the_sum_of_the_hospitals_updates(films):
    places = [films.subset(range(3 * k, 3 * k + 3)) for k in range(3)]
    state = initial_state(RECIPE, films)
    view = simulate_view(places, RECIPE, state, SUM)
    single = [simulate_view(own, RECIPE, state).updates[0] for own in places]
    for name, value in view.updates[0].items():
        torch.testing.assert_close(value, sum(update[name] for update in single), rtol=1e-4, atol=1e-7)
    assert view.hospitals == 3 and view.n_films == 3 and view.total_films == 9
    assert view.labels.tolist() == films.labels[:9].tolist()
    assert seen(films, range(4), KNOWING, sample_rate=0.5).labels is None  # nobody knows who is in a Poisson batch
    each = film_gradients(films.subset(range(9)), RECIPE, state)
    torch.testing.assert_close(flat(view.gradient()), 3 * each.mean(0), rtol=1e-3, atol=1e-6)


def test_the_noise_of_a_sum_and_of_rounds_is_independent(films):
    own, state = films.subset(range(4)), initial_state(RECIPE, films)
    privacy, alone = Privacy(1.0, 1.0, 100.0, unit="film"), clipping_alone()
    exact = flat(simulate_view(own, RECIPE, state, privacy=alone).gradient())
    total = flat(simulate_view([own] * 4, RECIPE, state, SUM, privacy, seed=0).gradient()) - 4 * exact
    assert abs(float(total.std()) * 4 / 2.0 - 1) < 4 / math.sqrt(2 * len(total))  # a noise each: σC sqrt(4), over 4
    rounds = simulate_view(own, RECIPE, [state, state], ROUNDS, privacy, seed=0)
    first, second = (flat(rounds.gradient(t)) - exact for t in range(2))
    assert abs(float(torch.corrcoef(torch.stack([first, second]))[0, 1])) < 4 / math.sqrt(len(first))


def test_seeds_repeat_and_the_operating_system_doesnt(films):
    own, state, privacy = films.subset(range(4)), initial_state(RECIPE, films), Privacy(1.0, 1.0, 100.0, unit="film")
    one, again, other, *drawn = (
        flat(simulate_view(own, RECIPE, state, privacy=privacy, seed=seed).gradient()) for seed in (1, 1, 2, None, None)
    )
    assert torch.equal(one, again) and not torch.equal(one, other) and not torch.equal(*drawn)


def test_a_view_and_an_attack_leave_the_weights_as_they_were(films):
    state = initial_state(RECIPE, films)
    kept = {name: value.clone() for name, value in state.items()}
    view = seen(films, [0], state=state)
    update = {name: value.clone() for name, value in view.updates[0].items()}
    reconstruct(view, InvertingGradients(3))
    for now, before in ((state, kept), (view.weights[0], kept), (view.updates[0], update)):
        assert all(torch.equal(now[name], value) for name, value in before.items())
    assert all(torch.equal(value, kept[name]) for name, value in view.network.state_dict().items())
    state["0.weight"].zero_()  # the server's next weights
    assert torch.equal(view.weights[0]["0.weight"], kept["0.weight"])
