import numpy as np
import pytest

from gllm.report.stats import covered_ns, length_ns, overlap_ns, running_integral, spread, union, weighted_percentile


@pytest.mark.parametrize("seed", range(30))
def test_weighted_percentiles_are_those_of_the_repeated_values(seed):
    rng = np.random.default_rng(seed)
    values = rng.choice([rng.random(50), rng.integers(0, 5, 50).astype(float)])
    weights = rng.integers(0, 30, 50)
    percents = [0, 1, 10, 25, 50, 90, 99, 99.9, 100]
    expected = np.percentile(np.repeat(values, weights), percents, method="inverted_cdf")
    assert np.array_equal(weighted_percentile(values, weights, percents), expected)


def test_weighted_percentile_of_one_value():
    assert weighted_percentile(np.array([3.0]), np.array([1]), [0, 50, 100]).tolist() == [3, 3, 3]


def test_nothing_has_no_spread():
    assert spread(np.array([])) == {"mean": None, "p50": None, "p90": None, "p99": None}


def test_union_merges_what_touches_and_what_is_nested():
    merged = union(np.array([8, 0, 1, 4, 6]), np.array([9, 4, 2, 5, 6]))
    assert merged.tolist() == [[0, 5], [6, 6], [8, 9]]
    assert length_ns(merged) == 6


def test_union_of_nothing():
    nothing = union(np.array([], dtype=np.int64), np.array([], dtype=np.int64))
    assert length_ns(nothing) == 0
    assert covered_ns(nothing, np.array([5])).tolist() == [0]


@pytest.mark.parametrize("seed", range(20))
def test_overlap_equals_counting_ticks(seed):
    rng = np.random.default_rng(seed)
    starts = rng.integers(0, 100, (2, 12))
    ends = starts + rng.integers(0, 12, (2, 12))
    ticks = [{t for s, e in zip(*pair, strict=True) for t in range(s, e)} for pair in zip(starts, ends, strict=True)]
    one, other = (union(s, e) for s, e in zip(starts, ends, strict=True))
    assert length_ns(one) == len(ticks[0])
    assert overlap_ns(one, other) == len(ticks[0] & ticks[1])


def test_integral_of_steps():
    knots, values = np.array([0.0, 2.0, 3.0]), np.array([5.0, 1.0])
    assert running_integral(values, knots, np.array([0.0, 1.0, 2.0, 2.5, 3.0, 9.0])).tolist() == [
        0,
        5,
        10,
        10.5,
        11,
        11,
    ]
