"""Who may import whom, what the core must not know, and how long a file or function may be."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "gllm").rglob("*.py"))
HEAVY = {"torch", "transformers", "triton", "flash_attn", "numpy", "pandas", "simpy", "matplotlib", "rich", "fastapi"}
OUTSIDE = {"time", "datetime", "random", "secrets", "uuid", "os", "io", "socket", "threading", "asyncio", "subprocess"}


def name(path):
    return str(path.relative_to(ROOT))


def files_of(*rooms):
    return [path for path in FILES if path.relative_to(ROOT / "gllm").parts[0] in rooms]


def imports_of(path):
    """Full names of all modules that a file imports, for type checking or not."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name(path)}: imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def is_within(module, package):
    return f"{module}.".startswith(f"{package}.")


def loaded_by(module):
    """Top-level names of what `import module` loads."""
    code = f"import sys, {module}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)  # noqa: S603
    return set(run.stdout.split())


def functions_of(path):
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, kinds)]


def length(function):
    return function.end_lineno - function.lineno + 1


@pytest.mark.parametrize("path", files_of("core"), ids=name)
def test_the_core_imports_itself_and_the_standard_library(path):
    foreign = [
        each
        for each in imports_of(path)
        if not is_within(each, "gllm.core") and each.partition(".")[0] not in sys.stdlib_module_names
    ]
    assert foreign == []


@pytest.mark.parametrize("path", files_of("policy"), ids=name)
def test_policies_import_themselves_the_core_and_the_standard_library(path):
    foreign = [
        each
        for each in imports_of(path)
        if not is_within(each, "gllm.core")
        and not is_within(each, "gllm.policy")
        and each.partition(".")[0] not in sys.stdlib_module_names
    ]
    assert foreign == []


@pytest.mark.parametrize("path", files_of("core", "policy"), ids=name)
def test_decisions_know_no_clock_no_dice_and_no_world(path):
    assert OUTSIDE.isdisjoint(each.partition(".")[0] for each in imports_of(path))


@pytest.mark.parametrize("path", files_of("core", "policy"), ids=name)
def test_decisions_do_no_input_and_no_output(path):
    names = {node.id for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Name)}
    assert names.isdisjoint({"open", "print", "input", "__import__", "exec", "eval", "hash"})


@pytest.mark.parametrize(
    ("room", "other"),
    [("sim", "gllm.runtime"), ("runtime", "gllm.sim"), ("report", "gllm.runtime"), ("report", "gllm.sim")],
)
def test_rooms_that_never_meet(room, other):
    meetings = [(name(path), each) for path in files_of(room) for each in imports_of(path) if is_within(each, other)]
    assert meetings == []


@pytest.mark.parametrize("path", [path for path in FILES if path not in files_of("runtime")], ids=name)
def test_only_the_runtime_knows_tensors(path):
    known = {each.partition(".")[0] for each in imports_of(path)}
    assert known.isdisjoint({"torch", "transformers", "triton", "flash_attn", "gllm_kernels"})


@pytest.mark.parametrize("module", ["gllm.core", "gllm.policy"])
def test_deciding_loads_nothing_heavy(module):
    assert loaded_by(module).isdisjoint(HEAVY)


def test_simulating_does_not_load_torch():
    parts = (path.relative_to(ROOT).with_suffix("").parts for path in files_of("sim") if path.stem != "__main__")
    modules = [".".join(names).removesuffix(".__init__") for names in parts]
    assert loaded_by(", ".join(modules)).isdisjoint({"torch", "transformers", "triton", "gllm_kernels"})


@pytest.mark.parametrize("path", FILES, ids=name)
def test_no_function_is_long(path):
    assert [function.name for function in functions_of(path) if length(function) > 50] == []


def test_most_functions_are_short():
    lengths = sorted(length(function) for path in FILES for function in functions_of(path))
    assert lengths[len(lengths) // 2] < 10


@pytest.mark.parametrize("path", FILES, ids=name)
def test_no_file_is_long(path):
    most = 300 if path in files_of("core", "policy", "sim") else 400
    assert len(path.read_text().splitlines()) < most
