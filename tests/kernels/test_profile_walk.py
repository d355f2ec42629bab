"""Do the profile's kernels agree with torch? On a GPU, or in the interpreter without one."""

import logging
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from afbs_compile.kernels import policy_columns as col
from afbs_compile.kernels import profile as in_torch
from afbs_compile.kernels import profile_walk
from afbs_compile.kernels.data_mask import DataMask
from afbs_compile.kernels.geometry import Mask

# Triton 3.6's interpreter makes scalars in a way that NumPy deprecates
pytestmark = pytest.mark.filterwarnings(
    "ignore:Conversion of an array with ndim:DeprecationWarning"
)

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
OFF = -math.inf
LEVELS = [(OFF,), (OFF, -3.0), (-1.0, OFF, -6.0), (OFF, -10.0, -5.0, -3.0, -2.0, -1.0)]


def both(problem, lambdas, dtype=torch.float32, rows=None, selector="sub8"):
    """The profile by kernels and in torch; in torch from the same numbers in fp32."""
    q, k, v = (x.to(DEVICE, dtype) for x in (problem.q, problem.k, problem.v))
    policy = problem.policy.to(DEVICE)
    if rows is None:
        rows = torch.arange(-(-q.shape[2] // problem.block_m))
    rows = rows.to(DEVICE)
    call = {"selector": selector} | problem.site
    got = in_torch.by_kernels(q, k, v, policy, rows, lambdas, **call)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(in_torch, "no_kernel", lambda *_, **__: "a test wants torch")
        want = in_torch.profile(q, k, v, policy, rows=rows, lambdas=lambdas, **call)
    return got, want


def check(got, want, atol):
    for name in ("rows", "before", "forced", "visible"):
        assert torch.equal(getattr(got, name), getattr(want, name)), name
    torch.testing.assert_close(got.norm, want.norm, rtol=1e-4 if atol <= 1e-6 else 1e-3, atol=1e-6)
    assert got.computed.dtype == want.computed.dtype
    column = torch.arange(want.error.shape[-1], device=DEVICE)
    there = column <= (want.visible - want.forced)[..., None]
    assert torch.equal(got.computed * there, want.computed * there)
    scale = want.norm.sum().clamp(min=1e-6)
    zero = torch.zeros((), device=DEVICE)
    torch.testing.assert_close(
        torch.where(there, got.error, zero) / scale, torch.where(there, want.error, zero) / scale,
        atol=atol, rtol=1e-3 if atol > 1e-6 else 1e-4,
    )  # fmt: skip
    assert got.error.isfinite().all()


@settings(max_examples=25 if GPU else 8)
@given(st.data(), st.sampled_from(LEVELS), st.sampled_from(["sub8", "mean"]))
def test_agrees_with_torch(problems, poisoned_empty, data, lambdas, selector):
    problem = data.draw(problems(tau=1.0, longest=400 if GPU else 100))
    check(*both(problem, lambdas, selector=selector), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mask", [Mask(True), Mask(), Mask(True, 10, 30)])
def test_half_precision(problem_of, poisoned_empty, dtype, mask):
    check(*both(problem_of(mask), (OFF, -2.5), dtype), atol=1e-5)


def test_some_rows(problem_of):
    got, want = both(problem_of(Mask(True)), (OFF,), rows=torch.tensor([3, 1]))
    check(got, want, atol=1e-6)
    assert got.error.shape[3] == 2


def test_a_level_that_leaves_out_everything(problem_of):
    got, want = both(problem_of(Mask(True)), (1.0, OFF))
    check(got, want, atol=1e-6)
    torch.testing.assert_close(
        got.error[0], got.norm[..., None].expand_as(got.error[0]), rtol=1e-5, atol=1e-6
    )


def test_a_row_far_below_its_best_key(problem_of):
    """What is kept may weigh nothing beside what is not; the ratio of sums survives."""
    problem = problem_of(Mask())
    problem.k[:, :, 40:48] *= 6
    check(*both(problem, (OFF,)), atol=1e-5)


def test_every_other_call_says_why_it_stays_in_torch(problem_of, caplog, monkeypatch):
    problem = problem_of(Mask(True))
    q, k, v, policy = problem.q, problem.k, problem.v, problem.policy
    with caplog.at_level(logging.DEBUG):
        in_torch.profile(q, k, v, policy, selector="sub8", **problem.site)
    assert "profile in torch: no kernel on CPU" in caplog.text
    monkeypatch.setattr(torch.Tensor, "device", torch.device("cuda"))
    plain = {"compensation": "none", "data": None}
    assert in_torch.no_kernel(q, k, policy, **plain) is None
    assert "float64" in in_torch.no_kernel(q.double(), k.double(), policy, **plain)
    assert "tangent" in in_torch.no_kernel(q, k, policy, compensation="tangent", data=None)
    assert "mask" in in_torch.no_kernel(q, k, policy, compensation="none", data=DataMask())
    assert "320" in in_torch.no_kernel(q.repeat(1, 1, 1, 10), k, policy, **plain)
    windowed = policy.clone()
    windowed[0, col.MODE] = col.WINDOWED
    assert "windows" in in_torch.no_kernel(q, k, windowed, **plain)


def test_levels_are_grouped_from_the_most_permissive_one():
    places, groups = profile_walk.grouped((-3.0, OFF, -1.0, -5.0, -2.0))
    assert groups == [[OFF, -5.0, -3.0, -2.0], [-1.0, math.inf, math.inf, math.inf]]
    assert places == [2, 0, 4, 1, 3]
    assert profile_walk.grouped((OFF,)) == ([0], [[OFF]])
    assert profile_walk.grouped((OFF, -1.0)) == ([0, 1], [[OFF, -1.0]])
