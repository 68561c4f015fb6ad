"""The local loop without privacy: batches, weights, mixing, parts and views. (With privacy: test_dpsgd.py.)"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight
from torch import nn
from torch.nn import functional as F

from primia_lite.config import UserError
from primia_lite.data.films import Films
from primia_lite.models import build
from primia_lite.privacy.rng import SecureGenerator
from primia_lite.training import SGD, Training, augment, predict, shuffled_batches, train


def tabular(n=40, d=6, classes=3, seed=0, views=1):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(n, views, d, generator=generator)
    return Films(inputs, torch.randint(classes, (n,), generator=generator), np.arange(n).astype(str))


def run(films, training, seed=0):
    model = build("litenet", 3, films.inputs.shape[2:])
    losses = train(model, films, training, None, SecureGenerator.from_seed(seed), 1.0)
    return model, losses


def same(a, b, **tolerance):
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, **tolerance)


# --- the loop ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [None, (0.5, 1.0, 3.0)])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_full_batches_are_plain_sgd(weights, smoothing):
    films = tabular()
    options = dict(momentum=0.8, weight_decay=0.01)
    training = Training(
        sample_rate=1.0, local_steps=6, learning_rate=0.4, class_weights=weights, label_smoothing=smoothing, **options
    )
    model, losses = run(films, training)
    plain = nn.Linear(6, 3, bias=False)
    nn.init.zeros_(plain.weight)
    optimizer = torch.optim.SGD(plain.parameters(), 0.4, **options)
    target = F.one_hot(films.labels, 3).float() * (1 - smoothing) + smoothing / 3
    if weights:
        target = target * torch.tensor(weights)
    want = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = -(target * plain(films.inputs[:, 0]).log_softmax(1)).sum(1).mean()
        loss.backward()
        optimizer.step()
        want.append(float(loss.detach()))
    same(model, plain, atol=1e-6, rtol=1e-5)
    np.testing.assert_allclose(losses, want, rtol=1e-5)


@pytest.mark.parametrize(
    "options", [{}, {"weight_decay": 0.01}, {"momentum": 0.8}, {"momentum": 0.8, "weight_decay": 0.01}]
)
def test_a_step_is_that_of_torch_to_the_bit(options):
    ours, theirs = nn.Linear(5, 3), nn.Linear(5, 3)
    theirs.load_state_dict(ours.state_dict())
    steps = SGD(ours, Training(learning_rate=0.3, **options)), torch.optim.SGD(theirs.parameters(), 0.3, **options)
    for seed in range(4):
        x = torch.randn(7, 5, generator=torch.Generator().manual_seed(seed))
        for model, optimizer in zip((ours, theirs), steps, strict=True):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
    same(ours, theirs, atol=0, rtol=0)


def test_training_repeats_by_seed():
    films, training = tabular(views=3), Training(sample_rate=0.2, local_steps=None, local_epochs=2)
    first, second, other = (run(films, training, seed)[0] for seed in (1, 1, 2))
    same(first, second, atol=0, rtol=0)
    assert not torch.equal(first.weight, other.weight)


def test_training_learns():
    films = tabular(n=120)
    films.inputs[:, 0, :3] += 3.0 * F.one_hot(films.labels, 3)
    model, losses = run(films, Training(sample_rate=0.5, local_steps=None, local_epochs=20, learning_rate=0.5))
    assert len(losses) == 40 and losses[-1] < 0.5 * losses[0]
    assert (predict(model, films).argmax(1) == films.labels.numpy()).mean() > 0.9


@pytest.mark.parametrize("extra", [(), ("mixup",)])
def test_a_batch_in_parts_takes_the_same_step(monkeypatch, extra):
    films = tabular(n=50)
    training = Training(sample_rate=0.6, local_steps=5, learning_rate=0.5, augmentation=extra)
    whole, losses = run(films, training)
    monkeypatch.setattr("primia_lite.training.PART_FILMS", 7)
    parts, losses_of_parts = run(films, training)
    same(whole, parts, atol=1e-6, rtol=1e-5)
    np.testing.assert_allclose(losses, losses_of_parts, rtol=1e-5)


@pytest.mark.parametrize(("n", "rate", "size"), [(10, 0.25, 2), (10, 1.0, 10), (3, 0.01, 1), (7, 0.5, 4)])
def test_batches_have_a_fixed_size_and_cover_all_films_each_pass(n, rate, size):
    batches = list(shuffled_batches(n, rate, 12, torch.Generator().manual_seed(0)))
    assert [len(batch) for batch in batches] == [size] * 12
    assert sorted(torch.cat(batches)[:n].tolist()) == list(range(n))


# --- class weights ----------------------------------------------------------------------------------------------------


def test_balanced_class_weights_are_scikit_learns():
    films = tabular(n=60)
    films.labels[:40] = 0
    given = compute_class_weight("balanced", classes=np.arange(3), y=films.labels.numpy())
    balanced, public = (run(films, Training(sample_rate=1.0, class_weights=w))[0] for w in ("balanced", tuple(given)))
    same(balanced, public, atol=1e-6, rtol=1e-5)


def test_balanced_weights_give_each_class_the_same_say():
    films = tabular(n=60)
    films.labels[:50] = 0
    films.inputs[:] = 1.0  # nothing to learn from: what is left is the classes' shares
    counts = torch.bincount(films.labels, minlength=3)
    assert counts.min() > 0
    model, _ = run(films, Training(sample_rate=1.0, local_steps=3, class_weights="balanced"))
    np.testing.assert_allclose(predict(model, films), 1 / 3, atol=1e-6)


# --- mixup ------------------------------------------------------------------------------------------------------------


def test_mixup_mixes_labels_as_it_mixes_films():
    """Two films and a model linear in its input: each mixed film is a line between them, and so is its loss."""
    generator, seen = torch.Generator().manual_seed(0), []
    films = Films(torch.randn(2, 1, 6, generator=generator), torch.tensor([0, 2]), np.array(["a", "b"]))
    model = nn.Linear(6, 3)
    model.register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0].detach()))
    mixed_twice, shares = 0, []
    for seed in range(40):
        weight, bias = model.weight.detach().clone(), model.bias.detach().clone()
        training = Training(sample_rate=1.0, learning_rate=0.01, augmentation=("mixup",))
        (loss,) = train(model, films, training, None, SecureGenerator.from_seed(seed), 1.0)
        logits = seen[-1] @ weight.T + bias
        line = films.inputs[1, 0] - films.inputs[0, 0]
        at = ((seen[-1] - films.inputs[0, 0]) @ line / (line @ line)).clamp(0, 1)  # of the second film
        torch.testing.assert_close(films.inputs[0] + at[:, None] * line, seen[-1], atol=1e-5, rtol=1e-5)
        want = -((1 - at) * logits.log_softmax(1)[:, 0] + at * logits.log_softmax(1)[:, 2]).mean()
        assert loss == pytest.approx(float(want), abs=1e-4)
        mixed_twice += float(at.sum()) == pytest.approx(1.0, abs=1e-5)
        shares.append(float(at[0]))
    assert mixed_twice == 40 and np.std(shares) > 0.1


def test_mixup_of_one_film_is_the_film():
    films = tabular(n=1)
    mixed, plain = (run(films, Training(sample_rate=1.0, augmentation=kinds))[0] for kinds in (("mixup",), ()))
    same(mixed, plain, atol=0, rtol=0)


# --- views ------------------------------------------------------------------------------------------------------------


def test_each_view_is_drawn_about_equally_often():
    views, n = 4, 4000
    films = Films(
        torch.arange(float(views)).view(1, views, 1).repeat(n, 1, 1), torch.zeros(n).long(), np.arange(n).astype(str)
    )
    drawn = augment(films, torch.arange(n), ("jitter",), torch.Generator().manual_seed(0), all_views=False)
    assert drawn.shape == (n, 1, 1)
    counts = torch.bincount(drawn.flatten().long(), minlength=views).numpy()
    assert (abs(counts - n / views) < 5 * np.sqrt(n / views)).all()
    everything = augment(films, torch.tensor([5, 9]), ("jitter",), torch.Generator(), all_views=True)
    assert everything.shape == (2, views, 1) and everything[0, :, 0].tolist() == [0, 1, 2, 3]


def pixels(n=12, size=20):
    inputs = (torch.rand(n, 1, 1, size, size, generator=torch.Generator().manual_seed(0)) - 0.4) / 0.2
    return Films(inputs, torch.arange(n) % 3, np.arange(n).astype(str), (0.4, 0.2))


@pytest.mark.parametrize("all_views", [False, True])
def test_pixels_are_changed_anew_and_keep_their_scale(all_views):
    films = pixels()
    index, generator = torch.arange(12), torch.Generator().manual_seed(0)
    plain = augment(films, index, (), generator, all_views=all_views)
    assert torch.equal(plain, films.inputs)
    kinds = ("flip", "shift", "jitter", "stretch")
    first, second = (augment(films, index, kinds, generator, all_views=all_views) for _ in range(2))
    assert first.shape == plain.shape and not torch.equal(first, second)
    grey = films.denormalise(first)
    assert grey.min() >= -1e-6 and grey.max() <= 1 + 1e-6
    nobody = augment(films, index[:0], kinds, generator, all_views=all_views)
    assert nobody.shape == (0, 1, 1, 20, 20)


def test_predict_averages_the_logits_of_a_films_views():
    films = tabular(n=30, views=3)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 3), nn.Dropout(0.5))
    got = predict(model, films, batch_size=7)
    want = (films.inputs.double() @ model[0].weight.T.double() + model[0].bias.double()).mean(1).softmax(1)
    np.testing.assert_allclose(got, want.detach().numpy(), atol=1e-6)
    assert got.dtype == np.float64 and got.shape == (30, 3)


# --- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"local_steps": 3}, 3),
        ({"local_steps": None, "local_epochs": 2, "sample_rate": 0.25}, 8),
        ({"local_steps": None, "local_epochs": 1, "sample_rate": 0.9}, 1),
    ],
)
def test_steps_per_round(options, steps):
    assert Training(**options).steps_per_round == steps


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"model": "vgg"}, "vgg"),
        ({"sample_rate": 0.0}, "sample_rate"),
        ({"sample_rate": 1.5}, "sample_rate"),
        ({"local_steps": 1, "local_epochs": 1}, "either"),
        ({"local_steps": None}, "either"),
        ({"local_steps": 0}, "at least 1"),
        ({"label_smoothing": 1.0}, "label_smoothing"),
        ({"max_grad_norm": 0.0}, "max_grad_norm"),
        ({"augmentation": ("flip", "rotate")}, "rotate"),
        ({"class_weights": "even"}, "class_weights"),
        ({"class_weights": (1.0, 2.0)}, "class_weights"),
    ],
)
def test_bad_options_are_named(options, word):
    with pytest.raises(UserError, match=word):
        Training(**options)
