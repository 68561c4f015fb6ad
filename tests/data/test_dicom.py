from __future__ import annotations

import dataclasses
import os
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import DigitalXRayImageStorageForPresentation, ExplicitVRLittleEndian, generate_uid

from primia_lite.data import CLASSES_2, CLASSES_3, DataError, load

NAME, NUMBER = "DOE^SECRET", "MRN-4711"


def write_dicom(path: Path, pixels: np.ndarray, **tags) -> Path:
    header = Dataset()
    header.file_meta = FileMetaDataset()
    header.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    header.file_meta.MediaStorageSOPClassUID = header.SOPClassUID = DigitalXRayImageStorageForPresentation
    header.file_meta.MediaStorageSOPInstanceUID = header.SOPInstanceUID = generate_uid()
    header.PatientName, header.PatientID, header.PatientBirthDate = NAME, NUMBER, "20190101"
    header.Rows, header.Columns = pixels.shape[:2]
    header.SamplesPerPixel, header.PhotometricInterpretation = 1, "MONOCHROME2"
    bits = 8 * pixels.dtype.itemsize
    header.BitsAllocated, header.BitsStored, header.HighBit = bits, bits, bits - 1
    header.PixelRepresentation = int(pixels.dtype.kind == "i")
    for name, value in tags.items():
        setattr(header, name, value)
    header.add_new("PixelData", "OB" if header.BitsAllocated == 8 else "OW", pixels.tobytes())
    path.parent.mkdir(parents=True, exist_ok=True)
    header.save_as(path, enforce_file_format=True)
    return path


def ramp(dtype=np.uint16, low: int = 0, high: int = 4095, side: int = 32) -> np.ndarray:
    """From ``low`` at the top to ``high`` at the bottom."""
    return np.tile(np.linspace(low, high, side)[:, None], (1, side)).astype(dtype)


def write_csv(folder: Path, lines: list[str], header: str = "file,label,patient_id,split") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "labels.csv").write_text("\n".join([header, *lines]) + "\n")


def one_film(tmp_path: Path, pixels: np.ndarray, **tags) -> np.ndarray:
    """The film [32, 32] that the loader makes of these pixels; one of the other class stands beside it."""
    write_dicom(tmp_path / "a.dcm", pixels, **tags)
    write_dicom(tmp_path / "b.dcm", ramp())
    write_csv(tmp_path, [f"a.dcm,normal,{NUMBER},train", "b.dcm,pneumonia,other,train"])
    return load("dicom", 32, root=tmp_path).images[0]


def cohort(folder: Path, n: int = 12, header: str = "file,label,patient_id", more: str = "") -> Path:
    lines = []
    for i in range(n):
        for k in range(2):
            write_dicom(folder / "films" / f"{i}_{k}.dcm", ramp(high=1000 + 100 * i + k))
            lines.append(f"films/{i}_{k}.dcm,{CLASSES_3[i % 3]},{NUMBER}-{i}{more}")
    write_csv(folder, lines, header)
    return folder


EXPECTED = np.linspace(0, 255, 32)


def test_12_bits_are_stretched_over_the_range_of_the_film_without_a_window(tmp_path):
    film = one_film(tmp_path, ramp(low=500, high=3500), BitsStored=12, HighBit=11)
    assert film.dtype == np.uint8 and film[0, 0] == 0 and film[-1, 0] == 255
    assert np.abs(film[:, 0] - EXPECTED).max() <= 6


@pytest.mark.parametrize(
    ("pixels", "bits"),
    [(ramp(np.uint8, high=255), 8), (ramp(high=1023), 10), (ramp(high=65535), 16), (ramp(np.int16, -99, 99), 12)],
)
def test_depths_and_signs(tmp_path, pixels, bits):
    film = one_film(tmp_path, pixels, BitsStored=bits, HighBit=bits - 1)
    assert np.abs(film[:, 0] - EXPECTED).max() <= 6


def test_the_window_decides_not_the_range_of_the_film(tmp_path):
    film = one_film(tmp_path, ramp(high=1000), BitsStored=12, HighBit=11, WindowCenter=2048, WindowWidth=4096)
    assert film.max() == pytest.approx(1000 / 4095 * 255, abs=1)


def test_rescale_comes_before_the_window(tmp_path):
    tags = {"BitsStored": 12, "HighBit": 11, "RescaleSlope": 2, "RescaleIntercept": -1000}
    film = one_film(tmp_path, ramp(), **tags, WindowCenter=1000, WindowWidth=2000)[:, 0].astype(float)
    values = np.linspace(0, 4095, 32) * 2 - 1000
    np.testing.assert_allclose(film, np.clip((values - 999.5) / 1999 + 0.5, 0, 1) * 255, atol=1)


@pytest.mark.parametrize("bits", [8, 12])
def test_voi_table(tmp_path, bits):
    table = Dataset()
    entries = (np.arange(4096) // (16 if bits == 8 else 1))[::-1]
    table.add_new("LUTDescriptor", "US", [4096, 0, bits])
    table.add_new("LUTData", "US", entries.tolist())
    film = one_film(tmp_path, ramp(), BitsStored=12, HighBit=11, VOILUTSequence=[table])
    assert np.abs(film[:, 0] - EXPECTED[::-1]).max() <= 1


def test_monochrome1_is_inverted(tmp_path):
    plain = one_film(tmp_path / "2", ramp(), BitsStored=12, HighBit=11)
    inverted = one_film(tmp_path / "1", ramp(), BitsStored=12, HighBit=11, PhotometricInterpretation="MONOCHROME1")
    np.testing.assert_array_equal(inverted, 255 - plain)


def test_a_film_of_one_grey_and_an_oblong_film(tmp_path):
    assert one_film(tmp_path / "1", np.full((32, 32), 7, np.uint16)).std() == 0
    assert one_film(tmp_path / "2", ramp(side=64)[:, :20].copy()).shape == (32, 32)


def test_patients_get_pseudonyms_and_splits(tmp_path):
    films = load("dicom", 16, root=cohort(tmp_path / "dicom", 30).parent)
    assert films.class_names == CLASSES_3 and films.source == "dicom" and films.sites == ("dicom",)
    assert (
        films.n_patients == 30
        and films.patient_id[0] == "patient-0001"
        and set(films.counts()) == {"train", "val", "test"}
    )
    assert sum(films.counts()["test"].values()) == 12
    assert films.fingerprint() == load("dicom", 16, root=tmp_path).fingerprint()


def test_site_and_split_columns_are_kept(tmp_path):
    header = "file,label,patient_id,site,split"
    films = load("dicom", 16, root=cohort(tmp_path, 6, header, ",north,train"))
    assert films.sites == ("north",) and set(films.split) == {"train"}
    # Spaces, a byte order mark as Excel writes it, capital letters and a further column do no harm.
    (tmp_path / "labels.csv").write_text(
        "\ufefffile, label, patient_id, remark\n" + "".join(f"films/{i}_0.dcm, Normal , p{i}, x\n" for i in (0, 1, 2))
        + "".join(f"films/{i}_0.dcm,pneumonia,p{i},\n" for i in (3, 4, 5)), encoding="utf-8",
    )  # fmt: skip
    films = load("dicom", 16, root=tmp_path)
    assert films.class_names == CLASSES_2 and films.labels.tolist() == [0, 0, 0, 1, 1, 1]


def test_fractions_and_n_films(tmp_path):
    cohort(tmp_path, 12)
    films = load("dicom", 16, root=tmp_path, test_fraction=0, validation_fraction=0.25)
    assert set(films.counts()) == {"train", "val"} and sum(films.counts()["val"].values()) == 6
    assert len(load("dicom", 16, root=tmp_path, test_fraction=0.5, validation_fraction=0, n_films=12)) == 12
    with pytest.raises(DataError, match="test_fraction=1"):
        load("dicom", 16, root=tmp_path, test_fraction=1)


def bad_films(folder: Path) -> dict[str, Path]:
    """One film of each kind that can't be used."""
    colour = np.zeros((8, 8, 3), np.uint8)
    whole = write_dicom(folder / "truncated.dcm", ramp())
    whole.write_bytes(whole.read_bytes()[:-500])
    (folder / "text.dcm").write_text(f"{NAME} {NUMBER}")
    return {
        "frames, not one": write_dicom(folder / "frames.dcm", ramp(), NumberOfFrames=2, Rows=16),
        "in colour": write_dicom(
            folder / "colour.dcm", colour, SamplesPerPixel=3, PhotometricInterpretation="RGB", PlanarConfiguration=0
        ),
        "in colour .PALETTE": write_dicom(
            folder / "palette.dcm", ramp(np.uint8), PhotometricInterpretation="PALETTE COLOR"
        ),
        "text burned in": write_dicom(folder / "burned.dcm", ramp(), BurnedInAnnotation="YES"),
        "pixels can't be decoded": whole,
        "negative|pixels can't": write_dicom(
            folder / "slope.dcm", ramp(), RescaleSlope=-1, RescaleIntercept=0, WindowCenter=1, WindowWidth=9
        ),
        "not a DICOM file": folder / "text.dcm",
        "no such file": folder / "missing.dcm",
    }


def test_films_that_cannot_be_used_are_named_or_skipped(tmp_path):
    cohort(tmp_path, 6)
    good = [f"films/{i}_0.dcm,{CLASSES_3[i % 3]},p{i},train" for i in range(6)]
    bad = bad_films(tmp_path)
    for message, path in bad.items():
        write_csv(tmp_path, [*good, f"{path.name},normal,{NUMBER},train"])
        with pytest.raises(DataError, match=rf"{path.name} \(row 8\).*({message}).*--skip-bad") as error:
            load("dicom", 16, root=tmp_path)
        assert NAME not in chain(error.value) and NUMBER not in chain(error.value)
    write_csv(tmp_path, [*good, *(f"{path.name},normal,{NUMBER}-{path.name},train" for path in bad.values())])
    with pytest.warns(UserWarning, match=f"skipped {len(bad)} of") as caught:
        films = load("dicom", 16, root=tmp_path, skip_bad=True)
    assert len(films) == 6 and films.skipped == tuple(f"row {i}" for i in range(8, 8 + len(bad)))
    assert not any(NAME in str(warning.message) or NUMBER in str(warning.message) for warning in caught)


def chain(error: BaseException | None) -> str:
    """What a traceback would print of an error and the errors behind it."""
    text = ""
    while error is not None:
        text += repr(error)
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return text


def test_names_and_ids_never_leave_the_loader(tmp_path, caplog, capfd):
    caplog.set_level("DEBUG")
    films = load("dicom", 16, root=cohort(tmp_path, 30))
    content = pickle.dumps({field.name: getattr(films, field.name) for field in dataclasses.fields(films)})
    said = repr(films) + caplog.text + "".join(capfd.readouterr())
    for secret in (NAME, NUMBER, "DOE", "20190101"):
        assert secret not in said
        assert secret.encode() not in content and secret.encode("utf-32-le") not in content


@pytest.mark.parametrize(
    ("lines", "header", "message"),
    [
        (["a.dcm,normal"], "file,label", "patient_id"),
        ([], "file,label,patient_id", "no film"),
        (["a.dcm,normal,"], "file,label,patient_id", "row 2.*patient_id"),
        (["a.dcm"], "file,label,patient_id", "row 2.*label"),
        (["a.dcm,covid,p"], "file,label,patient_id", "row 2.*'covid'"),
        (["a.dcm,viral,p", "b.dcm,pneumonia,q"], "file,label,patient_id", "mixes"),
        (["a.dcm,viral,p", "a.dcm,normal,q"], "file,label,patient_id", "row 3.*row 2"),
        (["a.dcm,viral,p,dev"], "file,label,patient_id,split", "row 2.*'dev'"),
        (["a.dcm,viral,p,train,"], "file,label,patient_id,split,site", "row 2.*site"),
        (["a.dcm,normal,p", "b.dcm,viral,q"], "file,label,patient_id", "class normal"),
    ],
)
def test_a_wrong_csv_is_explained(tmp_path, lines, header, message):
    write_csv(tmp_path, lines, header)
    with pytest.raises(DataError, match=message):
        load("dicom", 16, root=tmp_path)


def test_one_patient_in_two_splits_is_told_by_row_not_by_id(tmp_path):
    write_csv(tmp_path, [f"a.dcm,normal,{NUMBER},train", "b.dcm,viral,q,train", f"c.dcm,normal,{NUMBER},test"])
    with pytest.raises(DataError, match="row 4.*row 2") as error:
        load("dicom", 16, root=tmp_path)
    assert NUMBER not in str(error.value)


@pytest.mark.parametrize("name", ["films/../films/0_0.dcm", "symbolic", "hard"])
def test_one_file_listed_twice_under_two_names(tmp_path, name):
    cohort(tmp_path, 3)
    file = tmp_path / "films" / "0_0.dcm"
    if name == "symbolic":
        (tmp_path / name).symlink_to(file)
    elif name == "hard":
        os.link(file, tmp_path / name)
    good = [f"films/{i}_0.dcm,{CLASSES_3[i]},p{i},train" for i in range(3)]
    write_csv(tmp_path, [*good, f'"{name}",normal,{NUMBER},train'])
    with pytest.raises(DataError, match="row 5.*row 2"):
        load("dicom", 16, root=tmp_path)


def test_a_copied_film_makes_two_patients_one(tmp_path):
    """Where the header differs, or the window, the bytes of the files do too: the pixels tell."""
    write_dicom(tmp_path / "a.dcm", ramp(high=999))
    write_dicom(tmp_path / "b.dcm", ramp(high=999), WindowCenter=500, WindowWidth=300)
    lines = ["a.dcm,normal,one", "b.dcm,normal,two"]
    for i in range(2, 20):
        write_dicom(tmp_path / f"{i}.dcm", ramp(high=1000 + i))
        lines.append(f"{i}.dcm,{'normal' if i % 2 else 'pneumonia'},{i}")
    for seed in range(4):
        write_csv(tmp_path, lines, "file,label,patient_id")
        with pytest.warns(UserWarning, match="row 2 of .*row 3") as caught:
            films = load("dicom", 16, root=tmp_path, seed=seed)
        assert "one" not in str(caught[0].message).split() and len(films) == 20 and films.n_patients == 19
        assert films.patient_id[0] == films.patient_id[1] and films.split[0] == films.split[1]
    given = [f"{line},{'test' if i == 1 else 'train'}" for i, line in enumerate(lines)]
    write_csv(tmp_path, given)
    with pytest.raises(DataError, match="row 2 of .*row 3"):
        load("dicom", 16, root=tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="names of files are bytes on Linux only")
def test_a_csv_and_names_in_another_encoding(tmp_path):
    cohort(tmp_path, 3)
    os.rename(tmp_path / "films" / "0_0.dcm", os.fsencode(tmp_path / "films") + "/副本.dcm".encode("gbk"))
    lines = "file,label,patient_id,split,site\nfilms/副本.dcm,normal,甲,train,北京\n" + "".join(
        f"films/{i}_0.dcm,{CLASSES_3[i]},p{i},train,北京\n" for i in (1, 2)
    )
    (tmp_path / "labels.csv").write_bytes(lines.encode("gbk"))
    films = load("dicom", 16, root=tmp_path)
    assert len(films) == 3 and films.sites[0].encode()
    os.remove(os.fsencode(tmp_path / "films") + "/副本.dcm".encode("gbk"))
    with pytest.raises(DataError, match="row 2") as error:
        load("dicom", 16, root=tmp_path)
    assert str(error.value).encode()  # can be printed


def test_a_csv_that_is_none(tmp_path):
    (tmp_path / "labels.csv").write_bytes(b"file,label,patient_id\n\xff\xfe\x00,normal,p\n")
    with pytest.raises(DataError, match="UTF-8"):
        load("dicom", 16, root=tmp_path)
    (tmp_path / "labels.csv").unlink()
    with pytest.raises(DataError, match="labels"):
        load("dicom", 16, root=tmp_path)
