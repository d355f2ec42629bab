"""Do cases give whole rows, leave out what cannot run, and stop at what is wrong?"""

from typing import NamedTuple

import pytest
import torch

pytest.importorskip("triton")

from afbs_compile.bench import attention, baselines, cases, checks, fa4, problems, training
from afbs_compile.bench.baselines import Way
from afbs_compile.bench.cases import EMPTY
from afbs_compile.bench.problems import Shape
from afbs_compile.kernels import dispatch, on_gpu, reference, selection, triton_forward
from afbs_compile.kernels.lists import from_keep, to_keep

pytestmark = [
    pytest.mark.usefixtures("on_cpu"),
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning"),
    # what NumPy says of infinities when it interprets a kernel; results are compared with fp32
    pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="the processor stands for the device"),
]


def plain(problem, lists):
    return reference.forward(
        problem.q, problem.k, problem.v, *lists, problems.policy(1.0, problem.heads, "cpu"),
        mask=problem.mask, scale=problem.scale, block_m=128, block_n=64,
    )  # fmt: skip


def test_forward(bench, small):
    problem = small()
    full, sparse = cases.forward(bench, problem)
    assert set(full) > set(EMPTY)
    for row in (full, sparse):
        assert row["case"] == "forward"
        assert (row["granularity"], row["kernel"], row["inputs"]) == ("128x64", "triton", "randn")
        assert row["ours_ms"] > 0
        assert row["ratio_cudnn"] == pytest.approx(row["cudnn_ms"] / row["ours_ms"], rel=2)
        assert row["spread"] >= 0
        assert row["ratio_fa2"] is row["ratio_fa4"] is None
    assert full["kept"] == 1
    assert sparse["kept"] < 1
    # without a compiler FlexAttention skips no blocks: right when all are kept, else left out
    assert full["ratio_flex"] > 0
    assert full["flex_options"] == "default, USE_TMA"
    assert sparse["ratio_flex"] is None
    assert any("FlexAttention" in note and "differs" in note for note in bench.notes.told)
    assert any(note.startswith("fa2") for note in bench.notes.told)


def test_forward_without_cudnn(bench, small, monkeypatch):
    monkeypatch.setattr(baselines, "cudnn", baselines.fa2)
    row = cases.forward(bench, small(130))[0]
    assert row["ours_ms"] > 0
    assert row["cudnn_ms"] is row["ratio_cudnn"] is row["spread"] is None


def test_a_wrong_kernel_is_not_timed(bench, small, monkeypatch):
    def wrong(*args, **keywords):
        o, lse = triton_forward.forward(*args, **keywords)
        return 1.01 * o, lse

    monkeypatch.setattr(on_gpu, "gpu_forward", lambda *_, **__: wrong)
    with pytest.raises(checks.WrongResult, match="forward 130:causal:d64"):
        cases.forward(bench, small(130))


@pytest.mark.slow
def test_selection(bench, small):
    rows = cases.selection(bench, small(130))
    assert [row["selector"] for row in rows] == list(cases.SELECTORS)
    for row in rows:
        assert row["percent_of_dense"] == pytest.approx(100 / row["ratio_cudnn"])
        assert 0 < row["kept"] <= 1
        assert row["causal"]


@pytest.fixture
def oracle(monkeypatch):
    """Selection and the op in plain torch, which an interpreter is too slow for."""

    def selected(problem, policy, selector):
        site = {"mask": problem.mask, "scale": problem.scale, "selector": selector}
        return selection.select(problem.q, problem.k, policy, **site, **cases.BLOCKS)

    def attention(q, k, v, policy, *, mask, scale, selector, **usual):
        site = {"mask": mask, "scale": scale} | cases.BLOCKS
        lists = selection.select(q, k, policy, selector=selector, **site)
        return reference.forward(q, k, v, *lists, policy, **site)[0]

    monkeypatch.setattr(problems, "selected", selected)
    monkeypatch.setattr(dispatch, "attention", attention)


@pytest.mark.usefixtures("oracle")
def test_whole_op_keeps_about_what_was_asked_for(bench, small):
    bench.kept = (1.0, 0.6)
    full, sparse = cases.whole_op(bench, small(1300, kind="clustered"))
    assert (full["kept"], full["tau"], full["inputs"]) == (1, 1, "clustered")
    assert sparse["kept"] == pytest.approx(0.6, abs=0.05)
    assert 0 < sparse["tau"] < 1
    assert sparse["selector"] == "sub8"


@pytest.mark.usefixtures("oracle")
def test_host(bench, small):
    rows = cases.host(bench, small(130))
    assert [row["variant"] for row in rows] == ["forward", "selection", "whole_op"]
    assert all(row["host_us"] > 0 and row["ours_ms"] is None for row in rows)
    assert any(note.startswith("cudnn") for note in bench.notes.told)


def test_no_backward(bench, small, monkeypatch):
    monkeypatch.delattr(dispatch, "backward", raising=False)
    assert training.backward(bench, small(130)) == []
    assert training.forward_backward(bench, small(130)) == []
    assert [note for note in bench.notes.told if "have no backward" in note]


@pytest.fixture
def plain_backward(monkeypatch):
    """The oracle's gradients in the place of the kernels'."""

    def backward(do, q, k, v, o, lse, counts, indices, policy, *, mask, scale):
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in (q, k, v)]
            out, _ = reference.forward(
                *leaves, counts, indices, policy, mask=mask, scale=scale, **cases.BLOCKS
            )
        assert torch.allclose(out, o, atol=1e-3)
        return torch.autograd.grad(out, leaves, do)

    monkeypatch.setattr(dispatch, "backward", backward, raising=False)
    return backward


@pytest.fixture
def flex_that_differentiates(monkeypatch):
    """FlexAttention's part, on its own block masks: the processor's has no backward."""

    def attend(q, k, v, mask):
        keep = mask.to_dense().bool()
        pairs = keep.repeat_interleave(128, -2).repeat_interleave(64, -1)
        i, j = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])
        seen = pairs[..., : len(i), : len(j)] & mask.mask_mod(0, 0, i, j)
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=seen, enable_gqa=True
        )

    monkeypatch.setattr(Way, "compiled", lambda self: attend)


@pytest.mark.usefixtures("plain_backward", "flex_that_differentiates", "oracle")
@pytest.mark.parametrize("case", [training.backward, training.forward_backward])
def test_backward(bench, small, case):
    bench.kept = (1.0, 0.5)
    full, sparse = case(bench, small(700, kv_heads=1, kind="clustered"))
    assert (full["case"], full["kept"]) == (case.__name__, 1)
    assert sparse["kept"] < 1
    for row in (full, sparse):
        assert row["ratio_cudnn"] > 0
        assert row["ratio_flex"] > 0
        assert row["flex_options"] == "default"
    assert not [note for note in bench.notes.told if "FlexAttention" in note]


@pytest.mark.usefixtures("plain_backward")
def test_backward_without_flex(bench, small):
    row = training.backward(bench, small(130))[0]
    assert row["ours_ms"] > 0
    assert row["ratio_flex"] is row["flex_options"] is None
    assert any("FlexAttention's backward" in note for note in bench.notes.told)


def test_a_wrong_backward_is_not_timed(bench, small, plain_backward, monkeypatch):
    def wrong(*args, **keywords):
        dq, dk, dv = plain_backward(*args, **keywords)
        return dq, 1.02 * dk, dv

    monkeypatch.setattr(dispatch, "backward", wrong)
    with pytest.raises(checks.WrongResult, match="backward 130"):
        training.backward(bench, small(130))


class FakeLists(NamedTuple):
    """FlashAttention-4's own names and order."""

    mask_block_cnt: torch.Tensor
    mask_block_idx: torch.Tensor
    full_block_cnt: torch.Tensor
    full_block_idx: torch.Tensor
    block_size: tuple = None


def fake_fa4(q, k, v, *, block_sparse_tensors, causal=False, mask_mod=None):
    """What flash_attn_func computes; full blocks are not masked where there is a mask_mod."""
    counts, indices, full_counts, full_indices, size = block_sparse_tensors
    assert size == (128, 128)
    assert all(x.is_contiguous() for x in (q, k, v))
    length, heads = q.shape[1], q.shape[2]

    def pairs(counts, indices):
        keep = to_keep(counts, indices).repeat_interleave(128, -1).repeat_interleave(128, -2)
        return keep[..., :length, :length]

    i, j = torch.arange(length)[:, None], torch.arange(length)
    below = j <= i
    partial = pairs(counts, indices)
    if mask_mod is not None:
        partial = partial & mask_mod(0, 0, i, j, None, None)
    seen = partial | pairs(full_counts, full_indices)
    k, v = (x.repeat_interleave(heads // x.shape[2], 2) for x in (k, v))
    o = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), attn_mask=seen & below if causal else seen
    )
    return o.transpose(1, 2), None


@pytest.mark.parametrize("causal", [False, True])
def test_flash_attention_4_sees_the_same_blocks(bench, small, monkeypatch, causal):
    monkeypatch.setattr(fa4, "package", lambda: (fake_fa4, FakeLists, fa4.causal_pairs))
    rows = cases.forward_coarse(bench, small(400, causal))
    assert len(rows) == 2
    for row in rows:
        assert row["ratio_fa4"] > 0
        assert (row["case"], row["granularity"]) == ("forward", "128x128")
        assert row["fa4_options"] in (("mask_mod", "causal") if causal else ("full",))
    assert not [note for note in bench.notes.told if "FlashAttention-4" in note]


def test_flash_attention_4_that_is_wrong_is_left_out(bench, small, monkeypatch):
    def wrong(*args, **keywords):
        o, lse = fake_fa4(*args, **keywords)
        return 1.1 * o, lse

    monkeypatch.setattr(fa4, "package", lambda: (wrong, FakeLists, fa4.causal_pairs))
    assert cases.forward_coarse(bench, small()) == []
    assert sum("differs by 1.0e-01" in note for note in bench.notes.told) == 2


def test_flash_attention_4_that_is_not_there(bench, small):
    fa4.package.cache_clear()
    assert cases.forward_coarse(bench, small(130)) == []
    assert any("flash-attn-4" in note for note in bench.notes.told)


@pytest.mark.slow
def test_compiled_flex_computes_our_lists(small, monkeypatch):
    monkeypatch.undo()  # the real compiler
    problem = small()
    lists = from_keep(problems.random_keep(problem, 0.3))
    run = Way("default", False).compiled()
    o = run(problem.q, problem.k, problem.v, baselines.block_mask(problem, lists))
    assert torch.allclose(o, plain(problem, lists)[0], atol=1e-5)


def test_flex_keeps_the_fastest_way_of_a_kind(notes, small, monkeypatch):
    tried = []
    ways = (Way("a", True), Way("b", False), Way("last", False))

    def compiled(self):
        tried.append(self.mode)
        run = baselines.flex_attention
        return lambda q, k, v, mask: run(q, k, v, block_mask=mask, enable_gqa=True)

    monkeypatch.setattr(Way, "compiled", compiled)
    monkeypatch.setattr(baselines, "fastest", lambda calls: list(calls)[-1])
    flex = baselines.Flex(ways, notes)
    for length in (130, 200, 200):
        problem = small(length)
        lists = from_keep(problems.random_keep(problem, 1.0))
        _, options = flex.call(problem, lists, plain(problem, lists)[0])
        assert options == "b"
    assert tried == ["a", "b", "b"]


def test_plan():
    every = list(attention.BENCH_CASES)
    full, quick = (attention.plan(every, None, quick) for quick in (False, True))
    assert {step.case.removesuffix("_coarse") for step in full} == set(every)
    assert max(step.shape.length for step in full) == 65536
    assert max(step.shape.length for step in quick) == 16384
    assert full[-1].case == "forward_coarse"  # the rival that may bring the context down
    assert all(0.25 in step.kept for step in full if step.case in ("forward", "backward"))
    one = attention.plan(["selection"], [Shape(1024)], quick=False)
    assert one == [attention.Step("selection", Shape(1024))]


def test_the_budget_stops_new_steps(bench, monkeypatch):
    clock = iter([0.0, 0.0, 5.0, 11.0])
    monkeypatch.setattr(attention.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(problems, "make", lambda shape, kind: None)
    monkeypatch.setitem(attention.FUNCTIONS, "selection", lambda bench, problem: [{}])
    steps = attention.plan(["selection"], [Shape(n) for n in (1, 2, 3, 4)], quick=False)
    assert len(list(attention.measured(steps, bench, 10, lambda *_: None))) == 2
    (note,) = bench.notes.told
    assert note == "left out after 10 s: selection 3:full:d128, selection 4:full:d128"


def test_too_little_memory_is_a_note(bench, monkeypatch):
    def greedy(bench, problem):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(problems, "make", lambda shape, kind: None)
    monkeypatch.setitem(attention.FUNCTIONS, "selection", greedy)
    steps = attention.plan(["selection"], [Shape(1)], quick=True)
    assert list(attention.measured(steps, bench, None, lambda *_: None)) == []
    assert bench.notes.told == ["selection 1:full:d128 left out: the device's memory is too small"]
