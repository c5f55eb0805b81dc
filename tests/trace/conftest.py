"""Where the traces are: a writer of small files, the public ones, the samples' package."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PUBLIC = Path(os.environ.get("GLLM_TRACES", ROOT.parent / "shared" / "traces"))


def _import_samples_from_checkout():
    """Stands in for an installation, where `traces/` is the package `gllm_traces`."""
    folder = ROOT / "traces"
    spec = importlib.util.spec_from_file_location(
        "gllm_traces", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules["gllm_traces"] = module
    spec.loader.exec_module(module)


if importlib.util.find_spec("gllm_traces") is None:
    _import_samples_from_checkout()


@pytest.fixture(scope="session")
def public():
    """The path of a public trace; skips where it is not there."""

    def path(name):
        found = PUBLIC / name
        if not found.exists():
            pytest.skip(f"public trace {name} is not at {PUBLIC}")
        return found

    return path


@pytest.fixture
def trace_file(tmp_path):
    """Writes text or bytes to a file and gives its path."""

    def write(content, name="trace"):
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write
