"""Membership inference: LiRA tells members where a model learns by heart, and nothing where noise hides them."""

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from primia_lite.attacks import lira, shadow_runs, true_positive_rate
from primia_lite.attacks.membership import Shadows
from primia_lite.config import UserError
from primia_lite.data.films import Films
from primia_lite.federation import Hospital, Schedule
from primia_lite.privacy import Privacy
from primia_lite.training import Training


@pytest.fixture(scope="module")
def films() -> Films:
    rng = np.random.default_rng(0)
    inputs = torch.nn.functional.normalize(torch.from_numpy(rng.normal(size=(90, 1, 60)).astype(np.float32)), dim=2)
    return Films(inputs, torch.from_numpy(rng.integers(3, size=90)), (np.arange(90) // 2).astype(str), model="litenet")


TRAINING = Training(sample_rate=0.5, learning_rate=20.0)


def area(shadows: Shadows, score: np.ndarray) -> float:
    return roc_auc_score(shadows.member.ravel(), score.ravel())


def test_lira_tells_members_of_a_model_that_learnt_by_heart(films, tmp_path):
    shadows = shadow_runs(films, TRAINING, Schedule(30), None, 12, tmp_path)
    assert shadows.member.shape == (12, 45)
    assert area(shadows, lira(shadows)) > 0.95
    assert area(shadows, lira(shadows, online=False)) > 0.9
    assert area(shadows, shadows.scores["updates of the hospital"]) > 0.7


def test_noise_hides_members_and_finished_runs_are_kept(films, tmp_path):
    privacy = Privacy.for_budget(0.5, sample_rate=0.5, steps=5, max_grad_norm=0.25)
    others = [Hospital("B", films.subset(np.arange(30)))]
    settings = (films, TRAINING, Schedule(5), privacy, 8, tmp_path)
    shadows = shadow_runs(*settings, others=others)
    assert 0.3 < area(shadows, lira(shadows)) < 0.7
    again = shadow_runs(*settings, others=others)
    for sees, scores in shadows.scores.items():
        assert np.array_equal(scores, again.scores[sees])  # noise would differ


def test_lira_is_the_likelihood_ratio_of_normal_scores():
    """Known means and one deviation: AUC Φ(d / √2) for scores whose means lie d deviations apart."""
    rng = np.random.default_rng(1)
    member = rng.random((64, 300)) < 0.5
    score = rng.normal(size=300) * 5 + member * 1.5 + rng.normal(size=member.shape)
    found = lira(Shadows(np.arange(300).astype(str), member, {"released model": score}))
    assert roc_auc_score(member.ravel(), found.ravel()) == pytest.approx(0.856, abs=0.01)
    assert roc_auc_score(member.ravel(), score.ravel()) < 0.65


def test_a_rate_at_a_false_positive_rate_by_counting():
    member = np.array([1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], bool)
    score = np.array([9, 8, 0.5, 0.1, *np.arange(10) / 10.0])
    assert true_positive_rate(member, score, 0.1) == 0.5
    assert true_positive_rate(member, np.ones(14), 0.1) == 0  # ties show nothing


def test_too_few_runs_are_refused(films, tmp_path):
    with pytest.raises(UserError, match="runs"):
        shadow_runs(films, TRAINING, Schedule(1), None, 3, tmp_path)
    scores = {"released model": np.full((4, 2), np.nan)}
    with pytest.raises(UserError, match="finite"):
        lira(Shadows(np.array(["a", "b"]), np.eye(4, 2, dtype=bool), scores))
    with pytest.raises(UserError, match="members"):
        true_positive_rate(np.ones(3, bool), np.ones(3), 0.1)
