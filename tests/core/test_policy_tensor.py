"""A site's policy as a tensor: one row a head, every field in its column."""

import math

import torch

from afbs_compile.kernels import policy_columns as columns
from afbs_compile.policy import Head, Site
from afbs_compile.policy_tensor import to_tensor

HEADS = (
    Head("sparse", 0.9, theta=0.25, lambda_=-8.0, sink=32, neighbours=1),
    Head("window", 0.5, window=256),
    Head("dense", 1.0),
)


def site(decision):
    return Site("a", HEADS, 1, 64, "causal", decision)


def test_columns():
    tensor = to_tensor(site("sparse"))
    assert tensor.dtype == torch.float32
    assert tensor.shape == (3, columns.COLUMNS)
    modes = [columns.SPARSE, columns.WINDOWED, columns.DENSE]
    assert tensor[:, columns.MODE].tolist() == modes
    torch.testing.assert_close(tensor[:, columns.TAU], torch.tensor([0.9, 0.5, 1.0]))
    assert tensor[:, columns.THETA].tolist() == [0.25, -1, -1]
    assert tensor[:, columns.LAMBDA].tolist() == [-8, -math.inf, -math.inf]
    assert tensor[:, columns.WINDOW].tolist() == [0, 256, 0]
    assert tensor[:, columns.SINK].tolist() == [32, 64, 64]
    assert tensor[:, columns.NEIGHBOURS].tolist() == [1, 2, 2]


def test_dense_site_is_dense_in_every_head():
    assert to_tensor(site("dense"))[:, columns.MODE].tolist() == [columns.DENSE] * 3
