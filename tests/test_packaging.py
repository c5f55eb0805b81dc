"""What an installation holds, and what importing it costs."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
from email import message_from_string
from importlib import metadata
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
ROOTS = {"gllm": ROOT / "gllm", "gllm_kernels": ROOT / "kernels" / "gllm_kernels", "gllm_traces": ROOT / "traces"}
HEAVY = ("torch", "pandas", "matplotlib")


def python(*arguments, cwd=None):
    return subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, check=False)  # noqa: S603


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel of the sources, built in a copy: setuptools writes beside them."""
    if int(metadata.version("setuptools").split(".")[0]) < 77:
        pytest.skip("needs setuptools 77 or newer; `make setup` installs it")
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    skipped = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("gllm", "kernels", "traces"):
        shutil.copytree(ROOT / name, source / name, ignore=skipped)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--wheel-dir", str(target)]
    done = python("-m", "pip", "wheel", *options, ".", cwd=source)
    assert done.returncode == 0, done.stderr
    (path,) = target.glob("*.whl")
    with ZipFile(path) as archive:
        yield archive


def test_every_package_is_listed():
    found = {
        ".".join([name, *path.parent.relative_to(folder).parts])
        for name, folder in ROOTS.items()
        for path in folder.rglob("__init__.py")
    }
    assert found == set(PROJECT["tool"]["setuptools"]["packages"])


def test_the_wheel_holds_our_packages_alone(wheel):
    top = {name.split("/")[0] for name in wheel.namelist()}
    assert {name for name in top if not name.endswith(".dist-info")} == set(ROOTS)


@pytest.mark.parametrize(
    ("files", "prefix"),
    [
        (sorted((ROOT / "gllm" / "shapes").glob("*.json")), "gllm/shapes/"),
        (sorted((ROOT / "traces" / "samples").glob("*.jsonl")), "gllm_traces/samples/"),
        (sorted((ROOT / "gllm" / "sim" / "profiles").glob("*.json")), "gllm/sim/profiles/"),
        ([ROOT / "gllm" / "py.typed"], "gllm/"),
    ],
    ids=["shapes", "samples", "profiles", "py.typed"],
)
def test_the_wheel_holds_the_data(wheel, files, prefix):
    assert files
    assert {prefix + file.name for file in files} <= set(wheel.namelist())


def test_the_wheel_holds_every_module(wheel):
    names = {
        f"{name}/{path.relative_to(folder).as_posix()}"
        for name, folder in ROOTS.items()
        for path in folder.rglob("*.py")
    }
    assert names <= set(wheel.namelist())


def test_the_metadata(wheel):
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    read = message_from_string(wheel.read(name).decode())
    assert {"runtime", "flash", "dev"} <= set(read.get_all("Provides-Extra"))
    assert read["License-Expression"] == "Apache-2.0"
    base = [line for line in read.get_all("Requires-Dist") if "extra ==" not in line]
    assert base
    assert not [line for line in base if line.startswith(("torch", "triton", "transformers", "flash"))]
    assert name.replace("METADATA", "licenses/LICENSE") in wheel.namelist()


def test_the_commands_start(wheel):
    (name,) = (name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    assert "gllm = gllm.cli:main" in wheel.read(name).decode()
    done = python("-m", "gllm.sim", "--help")
    assert done.returncode == 0, done.stderr
    assert "replay" in done.stdout


@pytest.mark.parametrize("module", ["gllm.sim", "gllm.sim.cli", "gllm.trace", "gllm.core"])
def test_importing_is_light(module):
    done = python("-c", f"import sys, {module}; print(*sys.modules)")
    assert done.returncode == 0, done.stderr
    assert not {name.partition(".")[0] for name in done.stdout.split()} & set(HEAVY)


def test_constraints_pin_what_the_project_names():
    names = {line.partition("==")[0].lower().replace("_", "-") for line in lines(ROOT / "constraints.txt")}
    extras = PROJECT["project"]["optional-dependencies"]
    needed = [*PROJECT["project"]["dependencies"], *extras["dev"], "torch"]
    for requirement in needed:
        assert requirement.split(">")[0].split("=")[0] in names


def lines(path):
    return [line for line in path.read_text("utf-8").splitlines() if line and not line.startswith("#")]
