"""The registered op: schema, fake, strides, flops, and no autograd in silence."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import afbs_compile.kernels.op  # noqa: F401
from afbs_compile.kernels import policy_columns as col


def arguments(policy_tensor, length=300, dtype=torch.float32, min_length=0):
    q, k, v = (torch.randn(1, length, h, 32, dtype=dtype).transpose(1, 2) for h in (4, 2, 2))
    policy = policy_tensor(4, tau=0.5, sink=64)
    return q, k, v, policy, True, 0, 0, 32**-0.5, "sub8", min_length


def test_opcheck(policy_tensor):
    torch.library.opcheck(torch.ops.afbs.attention.default, arguments(policy_tensor))


def test_opcheck_with_compensation(policy_tensor):
    args = (*arguments(policy_tensor), "tangent")
    torch.library.opcheck(torch.ops.afbs.attention.default, args)


def test_compensation_reaches_the_kernels(policy_tensor):
    q, k, v, _, *rest = arguments(policy_tensor)
    policy = policy_tensor(4, tau=0.0, sink=64, neighbours=0)
    plain, tangent = (
        torch.ops.afbs.attention(q, k, v, policy, *rest, name) for name in ("none", "tangent")
    )
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True,
                                                             enable_gqa=True)  # fmt: skip
    assert torch.equal(plain, torch.ops.afbs.attention(q, k, v, policy, *rest))
    assert (tangent - dense).norm() < 0.9 * (plain - dense).norm()


def test_fake_agrees_with_the_real_result(policy_tensor):
    args = arguments(policy_tensor)
    real = torch.ops.afbs.attention(*args)
    with FakeTensorMode() as mode:
        fake = torch.ops.afbs.attention(
            *(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args)
        )
    assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)


def test_short_calls_are_sdpa(policy_tensor):
    args = arguments(policy_tensor, length=100, min_length=101)
    q, k, v = args[:3]
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True,
                                                            enable_gqa=True)  # fmt: skip
    torch.testing.assert_close(torch.ops.afbs.attention(*args), want)


def test_flops_are_counted(policy_tensor):
    with FlopCounterMode(display=False) as counter:
        torch.ops.afbs.attention(*arguments(policy_tensor))
    assert counter.get_total_flops() >= 4 * 4 * 32 * 300 * 300 / 2


def test_gradients_with_compensation_are_an_error(policy_tensor):
    q, *rest = arguments(policy_tensor)
    with pytest.raises(RuntimeError, match="no backward with compensation 'tangent'"):
        torch.ops.afbs.attention(q.requires_grad_(), *rest, "tangent")
    with torch.no_grad():
        assert not torch.ops.afbs.attention(q, *rest, "tangent").requires_grad


def test_short_calls_have_sdpas_gradients(policy_tensor):
    args = arguments(policy_tensor, length=100, min_length=101)
    want, got = ([x.clone().requires_grad_() for x in args[:3]] for _ in range(2))
    torch.ops.afbs.attention(*got, *args[3:]).square().sum().backward()
    sdpa = torch.nn.functional.scaled_dot_product_attention
    sdpa(*want, is_causal=True, enable_gqa=True).square().sum().backward()
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_is_that_of_sdpa(policy_tensor, dtype):
    """q, k and v are cast, the policy is not: its window of 257 tokens has no bf16."""
    q, k, v, _, *rest = arguments(policy_tensor)
    policy = policy_tensor(4, mode=col.WINDOWED, window=257, sink=0)
    want = torch.ops.afbs.attention(*(x.to(dtype) for x in (q, k, v)), policy, *rest)
    with torch.autocast("cpu", dtype=dtype):
        got = torch.ops.afbs.attention(q, k, v, policy, *rest)
    assert got.dtype == dtype
    assert torch.equal(got, want)
