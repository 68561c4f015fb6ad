"""The page of results on real films, made from the files under results/: ``python docs/results.py`` writes them anew.

A block of docs/results.md between ``<!-- NAME: made by docs/results.py -->`` and ``<!-- /NAME -->`` is this script's, and so are
some rows of the table of targets; a test makes them again and compares. What a file doesn't hold is left out.
"""

from __future__ import annotations

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TRAINED = {
    "pooled": "pooled",
    "federated": "federated, 3 hospitals",
    "clip_only": "federated, clipped as under DP, no noise",
    "federated_dp": "federated with DP, ε = {epsilon:.2f}",
}
PUBLISHED = {
    "ResNet-50, 224 px (MedMNIST v2)": "0.962",
    "VGG-11 without DP (deepee)": "0.961",
    "VGG-11 with DP per film, ε about 0.5 (deepee)": "0.848",
}
SPLITS = ("", "_resplit1", "_resplit2")
BUDGETS = {"8": "8", "1": "1", "05": "0.5"}  # of notebook 03, by name in its file


def read(name: str) -> dict[str, dict]:
    return json.loads((ROOT / "results" / f"{name}.json").read_text("utf-8"))


def metrics(name: str) -> dict[str, dict]:
    return read(name)["metrics"]


def origin(name: str) -> dict:
    return read(name)["origin"]


def score(entry: dict | None) -> str:
    """Mean, standard deviation over seeds, 95 % interval."""
    if not entry:
        return ""
    spread = f" ± {entry['std']:.3f}" if "std" in entry else ""
    return f"{entry['mean']:.3f}{spread} [{entry['ci95_low']:.3f}, {entry['ci95_high']:.3f}]"


def short(entry: dict | None) -> str:
    return f"{entry['mean']:.3f}" if entry else ""


def table(head: list[str], rows: list[list[str]]) -> str:
    """Markdown; columns that are empty in all rows are left out."""
    kept = [i for i in range(len(head)) if any(row[i] for row in rows)]
    lines = [[head[i] for i in kept], ["---"] * len(kept), *([row[i] for i in kept] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def trained() -> str:
    found, expert = metrics("paper/02_federated_dp_training"), metrics("bench/expert")
    head = ["trained", "AUROC, normal vs pneumonia", "accuracy, 3 classes", "MCC, 3 classes",
            "at a score of 0.5: sensitivity, specificity"]  # fmt: skip
    rows = []
    for way, label in TRAINED.items():
        if f"auroc_{way}" in found:
            at_half = [short(found.get(f"{name}_{way}")) for name in ("sensitivity", "specificity")]
            cells = [score(found.get(f"{name}_{way}")) for name in ("auroc", "acc3", "mcc3")]
            rows.append([label.format(epsilon=found["epsilon_max"]["mean"]), *cells, ", ".join(at_half)])
    at_work = ", ".join(short(expert[name]) for name in ("sensitivity", "specificity"))
    rows.append(["*one radiologist* (PriMIA's labels)", "", score(expert["accuracy"]), score(expert["mcc"]), at_work])
    rows += [[f"*published:* {name}", value, "", "", ""] for name, value in PUBLISHED.items()]
    return table(head, rows)


def resplits() -> str:
    """Scores of each way on the original test films, and on those of two other splits."""
    two, three = metrics("paper/02_federated_dp_training"), metrics("paper/03_privacy_accounting")
    ways = {label.format(epsilon=two["epsilon_max"]["mean"]): (two, way) for way, label in TRAINED.items()}
    for e in ("1", "05"):
        name = f"patient_eps{e}"
        ways[TRAINED["federated_dp"].format(epsilon=three[f"epsilon_{name}"]["mean"])] = three, name
    rows = []
    for label, (found, way) in ways.items():
        if f"auroc_{way}_resplit1" in found:
            per_split = [[short(found.get(f"{key}_{way}{split}")) for split in SPLITS] for key in ("auroc", "mcc3",
                         "specificity")]  # fmt: skip
            rows.append([label, *(" / ".join(filter(None, values)) for values in per_split)])
    if not rows:
        return ""
    head = ["original test films / re-split 1 / re-split 2", "AUROC", "MCC, 3 classes", "specificity at 0.5"]
    changes = [two[f"mcc3_clip_only{split}"]["mean"] - two[f"mcc3_federated{split}"]["mean"] for split in SPLITS]
    changed = " / ".join(f"{change:+.3f}" for change in changes)
    return (
        "Re-splits are cut by patient from all films before anything is trained on them; the recipe stays as it is.\n\n"
        f"{table(head, rows)}\n\nThe clip alone changes three-class MCC by {changed}."
    )


def differences() -> str:
    found, expert = metrics("paper/02_federated_dp_training"), metrics("bench/expert")
    gaps = []
    for name, label in (
        ("federated_minus_pooled", "federated minus pooled"),
        ("clip_only_minus_federated", "clipped minus federated"),
        ("federated_dp_minus_clip_only", "with DP minus clipped"),
        ("federated_dp_minus_federated", "with DP minus federated"),
    ):
        if gap := found.get(f"auroc_{name}"):
            gaps.append(f"{label} {round(gap['mean'], 4) + 0.0:+.4f} [{gap['ci95_low']:+.4f}, {gap['ci95_high']:+.4f}]")
    errors = [short(found[f"calibration_error_{way}"]) for way in ("federated", "federated_dp")]
    at_expert = [
        f"{short(found[name])} ({label})"
        for label, way in (("federated", "federated"), ("with DP", "federated_dp"))
        if (name := f"sensitivity_{way}_at_expert") in found
    ]
    lines = [
        f"AUROC, paired: {'; '.join(gaps)}.",
        f"Calibration error: federated {errors[0]}, with DP {errors[1]}.",
        f"Without any pretrained network (`scatternet`, one seed) AUROC is {short(found['auroc_scatternet'])}, with DP "
        f"{short(found['auroc_scatternet_dp'])}.",
        "",
        f"The radiologist is one reader, right on {expert['n_right']['mean']} of {expert['n_right']['n']} films; the "
        "score is computed from published labels (`primia-lite bench expert`).",
        f"{expert['n_unusable']['mean']} of the films, all of them pneumonias, the reader called unusable; without "
        f"them accuracy is {short(expert['accuracy_usable'])}, MCC {short(expert['mcc_usable'])}.",
        *([f"At the reader's specificity the models' sensitivity is {', '.join(at_expert)}."] if at_expert else []),
        "The comparison is lopsided: the models learnt this data set's labels, the reader did not.",
    ]
    return "\n".join(lines)


def budgets() -> str:
    found = metrics("paper/03_privacy_accounting")
    rows = []
    for name, e in BUDGETS.items():
        cells = [
            score(found[f"{key}_{network}patient_eps{name}"])
            for network in ("", "scatternet_")
            for key in ("auroc", "mcc3")
        ]
        rows.append([f"{e} ({short(found[f'epsilon_patient_eps{name}'])} spent)", *cells])
    head = ["`litenet`, AUROC", "MCC, 3 classes", "`scatternet` (no pretraining), AUROC", "MCC, 3 classes"]
    children = [f"a child with {k} films ε = {found[f'epsilon_child_{k}_films']['mean']:.0f}" for k in (2, 30)]
    film = (
        f"The same noise with the *film* as the unit (ε = 8 per film, AUROC {score(found['auroc_film_eps8'])}) leaves"
    )
    return f"{table(['ε for one patient', *head], rows)}\n\n{film} {' and '.join(children)}."


def audits() -> str:
    found = metrics("paper/09_privacy_auditing")
    ways = {
        "many_any": "many trainings of one canary, any mechanism", "many_dpsgd": "the same, if the mechanism is DP-SGD",
        "one_run_any": "one training of many canaries, any mechanism", "one_run_dpsgd": "the same, if DP-SGD",
        "one_run_released_any": "one training, from the released model alone, any mechanism",
    }  # fmt: skip
    head = ["ε at least, by", *(f"claimed {claim}" for claim in (1, 4, 8))]
    lower = [
        [label, *(f"{found[f'audit_{way}_eps{c}']['mean']:.2f}" for c in (1, 4, 8))] for way, label in ways.items()
    ]
    names = {"no_dp": "without DP", "eps8": "ε = 8", "eps1": "ε = 1"}
    who = ["LiRA, AUC", "true positives at 1 % false ones", "loss attack, AUC", "LiRA, mislabelled patients, AUC"]
    keys = ["lira_auc_{}", "lira_tpr_1pct_{}", "loss_auc_{}", "lira_auc_{}_mislabelled"]
    member = [[label, *(f"{found[key.format(name)]['mean']:.3f}" for key in keys)] for name, label in names.items()]
    bugs = f"Of {found['bugs_planted']['mean']:.0f} planted bugs audits find {found['bugs_caught']['mean']:.0f}."
    return f"{table(head, lower)}\n\n{bugs}\n\n{table(['training', *who], member)}"


def rows() -> dict[str, str]:
    """Rows of the table of targets, by how they begin."""
    two, three = metrics("paper/02_federated_dp_training"), metrics("paper/03_privacy_accounting")
    minutes = [origin(f"paper/{name}")["seconds_since_start"] / 60 for name in (
        "02_federated_dp_training", "03_privacy_accounting")]  # fmt: skip

    def row(name: str, entries: list[dict], targets: list[str], digits: int = 3) -> tuple[str, str]:
        missed = any(entry["mean"] < float(target) for entry, target in zip(entries, targets, strict=True))
        values = ", ".join(f"{entry['mean']:.{digits}f}" for entry in entries)
        return f"| {name} |", f"{values} | at least {', '.join(targets)}{': missed' if missed else ''}"

    gap = round(two["auroc_federated_minus_pooled"]["mean"], 4) + 0.0  # no -0.0000
    found = dict([
        row("pooled AUROC on real films", [two["auroc_pooled"]], ["0.970"], 4),
        ("| federated minus pooled, AUROC |", f"{gap:+.4f} | within 0.005{': missed' if abs(gap) > 0.005 else ''}"),
        row("federated, three-class accuracy and MCC",
            [two["acc3_federated"], two["mcc3_federated"]], ["0.80", "0.70"]),
        row("patient-level DP, AUROC at ε = 8, 1, 0.5 (03)",
            [three[f"auroc_patient_eps{e}"] for e in BUDGETS], ["0.960", "0.945", "0.930"]),
        row("patient-level DP, three-class MCC at ε = 8, 1, 0.5 (03)",
            [three[f"mcc3_patient_eps{e}"] for e in BUDGETS], ["0.70", "0.66", "0.62"]),
        ("| paper profile of 02 and 03, features cached |",
         f"{minutes[0]:.1f} and {minutes[1]:.1f} minutes | 30 minutes{': missed' if sum(minutes) > 30 else ''}"),
    ])  # fmt: skip
    return {start: f"{start} {rest} |" for start, rest in found.items()}


BLOCKS = {"trained": trained, "differences": differences, "resplits": resplits, "budgets": budgets, "audits": audits}


def made(text: str) -> str:
    """The text with each block and row made anew."""
    for name, make in BLOCKS.items():
        begin, end = f"<!-- {name}: made by docs/results.py -->", f"<!-- /{name} -->"
        before, found, rest = text.partition(begin)
        _, closed, after = rest.partition(end)
        if not found or not closed:
            raise SystemExit(f"docs/results.md needs a block between {begin} and {end}")
        block = make()
        text = f"{before}{begin}\n" + (f"\n{block}\n\n" if block else "") + f"{end}{after}"
    lines = text.splitlines(keepends=True)
    for start, row in rows().items():
        at = [number for number, line in enumerate(lines) if line.startswith(start)]
        if len(at) != 1:
            raise SystemExit(f"docs/results.md has {len(at)} rows that begin {start}: it needs one")
        lines[at[0]] = f"{row}\n"
    return "".join(lines)


if __name__ == "__main__":
    page = ROOT / "docs" / "results.md"
    page.write_text(made(page.read_text("utf-8")), "utf-8")
