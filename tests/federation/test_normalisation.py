"""Pixel mean and standard deviation under DP: what is summed, how much noise, what is charged and when."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from primia_lite.config import BudgetError, UserError
from primia_lite.data import phantom
from primia_lite.federation import normalisation
from primia_lite.federation.hospital import declare_size
from primia_lite.federation.normalisation import mean_and_std_under_dp
from primia_lite.privacy.accounting import Release, epsilon
from primia_lite.privacy.dpsgd import Privacy
from primia_lite.privacy.ledger import Ledger
from primia_lite.privacy.rng import SecureGenerator

PRIVACY = Privacy(1.0, 1.0, target_epsilon=8.0, unit="film")
TINY = 1e-9  # noise too small to matter, and a budget that allows it
ANY = Privacy(1.0, 1.0, target_epsilon=1e30, unit="film")


def normalise(hospitals, sigma, folder, privacy=PRIVACY, rng=None, **more):
    return mean_and_std_under_dp(hospitals, sigma, folder, privacy, rng or SecureGenerator(), **more)


@pytest.fixture(scope="module")
def hospitals():
    films = phantom.generate(57, 28, seed=41)
    return [("A", films.subset(np.arange(24))), ("B", films.subset(np.arange(24, 57)))]


@pytest.fixture
def without_accountant(monkeypatch):
    """Charges cost nothing to work out: for tests of the noise alone."""
    monkeypatch.setattr("primia_lite.privacy.ledger.filter_epsilon", lambda *_: 0.0)


def test_without_noise_it_is_the_mean_over_the_declared_sizes(hospitals, tmp_path, without_accountant):
    mean, std = normalise(hospitals, TINY, tmp_path, ANY)
    declared = declare_size(24) + declare_size(33)
    assert declared == 50
    pixels = np.concatenate([films.images.reshape(len(films), -1) for _, films in hospitals]) / 255.0
    want = pixels.mean(1).sum() / declared
    square = (pixels**2).mean(1).sum() / declared
    assert mean == pytest.approx(want, abs=1e-6)
    assert std == pytest.approx(np.sqrt(square - want**2), abs=1e-6)


def test_one_film_changes_a_sum_by_at_most_the_sensitivity(hospitals, tmp_path, without_accountant, monkeypatch):
    # All white is the worst film: (1, 1), of norm sqrt(2).
    films = hospitals[0][1]
    white = np.full((1, 28, 28), 255, np.uint8)
    monkeypatch.setattr(normalisation, "declare_size", lambda n: 20)
    with_film = films.subset(np.arange(20))
    object.__setattr__(with_film, "images", np.concatenate([white, films.images[:19]]))
    without = films.subset(np.arange(19))
    moments = []
    for number, some in enumerate((with_film, without)):
        mean, std = normalise([("A", some)], TINY, tmp_path / str(number), ANY)
        moments.append(20 * np.array([mean, std**2 + mean**2]))
    assert np.linalg.norm(moments[0] - moments[1]) == pytest.approx(np.sqrt(2), abs=1e-5)


def test_noise_of_each_hospital_has_the_stated_scale(hospitals, tmp_path, without_accountant):
    sigma, declared = 0.05, 50  # small, so that no result is clipped to its range
    exact = normalise(hospitals, TINY, tmp_path / "exact", ANY)
    draws = []
    for seed in range(400):
        rng = SecureGenerator.from_seed(seed)
        mean, std = normalise(hospitals, sigma, tmp_path / "noisy", PRIVACY, rng)
        draws.append([mean - exact[0], std**2 + mean**2 - exact[1] ** 2 - exact[0] ** 2])
    draws = np.array(draws) / (np.sqrt(2.0) * sigma * np.sqrt(len(hospitals)) / declared)
    for column in draws.T:
        assert stats.kstest(column, "norm").pvalue > 1e-3
        assert column.std() == pytest.approx(1, abs=4 / np.sqrt(2 * len(column)))
    assert abs(np.corrcoef(draws.T)[0, 1]) < 4 / np.sqrt(len(draws))


def test_each_hospital_is_charged_before_it_computes(hospitals, tmp_path, without_accountant, monkeypatch):
    order = []
    charge, words = Ledger.charge, SecureGenerator.words
    monkeypatch.setattr(
        Ledger, "charge", lambda self, *a, **k: order.append(f"charge {self.path.stem}") or charge(self, *a, **k)
    )
    monkeypatch.setattr(SecureGenerator, "words", lambda self, n: order.append("compute") or words(self, n))
    normalise(hospitals, 2.0, tmp_path)
    assert order == ["charge ledger-A", "compute", "charge ledger-B", "compute"]


def test_the_charge_is_one_gaussian_release_of_all_films(hospitals, tmp_path):
    normalise(hospitals, 2.0, tmp_path)
    for name in "AB":
        ledger = Ledger(tmp_path / f"ledger-{name}.sqlite")
        assert ledger.charges() == [Release(2.0, 1.0, 1)]
        assert ledger.spent()["pld"] == epsilon(Release(2.0, 1.0, 1), 1e-4) < ledger.epsilon()


def test_a_charge_over_the_budget_computes_nothing(hospitals, tmp_path, monkeypatch):
    def refuse(self, n):
        raise AssertionError("computed although the budget doesn't allow it")

    monkeypatch.setattr(SecureGenerator, "words", refuse)
    tight = Privacy(1.0, 1.0, target_epsilon=0.1)
    with pytest.raises(BudgetError, match="normalisation"):
        normalise(hospitals, 2.0, tmp_path, tight)
    assert Ledger(tmp_path / "ledger-A.sqlite").charges() == []


def charges(folder: Path) -> int:
    return len(Ledger(folder / "ledger-A.sqlite").charges())


def test_a_repeat_is_charged_again_unless_a_seed_repeats_it(hospitals, tmp_path, without_accountant):
    for rng, expected in ((SecureGenerator(), 2), (SecureGenerator.from_seed(1), 1)):
        folder = tmp_path / str(expected)
        for _ in range(2):
            normalise(hospitals, 2.0, folder, PRIVACY, rng)
        assert charges(folder) == expected


def test_fresh_starts_new_ledgers(hospitals, tmp_path, without_accountant):
    for _ in range(2):
        normalise(hospitals, 2.0, tmp_path, fresh=True)
    assert charges(tmp_path) == 1
    another = Privacy(1.0, 1.0, target_epsilon=3.0)
    with pytest.raises(UserError, match="epsilon"):
        normalise(hospitals, 2.0, tmp_path, another)
    normalise(hospitals, 2.0, tmp_path, another, fresh=True)


def test_a_second_release_has_noise_of_its_own(hospitals, tmp_path, without_accountant):
    """The difference of two releases must not give a film away exactly, though one generator served both."""
    rng = SecureGenerator()
    first = normalise(hospitals, 1.0, tmp_path / "1", ANY, rng)
    second = normalise(hospitals, 1.0, tmp_path / "2", ANY, rng)
    assert first != second
    seeded = [normalise(hospitals, 1.0, tmp_path / f"s{i}", ANY, SecureGenerator.from_seed(1)) for i in (1, 2)]
    assert seeded[0] == seeded[1]


def test_a_patients_films_count_as_one(hospitals, tmp_path, without_accountant):
    """Unit patient: the mean over patients of the mean over their films, and the declared number of patients."""
    by_patient = Privacy(1.0, 1.0, target_epsilon=1e30)
    name, films = hospitals[1]
    mean, std = normalise([(name, films)], TINY, tmp_path, by_patient)
    pixels = films.images.reshape(len(films), -1) / 255.0
    patients = np.unique(films.patient_id)
    assert len(patients) < len(films)
    own = [pixels[films.patient_id == p] for p in patients]
    each = np.array([[films.mean(), (films**2).mean()] for films in own])
    want, square = each.sum(0) / declare_size(len(patients))
    assert mean == pytest.approx(want, abs=1e-6) and std == pytest.approx(np.sqrt(square - want**2), abs=1e-6)


def test_a_hospital_declares_a_number_of_its_own(hospitals, tmp_path, without_accountant):
    own = {"A": 40, "B": 1}
    mean, _ = normalise(hospitals, TINY, tmp_path, ANY, declared=own)
    pixels = np.concatenate([f.images.reshape(len(f), -1) for _, f in hospitals]) / 255.0
    assert mean == pytest.approx(np.clip(pixels.mean(1).sum() / 41, 0.05, 0.95), abs=1e-6)
    with pytest.raises(UserError, match="declared"):
        normalise(hospitals, TINY, tmp_path, ANY, declared={"A": 0})


def test_a_lasting_ledger_is_charged_for_it_too(hospitals, tmp_path):
    lasting = Ledger(tmp_path / "hospital-A.sqlite", 8.0, 1e-4, "film")
    normalise(hospitals, 5.0, tmp_path, PRIVACY, lasting_ledgers={"A": lasting})
    assert lasting.charges() == [Release(5.0, 1.0, 1)]
    assert not (tmp_path / "ledger-A.sqlite").exists() and (tmp_path / "ledger-B.sqlite").exists()
    with pytest.raises(UserError, match="noise"):
        normalise(hospitals, 5.0, tmp_path, PRIVACY, SecureGenerator.from_seed(1), lasting_ledgers={"A": lasting})
    by_patient = Privacy(1.0, 1.0, target_epsilon=8.0)
    with pytest.raises(UserError, match="privacy"):
        normalise(hospitals, 5.0, tmp_path, by_patient, lasting_ledgers={"A": lasting})


def test_fresh_forgets_no_other_charges(hospitals, tmp_path):
    Ledger(tmp_path / "ledger-A.sqlite", 8.0, 1e-4, "film").charge("a study", Release(5.0, 1.0, 1))
    with pytest.raises(UserError, match="charged"):
        normalise(hospitals, 5.0, tmp_path, fresh=True)
