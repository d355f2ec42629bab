"""How `bench/profile_cost.py` compares: what differs is found, other counts are set aside."""

import dataclasses

import torch

from afbs_compile.bench.profile_cost import compared
from afbs_compile.kernels.geometry import Mask
from afbs_compile.kernels.profile import profile


def test_differences_are_relative_to_a_heads_output(policy_tensor):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 256, 32, generator=generator) for _ in range(3))
    site = {"mask": Mask(True), "scale": 0.2, "block_m": 32, "block_n": 16}
    tables = profile(q, k, v, policy_tensor(2), selector="sub8", lambdas=(-3.0,), **site)
    found = compared(tables, tables)
    assert found["order_equal"] == 1.0
    assert found["largest_difference"] == found["counts_differ"] == 0.0
    copies = {name: getattr(tables, name).clone() for name in ("error", "computed")}
    moved = dataclasses.replace(tables, **copies)
    moved.error[0, 0, 1, 5, 0] += 0.01 * float(tables.norm[0, 1].sum())
    moved.error[0, 0, 0, 4, 0] += 99.0
    moved.computed[0, 0, 0, 4, 0] += 1
    found = compared(moved, tables)
    assert abs(found["largest_difference"] - 0.01) < 1e-4
    assert 0 < found["counts_differ"] < 0.01
