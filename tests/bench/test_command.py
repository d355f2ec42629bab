"""`afbs bench attention`: exit codes, JSON on stdout, the rest on stderr; and how it is packed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from afbs_compile import cli
from afbs_compile.bench import attention, checks, tables
from afbs_compile.bench.cases import EMPTY

ROOT = Path(__file__).parents[2]
ROW = EMPTY | {
    "case": "whole_op", "length": 8192, "causal": False, "head_dim": 128, "kv_heads": 32,
    "heads": 32, "inputs": "randn", "kept": 0.25, "ours_ms": 1.0, "ratio_cudnn": 3.0,
}  # fmt: skip


@pytest.fixture
def afbs(capsys):
    def run(*arguments):
        code = cli.main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def device(monkeypatch):
    """A CUDA device for those who ask, and measurements that are known."""

    def measured(steps, bench, seconds, on_progress):
        bench.notes("fa2 left out: not today")
        yield [ROW]
        yield [EMPTY | ROW | {"case": "host", "variant": "forward", "host_us": 7.0}]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91000)
    monkeypatch.setattr(attention.harness, "device_name", lambda device: "a GPU")
    monkeypatch.setattr(attention, "measured", measured)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device(afbs, tmp_path):
    code, out, error = afbs("bench", "attention", "--output", tmp_path)
    assert (code, out) == (1, "")
    assert "run it on a machine with an NVIDIA GPU" in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--case", "forward,dance"), "no case dance; there are forward, selection"),
        (("--shapes", "8192:round"), "'8192:round' is no shape; give LENGTH"),
    ],
)
def test_what_it_refuses(afbs, arguments, says):
    code, out, error = afbs("bench", "attention", *arguments)
    assert (code, out) == (1, "")
    assert says in error


@pytest.mark.usefixtures("device")
def test_table(afbs):
    code, out, error = afbs("bench", "attention")
    assert code == 0
    assert "| 8192 | none | 3.00× |" in out
    assert "whole_op randn kept 0.250: 1.000 ms, cudnn x3.00" in error
    assert "forward: 7 us" in error
    assert "fa2 left out: not today" in error


@pytest.mark.usefixtures("device")
def test_json_and_file(afbs, tmp_path):
    code, out, _ = afbs("bench", "attention", "--json", "--quick", "--output", tmp_path / "new")
    document = json.loads(out)
    assert code == 0
    assert [row["case"] for row in document["rows"]] == ["whole_op", "host"]
    assert document["notes"] == ["fa2 left out: not today"]
    stored = json.loads((tmp_path / "new" / "attention.json").read_text())
    assert stored["rows"] == document["rows"]
    assert tables.attention(stored)


@pytest.mark.usefixtures("device")
def test_a_wrong_kernel(afbs, monkeypatch, tmp_path):
    def measured(*_):
        yield [ROW]
        checks.require("forward 8192", 1.0, checks.FORWARD_BAR)

    monkeypatch.setattr(attention, "measured", measured)
    code, out, error = afbs("bench", "attention", "--output", tmp_path)
    assert (code, out) == (1, "")
    assert "forward 8192: relative error 1.00e+00 is above" in error
    assert json.loads((tmp_path / "attention.json").read_text())["rows"] == [ROW]


@pytest.mark.parametrize("script", ["attention", "demo"])
def test_scripts_run_from_the_repository(script):
    command = [sys.executable, str(ROOT / "bench" / f"{script}.py"), "--help"]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert run.stdout.startswith("usage")


def test_help_is_light():
    code = """
import sys, afbs_compile.cli
try:
    afbs_compile.cli.main(["bench", "--help"])
except SystemExit as stop:
    assert stop.code == 0
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_the_link_mounts_the_folder():
    link = ROOT / "afbs_compile" / "bench"
    assert link.is_symlink()
    assert link.resolve() == ROOT / "bench"
    assert not (ROOT / "bench" / "__init__.py").exists()


def test_nothing_below_imports_the_benchmark():
    folders = [ROOT / name for name in ("kernels", "passes", "tuner")]
    files = [path for folder in folders for path in folder.rglob("*.py")]
    files += (ROOT / "afbs_compile").glob("*.py")
    assert files
    assert not [path for path in files if "afbs_compile.bench" in path.read_text()]
