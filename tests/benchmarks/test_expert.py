"""The reader's scores: by hand on six films, and what a file that isn't right is told."""

from __future__ import annotations

import importlib.util
import json
import sys

import pytest

from primia_lite.config import UserError, repo_root

HEAD = "film,truth,expert,unusable\n"
FILMS = (
    "IM-0001-0001.jpeg,0,0,0\nIM-0003-0001.jpeg,0,1,0\nperson1_bacteria_1.jpeg,1,1,0\nperson1_bacteria_2.jpeg,1,2,0\n"
    "person1_virus_6.jpeg,2,2,0\nperson3_virus_16.jpeg,2,0,1\n"
)


@pytest.fixture
def expert(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("expert", repo_root() / "benchmarks" / "expert.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setenv("PRIMIA_LITE_DATA", str(tmp_path))
    monkeypatch.setenv("PRIMIA_LITE_RESULTS", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["expert"])
    return module


def test_scores_by_hand_with_and_without_unusable_films(expert, tmp_path):
    (tmp_path / "expert_labels.csv").write_text(HEAD + FILMS)
    expert.main()
    found = json.loads((tmp_path / "expert.json").read_text())["metrics"]
    assert found["n_right"]["mean"] == 3 and found["n_unusable"]["mean"] == found["n_unusable_pneumonia"]["mean"] == 1
    want = {"accuracy": 3 / 6, "sensitivity": 3 / 4, "specificity": 1 / 2, "accuracy_usable": 3 / 5,
            "sensitivity_usable": 1.0, "specificity_usable": 1 / 2}  # fmt: skip
    assert {name: found[name]["mean"] for name in want} == pytest.approx(want)
    assert found["sensitivity"]["n"] == 4 and found["specificity"]["n"] == 2
    for name in want:
        assert found[name]["ci95_low"] <= found[name]["mean"] <= found[name]["ci95_high"]


def test_without_the_file_one_sentence_says_what_it_is_and_where_it_goes(expert, tmp_path):
    with pytest.raises(SystemExit, match="PRIMIA_LITE_DATA"):
        expert.main()


@pytest.mark.parametrize(
    "text",
    ["", HEAD, "film,truth\nIM-0001-0001.jpeg,0\n", HEAD + "IM-0001-0001.jpeg,1,1,0\n",
     HEAD + "IM-0001-0001.jpeg,0,3,0\n", HEAD + "IM-0001-0001.jpeg,0,,0\n", HEAD + "scan.png,0,0,0\n"],
)  # fmt: skip
def test_a_file_that_cannot_be_right_is_refused_by_name(expert, tmp_path, text):
    (tmp_path / "expert_labels.csv").write_text(text)
    with pytest.raises(UserError, match="expert_labels.csv"):
        expert.read(tmp_path / "expert_labels.csv")
