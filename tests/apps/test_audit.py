"""Claimed beside audited from the command line, and the privacy card of a run."""

import numpy as np
import pytest
import torch

from primia_lite.apps.cli import main
from primia_lite.data.films import Films
from primia_lite.federation import Hospital, Schedule, WeightedMean, federate
from primia_lite.privacy import Privacy
from primia_lite.training import Training


@pytest.fixture
def run(tmp_path):
    def trained(privacy: Privacy | None, **options):
        films = Films(torch.ones(8, 1, 5), torch.arange(8) % 3, np.arange(8).astype(str), model="litenet")
        hospitals = [Hospital(name, films) for name in "AB"]
        options |= {"folder": tmp_path, "aggregator": WeightedMean(), "progress": None}
        federate(hospitals, Training(sample_rate=0.5), Schedule(2), privacy, **options)
        return tmp_path

    return trained


@pytest.mark.filterwarnings("ignore:target_delta")
def test_a_card_says_what_the_run_did(run, capsys):
    folder = run(Privacy.for_budget(3, sample_rate=0.5, steps=2, max_grad_norm=0.25, target_delta=0.01))
    assert main(["audit", str(folder), "--card", "-n", "100"]) == 0
    text, page = (folder / "privacy_card.md").read_text(), (folder / "privacy_card.html").read_text()
    for word in (
        "| A | 10 | 10 | 3.",
        "| B | 10 | 10 | 3.",
        "0.01",
        "mean in the clear",
        "torch",
        "one run",
        "patient",
    ):
        assert word in text
    assert "fixed seed" not in text and page.count("<table>") == 2
    assert "claimed" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:target_delta")
def test_a_card_says_what_a_run_did_not_protect(run):
    folder = run(None)
    assert main(["audit", str(folder), "--card"]) == 0
    assert "without differential privacy" in (folder / "privacy_card.md").read_text()
    folder = run(Privacy(1.0, 0.25, 1e3, planned=(0.5, 2)), noise_seed=0, fresh=True)
    assert main(["audit", str(folder), "--card", "-n", "100"]) == 0
    assert "fixed seed" in (folder / "privacy_card.md").read_text()


def test_a_recipe_is_audited_without_a_run(capsys):
    assert main(["audit", "--steps", "4", "-n", "200"]) == 0
    assert "released model" in capsys.readouterr().out


def test_what_has_no_claim_or_no_run_is_refused(run, tmp_path, capsys):
    assert main(["audit", str(tmp_path)]) == 2
    assert main(["audit", str(run(None))]) == 2
    assert main(["audit", "--card"]) == 2
    assert capsys.readouterr().err.count("primia-lite audit:") == 3
