import math

import pytest

from afbs_compile.tuner.strategy import Goal, margin_of


def test_the_search_stays_a_margin_below_the_cap():
    assert Goal(0.2, margin=0.8).cap == pytest.approx(0.16)


def test_fewer_inputs_need_a_wider_margin():
    margins = [margin_of(inputs) for inputs in (1, 2, 3, 10)]
    assert margins == sorted(margins)
    assert margins[0] < margins[1] < margins[2] == margins[3] == Goal(0.2).margin


@pytest.mark.parametrize(("mean", "budget"), [(None, 0.18), (0.05, 0.05), (0.5, 0.18), (0.0, 0.0)])
def test_budget_is_what_can_bind(mean, budget):
    assert Goal(0.2, mean).budget == pytest.approx(budget)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"max_error": -0.1}, "max_error"),
        ({"max_error": math.nan}, "max_error"),
        ({"max_error": math.inf}, "max_error"),
        ({"max_error": 0.1, "mean_error": -1.0}, "mean_error"),
        ({"max_error": 0.1, "mean_error": math.nan}, "mean_error"),
        ({"max_error": 0.1, "margin": 0.0}, "margin"),
        ({"max_error": 0.1, "margin": 1.1}, "margin"),
    ],
)
def test_goals_out_of_range_are_refused(fields, match):
    with pytest.raises(ValueError, match=match):
        Goal(**fields)
