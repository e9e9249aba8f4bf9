"""Legal groups and the choice among them, against the definition by trial division."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerswap.grouping import auto_groups, legal_groups, nearest_groups

channels = st.integers(1, 4096)


@given(channels)
def test_legal_groups_are_exactly_the_divisors(count):
    assert list(legal_groups(count)) == [g for g in range(1, count + 1) if count % g == 0]


@given(channels)
def test_auto_is_the_largest_divisor_within_both_bounds(count):
    allowed = [g for g in range(1, 33) if count % g == 0 and count // g >= 16]
    assert auto_groups(count) == max(allowed, default=1)


@given(channels, st.integers(1, 5000))
def test_nearest_is_the_largest_divisor_not_above(count, wanted):
    divisors = [g for g in range(1, count + 1) if count % g == 0 and g <= wanted]
    assert nearest_groups(count, wanted) == divisors[-1]


@pytest.mark.parametrize(
    ("count", "groups"), [(1, 1), (15, 1), (16, 1), (32, 2), (72, 4), (512, 32), (728, 28), (11, 1)]
)
def test_auto_on_channel_counts_of_real_networks(count, groups):
    assert auto_groups(count) == groups
