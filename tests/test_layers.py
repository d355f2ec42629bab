"""Imports point downwards only, and every module is loaded under one name."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "kernels": {"kernels"},
    "tuner": {"tuner"},
    "passes": {"passes", "kernels"},
}
MAY_LOAD = {"tuner": {"numpy", "scipy", "afbs_compile"}}


def imported(source):
    tree = ast.parse(source)
    names = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def ours(source):
    return {name.split(".")[1] for name in imported(source) if name.startswith("afbs_compile.")}


def files(layer):
    return sorted((ROOT / layer).rglob("*.py"))


@pytest.mark.parametrize("layer", MAY_IMPORT)
def test_layer_imports_only_downwards(layer):
    assert files(layer)
    upwards = {str(path): ours(path.read_text()) - MAY_IMPORT[layer] for path in files(layer)}
    assert not {path: names for path, names in upwards.items() if names}


@pytest.mark.parametrize("layer", MAY_LOAD)
def test_layer_needs_only_its_packages(layer):
    for path in files(layer):
        packages = {name.split(".")[0] for name in imported(path.read_text())}
        assert packages - set(sys.stdlib_module_names) <= MAY_LOAD[layer], path


@pytest.mark.parametrize(
    "source",
    [
        "from afbs_compile import options",
        "import afbs_compile.cache",
        "def f():\n    from afbs_compile.policy import Head",
    ],
)
def test_planted_upward_import_is_seen(source):
    assert ours(source) - MAY_IMPORT["passes"]


def test_links_mount_the_folders():
    for layer in MAY_IMPORT:
        link = ROOT / "afbs_compile" / layer
        assert link.is_symlink()
        assert link.resolve() == ROOT / layer
        assert not (ROOT / layer / "__init__.py").exists()


def test_no_twin_modules():
    names = [
        f"afbs_compile.{layer}.{path.relative_to(ROOT / layer).with_suffix('').as_posix()}"
        for layer in MAY_IMPORT
        for path in files(layer)
    ]
    code = f"""
import importlib, sys
for name in {[name.replace("/", ".") for name in names]}:
    importlib.import_module(name)
print([name for name in sys.modules if name.split(".")[0] in {list(MAY_IMPORT)}])
"""
    run = [sys.executable, "-c", code]
    assert subprocess.run(run, capture_output=True, text=True, check=True).stdout.strip() == "[]"
