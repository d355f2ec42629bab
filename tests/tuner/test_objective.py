import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from afbs_compile.tuner.objective import (
    FULL,
    U_MAX,
    Measured,
    QueryBlocks,
    SequenceLength,
    Trace,
    Traced,
    expect_heads,
    parse_fidelity,
    tau_of_u,
    u_of_tau,
)

fractions = st.floats(1e-6, 1.0)


@given(u=st.floats(0.0, U_MAX))
def test_u_and_tau_are_inverse(u):
    assert float(u_of_tau(tau_of_u(u))) == pytest.approx(u, abs=1e-9)


def test_tau_of_known_u():
    np.testing.assert_allclose(tau_of_u(np.array([0.0, 1.0, 2.0])), [0.0, 0.9, 0.99])
    np.testing.assert_allclose(u_of_tau(np.array([0.0, 0.9, 0.99999, 1.0])), [0.0, 1.0, 4.0, 4.0])


@pytest.mark.parametrize("tau", [-0.1, 1.1, np.nan])
def test_tau_out_of_range_is_refused(tau):
    with pytest.raises(ValueError, match="tau must lie"):
        u_of_tau(tau)


@given(fraction=fractions)
def test_fidelities_survive_their_string_form(fraction):
    for fidelity in (QueryBlocks(fraction), SequenceLength(fraction)):
        assert parse_fidelity(str(fidelity)) == fidelity


def test_costs_are_in_dense_passes():
    assert (FULL.cost, QueryBlocks(0.25).cost, SequenceLength(0.25).cost) == (1.0, 0.25, 0.0625)


@pytest.mark.parametrize("text", ["", "query_blocks", "query_blocks(0.5", "rows(0.5)"])
def test_other_texts_are_no_fidelities(text):
    with pytest.raises(ValueError, match="is no fidelity"):
        parse_fidelity(text)


@pytest.mark.parametrize("kind", [QueryBlocks, SequenceLength])
@pytest.mark.parametrize("fraction", [0.0, -1.0, 1.01, np.nan])
def test_fraction_out_of_range_is_refused(kind, fraction):
    with pytest.raises(ValueError, match="fraction"):
        kind(fraction)


@pytest.mark.parametrize(
    ("error", "density", "match"),
    [
        ([0.1, np.nan], [0.5, 0.5], r"head 1: .* error nan"),
        ([np.inf, 0.1], [0.5, 0.5], r"head 0: .* error inf"),
        ([0.1, -0.1], [0.5, 0.5], r"head 1: .* error -0.1"),
        ([0.1, 0.1], [0.5, 1.1], r"head 1: .* density 1.1"),
        ([0.1, 0.1], [np.nan, 0.5], r"head 0: .* density nan"),
        ([0.1, 0.1], [0.5], r"need \[heads\]"),
        (0.1, 0.5, r"need \[heads\]"),
    ],
)
def test_nonsense_is_refused_with_the_head(error, density, match):
    with pytest.raises(ValueError, match=match):
        Measured(np.array(error), np.array(density))


def test_rounding_of_a_density_is_forgiven():
    measured = Measured(np.zeros(2), np.array([1.0 + 5e-7, -5e-7]))
    np.testing.assert_array_equal(measured.density, [1.0, 0.0])


def test_number_of_heads_is_checked():
    measured = Measured(np.zeros(2), np.ones(2))
    assert expect_heads(measured, 2) is measured
    with pytest.raises(ValueError, match="asked for 3 heads"):
        expect_heads(measured, 3)


def test_trace_totals(landscape):
    trace = Trace()
    site = Traced(landscape(0, 5), trace, "layer0", "explore")
    site(np.full(5, 1.0), QueryBlocks(0.125))
    site(np.full(5, 2.0), FULL)
    assert (trace.calls, trace.evaluations, trace.cost) == (2, 10, 1.125)
    assert trace.rows[0].phase == "explore"
    assert trace.rows[1].u == (2.0,) * 5


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
