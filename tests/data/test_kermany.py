from __future__ import annotations

import io
import os
import shutil
import sys
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from primia_lite.data import CLASSES_3, DataError, kermany, load
from primia_lite.data.pixels import decode


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PRIMIA_LITE_CACHE", str(tmp_path / "cache"))


def jpeg(seed: int, mode: str = "L", size: tuple[int, int] = (60, 40)) -> bytes:
    grey = np.random.default_rng(seed).integers(0, 256, (6, 6)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(grey).resize(size).convert(mode).save(file, "JPEG", quality=90)
    return file.getvalue()


def kaggle_names(start: int, n: int, films: int = 2) -> dict[str, list[str]]:
    numbers = range(start, start + n)
    normal = [f"{'NORMAL2-' if i % 2 else ''}IM-{i:04d}-000{k}.jpeg" for i in numbers for k in range(1, films + 1)]
    pneumonia = [
        f"person{i}_{d}_{10 * i + k}.jpeg" for i in numbers for d in ("bacteria", "virus") for k in range(films)
    ]
    return {"NORMAL": normal, "PNEUMONIA": pneumonia}


def write_set(root: Path, folders: dict[str, dict[str, list[str]]], mode: str = "L") -> Path:
    for split, classes in folders.items():
        for name, files in classes.items():
            (root / split / name).mkdir(parents=True, exist_ok=True)
            for i, file in enumerate(files):
                (root / split / name / file).write_bytes(jpeg(hash_of(file) + i, mode))
    return root


def hash_of(name: str) -> int:
    return zlib.crc32(name.encode())


@pytest.fixture
def kaggle(tmp_path) -> Path:
    """Kaggle's layout: 10 patients of each class in train, 1 of each kind in val, 3 in test; 2 films each."""
    folders = {"train": kaggle_names(1, 10), "val": kaggle_names(50, 1), "test": kaggle_names(100, 3)}
    return write_set(tmp_path / "chest_xray", folders)


def test_classes_patients_and_splits_of_kaggles_layout(kaggle):
    films = load("kermany", 32, root=kaggle)
    assert films.class_names == CLASSES_3 and films.source == "kermany" and films.sites == ("kermany",)
    assert films.images.shape == (84, 32, 32) and films.n_patients == 42
    assert films.counts()["test"] == {"normal": 6, "bacterial": 6, "viral": 6}
    # 22 films of each class are pooled, 10 % of them in whole patients is one patient.
    assert films.counts()["val"] == {"normal": 2, "bacterial": 2, "viral": 2}
    assert {"person3_virus", "person3_bacteria", "IM-0002", "NORMAL2-IM-0001"} <= set(films.patient_id)
    assert films.skipped == () and films.lung_mask is None
    virus = np.char.endswith(films.patient_id, "virus")
    assert set(films.labels[virus]) == {2} and set(films.labels[~virus]) == {0, 1}


def test_original_validation_is_kept_on_demand(kaggle):
    films = load("kermany", 32, root=kaggle, validation="original")
    assert films.counts()["val"] == {"normal": 2, "bacterial": 2, "viral": 2}
    assert set(films.of_split("val").patient_id) == {"IM-0050", "person50_bacteria", "person50_virus"}
    shutil.rmtree(kaggle / "val")
    with pytest.raises(DataError, match="from_train"):
        load("kermany", 32, root=kaggle, validation="original")
    assert len(load("kermany", 32, root=kaggle)) == 78


def test_validation_fraction_and_seed(kaggle):
    assert "val" not in load("kermany", 32, root=kaggle, validation_fraction=0).counts()
    half = load("kermany", 32, root=kaggle, validation_fraction=0.5)
    assert sum(half.counts()["val"].values()) == pytest.approx(33, abs=3)
    other = load("kermany", 32, root=kaggle, validation_fraction=0.5, seed=1)
    assert np.any(other.split != half.split) and np.array_equal(other.images, half.images)
    for options in ({"validation_fraction": 1.0}, {"validation": "none"}, {"aspect": "tall"}):
        name, value = next(iter(options.items()))
        with pytest.raises(DataError, match=f"{name}={value!r}"):
            load("kermany", 32, root=kaggle, **options)


@pytest.mark.parametrize("inside", ["", "ZhangLabData/CellData/chest_xray"])
def test_the_root_may_be_the_folder_or_one_above_it(tmp_path, inside):
    write_set(tmp_path / "data" / inside, {"train": kaggle_names(1, 4), "test": kaggle_names(100, 1)})
    assert len(load("kermany", 16, root=tmp_path / "data")) == 30
    assert kermany.find(tmp_path / "data") == ((tmp_path / "data" / inside).resolve(), 30)


def test_mendeleys_names(tmp_path):
    train = {
        "NORMAL": [f"NORMAL-{i}-000{k}.jpeg" for i in (11419, 28501, 1003233) for k in (1, 2)],
        "PNEUMONIA": [f"{d}-{i}-0001.jpeg" for d in ("BACTERIA", "VIRUS") for i in (7422, 8000, 1018860)],
    }
    test = {"NORMAL": ["NORMAL-115218-0001.jpeg"], "PNEUMONIA": ["VIRUS-355597-0002.jpeg", "BACTERIA-40699-0001.jpeg"]}
    write_set(tmp_path / "chest_xray", {"train": train, "test": test}, mode="RGB")
    films = load("kermany", 16, root=tmp_path, validation_fraction=0.3)
    assert films.n_patients == 12 and len(films) == 15
    assert films.counts()["test"] == {"normal": 1, "bacterial": 1, "viral": 1}
    assert films.labels[films.patient_id == "VIRUS-7422"].tolist() == [2]


def test_files_of_macos_are_ignored(kaggle):
    (kaggle / "__MACOSX" / "train" / "NORMAL").mkdir(parents=True)
    (kaggle / "__MACOSX" / "train" / "NORMAL" / "._IM-0001-0001.jpeg").write_bytes(b"x")
    (kaggle / "train" / "NORMAL" / "._IM-0002-0001.jpeg").write_bytes(b"x")
    (kaggle / "train" / ".DS_Store").write_bytes(b"x")
    (kaggle / "train" / "NORMAL" / ".DS_Store").write_bytes(b"x")
    assert len(load("kermany", 16, root=kaggle)) == 84


def test_what_is_missing_is_named(tmp_path, kaggle):
    with pytest.raises(DataError, match="rscbjbr9sj") as error:
        load("kermany", 64, root=tmp_path / "nowhere")
    assert str(tmp_path / "nowhere") in str(error.value) and "PRIMIA_LITE_DATA" in str(error.value)
    for file in [file for split in ("train", "val") for file in (kaggle / split / "PNEUMONIA").glob("*virus*")]:
        file.unlink()
    with pytest.raises(DataError, match="'viral'"):
        load("kermany", 16, root=kaggle)
    shutil.rmtree(kaggle / "test")
    with pytest.raises(DataError, match="test/NORMAL"):
        load("kermany", 64, root=kaggle)


def test_one_patient_in_train_and_test_is_named(kaggle):
    (kaggle / "test" / "PNEUMONIA" / "person4_virus_99.jpeg").write_bytes(jpeg(1))
    with pytest.raises(DataError, match="person4_virus"):
        load("kermany", 16, root=kaggle, validation_fraction=0)


@pytest.mark.parametrize("kept", [0.0, 0.9])
def test_a_truncated_jpeg_is_named(kaggle, kept):
    file = kaggle / "train" / "PNEUMONIA" / "person4_virus_40.jpeg"
    file.write_bytes(file.read_bytes()[: int(kept * file.stat().st_size)])
    with pytest.raises(DataError, match="person4_virus_40.jpeg.*--skip-bad") as error:
        load("kermany", 16, root=kaggle)
    assert "BytesIO" not in str(error.value)


def test_skip_bad_counts_and_names_what_it_skips(kaggle):
    (kaggle / "train" / "NORMAL" / "IM-0002-0001.jpeg").write_bytes(b"no film")
    (kaggle / "test" / "NORMAL" / "holiday.jpeg").write_bytes(jpeg(0))
    shutil.copy(kaggle / "train" / "NORMAL" / "IM-0004-0001.jpeg", kaggle / "train" / "PNEUMONIA" / "IM-0090-0001.jpeg")
    expected = ("train/PNEUMONIA/IM-0090-0001.jpeg", "test/NORMAL/holiday.jpeg", "train/NORMAL/IM-0002-0001.jpeg")
    for _ in range(2):  # the second time from the cache
        with pytest.warns(UserWarning, match="skipped"):
            films = load("kermany", 16, root=kaggle, skip_bad=True)
        assert films.skipped == expected and len(films) == 83
    # What was skipped once must not be forgotten by the cache.
    (kaggle / "test" / "NORMAL" / "holiday.jpeg").unlink()
    (kaggle / "train" / "PNEUMONIA" / "IM-0090-0001.jpeg").unlink()
    with pytest.raises(DataError, match="IM-0002-0001"):
        load("kermany", 16, root=kaggle)


def test_nothing_but_bad_films(tmp_path):
    write_set(tmp_path, {"train": kaggle_names(1, 2), "test": kaggle_names(100, 1)})
    for file in tmp_path.rglob("*.jpeg"):
        file.write_bytes(b"")
    with pytest.raises(DataError, match="none"):
        load("kermany", 16, root=tmp_path, skip_bad=True, validation_fraction=0)


def test_a_name_in_the_wrong_folder_and_an_unknown_name(kaggle):
    wrong = kaggle / "train" / "NORMAL" / "person1_virus_1.jpeg"
    wrong.write_bytes(jpeg(0))
    with pytest.raises(DataError, match="train/NORMAL/person1_virus_1.jpeg"):
        load("kermany", 16, root=kaggle)
    wrong.rename(wrong.with_name("scan.jpeg"))
    with pytest.raises(DataError, match="scan.jpeg"):
        load("kermany", 16, root=kaggle)


def test_grey_coded_as_rgb_is_grey_and_colour_is_named(kaggle):
    file = kaggle / "test" / "NORMAL" / "IM-0100-0001.jpeg"
    grey = load("kermany", 32, root=kaggle).of_split("test").images[0]
    file.write_bytes(jpeg(hash_of(file.name), "RGB"))
    np.testing.assert_array_equal(load("kermany", 32, root=kaggle).of_split("test").images[0], grey)
    # JPEG noise of the chroma channels, as when a grey film is saved again with a tint of two levels.
    near = np.repeat(np.asarray(Image.open(file).convert("L"))[..., None], 3, axis=2).astype(np.int16)
    near[..., 0] += 2
    Image.fromarray(near.clip(0, 255).astype(np.uint8)).save(file, "PNG")
    load("kermany", 32, root=kaggle)
    near[:4, :4, 0] = 255 - near[:4, :4, 1]
    Image.fromarray(near.clip(0, 255).astype(np.uint8)).save(file, "PNG")
    with pytest.raises(DataError, match="IM-0100-0001.jpeg.*colour"):
        load("kermany", 32, root=kaggle)
    Image.fromarray(np.zeros((9, 9), np.uint16)).save(file, "PNG")
    with pytest.raises(DataError, match="I;16"):
        load("kermany", 32, root=kaggle)


def saved(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize(("kind", "tag"), [("JPEG", 3), ("JPEG", 6), ("JPEG", 7), ("PNG", 8), ("JPEG", 99)])
def test_a_film_that_a_viewer_has_turned(kaggle, kind, tag):
    file = kaggle / "test" / "NORMAL" / "IM-0100-0001.jpeg"
    exif = Image.Exif()
    exif[0x0112] = tag
    film = np.add.outer(np.arange(0, 128, 4), np.arange(0, 64, 2)).astype(np.uint8)
    file.write_bytes(saved(Image.fromarray(film), kind, exif=exif))
    turned = {3: np.rot90(film, 2), 6: np.rot90(film, -1), 7: np.rot90(film, 2).T, 8: np.rot90(film), 99: film}[tag]
    np.testing.assert_allclose(load("kermany", 32, root=kaggle).of_split("test").images[0], turned, atol=4)


@pytest.mark.parametrize(
    ("film", "message"),
    [
        (saved(Image.new("LA", (9, 9), (80, 255)), "PNG"), None),
        (saved(Image.new("L", (9, 9), 80), "PNG", transparency=80), "transparent"),
        (saved(Image.new("L", (9, 9), 80), "GIF", save_all=True, append_images=[Image.new("L", (9, 9))]), "2 frames"),
        (saved(Image.new("P", (9, 9), 0), "PNG"), None),
        (saved(Image.new("CMYK", (9, 9), (0, 0, 0, 80)), "JPEG"), None),
        (saved(Image.new("F", (9, 9)), "TIFF"), "type F"),
        (saved(Image.new("L", (9, 9)), "PNG")[:16] + bytes(8) + saved(Image.new("L", (9, 9)), "PNG")[24:], "read"),
    ],
)
def test_kinds_of_images(kaggle, film, message):
    (kaggle / "test" / "NORMAL" / "IM-0100-0001.jpeg").write_bytes(film)
    if message is None:
        assert load("kermany", 16, root=kaggle).of_split("test").images[0].std() == 0
    else:
        with pytest.raises(DataError, match=rf"IM-0100-0001.jpeg .*{message}.*--skip-bad"):
            load("kermany", 16, root=kaggle)


@pytest.mark.filterwarnings("ignore")
def test_no_damage_to_a_film_is_more_than_an_error(kaggle):
    """Bytes changed at random: read or refused by name, whatever Pillow raises."""
    rng = np.random.default_rng(0)
    exif = Image.Exif()
    exif[0x0112] = 6
    grey = Image.fromarray(rng.integers(0, 256, (16, 16)).astype(np.uint8))
    for kind in ("JPEG", "PNG", "GIF", "TIFF"):
        whole = np.frombuffer(saved(grey, kind, exif=exif), np.uint8)
        for _ in range(100):
            damaged = whole.copy()
            damaged[rng.integers(0, min(400, len(whole)), 3)] = rng.integers(0, 256, 3)
            try:
                decode(damaged.tobytes(), "film")
            except DataError as error:
                assert str(error).startswith("film ")


@pytest.mark.skipif(sys.platform != "linux", reason="names of files are bytes on Linux only")
def test_names_in_another_encoding(kaggle):
    folder = os.fsencode(kaggle / "train" / "NORMAL")
    copy = "/IM-0002-0001 副本.jpeg".encode("gbk")
    os.rename(folder + b"/IM-0002-0001.jpeg", folder + copy)
    for _ in range(2):  # the second time from the cache
        films = load("kermany", 16, root=kaggle)
        assert len(films) == 84 and "IM-0002" in films.patient_id
    Path(os.fsdecode(folder + copy)).write_bytes(b"no film")
    Path(os.fsdecode(folder + "/副本.jpeg".encode("gbk"))).write_bytes(b"no film\n")
    with pytest.raises(DataError) as error:
        load("kermany", 16, root=kaggle)
    assert str(error.value).encode()  # can be printed
    for _ in range(2):
        with pytest.warns(UserWarning, match="skipped") as caught:
            films = load("kermany", 16, root=kaggle, skip_bad=True)
        assert all(text.isprintable() for text in (*films.skipped, str(caught[0].message))) and len(films) == 83


def test_the_same_film_in_train_and_test_is_an_error(kaggle):
    copied = (kaggle / "train" / "NORMAL" / "IM-0002-0001.jpeg").read_bytes()
    (kaggle / "test" / "NORMAL" / "IM-0909-0001.jpeg").write_bytes(saved(Image.open(io.BytesIO(copied)), "PNG"))
    for validation in ("from_train", "original", "original"):  # the third time from the cache
        with pytest.raises(DataError, match="IM-0002-0001.jpeg .*IM-0909-0001.jpeg"):
            load("kermany", 16, root=kaggle, validation=validation)


def test_the_same_film_of_two_patients_makes_them_one(kaggle):
    first, second, third = (kaggle / "train" / "NORMAL" / f"IM-00{n}-0001.jpeg" for n in ("02", "04", "06"))
    other = first.with_name("IM-0004-0002.jpeg")
    second.write_bytes(first.read_bytes())
    third.write_bytes(other.read_bytes())
    for seed in range(5):  # whatever the split, the three come to lie in one part
        with pytest.warns(UserWarning, match="IM-0002-0001.jpeg .*IM-0004-0001.jpeg"):
            films = load("kermany", 16, root=kaggle, seed=seed)
        assert len(films) == 84 and films.n_patients == 40
        assert np.sum(films.patient_id == "IM-0002") == 6 and not {"IM-0004", "IM-0006"} & set(films.patient_id)


def test_the_same_film_of_one_patient_is_no_matter(kaggle):
    file = kaggle / "train" / "NORMAL" / "IM-0002-0001.jpeg"
    shutil.copy(file, file.with_name("IM-0002-0001 (1).jpeg"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        films = load("kermany", 16, root=kaggle)
    assert len(films) == 85 and films.n_patients == 42


def test_resizing_is_antialiased_and_keeps_the_aspect_on_demand(kaggle):
    file = kaggle / "test" / "NORMAL" / "IM-0100-0001.jpeg"
    columns = np.tile(np.array([0, 255], np.uint8), (64, 64))  # 64 x 128: stripes of one pixel
    Image.fromarray(columns).save(file, "PNG")
    films = {
        a: load("kermany", 16, root=kaggle, aspect=a).of_split("test").images[0] for a in ("stretch", "crop", "pad")
    }
    assert np.abs(films["stretch"].astype(int) - 128).max() <= 8, "stripes must average out to grey"
    assert np.abs(films["crop"].astype(int) - 128).max() <= 8
    assert films["pad"][:4].max() == 0 and films["pad"][6:10].min() > 100


def test_the_cache_gives_the_same_films_and_follows_the_content(kaggle, tmp_path, monkeypatch):
    first = load("kermany", 16, root=kaggle)
    (path,) = (tmp_path / "cache").glob("*.npz")
    with monkeypatch.context() as patch:
        patch.setattr(kermany, "decode", lambda *_: pytest.fail("decoded although cached"))
        again = load("kermany", 16, root=kaggle)
        assert again.fingerprint() == first.fingerprint()
        shutil.copytree(kaggle, tmp_path / "elsewhere")
        assert load("kermany", 16, root=tmp_path / "elsewhere").fingerprint() == first.fingerprint()
    file = kaggle / "train" / "NORMAL" / "IM-0002-0001.jpeg"
    file.write_bytes(jpeg(999))
    assert load("kermany", 16, root=kaggle).fingerprint() != first.fingerprint()
    load("kermany", 24, root=kaggle)
    load("kermany", 24, root=kaggle, aspect="pad")
    assert len(list((tmp_path / "cache").glob("*.npz"))) == 4 and path.exists()


def test_a_cache_that_cannot_be_written_costs_only_time(kaggle, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PRIMIA_LITE_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.warns(UserWarning, match="PRIMIA_LITE_CACHE"):
        assert len(load("kermany", 16, root=kaggle)) == 84


def test_n_films_takes_whole_patients_of_every_class_and_split(kaggle):
    films = load("kermany", 16, root=kaggle, n_films=40)
    everything = load("kermany", 16, root=kaggle)
    assert abs(len(films) - 40) <= 9
    assert all(n > 0 for counts in films.counts().values() for n in counts.values()) and len(films.counts()) == 3
    for patient in np.unique(films.patient_id):
        assert np.sum(films.patient_id == patient) == np.sum(everything.patient_id == patient)
    assert films.fingerprint() == load("kermany", 16, root=kaggle, n_films=40).fingerprint()
    # A smaller set keeps the split of the whole set: no film of its train is in the whole set's test or val.
    of_whole = dict(zip(everything.patient_id, everything.split, strict=True))
    assert all(of_whole[patient] == split for patient, split in zip(films.patient_id, films.split, strict=True))
    assert len(load("kermany", 16, root=kaggle, n_films=10_000)) == 84


def test_a_bar_is_drawn_for_a_watcher_only(kaggle, capsys, monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load("kermany", 16, root=kaggle)
        assert capsys.readouterr().err == ""
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
        load("kermany", 17, root=kaggle)
    assert "reading films" in capsys.readouterr().err


def test_the_default_root_is_the_data_folder(kaggle, monkeypatch):
    monkeypatch.setenv("PRIMIA_LITE_DATA", str(kaggle.parent))
    assert len(load("kermany", 16)) == 84
