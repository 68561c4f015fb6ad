"""Random changes to films: what they may change, and what they must leave."""

from __future__ import annotations

import pytest
import torch

from primia_lite.data import augmentation as aug
from primia_lite.data import phantom

CHANGES = {"flip": aug.flip, "shift": aug.shift, "jitter": aug.jitter, "stretch": aug.stretch}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def films():
    return torch.from_numpy(phantom.generate(30, 48, seed=31).images).float()[:, None] / 255.0


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("size", [28, 33])
def test_shape_and_range_stay(name, size):
    for films in (torch.rand(12, 1, size, size), torch.zeros(2, 1, size, size), torch.ones(2, 1, size, size)):
        before = films.clone()
        changed = CHANGES[name](films, generator())
        assert changed.shape == films.shape and changed.dtype == torch.float32
        assert changed.min() >= 0 and changed.max() <= 1
        assert torch.equal(films, before)  # a change isn't made in place


@pytest.mark.parametrize("name", CHANGES)
def test_the_generator_alone_decides(films, name):
    torch.manual_seed(1)
    first = CHANGES[name](films, generator(5))
    torch.manual_seed(2)
    assert torch.equal(CHANGES[name](films, generator(5)), first)
    assert not torch.equal(CHANGES[name](films, generator(6)), first)


def test_no_films_are_no_films():
    assert aug.shift(torch.zeros(0, 1, 28, 28), generator()).shape == (0, 1, 28, 28)


def test_flip_twice_is_the_film(films):
    twice = aug.flip(aug.flip(films, generator(), probability=1.0), generator(), probability=1.0)
    assert torch.equal(twice, films)
    assert torch.equal(aug.flip(films, generator(), probability=0.0), films)


def test_flip_takes_half_of_the_films_and_mirrors_left_and_right():
    films = torch.rand(2000, 1, 4, 4)
    changed = aug.flip(films, generator(3))
    mirrored = (changed == films.flip(-1)).flatten(1).all(1)
    kept = (changed == films).flatten(1).all(1)
    assert (mirrored ^ kept).all()
    assert 900 < int(mirrored.sum()) < 1100


def test_shift_moves_by_whole_pixels_up_to_its_reach():
    side, reach = 50, 3
    films = torch.rand(400, 1, side, side)
    changed = aug.shift(films, generator(1), reach=reach / side)
    seen = set()
    for film, moved in zip(films[:, 0], changed[:, 0], strict=True):
        fits = []
        for dy in range(-reach, reach + 1):
            for dx in range(-reach, reach + 1):
                rows = (torch.arange(side) + dy).clamp(0, side - 1)  # the border is repeated
                columns = (torch.arange(side) + dx).clamp(0, side - 1)
                if torch.equal(film[rows][:, columns], moved):
                    fits.append((dy, dx))
        assert len(fits) == 1
        seen.update(fits)
    assert len(seen) == (2 * reach + 1) ** 2


def test_jitter_keeps_what_the_film_shows(films):
    changed = aug.jitter(films, generator(2))
    per_film = (changed - films).abs().flatten(1).mean(1)
    assert (per_film > 0.003).all()  # every film is changed
    # Over many draws, the changes cancel out: the mean film stays about where it was.
    mean = torch.stack([aug.jitter(films, generator(seed)).mean(0) for seed in range(20)]).mean(0)
    inside = (slice(None), slice(6, -6), slice(6, -6))  # the border is drawn in where a film is shrunk
    before, after = films.mean(0)[inside], mean[inside]
    assert (after - before).abs().mean() < 0.05
    correlation = torch.corrcoef(torch.stack([before.flatten(), after.flatten()]))[0, 1]
    assert correlation > 0.95


def test_films_are_jittered_independently():
    film = torch.rand(1, 1, 32, 32).repeat(6, 1, 1, 1)
    changed = aug.jitter(film, generator())
    assert all(not torch.equal(changed[i], changed[j]) for i in range(6) for j in range(i))


def test_stretch_scales_width_and_height_by_themselves():
    """A bright square in the middle: how wide and how high it becomes."""
    side = 96
    films = torch.zeros(400, 1, side, side)
    films[:, :, side // 3 : 2 * side // 3, side // 3 : 2 * side // 3] = 1.0
    changed = aug.stretch(films, generator(1), log_scale=0.35, reach=0.0)[:, 0]
    height, width = (torch.log(changed.amax(axis).sum(1) / (side / 3)) for axis in (2, 1))
    for size in (height, width):
        assert size.abs().max() < 0.40 and size.min() < -0.30 and size.max() > 0.30
        assert float(size.std()) == pytest.approx(0.35 / 3**0.5, abs=0.03)  # uniform
    assert abs(torch.corrcoef(torch.stack([height, width]))[0, 1]) < 0.15
    moved = aug.stretch(films, generator(1), log_scale=0.0, reach=0.10)[:, 0]
    middle = (moved.sum(1) * torch.arange(side)).sum(1) / moved.sum((1, 2)) - (side - 1) / 2
    assert middle.abs().max() <= 0.10 * side / 2 + 0.1 and middle.abs().max() > 0.08 * side / 2


def test_stretch_repeats_the_border():
    films = torch.full((20, 1, 16, 16), 0.6)
    torch.testing.assert_close(aug.stretch(films, generator()), films)
