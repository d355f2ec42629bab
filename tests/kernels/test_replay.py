"""Are recorded launches the call that they stand for? What runs on a GPU is marked so."""

import threading
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

import afbs_compile.kernels.op  # noqa: F401  defines the op
from afbs_compile.kernels import driver, launch, replay
from afbs_compile.kernels import policy_columns as col
from afbs_compile.kernels.driver import Unsupported

CAUSAL = (True, 0, 0)
FULL = (False, 0, 0)


@pytest.fixture(autouse=True)
def no_tapes(monkeypatch):
    monkeypatch.setattr(replay, "TAPES", {})


def inputs(seed=0, batch=1, heads=4, kv_heads=2, length=1000, dim=64, rows=False):
    generator = torch.Generator("cuda").manual_seed(seed)

    def one(count):
        shape = (batch, length, count, dim) if rows else (batch, count, length, dim)
        x = torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16)
        return x.transpose(1, 2) if rows else x

    return one(heads), one(kv_heads), one(kv_heads)


def heads_policy(heads=4, tau=0.7):
    policy = torch.zeros(heads, col.COLUMNS)
    policy[:, col.MODE], policy[:, col.TAU] = col.SPARSE, tau
    policy[:, col.THETA], policy[:, col.LAMBDA], policy[:, col.SINK] = -1.0, -float("inf"), 4
    return policy.cuda()


def attend(q, k, v, policy, site=CAUSAL, selector="sub8", scale=0.125):
    return torch.ops.afbs.attention(q, k, v, policy, *site, scale, selector, 0)


def afresh(*arguments, **site):
    replay.TAPES.clear()
    return attend(*arguments, **site)


def record(*arguments, **site):
    """Run a kind of call until it is known."""
    for _ in range(2):
        attend(*arguments, **site)
    (tape,) = replay.TAPES.values()
    return tape


@pytest.mark.gpu
@pytest.mark.parametrize("site", [CAUSAL, FULL, (True, 0, 300)])
@pytest.mark.parametrize("selector", ["sub8", "mean"])
@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("dim", [64, 128])
def test_other_tensors_get_their_own_result(site, selector, rows, dim):
    policy = heads_policy()
    given = {"site": site, "selector": selector}
    assert record(*inputs(0, rows=rows, dim=dim), policy, **given) is not None
    others = [inputs(seed, rows=rows, dim=dim) for seed in (1, 2, 3)]
    got = [attend(*other, policy, **given) for other in others]
    assert len(replay.TAPES) == 1
    for o, other in zip(got, others, strict=True):
        want = afresh(*other, policy, **given)
        assert o.stride() == want.stride()
        torch.testing.assert_close(o, want, rtol=0, atol=0)


@pytest.mark.gpu
def test_a_call_that_computes_beside_its_kernels_is_never_recorded():
    """Head dim 80 runs in Triton, and something in torch beside it."""
    policy, given = heads_policy(), {"site": CAUSAL, "selector": "sub8"}
    assert record(*inputs(0, dim=80), policy, **given) is None
    other = inputs(1, dim=80)
    want = afresh(*other, policy, **given)
    torch.testing.assert_close(attend(*other, policy, **given), want, rtol=0, atol=0)


@pytest.mark.gpu
def test_thresholds_are_read_from_the_policy_of_the_call():
    q, k, v = inputs()
    record(q, k, v, heads_policy(tau=0.5))
    policy = heads_policy(tau=0.95)
    got = attend(q, k, v, policy)
    torch.testing.assert_close(got, afresh(q, k, v, policy), rtol=0, atol=0)
    assert not torch.equal(got, afresh(q, k, v, heads_policy(tau=0.5)))


@pytest.mark.gpu
def test_another_length_is_another_kind():
    policy = heads_policy()
    for length in (1000, 1003, 640):
        for seed in range(4):
            q, k, v = inputs(seed, length=length)
            got = attend(q, k, v, policy)
            dense = torch.nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=True, enable_gqa=True
            )
            assert (got - dense).norm() < 0.7 * dense.norm()
            assert got.shape == q.shape
    assert len(replay.TAPES) == 3


@pytest.mark.gpu
def test_an_address_that_is_not_aligned_is_never_repeated():
    policy = heads_policy()
    q, k, v = inputs()
    record(q, k, v, policy)
    moved = torch.empty(q.numel() + 1, dtype=q.dtype, device="cuda")[1:].view(q.shape)
    moved.copy_(q)
    known = dict(replay.TAPES)
    got = attend(moved, k, v, policy)
    assert known == replay.TAPES
    torch.testing.assert_close(got, attend(q, k, v, policy), rtol=0, atol=4e-3)  # another kernel


@pytest.mark.gpu
def test_keys_that_are_values_are_not_recorded():
    policy = heads_policy()
    q, k, _ = inputs()
    assert record(q, k, k, policy) is None
    other = inputs(1)
    got = attend(*other, policy)
    torch.testing.assert_close(got, afresh(*other, policy), rtol=0, atol=0)


@pytest.mark.gpu
def test_scales_below_zero_copy_and_are_not_recorded():
    policy = heads_policy()
    assert record(*inputs(), policy, scale=-0.125) is None


@pytest.mark.gpu
def test_graph_capture_and_streams():
    policy = heads_policy()
    q, k, v = inputs()
    record(q, k, v, policy)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = attend(q, k, v, policy)
    other = inputs(7)
    for x, y in zip((q, k, v), other, strict=True):
        x.copy_(y)
    graph.replay()
    want = afresh(*other, policy)
    torch.testing.assert_close(o, want, rtol=0, atol=0)
    record(*other, policy)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        aside = attend(*other, policy)
    torch.cuda.current_stream().wait_stream(stream)
    torch.testing.assert_close(aside, want, rtol=0, atol=0)


@pytest.mark.gpu
def test_threads_do_not_mix_their_addresses():
    policy = heads_policy()
    given = [inputs(seed) for seed in range(4)]
    want = [afresh(*one, policy) for one in given]
    record(*given[0], policy)
    torch.cuda.synchronize()
    wrong = []

    def work(n):
        with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(50):
                got = attend(*given[n], policy)
                if not torch.equal(got, want[n]):
                    wrong.append(n)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def kernel(signature, **metadata):
    usual = {"num_ctas": 1, "num_warps": 4, "shared": 0, "launch_pdl": False}
    metadata = SimpleNamespace(**(usual | metadata))
    return SimpleNamespace(
        src=SimpleNamespace(signature=dict(enumerate(signature))), metadata=metadata, function=7
    )


def watched(call):
    recorder = replay.Recorder()
    with recorder, launch.watching(recorder.note):
        out = call()
    return recorder, out


def test_addresses_come_from_inputs_output_and_workspace():
    q = torch.zeros(8)

    def call():
        kept = torch.empty(100)
        out = torch.empty(8).view(2, 4)
        made = kernel(["*fp32", "*fp32", "i32", "*fp32", "constexpr"]), ()
        launch.tell(made, 5, (q, kept[10:], 3, out))
        return out

    recorder, out = watched(call)
    tape = replay.taped(recorder, (q,), out)
    assert tape.places == [(0, 0), (2, 40), (1, 0)]
    assert tape.workspace == 512
    assert tape.output == ((2, 4), (4, 1))
    (one,) = tape.launches
    assert one.head == (7, 5, 1, 1, 128, 1, 1, 0)
    assert len(one.parameters) == 4 + 2  # and two scratch memories
    assert driver.ctypes.c_int32.from_address(one.parameters[2]).value == 3


def test_memory_is_not_given_out_twice_while_a_call_is_watched():
    def call():
        first = torch.empty(1000)
        address = first.data_ptr()
        del first
        return torch.empty(1000), address

    recorder, (out, address) = watched(call)
    assert out.data_ptr() != address
    assert len(set(recorder.allocated)) == 2


def test_what_computes_beside_kernels_is_refused():
    q = torch.zeros(8)

    def call():
        out = torch.empty(8)
        launch.tell((kernel(["*fp32"]), ()), 1, (q * 2,))
        return out

    recorder, out = watched(call)
    with pytest.raises(Unsupported, match="aten::mul"):
        replay.taped(recorder, (q,), out)


def test_unknown_memory_is_refused():
    q, other = torch.zeros(8), torch.zeros(8)

    def call():
        out = torch.empty(8)
        launch.tell((kernel(["*fp32"]), ()), 1, (other,))
        return out

    recorder, out = watched(call)
    with pytest.raises(Unsupported, match="neither input"):
        replay.taped(recorder, (q,), out)


def test_result_that_is_an_input_is_refused():
    q = torch.zeros(8)
    recorder, out = watched(lambda: launch.tell((kernel(["*fp32"]), ()), 1, (q,)) or q)
    with pytest.raises(Unsupported, match="not its own"):
        replay.taped(recorder, (q,), out)


@pytest.mark.parametrize(
    "metadata",
    [{"num_ctas": 2}, {"launch_pdl": True}, {"global_scratch_size": 64},
     {"launch_cooperative_grid": True}],
)  # fmt: skip
def test_special_launches_are_left_to_triton(metadata):
    with pytest.raises(Unsupported, match=next(iter(metadata))):
        driver.prepare(kernel([], **metadata), 1, (), ())


def test_a_kernel_compiled_just_now_is_not_recorded(monkeypatch):
    q = torch.zeros(8)
    monkeypatch.setattr(replay, "kind_of", lambda *given: "kind")

    def call():
        launch.tell(None, 1, ())
        return torch.empty(8)

    replay.recorded("kind", (q,), call)
    assert not replay.TAPES
