"""Compiled DDP, cut by DDPOptimizer, has plain DDP's gradients at every length."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="the processor's path"),
]
WORKER = Path(__file__).with_name("ddp_lengths.py")


def test_gradients_are_plain_ddps_at_every_length(tmp_path):
    run = subprocess.run(
        [sys.executable, str(WORKER), str(tmp_path)], env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-5000:]
    for found in (json.loads((tmp_path / f"{n}.json").read_text()) for n in range(2)):
        assert len(found["apart"]) == 4
        assert max(found["apart"]) < 1e-5
        assert found["passes"] == [0, 0, 1, 1, 2, 2, 3, 3], "a layer was not sparse at some step"
        # cut in two, first for the first length and then for all
        assert found["graphs"] == 4
        assert found["took"] == 2
        assert found["less kept"] > 1e-3, "the policy is not read, so nothing was compared"
