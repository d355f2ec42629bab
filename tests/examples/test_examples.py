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
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
        "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0",
        str(ROOT / "examples" / f"{name}.py"), "--samples", "45", "--epochs", "3",
    ]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=400, check=False
    )
    assert run.returncode == 0, run.stderr[-3000:]
    losses = [float(loss) for loss in re.findall(r"epoch \d loss (\S+)", run.stdout)]
    assert len(losses) == 3
    assert losses[2] < losses[1] < losses[0]
    if name == "ddp":
        assert "waiting" in run.stdout
