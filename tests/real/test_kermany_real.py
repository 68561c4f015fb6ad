"""The real films, where ``PRIMIA_LITE_DATA`` points at a folder that holds ``chest_xray``."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from primia_lite.data import kermany, load, partition

DATA = os.environ.get("PRIMIA_LITE_DATA")
pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(
        not DATA or not (Path(DATA) / "chest_xray").is_dir(), reason="PRIMIA_LITE_DATA has no chest_xray"
    ),
]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PRIMIA_LITE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield patch


@pytest.fixture(scope="module")
def films(cache):
    return load("kermany", 32)


def test_original_split_and_classes(cache, films):
    original = load("kermany", 32, validation="original")
    assert {split: sum(counts.values()) for split, counts in original.counts().items()} == {
        "train": 5216,
        "val": 16,
        "test": 624,
    }
    assert original.counts()["test"] == films.counts()["test"] == {"normal": 234, "bacterial": 242, "viral": 148}
    assert original.counts()["train"] == {"normal": 1341, "bacterial": 2530, "viral": 1345}


def test_patients(films):
    assert films.n_patients == 4096
    assert np.unique(films.patient_id, return_counts=True)[1].max() == 30
    in_split = {split: set(films.of_split(split).patient_id) for split in ("train", "val", "test")}
    assert not in_split["train"] & in_split["test"] and not in_split["train"] & in_split["val"]
    # Person numbers used under both diseases, which the key takes to be different children.
    numbers = [{p.split("_")[0] for p in films.patient_id if p.endswith(d)} for d in ("bacteria", "virus")]
    assert len(numbers[0] & numbers[1]) == 979


def test_films_that_are_there_twice(films):
    _, counts = np.unique(films.images.reshape(len(films), -1), axis=0, return_counts=True)
    assert np.sum(counts > 1) == 30 and counts[counts > 1].sum() == 62
    # Two numbers share one film, and so count as one child.
    with pytest.warns(UserWarning, match="NORMAL/NORMAL2-IM-0095.*NORMAL2-IM-0096") as caught:
        again = load("kermany", 32)
    assert len(caught) == 1 and again.fingerprint() == films.fingerprint()
    assert "NORMAL2-IM-0096" not in films.patient_id
    assert set(films.split[films.patient_id == "NORMAL2-IM-0095"]) == {"test"}


def test_validation_is_a_tenth_of_each_class(films):
    counts = films.counts()
    for name in films.class_names:
        share = counts["val"][name] / (counts["val"][name] + counts["train"][name])
        assert share == pytest.approx(0.1, abs=0.005)


def test_the_cache_gives_the_same_films(cache, films):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kermany, "decode", lambda *_: pytest.fail("decoded although cached"))
        again = load("kermany", 32)
    assert again.fingerprint() == films.fingerprint()


def test_hospitals(films):
    parts = partition(films, 3, "iid", seed=0)
    assert sum(len(part) for part in parts) == 5856 and sum(part.n_patients for part in parts) == 4096
    for part in parts:
        for split, counts in part.counts().items():
            for name, n in counts.items():
                # A third, to within a patient or two.
                assert abs(n - films.counts()[split][name] / 3) <= 15
