"""Scheduling policies: one idea, one file, one frozen dataclass that is its own configuration.

To add one, write the file and name it in `POLICIES`; nothing else knows the list.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gllm.policy import spec as _spec
from gllm.policy.orca import Orca
from gllm.policy.order import EarliestDeadline, Fcfs, LongestPrefix, Priority, ShortestPrompt
from gllm.policy.prefill_first import PrefillFirst
from gllm.policy.sarathi import Sarathi
from gllm.policy.throttle import Throttle

if TYPE_CHECKING:
    from collections.abc import Callable

    from gllm.core import Order, Policy

POLICIES: dict[str, Callable[..., Policy]] = {
    "throttle": Throttle,
    "sarathi": Sarathi,
    "prefill_first": PrefillFirst,
    "orca": Orca,
}

ORDERS: dict[str, Order] = {
    "fcfs": Fcfs(),
    "priority": Priority(),
    "sjf": ShortestPrompt(),
    "lpm": LongestPrefix(),
    "edf": EarliestDeadline(),
}


def parse_policy(spec: str) -> Policy:
    """Build a policy from `NAME[:key=value,...]`, such as `throttle:max_prefill=4096,order=priority`.

    Raises:
        ValueError: An unknown name or key, or a bad value; the message lists what exists.
    """
    return _spec.parse_spec(spec, POLICIES, ORDERS)


def format_policy(policy: Policy) -> str:
    """The shortest spec that `parse_policy` turns into this policy."""
    return _spec.format_spec(policy, POLICIES, ORDERS)


def policy_options(policy: Policy) -> dict[str, Any]:
    """Every option of a policy, defaults too; its order by name."""
    return _spec.spec_options(policy, ORDERS)


__all__ = [
    "ORDERS",
    "POLICIES",
    "EarliestDeadline",
    "Fcfs",
    "LongestPrefix",
    "Orca",
    "PrefillFirst",
    "Priority",
    "Sarathi",
    "ShortestPrompt",
    "Throttle",
    "format_policy",
    "parse_policy",
    "policy_options",
]
