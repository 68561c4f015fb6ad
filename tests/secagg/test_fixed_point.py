"""Fixed point and masks: whole numbers that never wrap, within a stated error, under a vetted keystream."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from primia_lite.config import UserError
from primia_lite.secagg.fixed_point import FixedPoint, centred, integers
from primia_lite.secagg.masks import add_masks

# --- fixed point ------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(
    st.sampled_from([2, 3, 10, 100, 999, 1000]),
    st.sampled_from([1e-30, 0.25, 1.0, 32.0, 3e38]),
    st.integers(0, 2**32 - 1),
    st.sampled_from([1, 10, 10**9]),
)
def test_no_sum_of_extremes_wraps(n, clip, seed, largest):
    sizes = np.random.default_rng(seed).integers(1, largest, n, endpoint=True)
    point = FixedPoint(float(np.float32(clip)), n)
    ends = np.float32([clip, -clip])
    # Whoever takes part: all is the most, as weights add up to 1 there.
    total = sum(point.quantise(ends, int(size) / int(sizes.sum())).view(np.int32).astype(object) for size in sizes)
    assert -(2**31) < total[1] <= 0 <= total[0] < 2**31
    assert total[0] > 2**31 - 2 * n - 2  # and little of the range is wasted


@given(st.floats(-1, 1, width=32), st.integers(1, 1000), st.integers(1, 10**6), st.integers(0, 10**6))
def test_each_number_is_rounded_by_half_a_unit_at_most(value, n, size, others):
    point, weight = FixedPoint(1.0, n), size / (size + others)
    got = int(point.quantise(np.float32([value]), weight).view(np.int32)[0])
    exact = Fraction(value) * Fraction(weight) * Fraction(point.scale)
    assert abs(got - exact) <= Fraction(1, 2) + Fraction(1, 10**5)


@pytest.mark.parametrize("at", [0, 65535, 65536, 70000])
@pytest.mark.parametrize(("value", "message"), [(np.nan, "finite"), (np.inf, "finite"), (-1.0001, "declared")])
def test_values_that_cannot_be_sent_are_found_wherever_they_are(at, value, message):
    values = np.zeros(70001, np.float32)
    values[at] = value
    with pytest.raises(UserError, match=message):
        FixedPoint(1.0, 3).quantise(values, 0.5)


@pytest.mark.parametrize(
    ("clip", "hospitals"), [(0.0, 3), (-1.0, 3), (np.nan, 3), (np.inf, 3), (1e-300, 3), (1e300, 3)]
)
def test_scales_that_do_not_serve_are_refused(clip, hospitals):
    with pytest.raises(UserError, match=r"clip is|hospitals is"):
        FixedPoint(clip, hospitals)


@given(st.lists(st.integers(-(2**31), 2**31 - 1), max_size=5))
def test_integers_survive_the_modulus(values):
    assert centred(integers(np.array(values, np.int64))).tolist() == values


@pytest.mark.parametrize("value", [2**31, -(2**31) - 1, 2**63 - 1, -(2**63)])
def test_integers_beyond_the_modulus_are_refused(value):
    with pytest.raises(UserError, match="bits"):
        integers(np.array([0, value]))


# --- masks ------------------------------------------------------------------------------------------------------------


def test_a_mask_is_the_keystream_of_aes_256_in_counter_mode():
    # Test case 13 of GCM's specification (McGrew and Viega 2004): the cipher of blocks 0 and 1 under the zero key.
    mask = np.zeros(8, "<u4")
    add_masks(mask, [(bytes(32), 1)])
    assert mask[:4].tobytes().hex() == "dc95c078a2408989ad48a21492842087"
    assert mask[4:].tobytes().hex() == "530f8afbc74536b9a963b4f1c4cb738b"


@pytest.mark.parametrize("length", [0, 1, 65535, 65536, 65537, 200_001])
def test_masks_of_both_signs_cancel_at_any_length(length):
    vector = np.arange(length, dtype=np.uint32)
    seeds = [(bytes([i]) * 32, 1) for i in range(3)]
    add_masks(vector, seeds)
    assert length < 2 or not np.array_equal(vector, np.arange(length))
    add_masks(vector, [(seed, -1) for seed, _ in reversed(seeds)])
    assert np.array_equal(vector, np.arange(length))


def test_a_longer_mask_begins_like_a_shorter_one_and_never_repeats():
    long, short = np.zeros(200_000, np.uint32), np.zeros(70_000, np.uint32)
    for mask in (long, short):
        add_masks(mask, [(b"k" * 32, 1)])
    assert np.array_equal(long[:70_000], short)
    assert len(np.unique(long.reshape(-1, 4), axis=0)) == 50_000


@pytest.mark.parametrize("seed", [b"", bytes(16), bytes(24), bytes(31), bytes(33)])
def test_seeds_have_256_bits(seed):
    with pytest.raises(ValueError, match="bytes"):
        add_masks(np.zeros(4, np.uint32), [(seed, 1)])


def test_the_error_is_half_a_unit_for_each_hospital():
    point = FixedPoint(32.0, 3)
    assert point.error == pytest.approx(1.5 * 32 / 2**31, rel=1e-6)
    assert point.mean(np.array([2**30], np.int32), 0.5).dtype == np.float32


@pytest.mark.parametrize("weight", [0.0, -0.1, 1.1, float("nan")])
def test_weights_are_shares(weight):
    with pytest.raises(UserError, match="weight"):
        FixedPoint(1.0, 3).quantise(np.zeros(1, np.float32), weight)
