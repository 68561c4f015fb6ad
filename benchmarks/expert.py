"""How well one reader does on the 624 test films of Kermany et al., by the labels that PriMIA published.

The labels came with PriMIA's code and are not part of this repository. ``expert_labels.csv`` in the data folder has a
line for each test film: film (its file name), truth and expert (0 normal, 1 bacterial, 2 viral), unusable (1 where the
reader called the film so). Unusable films are scored as they were labelled, and once more left out. Intervals are over
patients, not readers: there is one.
"""

from __future__ import annotations

import csv
import hashlib
import sys
from pathlib import Path

import numpy as np

from primia_lite import metrics, runtime
from primia_lite.apps.bench import Options
from primia_lite.config import DataError, UserError, data_root
from primia_lite.data.kermany import label_and_patient

FILE = "expert_labels.csv"
SCORES = ("accuracy", "mcc", "sensitivity", "specificity")


def read(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Truth, the reader's label, whether unusable (int [N] each), and patients (str [N]).

    Raises
    ------
    UserError
        There is no such file.
    DataError
        A line that can't be read, or whose truth isn't the one that the film's name tells.
    """
    if not path.exists():
        raise UserError(
            f"no {FILE} in {path.parent}: write the reader's labels that PriMIA published with its code "
            "(github.com/gkaissis/PriMIA) into such a file with the columns film, truth, expert, unusable (0 normal, "
            "1 bacterial, 2 viral; 1 unusable), or point PRIMIA_LITE_DATA at the folder that has it"
        )
    rows, patients = [], []
    with path.open(newline="", encoding="utf-8-sig") as file:
        for number, row in enumerate(csv.DictReader(file), 2):
            try:
                truth, expert, unusable = (int(row[name]) for name in ("truth", "expert", "unusable"))
                label, patient = label_and_patient(row["film"])
            except (KeyError, TypeError, ValueError, DataError) as error:
                raise DataError(f"line {number} of {FILE} needs film, truth, expert, unusable: {error}") from error
            if truth != label or expert not in (0, 1, 2) or unusable not in (0, 1):
                raise DataError(f"line {number} of {FILE}: {row} can't be; the film's name says class {label}")
            rows.append((truth, expert, unusable))
            patients.append(patient)
    if not rows:
        raise DataError(f"{FILE} in {path.parent} has no line")
    return *np.array(rows).T, np.array(patients)


def scored(truth: np.ndarray, expert: np.ndarray, patients: np.ndarray, suffix: str = "") -> dict[str, dict]:
    called = np.eye(3)[expert]
    found = {}
    for name in SCORES:
        score = getattr(metrics, name)
        low, high = metrics.bootstrap(score, [called], truth, patients)
        value = float(score(called, truth))
        n = {"sensitivity": np.sum(truth > 0), "specificity": np.sum(truth == 0)}.get(name, len(truth))
        found[name + suffix] = {"mean": value, "ci95_low": low, "ci95_high": high, "n": int(n), "unit": "1"}
    return found


def main() -> None:
    Options("expert", __doc__).read()
    path = data_root() / FILE
    try:
        truth, expert, unusable, patients = read(path)
    except UserError as error:
        sys.exit(str(error))
    usable = unusable == 0
    found = scored(truth, expert, patients) | scored(truth[usable], expert[usable], patients[usable], "_usable")
    found["n_right"] = {"mean": int((truth == expert).sum()), "n": len(truth), "unit": "films"}
    found["n_unusable"] = {"mean": int((~usable).sum()), "n": len(truth), "unit": "films"}
    found["n_unusable_pneumonia"] = {"mean": int((truth[~usable] > 0).sum()), "n": len(truth), "unit": "films"}
    origin = runtime.origin(
        data_source="one reader's labels of the test films, published with PriMIA's code (github.com/gkaissis/PriMIA)",
        data_fingerprint=hashlib.sha256(path.read_bytes()).hexdigest()[:16], seeds=[0],
        command="primia-lite bench expert", n_readers=1, interval="95 %, bootstrap over patients",
    )  # fmt: skip
    written = runtime.write_results("expert", origin, found)
    for name, entry in found.items():
        print(f"{name:<22} {entry['mean']:8.4g}  {entry['unit']}")
    print(f"written to {written.name}")


if __name__ == "__main__":
    main()
