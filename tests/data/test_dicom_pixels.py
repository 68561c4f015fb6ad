"""Headers from the field: each is shown as a viewer shows it, or refused by the name of the element."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.data import get_testdata_files
from pydicom.dataset import Dataset
from pydicom.pixels import apply_modality_lut, apply_voi_lut
from test_dicom import EXPECTED, one_film, ramp, write_csv, write_dicom

from primia_lite.data import DataError, load
from primia_lite.data.pixels import to_square

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # pydicom's, about the odd headers that are written here
BITS_12 = {"BitsStored": 12, "HighBit": 11}
WINDOW = {"WindowCenter": 2048, "WindowWidth": 4096}


def refused(tmp_path: Path, match: str, pixels: np.ndarray | None = None, **tags) -> None:
    with pytest.raises(DataError, match=rf"a.dcm \(row 2\).*{match}.*--skip-bad"):
        one_film(tmp_path, ramp() if pixels is None else pixels, **{**BITS_12, **tags})


def replaced(path: Path, old: bytes, new: bytes) -> None:
    content = path.read_bytes()
    assert len(old) == len(new) and old in content
    path.write_bytes(content.replace(old, new))


@pytest.mark.parametrize("element", ["WindowCenter", "WindowWidth", "RescaleSlope", "RescaleIntercept"])
def test_a_number_that_is_none_is_named(tmp_path, element):
    good = {**BITS_12, **WINDOW, "RescaleSlope": 1, "RescaleIntercept": 0}
    for i in range(4):
        write_dicom(tmp_path / f"{i}.dcm", ramp(high=1000 + i), **good)
    path = write_dicom(tmp_path / "bad.dcm", ramp(), **{**good, element: "77.7"})
    replaced(path, b"77.7", b"40,5")
    write_csv(tmp_path, [*(f"{i}.dcm,{'normal' if i % 2 else 'pneumonia'},{i},train" for i in range(4)),
                         "bad.dcm,normal,9,train"])  # fmt: skip
    with pytest.raises(DataError, match=rf"bad.dcm \(row 6\): its {element}"):
        load("dicom", 16, root=tmp_path)
    films = load("dicom", 16, root=tmp_path, skip_bad=True)
    assert len(films) == 4 and films.skipped == ("row 6",)


@pytest.mark.parametrize("dtype", [np.uint16, np.int16])
@pytest.mark.parametrize("photometric", ["MONOCHROME2", "MONOCHROME1"])
@pytest.mark.parametrize("window", [{}, WINDOW])
def test_padding_is_black_and_costs_no_contrast(tmp_path, dtype, photometric, window):
    value = 65535 if dtype == np.uint16 else -2000
    plain = np.tile(np.linspace(0, 2047, 32), (32, 1)).T.astype(dtype)
    padded = plain.copy()
    padded[:, :8] = value
    tags = {**BITS_12, "PhotometricInterpretation": photometric, **window}
    expected = one_film(tmp_path / "plain", plain, **tags)
    film = one_film(tmp_path / "padded", padded, **tags, PixelPaddingValue=value)
    assert film[:, :8].max() == 0
    np.testing.assert_allclose(film[:, 8:], expected[:, 8:], atol=1)


def test_a_range_of_padding(tmp_path):
    padded = ramp(high=2000)
    padded[:, :8] = 60000 + np.arange(8)
    for first, last in ((60000, 65535), (65535, 60000)):
        film = one_film(tmp_path, padded, PixelPaddingValue=first, PixelPaddingRangeLimit=last)
        assert film[:, :8].max() == 0
        assert np.abs(film[:, 8].astype(float) - EXPECTED).max() <= 6


def test_padding_written_with_the_wrong_sign(tmp_path):
    padded = ramp(np.int16, high=2000)
    padded[:, :8] = -2000
    for i, value in enumerate((-2000, 63536)):
        path = write_dicom(tmp_path / f"{i}.dcm", padded)
        header = pydicom.dcmread(path)
        header.add_new("PixelPaddingValue", "SS" if value < 0 else "US", value)
        header.save_as(path)
    write_csv(tmp_path, ["0.dcm,normal,a,train", "1.dcm,pneumonia,a,train"])
    films = load("dicom", 32, root=tmp_path)
    assert films.images[:, :, :8].max() == 0 and np.ptp(films.images[:, :, 8:]) == 255


def test_nothing_but_padding_is_refused(tmp_path):
    refused(tmp_path, "PixelPaddingValue", np.full((32, 32), 7, np.uint16), PixelPaddingValue=7)


@pytest.mark.parametrize("width", [0, -3, "nan", "inf"])
def test_a_window_that_is_none_is_ignored(tmp_path, width):
    without = one_film(tmp_path / "1", ramp(), **BITS_12)
    film = one_film(tmp_path / "2", ramp(), **BITS_12, WindowCenter=2048, WindowWidth=width)
    np.testing.assert_array_equal(film, without)
    both = {"WindowCenter": [0, 2048], "WindowWidth": [width, 4096]}
    second = one_film(tmp_path / "3", ramp(), **BITS_12, **both)
    np.testing.assert_array_equal(second, one_film(tmp_path / "4", ramp(), **BITS_12, **WINDOW))


@pytest.mark.parametrize("empty", [{"WindowCenter": None}, {"WindowWidth": None}, {"WindowCenter": ["", ""]}])
def test_half_a_window_is_none(tmp_path, empty):
    without = one_film(tmp_path / "1", ramp(), **BITS_12)
    np.testing.assert_array_equal(one_film(tmp_path / "2", ramp(), **BITS_12, **{**WINDOW, **empty}), without)


def test_functions_of_the_window(tmp_path):
    values = np.linspace(0, 4095, 32).astype(int)
    tags = {**BITS_12, "WindowCenter": 2000, "WindowWidth": 1000}
    exact = one_film(tmp_path / "1", ramp(), **tags, VOILUTFunction="LINEAR_EXACT")[:, 0]
    np.testing.assert_allclose(exact, 255 * np.clip((values - 2000) / 1000 + 0.5, 0, 1), atol=1)
    sigmoid = one_film(tmp_path / "2", ramp(), **tags, VOILUTFunction="SIGMOID")[:, 0]
    np.testing.assert_allclose(sigmoid, 255 / (1 + np.exp(-4 * (values - 2000) / 1000)), atol=1)
    empty = one_film(tmp_path / "3", ramp(), **tags, VOILUTFunction="")
    np.testing.assert_array_equal(empty, one_film(tmp_path / "4", ramp(), **tags))
    refused(tmp_path / "5", "VOILUTFunction", **tags, VOILUTFunction="CUBIC")


@pytest.mark.parametrize(
    "tags",
    [
        {"WindowCenter": 20000, "WindowWidth": 100},
        {"WindowCenter": 2048, "WindowWidth": 1},
        {"RescaleSlope": 0, "RescaleIntercept": 0},
    ],
)
def test_a_header_that_leaves_nothing_of_the_film_is_refused(tmp_path, tags):
    refused(tmp_path, "WindowWidth, RescaleSlope", **tags)


def test_a_film_of_two_greys_is_one(tmp_path):
    mask = np.where(ramp() > 2000, 4095, 0).astype(np.uint16)
    assert set(np.unique(one_film(tmp_path, mask, **BITS_12))) == {0, 255}


def test_rescale(tmp_path):
    plain = one_film(tmp_path / "1", ramp(), **BITS_12)
    empty = one_film(tmp_path / "2", ramp(), **BITS_12, RescaleSlope=None, RescaleIntercept=None)
    tiny = one_film(tmp_path / "3", ramp(), **BITS_12, RescaleSlope="1e-20", RescaleIntercept=0)
    negative = one_film(tmp_path / "4", ramp(), **BITS_12, RescaleSlope=-1, RescaleIntercept=4095)
    np.testing.assert_array_equal(empty, plain)
    np.testing.assert_array_equal(tiny, plain)
    np.testing.assert_allclose(negative, 255 - plain.astype(int), atol=1)
    for i, slope in enumerate((["1", "2"], "nan", "1e300")):
        refused(tmp_path / f"bad{i}", "RescaleSlope", RescaleSlope=slope, RescaleIntercept=0)


def table(entries: int, first: int, bits: int, data: list[int]) -> list[Dataset]:
    item = Dataset()
    item.add_new("LUTDescriptor", "SS" if first < 0 else "US", [entries, first, bits])
    item.add_new("LUTData", "US", data)
    return [item]


def test_tables(tmp_path):
    expected = one_film(tmp_path / "1", ramp(), **BITS_12, WindowCenter=2048, WindowWidth=4096)
    modality = table(4096, 0, 16, [4 * i for i in range(4096)])
    film = one_film(
        tmp_path / "2", ramp(), **BITS_12, ModalityLUTSequence=modality, WindowCenter=8192, WindowWidth=16384
    )
    np.testing.assert_allclose(film, expected, atol=1)
    # A VOI table meets rescaled values: fractions, below its first entry, beyond its last and beyond 16 bits.
    voi = {"RescaleSlope": 40.5, "RescaleIntercept": -50000, "VOILUTSequence": table(4096, -2048, 12, [*range(4096)])}
    film = one_film(tmp_path / "3", ramp(), **BITS_12, **voi)[:, 0]
    values = np.linspace(0, 4095, 32).astype(int) * 40.5 - 50000
    np.testing.assert_allclose(film, 255 * np.clip(np.rint(values) + 2048, 0, 4095) / 4095, atol=1)
    refused(tmp_path / "4", "VOILUTSequence", VOILUTSequence=table(4096, 0, 12, [*range(100)]))
    refused(tmp_path / "5", "VOILUTSequence", VOILUTSequence=[Dataset()])
    refused(tmp_path / "6", "ModalityLUTSequence", ModalityLUTSequence=table(4096, 0, 12, [*range(4096)]))


def test_values_beyond_the_bits_stored_are_refused(tmp_path):
    refused(tmp_path / "1", "BitsStored", ramp(low=1000, high=5000))
    overlay = ramp()
    overlay[3, 3] |= 0x8000
    refused(tmp_path / "2", "BitsStored", overlay)
    refused(tmp_path / "3", "BitsStored", ramp() << 4, HighBit=15)


def test_negative_values_with_and_without_their_sign_in_the_unused_bits(tmp_path):
    values = ramp(np.int16, -2048, 2047)
    extended = one_film(tmp_path / "1", values, **BITS_12)
    bare = one_film(tmp_path / "2", values & 0xFFF, **BITS_12)
    np.testing.assert_array_equal(bare, extended)
    assert extended[0, 0] == 0 and extended[-1, 0] == 255


@pytest.mark.parametrize(
    ("rows", "columns", "lay"),
    [
        ("L", "F", np.array),
        ("R", "F", np.fliplr),
        ("L", "H", np.flipud),
        ("RH", "HL", lambda film: np.rot90(film, 2)),
        ("F", "L", np.transpose),
        ("H", "L", lambda film: np.rot90(film, -1)),
        ("F", "R", lambda film: np.rot90(film, 1)),
    ],
)
def test_films_are_set_upright(tmp_path, rows, columns, lay):
    pixels = np.random.default_rng(0).integers(0, 4096, (32, 32)).astype(np.uint16)
    expected = one_film(tmp_path / "1", pixels, **BITS_12)
    lying = np.ascontiguousarray(lay(pixels))
    film = one_film(tmp_path / "2", lying, **BITS_12, PatientOrientation=[rows, columns])
    np.testing.assert_array_equal(film, expected)


def test_orientation_in_cosines_and_none(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 4096, (32, 32)).astype(np.uint16)
    plain = one_film(tmp_path / "1", pixels, **BITS_12)
    for i, orientation in enumerate(("", "L", ["X", "Y"], ["L", "P"])):
        film = one_film(tmp_path / f"none{i}", pixels, **BITS_12, PatientOrientation=orientation)
        np.testing.assert_array_equal(film, plain)
    cosines = [-1, 0, 0, 0, 0, -1]
    mirrored = one_film(tmp_path / "3", np.fliplr(pixels).copy(), **BITS_12, ImageOrientationPatient=cosines)
    np.testing.assert_array_equal(mirrored, plain)
    refused(tmp_path / "4", "PatientOrientation", PatientOrientation=["A", "F"])


def test_contradictions_and_missing_elements_are_named(tmp_path):
    refused(tmp_path / "1", "PresentationLUTShape", PresentationLUTShape="INVERSE")
    inverse = {"PhotometricInterpretation": "MONOCHROME1", "PresentationLUTShape": "INVERSE"}
    assert one_film(tmp_path / "2", ramp(), **BITS_12, **inverse)[0, 0] == 255
    refused(tmp_path / "3", "Rows", Rows=None)
    refused(tmp_path / "4", "Bits Stored", BitsStored=20)
    refused(tmp_path / "5", "Pixel Representation", PixelRepresentation=None)
    two = np.vstack([ramp(), ramp()])
    refused(tmp_path / "6", "2 frames", two, Rows=32)


def shown_by_pydicom(path: str) -> np.ndarray:
    header = pydicom.dcmread(path)
    values = apply_modality_lut(header.pixel_array, header)
    if header.get("WindowWidth") is None:
        values = np.clip(values, *np.percentile(values, (0.5, 99.5)))
    values = apply_voi_lut(values, header).astype(np.float64)
    scaled = 255 * (values - values.min()) / np.ptp(values)
    grey = np.rint(255 - scaled if header.PhotometricInterpretation == "MONOCHROME1" else scaled)
    return to_square(Image.fromarray(grey.astype(np.uint8)), 32)


def write_good(folder: Path) -> list[str]:
    for i in range(2):
        write_dicom(folder / f"{i}.dcm", ramp(high=1000 + i))
    return ["0.dcm,normal,a,train", "1.dcm,pneumonia,b,train"]


def test_pydicoms_own_files_are_read_as_pydicom_shows_them(tmp_path):
    paths = get_testdata_files()
    write_csv(tmp_path, [*write_good(tmp_path), *(f'"{path}",normal,{i},train' for i, path in enumerate(paths))])
    films = load("dicom", 32, root=tmp_path, skip_bad=True)
    read = [path for row, path in enumerate(paths, 4) if f"row {row}" not in films.skipped]
    assert len(read) > 40 and len(read) == len(films) - 2
    for path, film in zip(read, films.images[2:], strict=True):
        assert np.corrcoef(film.ravel(), shown_by_pydicom(path).ravel())[0, 1] > 0.99, path  # greys are rounded


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("JPGExtended.dcm", "pylibjpeg"),
        ("JPEG-lossy.dcm", "pylibjpeg"),
        ("MR_small_jpeg_ls_lossless.dcm", "pylibjpeg"),
        ("badVR.dcm", "NumberOfFrames"),
        ("rtdose.dcm", "15 frames"),
        ("SC_rgb_rle.dcm", "in colour .RGB"),
        ("examples_palette.dcm", "in colour .PALETTE COLOR"),
        ("rtplan.dcm", "no PixelData"),
        ("zipMR.gz", "not a DICOM"),
        ("MR_truncated.dcm", "less than expected"),
    ],
)
def test_others_of_pydicoms_files_are_refused_by_a_sentence(tmp_path, name, word):
    (path,) = get_testdata_files(name)
    write_csv(tmp_path, [*write_good(tmp_path), f'"{path}",normal,other,train'])
    with pytest.raises(DataError, match=rf"{name} \(row 4\): .*{word}.*--skip-bad"):
        load("dicom", 16, root=tmp_path)
