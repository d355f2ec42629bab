"""Every example trains on two processes of a CPU, and learns."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddp", "fsdp2", "accelerated"])
def test_an_example_learns(name):
    said = ran(name)
    assert ("waiting" in said) == (name == "ddp")


@pytest.mark.slow
@pytest.mark.parametrize("wrap", ["ddp", "fsdp2"])
def test_sparse_training_learns_while_budgets_move(wrap):
    """Gradients accumulate over four micro-batches; FSDP2 computes in bfloat16."""
    said = ran("sparse", "--wrap", wrap)
    sparse, sites = re.search(r"sparse (\d+) of (\d+)", said).groups()
    assert sparse == sites != "0"
    spreads = [tuple(map(float, s)) for s in re.findall(r"budgets (\S+) to (\S+)", said)]
    assert all(0.125 <= low <= high <= 0.5 for low, high in spreads)
    assert any(low < high for low, high in spreads)


def ran(name, *arguments):
    """What an example says, whose loss falls from epoch to epoch."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
        "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0",
        str(ROOT / "examples" / f"{name}.py"), "--samples", "45", "--epochs", "3",
        *arguments,
    ]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=400, check=False
    )
    assert run.returncode == 0, run.stderr[-3000:]
    losses = [float(loss) for loss in re.findall(r"epoch \d loss (\S+)", run.stdout)]
    assert len(losses) == 3
    assert losses[2] < losses[1] < losses[0]
    return run.stdout


@pytest.mark.slow
def test_a_hybrid_model_is_trained_on():
    command = [sys.executable, str(ROOT / "examples" / "continued_training.py"), "--steps", "12"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=400, check=False
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert re.search(r"windows in [12] of 2 layers", run.stdout)
    before, after = map(float, re.search(r"loss (\S+) before, (\S+) after", run.stdout).groups())
    assert after < before - 0.3
