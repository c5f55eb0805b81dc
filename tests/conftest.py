"""What must be so before anything is imported or started."""

import os
import signal
from pathlib import Path

# Triton's kernels run in its interpreter where there is no GPU; Triton must be told before it is imported.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# A shell has what it runs in the background ignore Ctrl-C, and whatever that starts; some tests press it.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
