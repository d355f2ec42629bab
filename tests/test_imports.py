"""What an import or a help page costs: no heavy package comes along."""

import subprocess
import sys

import pytest

HEAVY = ("torch", "triton", "transformers", "scipy", "matplotlib")


def loaded_after(code):
    script = f"""
import sys
{code}
print(sorted(set({HEAVY}) & set(sys.modules)), file=sys.stderr)
"""
    run = [sys.executable, "-c", script]
    return subprocess.run(run, capture_output=True, text=True, check=True).stderr.strip()


@pytest.mark.parametrize(
    "module",
    ["afbs_compile", "afbs_compile.cli", "afbs_compile.options", "afbs_compile.policy"],
)
def test_import_is_light(module):
    assert loaded_after(f"import {module}") == "[]"


@pytest.mark.parametrize("command", ["", "demo", "tune", "show", "cache", "doctor"])
def test_help_is_light(command):
    arguments = [*filter(None, [command]), "--help"]
    code = f"""
import afbs_compile.cli
try:
    afbs_compile.cli.main({arguments})
except SystemExit as stop:
    assert stop.code == 0, stop.code
"""
    assert loaded_after(code) == "[]"


def test_the_probe_sees_a_heavy_import():
    assert "torch" in loaded_after("import torch")
