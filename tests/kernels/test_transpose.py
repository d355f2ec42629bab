"""Are lists turned around right? On a GPU, or in the interpreter without one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from afbs_compile.kernels import lists, transpose

# Triton 3.6's interpreter makes scalars in a way that NumPy deprecates
pytestmark = pytest.mark.filterwarnings(
    "ignore:Conversion of an array with ndim:DeprecationWarning"
)

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"


def random_keep(seed, share, *shape):
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(shape, generator=generator) < share).to(DEVICE)


def check(keep):
    counts, indices = lists.from_keep(keep)
    # what is not listed may hold anything in range
    listed = torch.arange(keep.shape[-1], device=DEVICE) < counts[..., None]
    spoilt = torch.where(listed, indices, keep.shape[-1] - 1)
    got_counts, got = transpose.transposed(counts, spoilt)
    want_counts, want = lists.transposed(counts, indices)
    assert (got_counts.dtype, got.dtype) == (torch.int32, torch.int32)
    assert torch.equal(got_counts, want_counts)
    listed = torch.arange(keep.shape[-2], device=DEVICE) < want_counts[..., None]
    assert torch.equal(got.where(listed, 0), want.where(listed, 0))
    assert ((got >= 0) & (got < keep.shape[-2])).all()


@given(
    seed=st.integers(0, 1000),
    share=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    heads=st.sampled_from([(1, 1), (2, 1), (1, 2)]),
    blocks=st.tuples(st.integers(1, 80), st.integers(1, 270)),
)
@settings(max_examples=50 if GPU else 10)
def test_agrees_with_the_oracle(seed, share, heads, blocks):
    check(random_keep(seed, share, *heads, *blocks))


def test_the_oracle_from_its_definition():
    keep = random_keep(0, 0.4, 1, 2, 5, 7)
    counts, indices = lists.transposed(*lists.from_keep(keep))
    for h in range(2):
        for n in range(7):
            mine = [m for m in range(5) if keep[0, h, m, n]]
            assert indices[0, h, n, : counts[0, h, n]].tolist() == mine


def test_lists_that_are_views():
    keep = random_keep(1, 0.4, 2, 4, 5, 7)
    counts, indices = lists.from_keep(keep)
    got = transpose.transposed(counts[:, ::2], indices[:, ::2])
    want = lists.transposed(counts[:, ::2], indices[:, ::2])
    assert torch.equal(got[0], want[0])
    assert torch.equal(lists.to_keep(*got), lists.to_keep(*want))


@pytest.mark.gpu
def test_captured_in_a_graph():
    counts, indices = lists.from_keep(random_keep(2, 0.3, 1, 4, 200, 400))
    want, graph = transpose.transposed(counts, indices), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = transpose.transposed(counts, indices)
    graph.replay()
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])
