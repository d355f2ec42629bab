"""Autograd through the op: eager, compiled, checkpointed. In the interpreter without a GPU."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("triton")

import afbs_compile.kernels.op  # noqa: F401
from afbs_compile.kernels import dispatch, reference
from afbs_compile.kernels.geometry import Blocks, Mask, site_visible

# Triton 3.6's interpreter makes scalars in a way that NumPy deprecates
pytestmark = [
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning"),
    pytest.mark.usefixtures("kernels"),
]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LENGTH = 150
attention = torch.ops.afbs.attention


@pytest.fixture(params=["own", "triton"])
def kernels(monkeypatch, request):
    """The device's own kernels; on a CPU also Triton's, in the interpreter."""
    if request.param == "triton":
        if torch.cuda.is_available():
            pytest.skip("Triton's are the device's own")
        monkeypatch.setattr(dispatch, "by_pairs", lambda device_type: False)


@pytest.fixture
def problem(policy_tensor):
    """q, k, v that need gradients, and the other arguments of `afbs::attention`."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, LENGTH, heads, 32, generator=generator)
        .to(DEVICE)
        .transpose(1, 2)
        .requires_grad_()
        for heads in (4, 2, 2)
    )
    policy = policy_tensor(4, tau=0.0, sink=64, neighbours=0).to(DEVICE)
    return (q, k, v), (policy, True, 0, 0, 0.2, "sub8", 0)


def loss(q, k, v, *rest):
    return attention(q, k, v, *rest).square().sum()


def gradients(function, tensors, rest):
    return torch.autograd.grad(function(*tensors, *rest), tensors)


def close(got, want):
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)


def test_gradients_are_those_of_the_blocks_that_were_chosen(problem):
    tensors, rest = problem
    with torch.no_grad():
        o, _, counts, indices = torch.ops.afbs.attention_train(*tensors, *rest[:-1])
    block_m, block_n = dispatch.block_sizes(DEVICE)
    rows, columns = (Blocks.of(LENGTH, size, o.device) for size in (block_m, block_n))
    assert counts.sum() < 4 * site_visible(Mask(True), rows, columns).sum(), "nothing is left out"
    want = reference.backward(
        2 * o, *tensors, counts, indices, rest[0],
        mask=Mask(True), scale=0.2, block_m=block_m, block_n=block_n,
    )  # fmt: skip
    close(gradients(loss, tensors, rest), want)


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (0, 2)])
def test_some_inputs_need_no_gradient(problem, needed):
    tensors, rest = problem
    want = gradients(loss, tensors, rest)
    mixed = [x.detach().requires_grad_(n in needed) for n, x in enumerate(tensors)]
    rest[0].requires_grad_()
    loss(*mixed, *rest).backward()
    assert rest[0].grad is None
    for n, x in enumerate(mixed):
        assert (x.grad is not None) == (n in needed)
        assert n not in needed or torch.equal(x.grad, want[n])


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed(problem, use_reentrant):
    tensors, rest = problem
    again = checkpoint(loss, *tensors, *rest, use_reentrant=use_reentrant)
    again.backward()
    got = [x.grad for x in tensors]
    assert all(torch.equal(x, y) for x, y in zip(got, gradients(loss, tensors, rest), strict=True))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_as_one_graph(problem, dynamic, fresh_dynamo):
    tensors, rest = problem
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    close(gradients(compiled, tensors, rest), gradients(loss, tensors, rest))


def test_another_length_is_not_another_graph(problem, fresh_dynamo):
    tensors, rest = problem
    graphs, compilations = [], []
    compiled = torch.compile(loss, dynamic=True, fullgraph=True, backend=counting(graphs))
    for length in (LENGTH, 130, 140):  # of several blocks on any device
        short = [like_a_model(x.detach()[:, :, :length]).requires_grad_() for x in tensors]
        close(gradients(compiled, short, rest), gradients(loss, short, rest))
        compilations.append(len(graphs))
    assert len(set(compilations)) == 1


def like_a_model(x):
    """The same numbers, `[B, L, H, D]` in memory."""
    return x.transpose(1, 2).clone(memory_format=torch.contiguous_format).transpose(1, 2)


def counting(graphs):
    from torch._dynamo.backends.debugging import aot_eager

    return lambda gm, inputs: graphs.append(gm) or aot_eager(gm, inputs)


def test_autocast(problem):
    tensors, rest = problem
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        got = gradients(loss, tensors, rest)
    halves = [x.detach().bfloat16().requires_grad_() for x in tensors]
    want = gradients(loss, halves, rest)
    for mine, theirs in zip(got, want, strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine.bfloat16(), theirs, rtol=2e-2, atol=2e-2)


def test_twice_is_an_error_only_when_it_is_asked_for(problem):
    tensors, rest = problem
    once = torch.autograd.grad(loss(*tensors, *rest), tensors, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        once[0].sum().backward()


def test_nothing_is_kept_where_nothing_needs_a_gradient(problem):
    tensors, rest = problem
    detached = [x.detach() for x in tensors]
    assert attention(*detached, *rest).grad_fn is None
    with torch.no_grad():
        assert attention(*tensors, *rest).grad_fn is None
    with torch.inference_mode():
        assert attention(*tensors, *rest).grad_fn is None


def test_opcheck(problem):
    tensors, rest = problem
    torch.library.opcheck(torch.ops.afbs.attention_train.default, (*tensors, *rest[:-1]))
    torch.library.opcheck(torch.ops.afbs.attention.default, (*tensors, *rest))


def test_opcheck_of_the_backward(problem):
    tensors, rest = problem
    detached = [x.detach() for x in tensors]
    saved = torch.ops.afbs.attention_train(*detached, *rest[:-1])
    args = torch.ones_like(saved[0]), *detached, *saved, *rest[:-2]
    torch.library.opcheck(torch.ops.afbs.attention_backward.default, args)


@pytest.mark.parametrize("length_k", [1, 64, 150])
def test_fakes_agree_with_the_real_results(problem, length_k):
    tensors, rest = problem
    q, k, v = (x.detach() for x in tensors)
    args = q, k[:, :, :length_k], v[:, :, :length_k], *rest[:-1]
    real = torch.ops.afbs.attention_train(*args)
    with FakeTensorMode() as mode:
        fake = torch.ops.afbs.attention_train(
            *(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args)
        )
    for x, y in zip(real, fake, strict=True):
        assert (x.shape, x.stride(), x.dtype) == (y.shape, y.stride(), y.dtype)


def test_flops_are_counted(problem):
    tensors, rest = problem
    with FlopCounterMode(display=False) as counter:
        gradients(loss, tensors, rest)
    forward = 4 * 4 * 32 * LENGTH * LENGTH / 2
    assert counter.get_total_flops() == pytest.approx(3.5 * forward, rel=1e-3)


@pytest.mark.gpu
def test_captured_in_a_graph(problem):
    tensors, rest = problem
    want = gradients(loss, tensors, rest)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = gradients(loss, tensors, rest)
    graph.replay()
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


@pytest.mark.gpu
@pytest.mark.real_inductor
def test_inductor_compiles_both_passes(problem, fresh_dynamo):
    tensors, rest = problem
    compiled = torch.compile(loss, fullgraph=True)
    close(gradients(compiled, tensors, rest), gradients(loss, tensors, rest))
