"""The model key: any change of content changes it, and nothing else does."""

import warnings

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from afbs_compile.identity import TILE, model_key, multipliers_on, normalise, tile_sums

DTYPES = [
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float8_e4m3fn,
    torch.int64,
    torch.int16,
    torch.uint8,
    torch.bool,
    torch.complex64,
]
SIZES = st.integers(1, 9) | st.integers(TILE - 2, TILE + 2) | st.integers(1, 3 * TILE)


def drawn(size, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    if dtype in (torch.bool, torch.complex64) or not dtype.is_floating_point:
        return torch.randint(0, 2, (size,), generator=generator).to(dtype)
    return torch.randn(size, generator=generator).to(dtype)


def key(tensor):
    return model_key([("w", tensor)])


def octets(tensor):
    return tensor.reshape(-1).view(torch.uint8)


@given(size=SIZES, dtype=st.sampled_from(DTYPES), data=st.data())
def test_any_changed_bit_changes_the_key(size, dtype, data):
    tensor = drawn(size, dtype)
    before = key(tensor)
    assert len(before) == 32
    at = data.draw(st.integers(0, tensor.nbytes - 1))
    octets(tensor)[at] ^= 1 << data.draw(st.integers(0, 7))
    assert key(tensor) != before


@given(size=st.integers(2, 3 * TILE), dtype=st.sampled_from(DTYPES[:7]), data=st.data())
@example(size=TILE, dtype=torch.bfloat16, data=None)
def test_swapped_elements_change_the_key(size, dtype, data):
    tensor = drawn(size, dtype)
    first, second = (
        (0, size - 1)
        if data is None
        else (data.draw(st.lists(st.integers(0, size - 1), min_size=2, max_size=2, unique=True)))
    )
    tensor[first] = 1
    tensor[second] = -1 if dtype.is_signed else 2
    before = key(tensor)
    tensor[[first, second]] = tensor[[second, first]]
    assert key(tensor) != before


def test_both_sums_see_every_change_and_swap():
    content = torch.arange(2 * TILE, dtype=torch.int32)
    swapped = content.clone()
    swapped[[0, TILE - 1]] = content[[TILE - 1, 0]]
    for other in (content.clone().index_fill_(0, torch.tensor(5), 99), swapped):
        same = tile_sums(content) == tile_sums(other)
        assert same.tolist() == [[False, False], [True, True]]


def test_multipliers_are_invertible_and_independent():
    multipliers = multipliers_on(torch.device("cpu"))
    assert (multipliers % 2 == 1).all()
    assert multipliers.unique().numel() == 2 * TILE


def test_key_stays_what_it_is():
    named = [("w", torch.arange(100_000, dtype=torch.int32)), ("b", torch.ones(3))]
    assert model_key(named) == "1dbf2adb2a2bb0ea965bf04bf35552bd"


def test_sign_flips_that_cancel_in_a_plain_sum_are_seen():
    tensor = torch.ones(4096, dtype=torch.bfloat16)
    keys = {key(tensor)}
    for i in range(0, 64, 2):
        changed = tensor.clone()
        changed[i], changed[4095 - i] = -1, -1
        keys.add(key(changed))
    assert len(keys) == 33


@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES),
    offset=st.integers(0, 3),
)
def test_memory_layout_does_not_matter(rows, columns, dtype, offset):
    plain = drawn(rows * columns, dtype).view(rows, columns)
    spread = torch.zeros(columns, rows + offset, dtype=dtype)[:, offset:].t()
    spread.copy_(plain)
    shifted = torch.cat([drawn(offset, dtype), plain.reshape(-1)])[offset:].view(rows, columns)
    assert key(plain) == key(spread) == key(shifted) == key(torch.nn.Parameter(plain, False))


def test_threads_do_not_matter():
    tensor = drawn(5 * TILE + 17, torch.float32)
    threads = torch.get_num_threads()
    keys = set()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        keys.add(key(tensor))
    torch.set_num_threads(threads)
    assert len(keys) == 1


def test_order_does_not_matter_but_names_shapes_dtypes_and_extra_do():
    a, b = drawn(12, torch.float32), drawn(12, torch.float32, seed=1)
    base = model_key([("a", a), ("b", b)])
    assert model_key([("b", b), ("a", a)]) == base
    assert model_key(iter([("a", a), ("b", b)])) == base
    others = [
        model_key([("a", b), ("b", a)]),
        model_key([("a", a), ("c", b)]),
        model_key([("a", a.view(3, 4)), ("b", b)]),
        model_key([("a", a.view(torch.int32)), ("b", b)]),
        model_key([("a", a)]),
        model_key([("a", a), ("b", b)], extra="x"),
        model_key([]),
    ]
    assert len({base, *others}) == 8


def test_negative_zero_is_a_change():
    assert key(torch.tensor([0.0])) != key(torch.tensor([-0.0]))


def test_lazy_views_are_read_as_their_values():
    z = torch.randn(8, dtype=torch.complex64)
    assert key(z.conj()) == key(z.conj().resolve_conj()) != key(z)
    assert key(z.conj().imag) == key(z.conj().imag.clone())


def test_empty_and_scalar_tensors():
    assert key(torch.zeros(0, 3)) != key(torch.zeros(3, 0))
    assert key(torch.tensor(1.0)) != key(torch.tensor(2.0))


def test_quantised_tensors_differ_by_bits_and_by_scale():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        x = torch.arange(8.0)
        quantise = torch.quantize_per_tensor
        scales, zeros = torch.tensor([0.5, 0.25]), torch.zeros(2)
        tensors = [
            quantise(x, 0.1, 0, torch.qint8),
            quantise(x * 2, 0.2, 0, torch.qint8),
            quantise(x, 0.1, 1, torch.qint8),
            torch.quantize_per_channel(x.view(2, 4), scales, zeros, 0, torch.qint8),
            torch.quantize_per_channel(x.view(2, 4), scales.flip(0), zeros, 0, torch.qint8),
        ]
        assert len({key(tensor) for tensor in tensors}) == len(tensors)


@pytest.mark.parametrize("device", ["meta", "fake", "sparse"])
def test_tensors_without_readable_bytes_are_refused_by_name(device):
    if device == "fake":
        with FakeTensorMode():
            tensor = torch.zeros(3)
    else:
        tensor = torch.eye(3).to_sparse() if device == "sparse" else torch.zeros(3, device="meta")
    with pytest.raises(TypeError, match=r"'layers\.0\.weight'"):
        model_key([("layers.0.weight", tensor)])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_gpu_and_cpu_agree(dtype):
    tensors = [drawn(size, dtype) for size in (3, TILE, 200 * TILE + 5)]
    named = [(str(i), t) for i, t in enumerate(tensors)]
    assert model_key(named) == model_key([(name, t.cuda()) for name, t in named])


@pytest.mark.parametrize(
    ("source", "path"),
    [
        ("L['self']._modules['layers']._modules['0']._parameters['weight']", "layers.0.weight"),
        ("L['s']._modules['x']._parameters['weight']", "x.weight"),
        ("L['m']._modules['bn']._buffers['running_mean']", "bn.running_mean"),
        ("L['self'].model.layers.0.self_attn", "model.layers.0.self_attn"),
        ("L['self'].__dict__['_modules']['blocks'].0.attn", "blocks.0.attn"),
        ("L['self'].layers[3].weight", "layers.3.weight"),
        ("G['net']._modules['a']", "a"),
        ("getattr(getattr(L['self'].layers, '0').attn, '1').weight", "layers.0.attn.1.weight"),
        ("model.layers.0.self_attn", "model.layers.0.self_attn"),
        ("L['self']", ""),
        ("", ""),
    ],
)
def test_normalise(source, path):
    assert normalise(source) == path
    assert normalise(path) == path
