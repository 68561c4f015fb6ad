"""Labels and films out of exact and clipped updates: closed forms, and searches that match gradients."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from attack_cases import (
    GUESSING,
    KNOWING,
    PIXELS,
    RECIPE,
    RELU,
    ROUNDS,
    SIDE,
    SUM,
    TANH,
    film_gradients,
    flat,
    psnrs,
    seen,
)
from torch import nn
from torch.nn import functional as F

from primia_lite import metrics
from primia_lite.attacks import (
    AttackerView,
    DeepLeakage,
    DenseLayerInversion,
    FeatureInversion,
    ImprintReading,
    InvertingGradients,
    MapEstimator,
    ThreatModel,
    class_image,
    clipping_alone,
    cosine_distance,
    expected_update,
    infer_labels,
    initial_state,
    reconstruct,
    simulate_view,
)
from primia_lite.attacks.gradients import smooth_variation, total_variation
from primia_lite.config import UserError
from primia_lite.privacy.dpsgd import Privacy

COSINE = InvertingGradients(closed_form=False)
SEARCHES = [InvertingGradients(), COSINE, DeepLeakage()]


# --- views that say too much or nothing -------------------------------------------------------------------------------


METHODS = [InvertingGradients(), DeepLeakage(), DenseLayerInversion(), ImprintReading()]


@pytest.mark.parametrize("method", [*METHODS, FeatureInversion(lambda x: x, None, 0.1)], ids=lambda m: type(m).__name__)
def test_a_method_that_takes_one_round_doesnt_pass_over_others(method, films):
    own = films.subset([0])
    view = simulate_view(own, RECIPE, [initial_state(RECIPE, own, seed) for seed in (0, 1, 2)], ROUNDS)
    with pytest.raises(UserError, match="rounds"):
        reconstruct(view, method)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
def test_an_update_that_says_nothing_is_refused(method, films):
    view = seen(films, [0])
    for value, word in ((0.0, "zeros"), (0.5, "constant")):
        nothing = replace(view, updates=({n: torch.full_like(v, value) for n, v in view.updates[0].items()},))
        with pytest.raises(UserError, match=word):
            reconstruct(nothing, method)
        with pytest.raises(UserError, match=word):
            infer_labels(nothing)
    with pytest.raises(UserError, match="learning"):
        seen(films, [0], learning_rate=0.0).gradient()


@pytest.mark.parametrize("n", [-1, 0, 5])
def test_a_wrong_number_of_films_is_refused(n, films):
    for threat in (KNOWING, GUESSING):
        with pytest.raises(UserError, match="n_films"):
            reconstruct(seen(films, [0, 1], threat), n_films=n)


@pytest.mark.parametrize("method", [InvertingGradients(2), DeepLeakage(2)])
def test_an_unknown_number_of_films_needs_a_guess_and_a_search_a_step_and_a_start(method, films):
    view = seen(films, [0, 1], ThreatModel(knows_batch_size=False))
    with pytest.raises(UserError, match="guess"):
        reconstruct(view, method)
    assert reconstruct(view, method, n_films=3).images.shape == (3, 1, SIDE, SIDE)
    for other, restarts in ((replace(method, iterations=-1), 1), (method, 0)):
        with pytest.raises(UserError, match="least"):
            reconstruct(view, other, restarts=restarts, n_films=1)


# --- closed forms -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"activation": "tanh", "hidden": 8}])
def test_a_dense_layer_on_the_pixels_gives_its_film_away(options, films, gallery):
    recipe = RECIPE.changed(model="mlp", model_options=options, learning_rate=1.0)
    out = reconstruct(seen(films, [3], GUESSING, recipe=recipe), DenseLayerInversion())
    assert psnrs(gallery, out, [3]) > 100
    assert out.labels.tolist() == films.labels[[3]].tolist() and out.loss == 0
    blend = reconstruct(seen(films, [3, 4], recipe=recipe), DenseLayerInversion())
    assert psnrs(gallery, blend, [3]) < 40


def test_where_a_dense_layer_says_nothing_that_is_said(films):
    with pytest.raises(UserError, match="pixels"):
        reconstruct(seen(films, [0]), DenseLayerInversion())
    recipe = RECIPE.changed(model="mlp", model_options={})
    state = initial_state(recipe, films)
    state["1.bias"] = torch.full_like(state["1.bias"], -1e3)
    with pytest.raises(UserError, match="active"):
        reconstruct(seen(films, [0], state=state, recipe=recipe), DenseLayerInversion())


@pytest.mark.parametrize("n", [1, 3])
def test_a_convnet_of_dead_relus_is_named(n, films, prior):
    recipe = RECIPE.changed(model_options=RELU)
    state = initial_state(recipe, films)
    state["2.bias"] = torch.full_like(state["2.bias"], -1e3)
    view = seen(films, range(n), state=state, recipe=recipe)
    assert float(flat(view.gradient()).abs().max()) > 0  # the last bias still moves, and tells labels
    assert infer_labels(replace(view, labels=None)).tolist() == sorted(films.labels[:n].tolist())
    for method in (*SEARCHES, MapEstimator(prior)):
        with pytest.raises(UserError, match="biases"):
            reconstruct(view, method)


# --- labels -----------------------------------------------------------------------------------------------------------


def label_accuracy(view, labels) -> float:
    """Share of a batch's labels that are right, matched as well as can be."""
    found = torch.bincount(infer_labels(view), minlength=3)
    return float(torch.minimum(found, torch.bincount(labels, minlength=3)).sum()) / len(labels)


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


@pytest.mark.parametrize("options", [TANH, {**TANH, "hidden": 64}])
@pytest.mark.parametrize(("n", "least"), [(4, 1.0), (12, 0.9)])
def test_labels_are_counted_where_clipping_cuts_every_film(n, least, options, films):
    rng, recipe, accuracy, chance = np.random.default_rng(0), RECIPE.changed(model_options=options), [], []
    for seed in range(3):
        own = films.subset(rng.choice(len(films), n, replace=False))
        state = initial_state(recipe, own, seed)
        assert film_gradients(own, recipe, state).norm(dim=1).min() > 2 * 0.2
        view = simulate_view(own, recipe, state, GUESSING, clipping_alone(0.2))
        accuracy.append(label_accuracy(view, own.labels))
        chance.append(float(torch.bincount(own.labels, minlength=3).clamp(max=n / 3).sum()) / n)
    assert np.mean(accuracy) >= least and np.mean(accuracy) > np.mean(chance) + 0.05


def test_the_labels_of_rounds_and_of_a_sum_are_counted_from_all_of_them(films):
    own = films.subset(range(8))
    states = [initial_state(RECIPE, own, seed) for seed in range(6)]
    view = simulate_view(own, RECIPE, states, ThreatModel(sees="rounds"), Privacy(0.3, 1.0, 1e9, unit="film"), seed=0)
    singles = [replace(view, weights=(w,), updates=(u,)) for w, u in zip(view.weights, view.updates, strict=True)]
    each = [label_accuracy(single, own.labels) for single in singles]
    assert label_accuracy(view, own.labels) > np.mean(each)
    places = [films.subset(range(4)), films.subset(range(4, 8))]
    for privacy in (None, clipping_alone(1e3)):
        view = simulate_view(places, RECIPE, initial_state(RECIPE, films), ThreatModel(sees="sum"), privacy)
        assert infer_labels(view).tolist() == sorted(own.labels.tolist())


def test_shares_beyond_the_batch_are_scaled_to_it():
    # A class whose share is below nothing: what is left of the others fits the batch, and none is cut off.
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    nn.init.zeros_(network[1].weight), nn.init.zeros_(network[1].bias)
    bias = 1 / 3 - torch.tensor([-1.2, 3.1, 2.1]) / 4
    view = AttackerView.from_gradient(network, [torch.arange(12.0).view(3, 4), bias], (1, 2, 2), n_films=4)
    assert infer_labels(view).tolist() == [1, 1, 2, 2]


@pytest.mark.parametrize(
    ("network", "word"),
    [(nn.Sequential(nn.Flatten(), nn.Linear(PIXELS, 3, bias=False)), "bias"),
     (nn.Sequential(nn.Conv2d(1, 3, SIDE), nn.Flatten()), "dense")],
)  # fmt: skip
def test_labels_that_cant_be_inferred_are_asked_for(network, word):
    gradient = [torch.randn_like(p) for p in network.parameters()]
    with pytest.raises(UserError, match=word):
        infer_labels(AttackerView.from_gradient(network, gradient, (1, SIDE, SIDE)))


# --- matching updates -------------------------------------------------------------------------------------------------


def test_the_expected_update_is_the_products_follows_local_steps_and_is_differentiable(films):
    for steps, options in ((1, TANH), (3, {**TANH, "hidden": 16})):
        view = seen(films, range(3), learning_rate=1.0, local_steps=steps, model_options=options)
        model, x = view.model(), films.inputs[:3, 0].clone().requires_grad_()
        got = expected_update(view, model, x, view.labels)
        torch.testing.assert_close(flat(got), flat(view.gradient()), rtol=1e-3, atol=1e-5)
        (slope,) = torch.autograd.grad(sum((g * g).sum() for g in got), x)
        assert slope.abs().max() > 0
        assert all(torch.equal(value, view.weights[0][name]) for name, value in model.state_dict().items())
    naive = expected_update(view, model, x, view.labels, unroll=False)
    assert float(cosine_distance(naive, view.gradient()).detach()) > 0.1


def test_distances_by_hand():
    a, b = [torch.tensor([3.0]), torch.tensor([[4.0, 0.0]])], [torch.tensor([0.0]), torch.tensor([[2.0, 0.0]])]
    assert float(cosine_distance(a, b)) == pytest.approx(1 - 8 / (5 * 2))
    assert float(cosine_distance(a, [-3 * x for x in a])) == pytest.approx(2)
    film = torch.tensor([[[[0.0, 1.0], [0.5, 0.5]]]])
    assert float(total_variation(film)) == pytest.approx(0.5 + 0.5)
    assert float(smooth_variation(film)) == pytest.approx(1.0, abs=1e-3)
    assert float(smooth_variation(torch.zeros(1, 1, 3, 3))) < 1e-3


@pytest.mark.parametrize(
    ("options", "least", "method"),
    [
        (TANH, 50, InvertingGradients()),
        (RELU, 35, InvertingGradients(120)),
        (TANH, 35, COSINE),
        ({"activation": "sigmoid"}, 30, InvertingGradients()),
        (TANH, 35, DeepLeakage()),
    ],
    ids=["tanh", "relu", "tanh, not closed form", "sigmoid", "deep leakage"],
)
def test_one_film_is_inverted(options, least, method, films, gallery):
    out = reconstruct(seen(films, [0], GUESSING, model_options=options), method)
    assert psnrs(gallery, out, [0]) > least
    assert out.labels.tolist() == films.labels[:1].tolist()
    assert out.images.shape == (1, 1, SIDE, SIDE) and 0 <= out.images.min() <= out.images.max() <= 1
    assert abs(out.loss) < 1e-3 and not out.stopped and out.cpu_s > 0
    steps = [step for step, _, _ in out.history]
    assert steps == sorted(steps) and out.iterations >= max(steps) and len(steps) > 10
    assert out.history[0][1] > 100 * max(out.loss, 1e-9) and out.history[0][2].shape == out.images.shape


def test_a_batch_before_a_hidden_layer_and_films_of_a_sum_are_inverted(films, gallery):
    recipe = RECIPE.changed(model_options={**TANH, "hidden": 64})
    out = reconstruct(seen(films, range(4), recipe=recipe), InvertingGradients(150))
    assert psnrs(gallery, out, range(4)).min() > 30
    view = simulate_view([films.subset([0]), films.subset([4])], recipe, initial_state(recipe, films), SUM)
    for method in (InvertingGradients(100), DeepLeakage()):
        assert psnrs(gallery, reconstruct(view, method), [0, 4]).min() > 35


def test_without_noise_clipping_hinders_nobody_and_noise_hinders(films, gallery):
    state = initial_state(RECIPE, films)
    plain, clipped = (seen(films, [0], GUESSING, privacy, state) for privacy in (None, clipping_alone(0.1)))
    assert flat(clipped.gradient()).norm() / flat(plain.gradient()).norm() < 0.5
    want, got = (psnrs(gallery, reconstruct(view, InvertingGradients(80)), [0]) for view in (plain, clipped))
    assert want > 35 and abs(got - want) < 3
    # The same attack on the same film: noise is all that differs. Under noise there is no closed form to use.
    alone, noisy = (
        psnrs(gallery, reconstruct(seen(films, [0], KNOWING, privacy, state), COSINE), [0])
        for privacy in (clipping_alone(1.0), Privacy(0.05, 1.0, 1e9, unit="film"))
    )
    assert noisy < 25 < 35 < alone


def test_attacks_use_the_declared_size_for_what_it_is(films, prior, gallery):
    """A denominator of ten over one film: the gradient is ten times too short, and its length is explained."""
    blind = ThreatModel(knows_batch_size=False)
    view = seen(films, [0], blind, clipping_alone(1e3))
    assert psnrs(gallery, reconstruct(view, DeepLeakage(), n_films=1), [0]) > 35
    for sigma, least in ((0.01, 4), (1e-9, 2)):
        noisy = seen(films, [0], blind, Privacy(sigma, 1.0, 1e30, unit="film"))
        out = reconstruct(noisy, MapEstimator(prior, 80), n_films=1)
        assert gallery.score(out.images.numpy(), [0])[0]["psnr_gain"] > least
    with pytest.raises(UserError, match="guess"):
        reconstruct(noisy, MapEstimator(prior))


def test_several_local_steps_are_better_followed_through(films, gallery):
    view = seen(films, [0, 1], learning_rate=1.0, local_steps=4, model_options={**TANH, "hidden": 64})
    truth = films.denormalise(films.inputs[:2, 0])
    start = (truth + 0.05 * torch.randn(truth.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    how = {"start": start, "iterations": 40, "step": 0.01, "total_variation_weight": 1e-3}
    unrolled, naive = (reconstruct(view, InvertingGradients(**how, unroll=unroll)) for unroll in (True, False))
    assert psnrs(gallery, unrolled, [0, 1]).min() > psnrs(gallery, naive, [0, 1]).max() + 5
    one = seen(films, [0], GUESSING, learning_rate=0.3, local_steps=3)
    assert psnrs(gallery, reconstruct(one, InvertingGradients(120, unroll=False)), [0]) > 35


def test_a_start_is_used_and_one_of_another_size_refused(films, gallery, prior):
    view = seen(films, [0])
    truth = films.denormalise(films.inputs[:1, 0])
    assert psnrs(gallery, reconstruct(view, InvertingGradients(1, start=truth)), [0]) > 60
    first = reconstruct(view, MapEstimator(prior, 5))
    found, given = (reconstruct(view, InvertingGradients(2, start=s)) for s in (MapEstimator(prior, 5), first.images))
    assert torch.equal(found.images, given.images)
    for shape in ((1, 1, SIDE, SIDE - 1), (2, 1, SIDE, SIDE), (SIDE, SIDE)):
        with pytest.raises(UserError, match="start"):
            reconstruct(view, InvertingGradients(start=torch.zeros(shape)))


def test_of_several_starts_the_one_with_the_least_own_loss_is_kept(films):
    view = seen(films, [0])
    for method in (InvertingGradients(15, closed_form=False), DeepLeakage(15)):
        each = [reconstruct(view, method, seed=seed) for seed in (5, 6, 7)]
        best = min(each, key=lambda out: out.loss)
        assert len({out.loss for out in each}) == 3
        together = reconstruct(view, method, seed=5, restarts=3)
        assert together.loss == best.loss and torch.equal(together.images, best.images)
        assert together.iterations == sum(out.iterations for out in each)


# --- searches that are stopped, or break ------------------------------------------------------------------------------


class Watched(nn.Tanh):
    """Counts its calls, and does something else in some of them."""

    calls, faulty, fault = itertools.count(), range(0), None

    def forward(self, x):
        return type(self).fault(super().forward(x)) if next(self.calls) in self.faulty else super().forward(x)


def stop(_):
    raise KeyboardInterrupt


@pytest.fixture
def watched(films):
    """A view of a network, and how to let it be at fault in its next calls, from 0."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 8, 5, 2, 2), Watched(), nn.Flatten(), nn.Linear(8 * 256, 3))
    loss = F.cross_entropy(network(films.inputs[0]), films.labels[:1])
    gradient = torch.autograd.grad(loss, list(network.parameters()))
    view = AttackerView.from_gradient(network, list(gradient), (1, SIDE, SIDE), labels=films.labels[:1],
                                      normalisation=films.normalisation)  # fmt: skip

    def arm(fault, *calls):
        Watched.calls, Watched.faulty, Watched.fault = itertools.count(), range(*calls), staticmethod(fault)
        return view

    yield arm
    Watched.faulty = range(0)


@pytest.mark.parametrize(
    ("method", "k"), [(InvertingGradients(30), 12), (InvertingGradients(30), 40), (DeepLeakage(), 10)]
)
def test_an_attack_that_is_stopped_ends_with_its_best(method, k, films, watched):
    view = watched(stop, k, k + 1)
    out = reconstruct(view, method, restarts=3)
    assert out.stopped and 0 < out.iterations <= k and math.isfinite(out.loss)
    assert out.history and out.history[0][0] == 1
    film = films.denormalise(films.inputs[:1, 0])
    assert out.images.shape == film.shape and 0 <= out.images.min() <= out.images.max() <= 1
    assert metrics.psnr(out.images, film) > metrics.psnr(out.history[0][2], film)


@pytest.mark.parametrize("method", [InvertingGradients(40, closed_form=False), DeepLeakage(40)])
def test_a_loss_that_is_no_number_ends_a_search_with_its_best(method, watched):
    view = watched(lambda x: x * torch.nan, 12, 13)
    with pytest.warns(RuntimeWarning, match="finite"):
        out = reconstruct(view, method)
    assert out.iterations == 12 and not out.stopped
    assert math.isfinite(out.loss) and torch.isfinite(out.images).all()
    assert out.history and all(math.isfinite(value) for _, value, _ in out.history)
    assert out.loss < out.history[0][1]


@pytest.mark.filterwarnings("ignore:.*wasn't finite:RuntimeWarning")
@pytest.mark.parametrize("method", [InvertingGradients(10, closed_form=False), DeepLeakage(10)])
def test_of_starts_those_without_a_number_are_passed_over(method, watched):
    want = reconstruct(watched(None, 0), method, seed=1)
    got = reconstruct(watched(lambda x: x * torch.nan, 2), method, seed=0, restarts=2)  # all of the first start
    assert got.loss == want.loss and torch.equal(got.images, want.images)


@pytest.mark.filterwarnings("ignore:.*wasn't finite:RuntimeWarning")
def test_where_no_loss_is_a_number_that_is_said(watched, prior):
    view = watched(lambda x: x * torch.nan, 10**9)
    for method in (InvertingGradients(5, closed_form=False), DeepLeakage(5)):
        with pytest.raises(UserError, match="finite"):
            reconstruct(view, method, restarts=2)
    with pytest.raises(UserError, match="finite"):
        class_image(nn.Sequential(nn.Flatten(), nn.Linear(PIXELS, 3)), 0, prior, lambda x: x * torch.nan)


def test_attacks_with_a_prior_can_be_stopped(watched, prior):
    for attack in (
        lambda view: reconstruct(view, MapEstimator(prior)),
        lambda view: class_image(view.network, 1, prior, view.normalise),
    ):
        out = attack(watched(stop, 7, 8))
        assert out.stopped and 5 <= out.iterations <= 7 and out.history and math.isfinite(out.loss)
