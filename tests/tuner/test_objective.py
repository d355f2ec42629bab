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
    checked_lambdas,
    expect_heads,
    lambdas_of,
    parse_fidelity,
    profile_cost_of,
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


def test_an_evaluator_that_does_not_tell_has_lambda_off_and_no_profile(landscape):
    class Levels:
        heads, lambdas, profile_cost = 2, (-np.inf, -3.0), 4.0

    assert lambdas_of(Levels()) == (-np.inf, -3.0)
    assert profile_cost_of(Levels()) == 4.0
    assert lambdas_of(landscape(0, 2)) == (-np.inf,)
    assert profile_cost_of(landscape(0, 2)) is None


@pytest.mark.parametrize("lambdas", [(), (-3.0,), (-np.inf, -3.0, -3.0), (-np.inf, -3.0, -5.0)])
def test_levels_begin_with_off_and_ascend(lambdas):
    assert checked_lambdas((-np.inf, -3.0, -1.0)) == (-np.inf, -3.0, -1.0)
    with pytest.raises(ValueError, match="begin with -inf and ascend"):
        checked_lambdas(lambdas)
