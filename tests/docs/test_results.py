"""Numbers in README and docs are those of the committed results, and every result has its origin."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RESULTS = sorted((ROOT / "results").rglob("*.json"))
README = (ROOT / "README.md").read_text()
TEXTS = "\n".join(path.read_text() for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))])


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
def test_texts_quote_the_paper_profile(metric):
    assert quoted(metrics("paper/02_federated_dp_training.json")[metric]) in TEXTS


def quoted(entry: dict) -> str:
    return f"{entry['mean']:.3f} ± {entry['std']:.3f} [{entry['ci95_low']:.3f}, {entry['ci95_high']:.3f}]"


@pytest.mark.parametrize("network", ["", "scatternet_"])
@pytest.mark.parametrize("label", ["8", "1", "05"])
def test_texts_quote_what_privacy_costs(label, network):
    found = metrics("paper/03_privacy_accounting.json")
    for name in ("auroc", "mcc3"):
        assert quoted(found[f"{name}_{network}patient_eps{label}"]) in TEXTS
    assert f"({found[f'epsilon_patient_eps{label}']['mean']:.3f} spent)" in TEXTS


def test_the_results_on_real_films_are_made_from_the_files():
    """If this fails after new results: python docs/results.py."""
    spec = importlib.util.spec_from_file_location("results", ROOT / "docs" / "results.py")
    results = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(results)
    page = (ROOT / "docs" / "results.md").read_text()
    assert results.made(page) == page


def test_the_experts_scores_are_those_that_were_recomputed_from_the_published_labels():
    found = {name: entry["mean"] for name, entry in metrics("bench/expert.json").items()}
    assert found["n_right"] == 398 and metrics("bench/expert.json")["n_right"]["n"] == 624
    assert found["mcc"] == pytest.approx(0.4986, abs=5e-5)
    assert (found["sensitivity"], found["specificity"]) == pytest.approx((0.795, 0.808), abs=5e-4)
    assert found["n_unusable"] == found["n_unusable_pneumonia"] == 48
    assert (found["accuracy_usable"], found["mcc_usable"]) == pytest.approx((0.667, 0.531), abs=5e-4)


def test_texts_quote_the_benchmark_of_private_steps():
    found = metrics("bench/dpsgd.json")
    for name in ("ratio_head_to_plain", "ratio_cnn_to_plain", "speedup_cnn_over_opacus_hooks"):
        assert f"{found[name]['median']:.2f}x" in TEXTS


def test_texts_quote_the_attack_on_noise():
    found = metrics("bench/noise_attack.json")
    floats, exact = (found[f"{kind}_noise_right"] for kind in ("float", "exact"))
    assert f"in {floats['mean']} of {floats['n']:,} plays; against ours in {exact['mean']} (" in TEXTS


def test_texts_quote_the_benchmark():
    for name in ("phantom_films_per_s", "litenet_films_per_s"):
        assert f"{metrics('bench/pipeline.json')[name]['median']:.0f} films/s" in TEXTS


def test_readme_and_results_quote_the_benchmark_of_the_commands():
    found = {name: entry["median"] for name, entry in metrics("bench/commands.json").items()}
    line = (
        f"set-up {found['setup_s']:.0f} s, `make run` {found['run_s']:.0f} s ({found['run_cpu_s']:.0f} CPU s), "
        f"`make test` {found['test_s'] / 60:.1f} minutes"
    )
    seconds = [f"| {value:.0f} s |" for name, value in found.items() if re.fullmatch(r"notebook_\d\d_s", name)]
    assert [quote for quote in (line, *seconds) if quote not in README] == []


def test_readme_quotes_what_a_newcomer_will_see():
    two, attacks = metrics("paper/02_federated_dp_training.json"), metrics(ATTACKS)
    encrypted = metrics("paper/05_encrypted_inference.json")
    quotes = [
        f"AUROC {two['auroc_federated']['mean']:.3f} on 624",
        f"{two['auroc_federated_dp']['mean']:.3f} with DP at ε = 8",
        f"at {attacks['psnr_convnet_b1_db']['median']:.0f} dB",
        f"{metrics('bench/secagg.json')['hospital_cpu_s_11m']['median']:.2f} CPU seconds",
        f"{encrypted['end_to_end_ms_litenet']['median']:.1f} ms, "
        f"{round(624 * encrypted['agreement_strict_litenet']['mean'])} of 624",
    ]  # fmt: skip
    assert [quote for quote in quotes if quote not in README] == []


def test_the_site_s_home_quotes_what_readme_does():
    words = (ROOT / "docs" / "index.md").read_text().split()
    assert [word for word in words if "0." in word and word.strip(".") not in README] == []


def test_readme_decides_in_two_minutes():
    assert len(README.splitlines()) <= 150 and len(README.split()) <= 1500
    assert max(map(len, README.splitlines())) <= 400


ATTACKS = "paper/04_model_inversion_attacks.json"


@pytest.mark.parametrize(
    "name", ["convnet_b1", "relu_trained_b1", "b4", "b64_honest", "local5_unrolled", "squares_prior", "resnet18_prior"]
)
def test_texts_quote_what_attacks_get(name):
    entry = metrics(ATTACKS)[f"psnr_{name}_db"]
    assert f"{entry['median']:.1f} dB (worst {entry['min']:.1f}), n = {entry['n']}" in TEXTS


@pytest.mark.parametrize("name", ["b64", "3x64", "20_steps"])
def test_texts_quote_the_imprint_layer(name):
    entry = metrics(ATTACKS)[f"imprint_exact_{name}"]
    assert f"{100 * entry['mean']:.1f} % exact (above 40 dB), n = {entry['n']}" in TEXTS


def test_texts_quote_the_identification_game():
    found = metrics(ATTACKS)
    for at in ("sigma_01", "sigma_02", "sigma_05", "sigma_1"):
        names = (f"identified_{at}", f"identified_orthogonal_{at}", f"rero_bound_{at}")
        assert " | ".join(f"{100 * found[name]['mean']:.1f} %" for name in names) in TEXTS


def test_the_table_of_targets_quotes_what_attacks_get():
    """The rows themselves, as the same numbers stand elsewhere, too."""
    found = metrics(ATTACKS)

    def row(start):
        (line,) = [line for line in TEXTS.splitlines() if line.startswith(start)]
        return line

    shares = ", ".join(f"{100 * found[f'imprint_exact_{name}']['mean']:.1f} %" for name in ("b64", "3x64", "20_steps"))
    assert shares in row("| imprint layer")
    ratio = found["identified_orthogonal_to_bound"]
    assert f"| {ratio['mean']:.2f} ({ratio['ci95_low']:.2f} to {ratio['ci95_high']:.2f}" in row(
        "| malicious server's game"
    )
    relu, trained = found["psnr_relu_b1_db"], found["psnr_relu_trained_b1_db"]
    for entry in (relu, trained):
        assert f"{entry['median']:.0f} dB ({entry['min']:.0f})" in row("| ReLU; trained ReLU")
    assert f"{found['psnr_b4_db']['median']:.0f} dB, all identified" in row("| batch of 4 |")
    assert found["identified_b4"]["mean"] == 1


@pytest.mark.parametrize("epsilon", ["8", "1", "05"])
def test_texts_quote_what_the_best_attacks_get_against_dp(epsilon):
    found = metrics(ATTACKS)
    cells = []
    for server in ("curious", "malicious"):
        gain = round(found[f"defence_dp_eps{epsilon}_{server}_psnr_gain_db"]["median"], 2) + 0.0
        cells += [f"{gain:+.2f} dB", f"{100 * found[f'defence_dp_eps{epsilon}_{server}_identified']['mean']:.1f} %"]
    assert " | ".join(cells) in TEXTS


def test_texts_quote_the_ratio_to_the_bound():
    entry = metrics(ATTACKS)["identified_orthogonal_to_bound"]
    assert f"{entry['mean']:.2f} of the bound ({entry['ci95_low']:.2f} to {entry['ci95_high']:.2f}" in TEXTS


def test_texts_quote_the_benchmark_of_attacks():
    found = metrics("bench/attacks.json")
    assert f"{found['psnr_gain_over_breaching_db']['median']:+.1f} dB at equal CPU seconds" in TEXTS
    assert f"{found['cpu_s_ratio_to_breaching']['median']:.2f} of its CPU seconds" in TEXTS


@pytest.mark.parametrize("name", ["litenet", "scatternet", "ckksnet"])
def test_texts_quote_encrypted_diagnosis(name):
    found = metrics("paper/05_encrypted_inference.json")
    (row,) = [line for line in TEXTS.splitlines() if line.startswith(f"| `{name}`: ")]
    agreed, error, auroc = (found[f"{what}_{name}"] for what in ("agreement_strict", "logit_error", "auroc"))
    assert f"| {round(agreed['mean'] * agreed['n'])} of {agreed['n']} |" in row
    assert f"| {error['mean']:.0e} | {auroc['mean']:.3f} ± {auroc['std']:.3f} |" in row
    rounded = found[f"agreement_rounded_{name}"]
    assert f"{round(rounded['mean'] * rounded['n'])} (`{name}`)" in TEXTS
    assert f"{found[f'auroc_encrypted_{name}']['mean']:.3f} (`{name}`)" in TEXTS
    steps = ("encrypt", "receive", "compute", "mask", "decrypt")
    times = [f"{found[f'{step}_ms_{name}']['median']:.2f} ms" for step in steps]
    kib = [f"{found[f'{what}_kib_{name}']['mean']:,.0f}" for what in ("keys", "upload", "reply")]
    assert " | ".join([*times, f"{found[f'end_to_end_ms_{name}']['median']:.1f} ms", *kib]) in row


def ms(value: float) -> str:
    return f"{value:,.2f}" if value < 10 else f"{value:,.1f}" if value < 100 else f"{value:,.0f}"


@pytest.mark.parametrize(
    ("network", "names"),
    [
        ("linear head, 1,280 features", "linear_1280"),
        ("network of TenSEAL", "tutorial"),
        ("quadratic CNN, 64 px", "quadratic"),
    ],
)
def test_texts_quote_encrypted_inference_beside_other_libraries(network, names):
    found = metrics("bench/ckks.json")
    rows = [line for line in TEXTS.splitlines() if line.startswith(f"| {network}") and line.count("|") > 8]
    ours, orion = (next(row for row in rows if who in row) for who in ("| ours |", "| orion-v2 |"))
    times = [found[f"{step}_{names}_ours_ms"]["median"] for step in ("receive", "server", "masked")]
    assert " | ".join(ms(value) for value in times) in ours
    assert f"| {ms(found[f'server_{names}_orion_ms']['median'])} | none |" in orion
    assert f"| {found[f'error_{names}_orion']['median']:.0e} |" in orion


def test_texts_quote_the_targets_of_encrypted_inference():
    found = {name: entry["median"] for name, entry in metrics("bench/ckks.json").items()}

    def row(start):
        (line,) = [line for line in TEXTS.splitlines() if line.startswith(f"| {start}")]
        return line

    assert f"| {found['speedup_tutorial_network']:.0f}x (" in row("tutorial's network: server time")
    assert f"| {found['quadratic_cnn_server_ms']:.1f} ms (" in row("quadratic CNN, 64 px, server")
    masked = row("the same with a fresh mask")
    assert f"| {found['linear_head_masked_ms']:.2f} ms (" in masked
    assert ("missed" in masked) == (found["linear_head_masked_ms"] > 1.5)
    end_to_end = row("the same, end to end in process")
    assert f"| {found['linear_head_end_to_end_ms']:.2f} ms (" in end_to_end
    assert ("missed" in end_to_end) == (found["linear_head_end_to_end_ms"] > 3)
    assert f"| {found['speedup_batch_per_film']:.1f}x (" in row("batch, a film of a linear head")
    assert f"| {found['service_p50_ms']:.1f} ms, {found['service_p99_ms']:.1f} ms; no error" in row(
        "service, 8 clients"
    )
    assert found["service_errors"] == 0


def secure_sum_row(start: str) -> str:
    page = (ROOT / "docs" / "secure_aggregation.md").read_text()
    (line,) = [line for line in page.splitlines() if line.startswith(f"| {start}")]
    return line


@pytest.mark.parametrize(
    ("start", "name", "digits", "unit", "target"),
    [
        ("3 hospitals, 11 million parameters: CPU", "hospital_cpu_s_11m", 2, " s", 1.0),
        ("the same, server |", "server_cpu_s_11m", 2, " s", 0.5),
        ("the same, CPU of all parties: Flower", "speedup_over_flower_secaggplus", 2, "x", -5.0),
        ("100 hospitals, 1 million parameters", "round_100x1m_s", 0, " s", 60.0),
        ("a round of PySyft", "syft_round_s", 1, " s", 30.0),
        ("a round over Flower and TLS", "flower_tls_round_s", 1, " s", None),
        ("a round over Flower and TLS", "flower_own_s", 1, " s", None),
        ("a round over Flower and TLS", "flower_tls_on_top_s", 1, " s", 3.0),
        ("Flower's apps in one process", "flower_inline_ratio", 2, "x", 1.2),
    ],
)
def test_texts_quote_the_targets_of_secure_aggregation(start, name, digits, unit, target):
    entry, row = metrics("bench/secagg.json")[name], secure_sum_row(start)
    least, most = (f"{entry[key]:.{digits}f}" for key in ("min", "max"))
    assert f" {entry['median']:.{digits}f}{unit} ({least} to {most})" in row
    if target is not None:  # at most; below 0: at least
        missed = entry["median"] > target if target > 0 else entry["median"] < -target
        assert ("missed" in row) == missed


def test_texts_quote_the_bytes_and_growth_of_secure_aggregation():
    found = {name: entry["median"] for name, entry in metrics("bench/secagg.json").items()}
    assert f"| {found['bytes_ratio_to_float32']:.4f}x |" in secure_sum_row("the same, bytes a hospital sends")
    assert found["bytes_ratio_to_float32"] <= 1.1
    assert f"| {found['speedup_over_ckks']:.0f}x (" in secure_sum_row("the same: CKKS with a shared key")
    hospital, server = (
        [found[f"growth_{party}_cpu_s_{n}"] for n in (3, 100, 1000)] for party in ("hospital", "server")
    )
    assert "takes {:.3f}, {:.2f} and {:.2f} CPU s".format(*hospital) in TEXTS
    assert "the server {:.2f}, {:.1f} and {:.0f} (".format(*server) in TEXTS
    law = [value for name, value in found.items() if name.startswith("law_over_measured_")]
    for name in ("hospital_cpu_s_1000", "server_cpu_s_1000", "server_cpu_s_1000_dropouts"):  # timed once more
        law.append(found[f"law_{name}"] / found[f"growth_{name}"])
    assert f"is within {min(law):.2f} to {max(law):.2f} of that" in TEXTS
    assert f"{found['law_hospital_cpu_s_10000']:.1f} and {found['law_server_cpu_s_10000']:.0f} CPU s for" in TEXTS


def test_texts_quote_what_secure_aggregation_costs_in_accuracy():
    found = metrics("paper/06_secure_aggregation.json")
    difference = found["auroc_difference_secagg"]["max"]
    assert f"largest difference {difference:.6f} (" in TEXTS and difference <= 0.0005
    for start, name in (
        ("each hospital adds all of it", "local_noise"), ("shared, t = 2, c = 1", "shared_noise_t2_c1"),
        ("shared, t = 3, c = 1", "shared_noise"), ("shared, t = 3, c = 0", "shared_noise_t3_c0"),
    ):  # fmt: skip
        assert quoted(found[f"auroc_{name}_eps1"]) in secure_sum_row(start)
    assert ("missed" in secure_sum_row("shared, t = 3, c = 1")) == (found["auroc_shared_noise_eps1"]["mean"] < 0.95)
    assert f"({found['epsilon_shared_noise_eps1']['mean']:.3f} spent), δ = 1e-4, 40 rounds" in TEXTS
    gain = found["auroc_shared_minus_local_eps1"]
    assert f"{gain['mean']:+.4f} [{gain['ci95_low']:+.4f}, {gain['ci95_high']:+.4f}]" in TEXTS


def test_nothing_says_that_sums_are_in_the_clear():
    assert "no secure aggregation" not in TEXTS and "**Sees:** every update" not in TEXTS


def test_docs_quote_what_rounds_over_flower_take():
    found, text = metrics("bench/secagg.json"), (ROOT / "docs" / "flower.md").read_text()
    for name, digits, unit in (("flower_tls_round_s", 1, " s"), ("flower_own_s", 1, " s"),
                               ("flower_tls_on_top_s", 1, " s"), ("flower_inline_ratio", 2, "x")):  # fmt: skip
        e = found[name]
        row = f"| {e['median']:.{digits}f}{unit} ({e['min']:.{digits}f} to {e['max']:.{digits}f}) |"
        assert row in text
