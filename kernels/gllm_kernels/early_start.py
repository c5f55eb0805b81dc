"""Kernels that start before the one ahead of them has ended (programmatic dependent launch, Hopper and later).

A launch and a kernel's first loads take some two microseconds in which memory stands still, and a step of few sequences
is hundreds of kernels. A kernel launched early has its programs take the places that the ones ahead leave, and wait.

Two rules make that safe, whatever the order on the device:
- every program of such a kernel calls `await_previous` before it touches anything that a step computes. Then the kernel
  ahead has ended; and since that waited likewise, so have all before it. What was there before the kernel ahead could
  begin, as a plan made for later, may be read at once;
- a kernel that is not launched early starts after all others, as ever.

`let_next_start` is a hint. Small kernels give it at once; products when they have read their weights, since programs
that come earlier crowd the multiprocessors that are done first.
"""

from __future__ import annotations

from functools import lru_cache

from gllm_kernels.jit import HAS_TRITON, tl, triton


def launch_options(*, allowed: bool = True) -> dict[str, bool]:
    """Options for the launch of a kernel that has a constant EARLY, and follows the rules above where it is true."""
    return {"EARLY": True, "launch_pdl": True} if allowed and _is_possible() else {"EARLY": False}


@lru_cache
def _is_possible() -> bool:
    if not HAS_TRITON or triton.knobs.runtime.interpret:
        return False
    target = triton.runtime.driver.active.get_current_target()
    return bool(target.backend == "cuda" and target.arch >= 90)


@triton.jit
def let_next_start(EARLY: tl.constexpr):
    """The next kernel's programs may come when all of this one's have said so, or ended."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def await_previous(EARLY: tl.constexpr):
    """The kernel ahead has ended, and what it wrote is there."""
    if EARLY:
        tl.extra.cuda.gdc_wait()
