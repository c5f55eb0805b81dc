"""By what components would have to be multiplied to fit measured times."""

import numpy as np
import pytest

from gllm.sim.fidelity.factors import PRIOR, component_factors

NUM_BATCHES = 400


def batches(seed=0):
    """Components of batches that differ, ns."""
    lots = np.random.default_rng(seed)
    return {name: lots.uniform(0.1, 1.0, NUM_BATCHES) * 1e6 for name in ("gemm", "decode_attention")}


def noise(size, seed=1):
    return np.random.default_rng(seed).normal(0.0, 0.02, size)


def test_what_is_wrong_is_found_and_what_is_right_stays():
    parts = batches()
    measured = (parts["gemm"] + 1.2 * parts["decode_attention"]) * (1 + noise(NUM_BATCHES))
    found = component_factors(parts, measured)
    assert list(found) == ["gemm", "decode_attention"]
    assert found["gemm"].value == pytest.approx(1.0, abs=4 * found["gemm"].standard_error)
    assert found["decode_attention"].value == pytest.approx(1.2, abs=4 * found["decode_attention"].standard_error)
    assert all(factor.standard_error < 0.01 for factor in found.values())


def test_times_that_fit_without_noise():
    parts = batches()
    found = component_factors(parts, 0.5 * parts["gemm"] + 3 * parts["decode_attention"])
    assert (found["gemm"].value, found["decode_attention"].value) == (pytest.approx(0.5), pytest.approx(3.0))
    assert all(factor.value == pytest.approx(1.0) for factor in component_factors(parts, sum(parts.values())).values())


def test_components_that_grow_together_share_what_is_wrong():
    gemm = batches()["gemm"]
    found = component_factors({"gemm": gemm, "head": gemm.copy()}, 2.2 * gemm * (1 + noise(NUM_BATCHES)))
    assert found["gemm"].value == pytest.approx(found["head"].value)
    assert found["gemm"].value == pytest.approx(1.1, abs=0.01)
    assert found["gemm"].standard_error == pytest.approx(PRIOR / np.sqrt(2), rel=0.05), "the data say nothing of each"


def test_a_component_without_a_share_is_taken_as_it_is():
    parts = {**batches(), "head": np.full(NUM_BATCHES, 1e3), "launch": np.zeros(NUM_BATCHES)}
    measured = parts["gemm"] + parts["decode_attention"] + parts["head"]
    found = component_factors(parts, measured)
    assert {name: factor.value for name, factor in found.items()} == pytest.approx(
        {"gemm": 1.0, "decode_attention": 1.0}
    )


@pytest.mark.parametrize("size", [0, 29])
def test_few_batches_say_nothing(size):
    parts = {name: times[:size] for name, times in batches().items()}
    assert component_factors(parts, parts["gemm"] * 2) == {}


def test_a_batch_that_took_no_time_spoils_it():
    parts = batches()
    assert component_factors(parts, np.append(parts["gemm"][1:], 0.0)) == {}
