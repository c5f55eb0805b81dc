"""Triton's kernels run in its interpreter where there is no GPU; Triton must be told before it is imported."""

import os
from pathlib import Path

if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")
