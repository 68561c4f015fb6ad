"""Federated runs whose noise the hospitals make together."""

import numpy as np
import pytest
import torch
from test_rounds import hospitals

from primia_lite.config import UserError
from primia_lite.federation.aggregation import SecureAggregation, WeightedMean
from primia_lite.federation.rounds import Schedule, federate
from primia_lite.privacy.dpsgd import Privacy
from primia_lite.privacy.shared import SharedNoise
from primia_lite.secagg import TooFewSurvivors
from primia_lite.training import Training

TRAINING = Training(sample_rate=1.0, learning_rate=0.5, weight_decay=0.01)


def privacy(group, threshold=3, colluding=1, sigma=2.0, **more):
    shared = SharedNoise(threshold, colluding, 24, tuple(h.declared_patients for h in group))
    return Privacy(sigma, 0.5, **{"target_epsilon": 100.0, "shared": shared} | more)


def run(group, promise, folder, aggregator=None, rounds=1, **more):
    return federate(group, TRAINING, Schedule(rounds), promise, folder=folder, aggregator=aggregator, progress=None,
                    **more)  # fmt: skip


def test_shared_noise_trains_as_local_noise_does_but_for_the_noise(tmp_path):
    group = hospitals()
    quiet = run(group, privacy(group, sigma=1e-3, target_epsilon=1e30), tmp_path / "shared", rounds=5).state
    local = run(group, Privacy(1e-9, 0.5, 1e30), tmp_path / "local", rounds=5).state
    torch.testing.assert_close(quiet["weight"], local["weight"], atol=2e-4, rtol=0)


def test_the_sums_noise_is_what_the_ledger_is_charged_for(tmp_path):
    group = hospitals()
    promise = privacy(group, threshold=3, colluding=1)
    exact = run(group, Privacy(1e-9, 0.5, 1e30), tmp_path / "exact").state["weight"]
    changes = []
    for number in range(25):
        found = run(group, promise, tmp_path / str(number))
        changes.append((found.state["weight"] - exact).numpy())
    # All three shares are in the sum, two of which suffice.
    quantizer = promise.quantizer
    wanted = TRAINING.learning_rate * quantizer.share_sigma * np.sqrt(3) / quantizer.scale
    wanted /= sum(promise.shared.declared)
    assert np.std(changes) == pytest.approx(
        wanted, rel=0.12
    )  # 600 samples: four standard errors; one share less is 18 % less
    charged = found.hospitals[0].ledger(tmp_path / "24", promise).charges()
    assert [(r.noise_multiplier, r.sample_rate, r.steps) for r in charged] == [(2.0, 1.0, 1)]


def test_who_vanishes_leaves_enough_noise_and_the_charge_stays(tmp_path):
    group = hospitals()
    promise = privacy(group, threshold=2, colluding=1)
    gone = SecureAggregation(2, absent=lambda number, step: {"B"} if (number, step) == (2, "confirm") else ())
    result = run(group, promise, tmp_path, gone, rounds=3)
    # B's update had arrived: it is in the sum although B is gone.
    assert ["absent" in record for record in result.history] == [False, False, False]
    early = SecureAggregation(2, absent=lambda number, step: {"B"} if (number, step) == (2, "mask") else ())
    result = run(group, promise, tmp_path / "early", early, rounds=3)
    assert [record.get("absent") for record in result.history] == [None, ["B"], None]
    steps = [sum(r.steps for r in h.ledger(tmp_path / "early", promise).charges()) for h in group]
    assert steps == [3, 2, 3]
    nobody = SecureAggregation(3, absent=lambda number, step: {"B"} if step == "confirm" else ())
    with pytest.raises(TooFewSurvivors, match="charged"):
        run(group, privacy(group), tmp_path / "abort", nobody)
    assert [sum(r.steps for r in h.ledger(tmp_path / "abort", promise).charges()) for h in group] == [1, 1, 1]


def test_a_run_that_ended_early_goes_on_and_charges_anew(tmp_path):
    group, promise = hospitals(), privacy(hospitals())
    once = SecureAggregation(3, absent=lambda number, step: {"B"} if (number, step) == (2, "unmask") else ())
    with pytest.raises(TooFewSurvivors):
        run(group, promise, tmp_path, once, rounds=3)
    assert not list(tmp_path.glob("update-*")), "a share of noise is never stored"
    result = run(group, promise, tmp_path, SecureAggregation(3), rounds=3)
    assert [record["round"] for record in result.history] == [1, 2, 3]
    assert [sum(r.steps for r in h.ledger(tmp_path, promise).charges()) for h in group] == [4, 4, 4]


@pytest.mark.parametrize("aggregator", [WeightedMean(), SecureAggregation(2)], ids=["clear", "below the threshold"])
def test_a_sum_of_too_few_is_refused_before_anything_is_charged(tmp_path, aggregator):
    group = hospitals()
    with pytest.raises(UserError, match="reveal"):
        run(group, privacy(group), tmp_path, aggregator)
    assert not list(tmp_path.glob("ledger-*"))


def test_hospitals_must_be_those_that_agreed(tmp_path):
    with pytest.raises(UserError, match="SharedNoise"):
        run(hospitals((60, 40, 200)), privacy(hospitals()), tmp_path)
    assert not list(tmp_path.glob("ledger-*"))
