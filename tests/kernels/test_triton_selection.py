"""Does the Triton selection keep the oracle's blocks? On a GPU, or interpreted without one."""

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from afbs_compile.kernels import lists, selection, triton_common, triton_selection
from afbs_compile.kernels import policy_columns as col
from afbs_compile.kernels.geometry import Blocks, Mask, head_visible
from afbs_compile.kernels.scores import SELECTORS, block_scores

# Triton 3.6's interpreter makes scalars in a way that NumPy deprecates
pytestmark = pytest.mark.filterwarnings(
    "ignore:Conversion of an array with ndim:DeprecationWarning"
)

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
LONGEST = 700 if GPU else 130


def normal(seed, *shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


def clustered(seed, batch, heads, length, dim, dtype=torch.float32):
    """Tokens that resemble their neighbours, so that some blocks matter more than others."""
    topics = normal(seed, batch, heads, length // 12 + 1, dim).repeat_interleave(12, 2)
    return (normal(seed + 1, batch, heads, length, dim) + topics[:, :, :length]).to(dtype)


def policy_row(mode=col.SPARSE, tau=0.5, theta=-1.0, window=40, sink=0, neighbours=1):
    row = torch.zeros(col.COLUMNS)
    row[col.MODE], row[col.TAU], row[col.THETA] = mode, tau, theta
    row[col.WINDOW], row[col.SINK], row[col.NEIGHBOURS] = window, sink, neighbours
    return row


def policy_of(*rows):
    return torch.stack(rows).to(DEVICE)


@st.composite
def policies(draw, heads):
    rows = [
        policy_row(
            mode=draw(st.sampled_from([col.SPARSE, col.SPARSE, col.DENSE, col.WINDOWED])),
            tau=draw(st.sampled_from([0.0, 0.3, 0.7, 0.95, 1.0])),
            theta=draw(st.sampled_from([-1.0, 0.3, 1.0])),
            window=draw(st.sampled_from([0, 1, 40])),
            sink=draw(st.sampled_from([0, 3, 64])),
            neighbours=draw(st.integers(0, 2)),
        )
        for _ in range(heads)
    ]
    return policy_of(*rows)


@st.composite
def problems(draw):
    """q, k, policy, and the call's arguments."""
    length_q, length_k = draw(st.integers(1, LONGEST)), draw(st.integers(1, LONGEST))
    batch, kv_heads, group = draw(st.sampled_from([(1, 1, 1), (1, 1, 3), (2, 1, 2), (1, 2, 1)]))
    head_dim = draw(st.sampled_from([32, 64, 80]))
    dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    block_m, block_n = draw(st.sampled_from([(16, 16), (32, 16), (64, 64), (128, 64)]))
    seed = draw(st.integers(0, 1000))
    causal = draw(st.booleans())
    offset = draw(st.sampled_from([0, length_k - length_q, -20, 30])) if causal else 0
    mask = Mask(causal, offset, draw(st.sampled_from([0, 0, 1, 50])) if causal else 0)
    q = clustered(seed, batch, kv_heads * group, length_q, head_dim, dtype)
    k = clustered(seed + 2, batch, kv_heads, length_k, head_dim, dtype)
    site = {"mask": mask, "scale": head_dim**-0.5, "selector": draw(st.sampled_from(SELECTORS))}
    policy = draw(policies(kv_heads * group))
    return q, k, policy, site | {"block_m": block_m, "block_n": block_n}


def keep_of(counts, indices):
    """The lists as a bool tensor, after checking that they are well formed."""
    assert counts.dtype == indices.dtype == torch.int32
    blocks = indices.shape[-1]
    assert ((counts >= 0) & (counts <= blocks)).all()
    assert ((indices >= 0) & (indices < blocks)).all()
    listed = torch.arange(blocks, device=counts.device) < counts[..., None]
    rising = (indices[..., 1:] > indices[..., :-1]) | ~listed[..., 1:]
    assert rising.all(), "a list is not ascending"
    return lists.to_keep(counts, indices)


def kept(q, k, policy, **site):
    return keep_of(*triton_selection.select(q, k, policy, **site))


def visible_blocks(q, k, policy, mask, block_m, block_n):
    rows = Blocks.of(q.shape[2], block_m, q.device), Blocks.of(k.shape[2], block_n, q.device)
    return head_visible(mask, policy, *rows), rows


def test_runs_where_it_should():
    assert triton_common.interpreted() != GPU, "triton was imported before this module chose"


@settings(max_examples=40 if GPU else 12, phases=[Phase.generate])
@given(problem=problems())
def test_keeps_what_the_rule_asks_for(problem, poisoned_empty):
    """Visible and forced blocks as the oracle's; by score no less than tau, no block too many."""
    q, k, policy, site = problem
    keep = kept(q, k, policy, **site)
    mask, block_m, block_n = site["mask"], site["block_m"], site["block_n"]
    visible, rows = visible_blocks(q, k, policy, mask, block_m, block_n)
    assert not (keep & ~visible).any()
    free = (policy[:, col.MODE] != col.SPARSE) | (policy[:, col.TAU] >= 1)
    assert torch.equal(keep[:, free], visible[free].expand(len(keep), -1, -1, -1))
    scores, gated = block_scores(q, k, policy, **site)
    forced = selection.forced_blocks(mask, policy, *rows, block_n) | gated
    assert not (forced & visible & ~keep)[:, ~free].any()
    assert torch.equal(keep.any(-1), visible.any(-1).expand(keep.shape[:-1]))
    tau = policy[:, col.TAU, None]
    slack = 2e-2 if GPU and q.dtype != torch.float32 else 1e-4  # tf32 on a GPU
    seen = scores.sum(-1) > 0  # else nothing but the sink is visible
    by_score = torch.where(keep & ~(forced & visible), scores, torch.inf)
    mass = (scores * keep).sum(-1)
    assert (mass >= tau - slack)[seen & ~free[:, None]].all()
    least = by_score.amin(-1)
    near = 1.05 if GPU and q.dtype != torch.float32 else 1.0  # tf32 may swap near equals
    above = (scores * (scores > near * least[..., None])).sum(-1)
    alone = keep.sum(-1) == 1  # tau = 0 with nothing forced keeps the best block
    assert ((above < tau + slack) | least.isinf() | alone)[:, ~free].all()


@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize("mask", [Mask(), Mask(True), Mask(True, 20), Mask(True, 20, 33)])
def test_equals_the_oracle_in_fp32(selector, mask):
    q, k = clustered(0, 1, 4, 75, 64), clustered(5, 1, 2, 115, 64)
    policy = policy_of(
        policy_row(tau=0.5, sink=32),
        policy_row(tau=0.8, theta=0.28, neighbours=0),
        policy_row(mode=col.WINDOWED, sink=7),
        policy_row(tau=0.0, theta=0.28, neighbours=0),
    )
    site = {"mask": mask, "scale": 0.25, "selector": selector, "block_m": 32, "block_n": 16}
    want = lists.to_keep(*selection.select(q, k, policy, **site))
    assert torch.equal(kept(q, k, policy, **site), want)


def test_lists_longer_than_a_chunk():
    """More key blocks than the pick kernel holds at once, and than the score kernel's tile."""
    blocks = 2 * triton_selection.CHUNK + 3
    q, k = clustered(0, 1, 1, 16, 32), clustered(2, 1, 1, 16 * blocks - 5, 32)
    policy = policy_of(policy_row(tau=0.6, sink=40))
    site = {"mask": Mask(), "scale": 0.5, "selector": "sub8", "block_m": 16, "block_n": 16}
    want = lists.to_keep(*selection.select(q, k, policy, **site))
    got = kept(q, k, policy, **site)
    assert 3 < want.sum() < blocks - 3
    assert torch.equal(got, want)


@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_a_query_block_with_nan_stays_dense(selector):
    q, k = clustered(0, 1, 1, 96, 32), clustered(2, 1, 1, 96, 32)
    policy = policy_of(policy_row(tau=0.2, neighbours=0))
    site = {"mask": Mask(True), "scale": 0.5, "selector": selector, "block_m": 32, "block_n": 16}
    clean = kept(q, k, policy, **site)
    q[:, :, 70] = torch.nan
    visible, _ = visible_blocks(q, k, policy, site["mask"], 32, 16)
    dirty = kept(q, k, policy, **site)
    assert not torch.equal(clean[0, 0, 2], visible[0, 2]), "the block was dense anyway"
    assert torch.equal(dirty[0, 0, 2], visible[0, 2])
    assert torch.equal(dirty[0, 0, :2], clean[0, 0, :2])


def test_a_key_that_is_not_seen_has_no_effect():
    q, k = clustered(0, 1, 1, 64, 32), clustered(2, 1, 1, 96, 32)
    policy = policy_of(policy_row(tau=0.3, neighbours=0))
    site = {"mask": Mask(True), "scale": 0.5, "selector": "sub4", "block_m": 16, "block_n": 16}
    clean = kept(q, k, policy, **site)
    k[:, :, 64:] = torch.nan
    assert torch.equal(kept(q, k, policy, **site), clean)


def test_a_windowed_head_that_sees_nothing_keeps_nothing():
    q, k = normal(0, 1, 1, 16, 32), normal(1, 1, 1, 16, 32)
    policy = policy_of(policy_row(mode=col.WINDOWED, window=0))
    site = {"mask": Mask(True, -20), "scale": 0.5, "selector": "sub8", "block_m": 16}
    assert not kept(q, k, policy, **site, block_n=16).any()
    site["mask"] = Mask(False, 20)
    assert not kept(q, k, policy, **site, block_n=16).any()


def test_equal_scores_keep_a_superset():
    """All keys alike: no block beats another, so all stay rather than an arbitrary part."""
    q, k = normal(0, 1, 1, 16, 32), normal(1, 1, 1, 1, 32).expand(1, 1, 128, 32)
    site = {"mask": Mask(), "scale": 0.5, "selector": "mean", "block_m": 16, "block_n": 16}
    assert kept(q, k, policy_of(policy_row(tau=0.5)), **site).all()


def test_strides_and_gqa_do_not_matter():
    """Last stride 2 and an expanded kv head: the same as contiguous copies."""
    q, k = normal(0, 1, 4, 30, 64)[..., ::2], normal(1, 1, 1, 70, 32).expand(1, 2, 70, 32)
    site = {"mask": Mask(True), "scale": 0.5, "selector": "sub8", "block_m": 32, "block_n": 16}
    policy = policy_of(*[policy_row(tau=0.4, neighbours=0)] * 4)
    repeated = k.repeat_interleave(2, 1).contiguous()
    got, want = kept(q, k, policy, **site), kept(q.contiguous(), repeated, policy, **site)
    assert torch.equal(got, want)


def test_an_unknown_selector_is_named():
    q = normal(0, 1, 1, 16, 32)
    site = {"mask": Mask(), "scale": 0.5, "selector": "sub9", "block_m": 16, "block_n": 16}
    with pytest.raises(ValueError, match=r"'sub9'.*sub8, sub4, mean"):
        triton_selection.select(q, q, policy_of(policy_row()), **site)


@pytest.mark.gpu
@pytest.mark.parametrize("selector", SELECTORS)
def test_captured_without_a_sync_and_not_compiled_again(selector):
    from afbs_compile.kernels import triton_pool, triton_scores

    policy = policy_of(*[policy_row()] * 2)
    kernels = (triton_pool.pool_kernel, triton_scores.score_kernel, triton_selection.pick_kernel)

    def choose(length):
        q = clustered(0, 1, 2, length, 64, torch.bfloat16)
        site = {"mask": Mask(True, window=length), "scale": 0.1, "selector": selector}
        return lambda: triton_selection.select(q, q, policy, **site, block_m=64, block_n=64)

    choose(256)()
    before = [compiled(kernel) for kernel in kernels]
    for length in (1, 17, 100, 1000):
        choose(length)()
    assert [compiled(kernel) for kernel in kernels] == before
    call, graph = choose(256), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    graph.replay()
    assert torch.equal(keep_of(*captured), keep_of(*call()))


def compiled(kernel):
    """Number of variants of a Triton kernel compiled so far on the current device."""
    return len(kernel.device_caches[torch.cuda.current_device()][0])
