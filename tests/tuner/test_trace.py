import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from afbs_compile.tuner.objective import FULL, U_MAX, Measured, QueryBlocks, SequenceLength
from afbs_compile.tuner.trace import Trace, Traced

fractions = st.floats(1e-6, 1.0)


class Leveled:
    """Two heads; what was asked comes back as what was measured."""

    heads, lambdas = 2, (-np.inf, -4.0, -2.0)

    def __call__(self, u, fidelity, level=None):
        return Measured(u / 10.0, (np.zeros(2) if level is None else level) / 2.0)


def test_trace_totals(landscape):
    trace = Trace()
    site = Traced(landscape(0, 5), trace, "layer0", "explore")
    site(np.full(5, 1.0), QueryBlocks(0.125))
    site(np.full(5, 2.0), FULL)
    assert (trace.calls, trace.evaluations, trace.cost) == (2, 10, 1.125)
    assert trace.rows[0].phase == "explore"
    assert trace.rows[1].u == (2.0,) * 5
    assert trace.rows[1].level == (0,) * 5


@given(seed=st.integers(0, 2**32 - 1), calls=st.integers(0, 4), fraction=fractions)
def test_trace_survives_json(landscape, seed, calls, fraction):
    trace = Trace()
    site = Traced(landscape(seed, 3), trace, "läyer", "refine")
    rng = np.random.default_rng(seed)
    for _ in range(calls):
        site(rng.uniform(0.0, U_MAX, 3), SequenceLength(fraction))
    text = trace.to_json()
    assert Trace.from_json(text) == trace
    assert Trace.from_json(text).to_json() == text
    assert len(json.loads(text)) == calls


def test_errors_are_noted_with_the_site():
    class Broken:
        heads = 2

        def __call__(self, u, fidelity):
            return Measured(u * np.nan, u)

    trace = Trace()
    with pytest.raises(ValueError, match="head 0") as caught:
        Traced(Broken(), trace, "layer7", "refine")(np.zeros(2), FULL)
    assert any("layer7" in note for note in caught.value.__notes__)
    assert trace.calls == 0


def test_wrong_number_of_heads_is_noted_with_the_site():
    class Short:
        heads = 3

        def __call__(self, u, fidelity):
            return Measured(np.zeros(2), np.ones(2))

    with pytest.raises(ValueError, match="asked for 3 heads") as caught:
        Traced(Short(), Trace(), "layer7", "refine")(np.zeros(3), FULL)
    assert any("layer7" in note for note in caught.value.__notes__)


@given(levels=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), max_size=4))
def test_levels_are_passed_on_and_survive_json(levels):
    trace = Trace()
    site = Traced(Leveled(), trace, "layer0")
    assert site.lambdas == Leveled.lambdas
    for level in levels:
        measured = site(np.ones(2), FULL, np.array(level))
        np.testing.assert_array_equal(measured.density, np.array(level) / 2.0)
    assert [row.level for row in trace.rows] == levels
    assert Trace.from_json(trace.to_json()) == trace


def test_repeats_are_evaluations_and_no_points():
    trace = Trace()
    sites = [Traced(Leveled(), trace, name) for name in "ab"]
    level = np.array([0, 1])
    for site in sites:
        for u in ([1.0, 1.0], [1.0, 2.0]):
            site(np.array(u), FULL, level)
        site(np.array([1.0, 2.0]), QueryBlocks(0.5), level)
    site(np.array([1.0, 2.0]), FULL, level[::-1])
    assert trace.evaluations == 14
    assert trace.points() == 12
    assert trace.points(FULL) == 8


def test_look_ups_cost_their_profile_once_and_are_no_evaluations():
    class Profiled(Leveled):
        profile_cost = 3.5

    trace = Trace()
    free = Traced(Profiled(), trace, "layer0").look_ups()
    for _ in range(3):
        free(np.ones(2), FULL)
    assert (trace.calls, trace.evaluations, trace.points(), trace.cost) == (0, 0, 0, 3.5)
    assert Trace.from_json(trace.to_json()) == trace


def test_without_a_profile_every_look_up_is_an_evaluation():
    trace = Trace()
    Traced(Leveled(), trace, "layer0").look_ups()(np.ones(2), FULL)
    assert (trace.calls, trace.evaluations, trace.cost) == (1, 2, 1.0)
