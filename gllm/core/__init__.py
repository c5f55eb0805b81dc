"""The engine as a pure state machine: no clock, no I/O, no randomness, no tensors, no token values.

A shell calls `Engine.turn`; a `Policy` decides; `BlockPool` keeps the cache's books.
"""

from gllm.core.decision import (
    Batch,
    Decision,
    Limits,
    Order,
    PlanError,
    Policy,
    Preempt,
    SequenceView,
    Snapshot,
    StallError,
    View,
    Wait,
    WaitReason,
)
from gllm.core.engine import Engine
from gllm.core.events import Event, Finished, FirstToken, Preempted, Rejected, Scheduled
from gllm.core.kvcache import BlockPool
from gllm.core.plan import Chunk, Joined, Plan, StepResult, Stopped, Turn
from gllm.core.request import NEVER, Phase, Request, Sequence
from gllm.core.rotation import DecodeGroup

__all__ = [
    "NEVER",
    "Batch",
    "BlockPool",
    "Chunk",
    "Decision",
    "DecodeGroup",
    "Engine",
    "Event",
    "Finished",
    "FirstToken",
    "Joined",
    "Limits",
    "Order",
    "Phase",
    "Plan",
    "PlanError",
    "Policy",
    "Preempt",
    "Preempted",
    "Rejected",
    "Request",
    "Scheduled",
    "Sequence",
    "SequenceView",
    "Snapshot",
    "StallError",
    "StepResult",
    "Stopped",
    "Turn",
    "View",
    "Wait",
    "WaitReason",
]
