"""Optional: `GLLM_COMPILE=1 pip install .` compiles the hot modules with mypyc; the source stays the truth.

Everything else about the package stands in pyproject.toml. The compiled package decides and reports
byte for byte what the plain one does, and faster (benchmarks/results); it needs a C compiler and mypy to build.
"""

import os
from pathlib import Path

from setuptools import setup

PLAIN = {"__init__.py", "spec.py"}
HOT = [
    *(
        str(path)
        for room in ("core", "policy")
        for path in sorted(Path("gllm", room).glob("*.py"))
        if path.name not in PLAIN
    ),
    "gllm/gpu_clock.py",
    "gllm/report/recorder.py",
    "gllm/sim/driver.py",
    "gllm/sim/pipeline.py",
    "gllm/sim/profiled.py",
    "gllm/sim/roofline.py",
]

if os.environ.get("GLLM_COMPILE", "0") != "0":
    from mypyc.build import mypycify

    # What hot modules merely import for its types (the runtime) may need packages that this build has no use for.
    setup(ext_modules=mypycify(["--follow-imports=silent", *HOT], opt_level="3", debug_level="0"))
else:
    setup()
