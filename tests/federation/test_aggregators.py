"""What every aggregator keeps to, so that rounds may use any of them."""

import pytest
import torch

from primia_lite.config import UserError
from primia_lite.encrypted.encrypted_sum import CkksAggregation
from primia_lite.federation.aggregation import SecureAggregation, WeightedMean
from primia_lite.federation.hospital import Update

LIKE = {"w": torch.zeros(2, 3), "b": torch.zeros(2)}
SIZES = {"A": 10, "B": 30, "C": 60}
ways = pytest.mark.parametrize("kind", [WeightedMean, SecureAggregation, CkksAggregation])


def asks(**changed):
    values = {
        name: {key: torch.full(value.shape, k + 0.5) for key, value in LIKE.items()} for k, name in enumerate(SIZES)
    }
    return {name: lambda v=value: Update(v, 1, False) for name, value in (values | changed).items()}


@ways
def test_the_mean_is_weighted_and_its_fewest_and_name_are_told(kind):
    way = kind()
    for number in (1, 2):
        sizes = dict(sorted(SIZES.items(), reverse=number == 2))  # in any order
        found = way.aggregate(asks(), sizes, LIKE, number)
        assert found.survivors == ("A", "B", "C") and found.value.keys() == LIKE.keys()
        for key, value in found.value.items():
            assert value.dtype == torch.float32 and value.shape == LIKE[key].shape
            torch.testing.assert_close(
                value, torch.full(value.shape, 0.1 * 0.5 + 0.3 * 1.5 + 0.6 * 2.5), atol=1e-5, rtol=0
            )
    assert 1 <= way.min_revealed(3) <= 3 and way.name
    if kind is not WeightedMean:
        assert kind(threshold=3).min_revealed(3) == 3


@ways
def test_whole_numbers_are_summed_exactly_or_refused(kind):
    whole = {name: {key: torch.full(value.shape, 2**40 if kind is WeightedMean else -7) for key, value in LIKE.items()}
             for name in SIZES}  # fmt: skip
    if kind is CkksAggregation:
        with pytest.raises(UserError, match="SecureAggregation"):
            kind().aggregate(asks(**whole), SIZES, LIKE, 1, integer_sum=True)
        return
    found = kind().aggregate(asks(**whole), SIZES, LIKE, 1, integer_sum=True).value
    assert all(
        value.dtype == torch.int64 and (value == 3 * whole["A"]["w"].flatten()[0]).all() for value in found.values()
    )


@ways
@pytest.mark.parametrize(
    "sizes", [{"A": 10, "B": 30}, SIZES | {"D": 1}, {}, SIZES | {"A": 0}, SIZES | {"B": -30}, dict.fromkeys("ABX", 10)]
)
def test_sizes_of_others_and_sizes_of_nothing_are_refused(kind, sizes):
    asked = asks() if sizes else {}
    with pytest.raises(UserError):
        kind().aggregate(asked, sizes, LIKE, 1)


@ways
@pytest.mark.parametrize(
    "update", [{"w": torch.zeros(2, 3)}, {"w": torch.zeros(3, 2), "b": torch.zeros(2)}, {},
               {"w": torch.zeros(2, 3), "b": torch.zeros(2), "c": torch.zeros(1)}],
)  # fmt: skip
def test_updates_of_other_shapes_are_refused_by_the_hospital_s_name(kind, update):
    with pytest.raises(UserError, match="hospital"):
        kind().aggregate(asks(B=update), SIZES, LIKE, 1)
