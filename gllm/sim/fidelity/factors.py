"""What measured times say of the components that predictions consist of: each by what it would have to be multiplied.

With p the predicted time of a component and m the measured one of a batch, the relative errors are

    1 - sum over components of factor * p / m

and taken as normal and independent. Factors are their most likely values beside what is thought of them beforehand,
normal about 1 with a deviation of `PRIOR`: components that always grow together cannot be told apart by the data, and
so share what is wrong instead of taking opposite sides. (Ridge regression towards 1; Hoerl and Kennard, 1970.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    Times = NDArray[np.float64]

PRIOR = 0.1

_LEAST_BATCHES = 30
_LEAST_SHARE = 0.01
"""Of the predicted time; components with less are taken as they are."""

_ROUNDING = 1e-6
"""Relative errors of times in nanoseconds are no smaller."""


class Factor(NamedTuple):
    """By what a component would have to be multiplied, and how sure that is."""

    value: float
    standard_error: float


def component_factors(parts_ns: Mapping[str, Times], measured_ns: Times) -> dict[str, Factor]:
    """By component, for those that have a share; empty where the batches are too few to say.

    Args:
        parts_ns: the predicted times of each component, (B,).
        measured_ns: what the batches took, (B,).
    """
    total_ns = sum(float(times.sum()) for times in parts_ns.values())
    names = [name for name, times in parts_ns.items() if times.sum() > _LEAST_SHARE * total_ns]
    if len(measured_ns) < _LEAST_BATCHES or not names or not np.all(measured_ns > 0):
        return {}
    shares = np.stack([parts_ns[name] for name in names], axis=1) / measured_ns[:, None]
    missing = 1.0 - sum(parts_ns.values(), np.zeros(len(measured_ns))) / measured_ns
    changes, *_ = np.linalg.lstsq(shares, missing, rcond=None)
    left = missing - shares @ changes
    variance = max(float(left @ left) / (len(left) - len(names)), _ROUNDING**2)
    covariance = np.linalg.inv(shares.T @ shares / variance + np.eye(len(names)) / PRIOR**2)
    values = 1.0 + covariance @ (shares.T @ missing) / variance
    errors = np.sqrt(np.diag(covariance))
    return {name: Factor(float(value), float(error)) for name, value, error in zip(names, values, errors, strict=True)}
