"""Which steps do the Gluon backward's producers make, and do those without a mask need none?

The index arithmetic of the kernels, run as plain Python on torch's integers: needs no GPU.
"""

import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton.experimental.gluon")

from afbs_compile.kernels import gluon_shim
from afbs_compile.kernels import policy_columns as col
from afbs_compile.kernels.geometry import Mask, token_visible
from afbs_compile.kernels.triton_common import UNLIMITED, site_window

if gluon_shim.unusable_triton() is not None:
    pytest.skip(gluon_shim.unusable_triton(), allow_module_level=True)

from triton.experimental.gluon import language as gl

from afbs_compile.kernels import gluon_dkdv, gluon_dkdv_producer, gluon_dq_producer, gluon_mask


class Pointer:
    """A pointer into a list, as kernels use them."""

    def __init__(self, values, at=0):
        self.values, self.at = values, at

    def __add__(self, n):
        return Pointer(self.values, self.at + int(n))

    def __sub__(self, n):
        return self + -n


class Number(torch.Tensor):
    """An integer of a kernel: `x -= 1` makes a new one."""

    __iadd__, __isub__ = torch.Tensor.__add__, torch.Tensor.__sub__


class Language:
    """What the functions under test ask of Gluon's language."""

    int32, int64 = torch.int32, torch.int64
    minimum = staticmethod(lambda a, b: torch.minimum(torch.as_tensor(a), torch.as_tensor(b)))
    arange = staticmethod(lambda start, end, layout: torch.arange(start, end))
    where = staticmethod(lambda *values: torch.where(*map(torch.as_tensor, values)))
    SliceLayout = staticmethod(lambda axis, layout: None)

    @staticmethod
    def load(pointer, mask=True, other=0):
        return torch.tensor(pointer.values[pointer.at] if mask else other).as_subclass(Number)


def plain(kernel_function, **replaced):
    """A `gluon.jit` function as a Python function."""
    scope = {
        name: x.value if isinstance(x, gl.constexpr) else x
        for name, x in kernel_function.fn.__globals__.items()
    }
    return types.FunctionType(kernel_function.fn.__code__, scope | {"gl": Language} | replaced)


@st.composite
def problems(draw):
    """What a head's queries see, its lists as a bool matrix, its policy row, and the mask.

    A window of 255 and an offset of -2 end one key off the edge of a block.
    """
    length_q, length_k = draw(st.integers(1, 700)), draw(st.integers(1, 700))
    causal = draw(st.booleans())
    offset = draw(st.sampled_from([0, 0, length_k - length_q, -70, 35, -2])) if causal else 50
    mask = Mask(causal, offset, draw(st.sampled_from([0, 0, 1, 50, 255, 300])) if causal else 0)
    policy = torch.zeros(1, col.COLUMNS)
    policy[0, col.MODE] = draw(st.sampled_from([col.SPARSE, col.WINDOWED]))
    policy[0, col.WINDOW] = draw(st.sampled_from([0, 1, 40, 255, 300]))
    policy[0, col.SINK] = draw(st.sampled_from([0, 7, 70, 200]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    shape = -(-length_q // 128), -(-length_k // 64)
    keep = torch.rand(shape, generator=generator) < draw(st.sampled_from([0.3, 0.7, 2.0, 2.0]))
    seen = token_visible(mask, policy, torch.arange(length_q), torch.arange(length_k))[0]
    return seen, keep, policy[0], mask


def numbers(seen, policy, mask):
    """Reach and sink of the head, and the site, as the kernels take them."""
    windowed = policy[col.MODE] == col.WINDOWED
    head = (
        (policy[col.WINDOW].int() if windowed else torch.tensor(UNLIMITED)),
        policy[col.SINK].int(),
    )
    return head, (*seen.shape, mask.offset, site_window(mask))


@settings(max_examples=200)
@given(problem=problems())
def test_keys_are_seen_once_by_the_queries_that_see_them(problem):
    """dkdv: steps with their mask, and steps without one, add up to what is seen and listed."""
    seen, keep, policy, mask = problem
    (reach, sink), site = numbers(seen, policy, mask)
    split = plain(gluon_dkdv_producer.split)
    notes = {1: reach, 2: sink}
    visible = plain(gluon_dkdv.seen_pairs, get=lambda slot: notes[slot])
    found = torch.zeros(seen.shape, dtype=torch.int32)
    for tile in range(keep.shape[1]):
        listed = keep[:, tile].nonzero()[:, 0].tolist()
        first, entries = tile * 64, [*listed, *[0] * (len(keep) - len(listed))]
        start, whole, tail, end = split(
            Pointer([len(listed)]), Pointer(entries), torch.tensor(0), first, (reach, sink), site,
            len(keep), mask.causal,
        )  # fmt: skip
        assert whole <= tail <= end
        n = torch.arange(first, first + 64)
        for t in range(int(start), int(end)):
            at = listed[t // 2] * 128 + t % 2 * 64
            pairs = torch.ones(64, 64, dtype=torch.bool)
            if not whole <= t < tail:
                ring = types.SimpleNamespace(index=lambda slot: slot)
                pairs = visible(n - mask.offset - at, n, ring, 0, site[3], None, mask.causal)
            pairs = pairs.expand(64, 64)[: seen.shape[1] - first, : max(0, seen.shape[0] - at)]
            found[at : at + 64, first : first + 64] += pairs.T.int()
    kept = keep.repeat_interleave(128, 0).repeat_interleave(64, 1)
    assert torch.equal(found, (seen & kept[: seen.shape[0], : seen.shape[1]]).int())


@settings(max_examples=200)
@given(problem=problems())
def test_queries_walk_their_list_once_and_mask_what_needs_it(problem):
    """dq: every step of a list comes once; both boxes of one without a mask are seen whole."""
    seen, keep, policy, mask = problem
    head, site = numbers(seen, policy, mask)
    masked_steps = plain(gluon_mask.masked_steps)
    left_steps, turn_of = plain(gluon_dq_producer.left_steps), plain(gluon_dq_producer.turn_of)
    for tile, row in enumerate(keep):
        listed, first = row.nonzero()[:, 0].tolist(), tile * 128
        entries, steps = Pointer([*listed, *[0] * len(row)]), max((len(listed) + 1) // 2, 1)
        unbounded = (*site[:3], UNLIMITED)
        right = masked_steps(entries, steps, first, (UNLIMITED, 0), unbounded, mask.causal)
        left = left_steps(entries, len(listed), steps - right, first + 127, head, site)
        turns = [int(turn_of(i, right, left, steps)) for i in range(steps)]
        assert sorted(turns) == list(range(steps))
        for turn in turns[int(right) + left :]:
            at = 2 * ((len(listed) + 1) // 2 - 1 - turn)
            for box in listed[at], listed[at + 1]:
                assert box * 64 + 64 <= seen.shape[1]
                assert seen[first : first + 128, box * 64 : box * 64 + 64].all()
