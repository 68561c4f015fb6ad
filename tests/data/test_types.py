from __future__ import annotations

import dataclasses
import subprocess
import sys

import numpy as np
import pytest

from primia_lite.data import CLASSES_3, ChestXrays, DataError, load, sources


def make(n: int = 12, **changes) -> ChestXrays:
    values = {
        "images": np.arange(n * 64, dtype=np.int64).reshape(n, 8, 8).astype(np.uint8),
        "labels": np.arange(n, dtype=np.int64) % 3,
        "class_names": CLASSES_3,
        "patient_id": np.array([f"p{i:02d}" for i in range(n)]),
        "site": np.array(["A", "B"] * (n // 2)),
        "split": np.array(["train"] * (n // 2) + ["val"] * (n // 4) + ["test"] * (n // 4)),
        "source": "phantom",
    }
    return ChestXrays(**{**values, **changes})


def test_properties_and_counts():
    films = make()
    assert (len(films), films.size, films.n_patients, films.sites) == (12, 8, 12, ("A", "B"))
    assert films.counts() == {
        "train": {"normal": 2, "bacterial": 2, "viral": 2},
        "val": {"normal": 1, "bacterial": 1, "viral": 1},
        "test": {"normal": 1, "bacterial": 1, "viral": 1},
    }
    assert "phantom: 12 films of 12 patients" in repr(films)
    with pytest.raises(dataclasses.FrozenInstanceError):
        films.source = "kermany"


def test_subset_keeps_every_array_in_step():
    films = make(lung_mask=np.arange(12 * 64).reshape(12, 8, 8) % 5 == 0)
    index = np.array([7, 2, 2])
    part = films.subset(index)
    assert part.patient_id.tolist() == ["p07", "p02", "p02"]
    np.testing.assert_array_equal(part.images, films.images[index])
    np.testing.assert_array_equal(part.lung_mask, films.lung_mask[index])
    assert part.lesion_mask is None and part.class_names == CLASSES_3
    mask = films.site == "A"
    assert films.subset(mask).patient_id.tolist() == films.patient_id[mask].tolist()
    assert films.of_split("val").counts() == {"val": films.counts()["val"]}


def test_an_empty_subset_and_a_subset_without_a_class_are_allowed():
    films = make()
    assert len(films.subset([])) == 0 and films.subset([]).size == 8 and films.subset([]).counts() == {}
    assert films.subset(films.labels == 1).counts()["train"]["normal"] == 0


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (np.ones(5, bool), "12 films"),
        (np.array([99]), "99"),
        (np.array([0.5]), "float64"),
        (np.ones((2, 2), int), "int64"),
    ],
)
def test_a_wrong_index_is_named(index, message):
    with pytest.raises(DataError, match=message):
        make().subset(index)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": np.zeros((12, 8, 8), np.float32)}, "uint8.*float32"),
        ({"images": np.zeros((12, 8, 9), np.uint8)}, "square"),
        ({"labels": np.zeros(12, np.int32)}, "int64.*int32"),
        ({"labels": np.zeros(11, np.int64)}, "labels"),
        ({"labels": np.full(12, 3)}, "label 3"),
        ({"class_names": ("bacterial", "viral")}, "normal"),
        ({"split": np.array(["training"] * 12)}, "training"),
        ({"site": np.array(["A"])}, "site"),
        ({"patient_id": np.array([""] * 12)}, "no patient id"),
        ({"lung_mask": np.zeros((12, 4, 4), bool)}, "lung_mask"),
        ({"lesion_mask": np.zeros((12, 8, 8), np.uint8)}, "lesion_mask"),
    ],
)
def test_bad_values_are_named(changes, message):
    with pytest.raises(DataError, match=message):
        make(**changes)


def test_one_patient_in_two_splits_is_named():
    patients = make().patient_id.copy()
    patients[11] = patients[0]
    with pytest.raises(DataError, match="p00"):
        make(patient_id=patients)


def test_an_empty_class_is_named_when_it_is_asked_for():
    films = make()
    assert films.require_classes() is films
    with pytest.raises(DataError, match="viral"):
        films.subset((films.labels != 2) | (films.split != "train")).require_classes()
    with pytest.raises(DataError, match="val"):
        films.subset(films.split == "train").of_split("val")
    with pytest.raises(DataError, match="dev"):
        films.of_split("dev")


def test_fingerprint_follows_content_only():
    films = make()
    assert films.fingerprint() == make().fingerprint()
    assert films.fingerprint() == "a46d8d9cd0ae887d", "changed: cached features and committed results refer to it"
    assert films.subset(np.arange(12)).fingerprint() == films.fingerprint()
    # A wider string type or another memory order is the same content.
    assert make(split=films.split.astype("<U40")).fingerprint() == films.fingerprint()
    assert make(images=np.asfortranarray(films.images)).fingerprint() == films.fingerprint()
    others = [
        make(images=films.images ^ np.uint8(1)),
        make(labels=films.labels[::-1].copy()),
        make(patient_id=np.array([f"q{i}" for i in range(12)])),
        make(site=films.site[::-1]),
        make(split=np.array(["train"] * 12)),
        make(lung_mask=np.zeros((12, 8, 8), bool)),
        films.subset(np.arange(11)),
    ]
    assert len({films.fingerprint(), *(other.fingerprint() for other in others)}) == 1 + len(others)


def test_load_names_what_it_does_not_know(tmp_path):
    with pytest.raises(DataError) as error:
        load("chexpert", 64)
    for name in ("phantom", "kermany", "pneumoniamnist", "dicom", "rscbjbr9sj", "labels.csv"):
        assert name in str(error.value)
    with pytest.raises(DataError, match="'colour'.*validation, aspect"):
        load("kermany", 64, root=tmp_path, colour=True)
    with pytest.raises(DataError, match="size=0"):
        load("kermany", 0, root=tmp_path)
    with pytest.raises(DataError, match="n_films=0"):
        load("kermany", 64, root=tmp_path, n_films=0)


def test_sources_tell_what_is_found_and_how_to_get_the_rest(tmp_path):
    (tmp_path / "chest_xray" / "train" / "NORMAL").mkdir(parents=True)
    (tmp_path / "chest_xray" / "train" / "NORMAL" / "IM-0001-0001.jpeg").touch()
    rows = {row["name"]: row for row in sources(tmp_path)}
    assert list(rows) == ["phantom", "kermany", "pneumoniamnist", "dicom"]
    assert rows["phantom"]["found"] and rows["kermany"]["found"] and rows["kermany"]["n_files"] == 1
    assert not rows["pneumoniamnist"]["found"] and not rows["dicom"]["found"]
    assert all(row["how_to_get"] and "\n" not in row["how_to_get"] for row in rows.values())


def test_importing_the_package_loads_nothing_heavy():
    heavy = "torch, PIL, medmnist, pydicom, sklearn, pandas"
    code = f"import sys, primia_lite.data; print([m for m in '{heavy}'.split(', ') if m in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


def test_the_phantom_needs_nothing_and_ignores_what_is_only_for_folders(tmp_path):
    films = load("phantom", 28, n_films=60, seed=1, root=tmp_path, skip_bad=True)
    assert films.source == "phantom" and len(films) == 60 and films.size == 28
    assert set(films.counts()) == {"train", "val", "test"} and films.lung_mask is not None
