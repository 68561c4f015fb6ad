"""Films that are attacked, films that the attacker owns, and who a reconstruction is of."""

from __future__ import annotations

import pytest

from primia_lite import metrics, models
from primia_lite.attacks import FilmPrior
from primia_lite.data import phantom


@pytest.fixture(scope="package")
def chest():
    return phantom.generate(40, 32, seed=5)


@pytest.fixture(scope="package")
def films(chest):
    return models.prepare("convnet", chest)


@pytest.fixture(scope="package")
def public():
    """Films that the attacker owns."""
    return phantom.generate(120, 32, seed=77).images


@pytest.fixture(scope="package")
def prior(public):
    return FilmPrior.fit(public, 48)


@pytest.fixture(scope="package")
def gallery(chest, public):
    return metrics.Gallery(chest.images, public.mean(0) / 255.0)
