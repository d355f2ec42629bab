"""Who decides when a search was at its best?"""

import numpy as np
import pytest

from afbs_compile.tuner.finals import decided
from afbs_compile.tuner.heads import bits, text
from afbs_compile.tuner.tally import Tally

SEARCHED = {"0011": 3.0, "0110": 2.0, "1001": np.inf, "1100": 1.0, "1010": 1.1, "1000": 0.1}


@pytest.fixture
def tally():
    made = Tally(lambda asked: [SEARCHED[text(one)] for one in asked], 2, 100)
    made([bits(name) for name in SEARCHED])
    return made


def held(**losses):
    asked = []

    def validate(choices):
        asked.extend(map(text, choices))
        return [losses.get(text(one), 9.0) for one in choices]

    return validate, asked


def winner(tally, losses, count, plain=()):
    validate, asked = held(**losses)
    choice, loss, validated = decided(tally, validate, count, [bits(name) for name in plain])
    assert validated == len(asked) <= count
    assert loss == SEARCHED[text(choice)]
    return text(choice), asked


def test_both_losses_together_decide(tally):
    losses = {"1100": 5.0, "1010": 4.0, "0110": 0.5, "0011": 1.0}
    best, asked = winner(tally, losses, 3)
    assert asked == ["1100", "0110", "1010"]  # the last incumbents, then what has the least loss
    assert best == "0110"  # 2 · 0.5; 0011 was the best too long ago
    assert winner(tally, losses | {"1010": 0.8}, 3)[0] == "1010"
    assert winner(tally, losses, 1) == ("1100", ["1100"])


def test_a_ranking_that_is_better_on_held_out_inputs_wins(tally):
    losses = {"1100": 1.0, "1010": 0.9}
    best, asked = winner(tally, losses, 3, ["1010", "1001"])
    assert (best, asked) == ("1010", ["1010", "1100", "0110"])
    assert winner(tally, losses | {"1010": 0.95}, 3, ["1010"])[0] == "1100"


def test_rankings_leave_a_place_for_the_search(tally):
    assert winner(tally, {"1100": 0.5}, 1, ["0011", "0110"]) == ("1100", ["1100"])
    assert winner(tally, {"1100": 0.5}, 2, ["0011", "0110"])[1] == ["0110", "1100"]
