"""Decoding over heads of different lengths: equal to attention over the live rows alone."""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from afbs_compile.kernels import decode, triton_decode

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # of the kernel
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def cache(kv_heads, group, dim, sizes, lengths, seed=0, dtype=torch.float32, device="cpu"):
    """q, keys, values, bases, slots, lengths; what is not live is NaN."""
    generator = torch.Generator().manual_seed(seed)
    slots = [sizes[h % len(sizes)] for h in range(kv_heads)]
    order = sorted(range(kv_heads), key=lambda h: -slots[h])
    bases, rows = [0] * kv_heads, 3  # rows that belong to nobody
    for h in order:
        bases[h], rows = rows, rows + slots[h]
    q = torch.randn(len(lengths), 1, kv_heads * group, dim, generator=generator).transpose(1, 2)
    keys, values = (torch.randn(len(lengths), rows, dim, generator=generator) for _ in "kv")
    alive = torch.zeros(len(lengths), rows, dtype=torch.bool)
    for b, length in enumerate(lengths):
        for h in range(kv_heads):
            alive[b, bases[h] : bases[h] + min(length, slots[h])] = True
    keys, values = (x.masked_fill(~alive[..., None], float("nan")) for x in (keys, values))
    floats = [x.to(device, dtype) for x in (q, keys, values)]
    return [*floats, *(torch.tensor(x, dtype=torch.int32, device=device)
                       for x in (bases, slots, lengths))]  # fmt: skip


def oracle(q, keys, values, bases, slots, lengths, scale):
    """One softmax at a time, in float64."""
    q, keys, values = q.double().cpu(), keys.double().cpu(), values.double().cpu()
    group, o = q.shape[1] // len(slots), torch.zeros_like(q)
    for b in range(len(lengths)):
        for head in range(q.shape[1]):
            h = head // group
            live = slice(int(bases[h]), int(bases[h]) + min(int(lengths[b]), int(slots[h])))
            p = (keys[b, live] @ q[b, head, 0] * scale).softmax(0)
            o[b, head, 0] = p @ values[b, live]
    return o


def worked(arguments, splits):
    """The arguments with the shares that `splits` make."""
    shares = decode.shares(arguments[4].tolist(), splits)
    return [*arguments, torch.tensor(shares, dtype=torch.int32, device=arguments[0].device)]


def by_kernel(splits):
    def run(*arguments, scale):
        there = [x.to(DEVICE) for x in worked(arguments, splits)]
        return triton_decode.decode(*there, scale=scale, splits=splits).cpu()

    return run


def by_op(splits):
    return lambda *a, scale: torch.ops.afbs.decode(*worked(a, splits), scale, splits)


def check(run, arguments, scale):
    wanted = oracle(*arguments, scale)
    found = run(*arguments, scale=scale)
    assert found.dtype == arguments[0].dtype
    atol = TOLERANCE[found.dtype] * max(1.0, float(wanted.abs().max()))
    torch.testing.assert_close(found.double().cpu(), wanted, rtol=0, atol=atol)


@st.composite
def problems(draw):
    kv_heads, group = draw(st.sampled_from([(1, 1), (2, 1), (2, 3), (3, 4), (1, 17)]))
    dim = draw(st.sampled_from([16, 40, 64]))
    sizes = draw(st.lists(st.integers(1, 700), min_size=1, max_size=3))
    lengths = draw(st.lists(st.integers(0, max(sizes)), min_size=1, max_size=3))
    return cache(kv_heads, group, dim, sizes, lengths, seed=draw(st.integers(0, 2**31)))


@given(problems(), st.sampled_from([0.3, -0.2, 0.0]))
def test_plain_torch_is_attention_over_the_live_rows(problem, scale):
    check(decode.on_cpu, problem, scale)


@given(problems(), st.sampled_from([0.3, -0.2, 0.0]), st.integers(1, 40))
@example(cache(2, 4, 64, [700, 68], [700, 69, 68]), 0.1, 3)
@example(cache(1, 1, 64, [520], [513, 512, 511]), 0.1, 2)
@pytest.mark.usefixtures("poisoned_empty")
def test_kernel_is_attention_over_the_live_rows(problem, scale, splits):
    check(by_kernel(splits), problem, scale)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("run", [decode.on_cpu, by_kernel(3)])
def test_half_precision(dtype, run):
    check(run, cache(2, 4, 64, [300, 20], [290, 7], dtype=dtype), 0.125)


def arguments(**changes):
    names = ("q", "keys", "values", "bases", "slots", "lengths", "work")
    return dict(zip(names, worked(cache(2, 2, 32, [40, 8], [33, 5]), 2), strict=True)) | {
        "scale": 0.2, "splits": 2
    } | changes  # fmt: skip


def test_the_op():
    torch.library.opcheck(torch.ops.afbs.decode.default, tuple(arguments().values()))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"q": torch.zeros(2, 4, 2, 32)}, "one query a head, not 2"),
        ({"keys": torch.zeros(2, 40, 16)}, "keys are"),
        ({"values": torch.zeros(2, 60, 32, dtype=torch.float16)}, "values are"),
        ({"lengths": torch.zeros(2, dtype=torch.int64)}, "lengths is torch.int64"),
        ({"slots": torch.ones(3, dtype=torch.int32), "bases": torch.ones(3, dtype=torch.int32)},
         "3 KV heads do not divide 4"),
        ({"splits": 0}, "splits is 0"),
    ],
)  # fmt: skip
def test_what_the_op_refuses(changes, says):
    with pytest.raises(ValueError, match=says):
        torch.ops.afbs.decode(**arguments(**changes))


@given(st.integers(1, 4096), st.integers(1, 1 << 20), st.integers(1, 160))
def test_splits_fill_the_device_and_are_worth_it(programs, capacity, multiprocessors):
    splits = decode.splits_for(programs, capacity, multiprocessors)
    assert 1 <= splits <= decode.MOST_SPLITS
    assert splits == 1 or capacity > (splits - 1) * triton_decode.LEAST
    enough = programs * splits >= multiprocessors * decode.WAVES
    assert enough or splits in (-(-capacity // triton_decode.LEAST), decode.MOST_SPLITS)


def test_both_know_the_least_share():
    assert decode.SHORTEST == triton_decode.LEAST


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=6), st.integers(1, 9))
def test_every_share_that_may_be_live_is_listed_once_and_long_heads_first(slots, splits):
    shares = decode.shares(slots, splits)
    counts = [sum(item // splits == h for item in shares) for h in range(len(slots))]
    assert counts == [min(splits, -(-size // decode.SHORTEST)) for size in slots]
    assert len({*shares}) == len(shares)
    sizes = [slots[item // splits] for item in shares]
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("dim", [64, 80, 128, 256])
def test_on_a_gpu(dtype, dim):
    problem = cache(
        2, 4, dim, [9000, 1028], [9000, 1028, 1027, 256, 1, 0], dtype=dtype, device="cuda"
    )
    for splits in (1, 7, 128):
        check(by_op(splits), problem, 0.1)


@pytest.mark.gpu
def test_a_cuda_graph_follows_the_lengths():
    problem = cache(2, 4, 128, [3000, 68], [3000, 3000], device="cuda")
    problem[-1].fill_(60)
    all_of_it = worked(problem, 5)
    torch.ops.afbs.decode(*all_of_it, 0.1, 5)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = torch.ops.afbs.decode(*all_of_it, 0.1, 5)
    for length in (1, 67, 68, 69, 2999):
        problem[-1].fill_(length)
        graph.replay()
        check(lambda *a, scale: out, problem, 0.1)
