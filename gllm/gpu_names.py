"""Short names of GPUs, from what drivers call them."""

from __future__ import annotations

import re

GPU_NAMES = ("h200", "h100", "a100-40g", "a100-80g", "a800", "b200", "l20", "l40s", "l4", "rtx-4090")
"""What the simulator calls the GPUs that it knows."""


def gpu_name(device: str) -> str | None:
    """The simulator's name for a device; None if it has none."""
    words = re.split(r"[^a-z0-9]+", device.lower())

    def is_there(part: str) -> bool:
        return part in words or f"{part}b" in words  # an A100 is of 80GB, its short name's end is 80g

    return next((name for name in GPU_NAMES if all(map(is_there, name.split("-")))), None)
