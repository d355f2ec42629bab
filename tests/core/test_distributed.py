"""Two ranks on gloo train as one process does: DDP and FSDP2, by block and whole."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from afbs_compile.kernels import policy_columns as col
from afbs_compile.kernels import reference
from afbs_compile.kernels.geometry import Mask
from afbs_compile.kernels.selection import select
from afbs_compile.policy_tensor import to_tensor

WORKER = Path(__file__).with_name("rank.py")
spec = importlib.util.spec_from_file_location("rank", WORKER)
rank = importlib.util.module_from_spec(spec)
spec.loader.exec_module(rank)

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the processor's path")
BUDGETS = [0.25 + n / 20 for n in range(rank.LAYERS)]


class Reference(rank.Model):
    """The model with its attention as plain torch over the blocks of a policy."""

    def __init__(self, budgets):
        super().__init__()
        sites = rank.policy_of(self, budgets).tunings[0].sites
        self.policies = [to_tensor(sites[f"layers.{n}"]) for n in range(rank.LAYERS)]

    def budget(self, budgets):
        for policy, budget in zip(self.policies, budgets, strict=True):
            policy[:, col.BUDGET] = budget

    def forward(self, x):
        site = {"mask": Mask(True), "scale": rank.DIM**-0.5, "block_m": 64, "block_n": 64}
        for block, policy in zip(self.layers, self.policies, strict=True):
            q, k, v = block.project(x)
            with torch.no_grad():
                lists = select(q, k, policy, selector="sub8", **site)
            out, _ = reference.forward(q, k, v, *lists, policy, **site)
            x = x + block.out(out.transpose(1, 2).flatten(2))
        return x


class Dense(rank.Model):
    """Both samples at once, with SDPA."""


def alone(model, steps):
    """Losses of one process with both ranks' samples, step by step."""
    return rank.train(model, torch.cat([rank.sample(0), rank.sample(1)]), steps)


def together(folder, budgets, wrap, scope, inner="eager", steps=10):
    """What two ranks found."""
    (folder / "policy.json").write_text(rank.policy_of(rank.Model(), budgets).to_json())
    command = [sys.executable, str(WORKER), str(folder), wrap, scope, inner, str(steps)]
    runs = [
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env=os.environ | {"RANK": str(n), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"},
        )
        for n in range(2)
    ]  # fmt: skip
    said = [run.communicate(timeout=500)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], "\n".join(said)[-5000:]
    return [json.loads((folder / f"{n}.json").read_text()) for n in range(2)]


def mean(found):
    return [sum(pair) / 2 for pair in zip(*[one["losses"] for one in found], strict=True)]


def check(found, want):
    torch.testing.assert_close(torch.tensor(mean(found)), torch.tensor(want), atol=1e-5, rtol=1e-5)
    assert want[-1] < 0.999 * want[0], "nothing was learned, so nothing was compared"
    for one in found:
        assert one["sites"] == rank.LAYERS
        assert one["graphs"] == 0


def test_two_steps_of_fsdp_by_block(tmp_path):
    found = together(tmp_path, BUDGETS, "fsdp", "block", steps=2)
    torch.testing.assert_close(mean(found), alone(Reference(BUDGETS), 2), atol=1e-5, rtol=1e-5)
    assert mean(found) != pytest.approx(alone(Dense(), 2), abs=1e-4)
    assert [one["sites"] for one in found] == [rank.LAYERS] * 2


WAYS = [
    ("fsdp", "block"),
    ("fsdp", "whole"),
    ("ddp", "block"),
    ("ddp", "whole"),
    ("ddp-one-graph", "whole"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("wrap", "scope"), WAYS)
def test_everything_kept_is_dense(tmp_path, wrap, scope):
    check(together(tmp_path, [1.0] * rank.LAYERS, wrap, scope), alone(Dense(), 10))


@pytest.mark.slow
@pytest.mark.parametrize("inner", ["eager", "inductor"])
@pytest.mark.parametrize(("wrap", "scope"), WAYS)
def test_twelve_budgets_act_as_twelve(tmp_path, wrap, scope, inner):
    """Equal to one sparse process; then fifty changes of the budgets without a graph."""
    found = together(tmp_path, BUDGETS, wrap, scope, inner)
    model = Reference(BUDGETS)
    check(found, alone(model, 10))
    model.budget([0.2 + (rank.CHANGES - 1 + n) % 9 / 20 for n in range(rank.LAYERS)])
    with torch.no_grad():
        last = [rank.loss_of(model(rank.sample(n))).item() for n in range(2)]
    assert [one["last"] for one in found] == pytest.approx(last, abs=1e-5)
    assert [one["took"] for one in found] == [rank.LAYERS] * 2
