"""The cost model finds what times are made of, and stays sound when they are not clean."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from afbs_compile.tuner.step_cost import CostModel

TRUTH = np.array([3e-6, 2e-7, 1e-3])
lengths = st.lists(st.integers(512, 65536), min_size=6, max_size=40, unique=True)


def work(tokens, density=0.3):
    tokens = np.asarray(tokens, float)
    return tokens, density * tokens**2 / 8192


def times(tokens, blocks, truth=TRUTH):
    return truth[0] * tokens + truth[1] * blocks + truth[2]


@given(lengths, st.integers(0, 2**32 - 1))
def test_predicts_clean_times(tokens, seed):
    density = np.random.default_rng(seed).uniform(0.1, 1.0, len(tokens))
    t, b = work(tokens, density)
    model = CostModel()
    model.observe(t, b, times(t, b))
    np.testing.assert_allclose(model.predict(t, b), times(t, b), rtol=0.02)


@given(st.integers(0, 2**32 - 1))
def test_is_never_negative(seed):
    """Tokens and blocks that rise together, and noise: plain least squares goes below 0 here."""
    rng = np.random.default_rng(seed)
    t, b = work(rng.integers(1000, 1300, 20))
    model = CostModel()
    model.observe(t, b, times(t, b) * rng.lognormal(0, 0.3, 20))
    assert (model.coefficients >= 0.0).all()
    assert (model.predict(t, b) > 0.0).all()


def test_plain_least_squares_goes_below_zero_there():
    negative = 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        t, b = work(rng.integers(1000, 1300, 20))
        x = np.stack([t, b, np.ones(20)], 1)
        y = times(t, b) * rng.lognormal(0, 0.3, 20)
        negative += bool((np.linalg.lstsq(x, y, rcond=None)[0] < 0.0).any())
    assert negative > 10


def test_what_is_no_time_is_counted_and_left_out():
    t, b = work([1000, 2000, 4000, 8000, 16000, 3000])
    clean, dirty = CostModel(), CostModel()
    clean.observe(t[:4], b[:4], times(t, b)[:4])
    assert dirty.observe(t, b, [*times(t, b)[:4], np.nan, -1.0]) == 4
    assert dirty.refused == 2
    np.testing.assert_array_equal(clean.coefficients, dirty.coefficients)


def test_one_wild_time_counts_as_four_times_the_prediction():
    t, b = work([1000, 2000, 4000, 8000] * 8)
    model = CostModel()
    model.observe(t, b, times(t, b))
    model.observe(t[:1], b[:1], [1e6])
    assert model.predict(t, b).max() < 2 * times(t, b).max()


def test_follows_a_device_that_slows_down():
    t, b = work([1000, 2000, 4000, 8000])
    model = CostModel(memory=0.9)
    for _ in range(5):
        model.observe(t, b, times(t, b))
    for _ in range(100):
        model.observe(t, b, 10 * times(t, b))
    np.testing.assert_allclose(model.predict(t, b), 10 * times(t, b), rtol=0.05)


def test_a_profile_holds_what_alike_steps_cannot_tell():
    """Steps of one length fit any mixture of a, b and c; the profile's is kept."""
    t, b = work([1000, 4000, 16000, 64000])
    model = CostModel()
    model.profile(t, b, times(t, b))
    for _ in range(300):
        model.observe(t[1:2], b[1:2], times(t, b)[1:2])
    np.testing.assert_allclose(model.predict(t, b), times(t, b), rtol=0.02)


def test_a_profile_needs_measurements():
    with pytest.raises(ValueError, match="4 or more"):
        CostModel().profile([1.0, 2.0], [1.0, 2.0], [1.0, 1.0])


def test_state_goes_through_json_and_predicts_the_same():
    t, b = work([1000, 2000, 4000, 8000])
    model, other = CostModel("a"), CostModel("a")
    model.profile(t, b, times(t, b))
    other.load_state_dict(json.loads(json.dumps(model.state_dict())))
    for m in (model, other):
        m.observe(t, b, 1.1 * times(t, b))
    np.testing.assert_array_equal(model.predict(t, b), other.predict(t, b))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"device": "b"}, "measured on 'b'"),
        ({"moment": [1.0, float("nan"), 0.0]}, "moment"),
        ({"gram": [[1.0]]}, "gram"),
        ({"memory": 0.0}, "memory"),
    ],
)
def test_a_state_that_cannot_be_is_refused(change, message):
    model = CostModel("a")
    with pytest.raises(ValueError, match=message):
        model.load_state_dict(model.state_dict() | change)


def test_a_state_with_a_gap_is_refused():
    state = CostModel().state_dict()
    del state["gram"]
    with pytest.raises(ValueError, match="lacks gram"):
        CostModel().load_state_dict(state)


def test_nothing_seen_is_not_ready():
    assert not CostModel().ready
