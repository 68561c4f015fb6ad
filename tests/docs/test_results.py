"""The README's numbers are those of the committed results, and every result has its origin."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RESULTS = sorted((ROOT / "results").rglob("*.json"))
README = (ROOT / "README.md").read_text()


def metrics(name: str) -> dict:
    return json.loads((ROOT / "results" / name).read_text())["metrics"]


@pytest.mark.parametrize("path", RESULTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_results_have_origin_and_shape(path):
    content = json.loads(path.read_text())
    needed = {"data_source", "data_fingerprint", "seeds", "command", "versions", "machine", "cores", "time"}
    assert needed <= content["origin"].keys()
    for name, entry in content["metrics"].items():
        assert {"n", "unit"} <= entry.keys() and entry.keys() & {"mean", "median"}, name


@pytest.mark.parametrize(
    "metric",
    ["auroc_pooled", "auroc_federated", "auroc_federated_dp", "acc3_federated", "mcc3_federated",
     "acc3_federated_dp", "mcc3_federated_dp"],
)  # fmt: skip
def test_readme_quotes_the_paper_profile(metric):
    entry = metrics("paper/02_federated_dp_training.json")[metric]
    quoted = f"{entry['mean']:.3f} ± {entry['std']:.3f} [{entry['ci95_low']:.3f}, {entry['ci95_high']:.3f}]"
    assert quoted in README


def test_readme_quotes_the_benchmark():
    for name in ("phantom_films_per_s", "litenet_films_per_s"):
        assert f"{metrics('bench/pipeline.json')[name]['median']:.0f} films/s" in README


def test_readme_quotes_the_benchmark_of_the_commands():
    found = metrics("bench/commands.json")
    quotes = [
        f"{found['setup_s']['median']:.0f} s, {found['setup_disk_gib']['median']:.1f} GiB of disk",
        f"{found['run_s']['median']:.0f} s, {found['run_peak_memory_mib']['median']:,.0f} MiB",
        f"{found['test_s']['median'] / 60:.1f} minutes",
        *(f"| {found[f'notebook_{number}_s']['median']:.0f} s |" for number in ("00", "01", "02")),
    ]
    assert [quote for quote in quotes if quote not in README] == []
