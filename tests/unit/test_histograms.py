"""Exponential buckets: the data model's definition, bounds, differences; exemplars of explicit ones."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exporter.emit.histograms import BUCKETS, SCALE, Exemplar, Histogram, added, bucket, coarsened, since

POSITIVE = st.floats(min_value=1e-9, max_value=1e12, allow_nan=False)


def filled(values: list[float]) -> list[int]:
    cells = [SCALE, 0, 0]
    for value in values:
        cells = added(cells, value)
    return cells


@given(POSITIVE, st.integers(-10, 8))
def test_a_bucket_holds_what_is_above_its_lower_bound_up_to_its_upper(value: float, scale: int) -> None:
    index = bucket(value, scale)
    # (2**(i / 2**s), 2**((i + 1) / 2**s)], compared without a logarithm: value**(2**s) with 2**i.
    exact = Fraction(value)
    if scale >= 0:
        powered = exact ** (1 << scale)
        low, high = Fraction(2) ** index, Fraction(2) ** (index + 1)
    else:
        powered = exact
        low, high = Fraction(2) ** (index << -scale), Fraction(2) ** ((index + 1) << -scale)
    # Beside a bound that is no power of two a logarithm of doubles may err by some units in the last place.
    slack = Fraction(1, 10**11) if scale > 0 else 0
    assert low * (1 - slack) < powered <= high * (1 + slack)


@pytest.mark.parametrize("scale", range(-10, SCALE + 1))
@pytest.mark.parametrize("exponent", [-40, -1, 0, 1, 30])
def test_a_power_of_two_is_an_upper_bound_exactly(scale: int, exponent: int) -> None:
    index = bucket(math.ldexp(1.0, exponent), scale)
    if scale >= 0:
        assert index + 1 == exponent << scale
    else:
        assert (index << -scale) < exponent <= ((index + 1) << -scale)


@given(st.lists(st.one_of(st.just(0.0), POSITIVE), max_size=300))
def test_every_value_is_counted_once_within_160_buckets(values: list[float]) -> None:
    cells = filled(values)
    scale, first, zeros, *counts = cells
    assert len(counts) <= BUCKETS
    assert zeros == values.count(0.0)
    expected: dict[int, int] = {}
    for value in values:
        if value:
            expected[bucket(value, scale)] = expected.get(bucket(value, scale), 0) + 1
    assert {first + at: count for at, count in enumerate(counts) if count} == expected
    if scale < SCALE:  # no coarser than it must be
        finer = {bucket(value, scale + 1) for value in values if value}
        assert max(finer) - min(finer) >= BUCKETS


@given(st.lists(POSITIVE, max_size=100), st.lists(POSITIVE, max_size=100))
def test_what_came_since_is_what_came_since(before: list[float], after: list[float]) -> None:
    then = filled(before)
    copy = then[:]
    now = then
    for value in after:
        now = added(now, value)
    scale, first, zeros, *counts = since(now, copy)
    assert zeros == 0
    assert sum(counts) == len(after)
    assert {first + at for at, count in enumerate(counts) if count} == {bucket(value, scale) for value in after}
    assert since(now, None) == now
    assert not any(since(now, now[:])[2:])


@given(st.lists(POSITIVE, min_size=1, max_size=50), st.integers(0, 12))
def test_coarser_is_as_if_it_had_been_coarser_from_the_start(values: list[float], by: int) -> None:
    cells = filled(values)
    scale, first, _, *counts = coarsened(cells, by)
    expected = [bucket(value, cells[0] - by) for value in values]
    assert scale == cells[0] - by
    assert sorted(index for at, count in enumerate(counts) for index in [first + at] * count) == sorted(expected)


def test_the_newest_exemplar_of_each_bucket_stays() -> None:
    histogram = Histogram((), (0.1, 1.0), 0, 0.0)
    for n in range(23):
        histogram.exemplify(Exemplar(0.05 + n / 10, n, bytes([n]) * 16, bytes(8)))
    assert histogram.exemplars is not None
    assert [exemplar and exemplar.time_ns for exemplar in histogram.exemplars] == [0, 9, 22]
