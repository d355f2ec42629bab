"""NOMAD as a solver: what is asked and told, and what a child that crashes or hangs leaves."""

import importlib.util
import sys
from dataclasses import replace

import numpy as np
import pytest

from afbs_compile.tuner import nomad
from afbs_compile.tuner.bosch import Search, search
from afbs_compile.tuner.heads import Impossible, Layout
from afbs_compile.tuner.solvers import Task
from afbs_compile.tuner.tally import Stop, Tally

HARM = np.arange(12.0)
ASKS = """
import json, sys
def hear(): return json.loads(sys.stdin.readline())
def say(told): print(json.dumps(told), flush=True)
wanted = hear()
say({"bits": wanted["start"]}); first = hear()["loss"]
"""
FLIPS = (
    ASKS
    + """
n = len(wanted["start"])
for k in range(n):
    say({"bits": [int(k <= i < k + 3) for i in range(n)]}); hear()
say({"done": "all"})
"""
)


def fake(code):
    return [sys.executable, "-c", code]


def task(budget=20, objective=None):
    layout = Layout((3, 3, 3, 3))
    start = np.arange(12) >= 9
    tally = Tally(objective or (lambda batch: [float(HARM @ b) for b in batch]), 3, 30)
    free = np.arange(2, 12)
    return Task(tally, layout, HARM, start, free, budget, np.random.default_rng(0))


def test_what_is_found_has_the_right_number():
    given = task()
    best = nomad.mads(given, fake(FLIPS))
    assert np.flatnonzero(best).tolist() == [2, 3, 4]
    assert all(name.count("1") == 3 and name[:2] == "00" for name in given.tally.losses)


def test_the_budget_is_kept():
    given = task(budget=4)
    nomad.mads(given, fake(FLIPS))
    assert len(given.tally.losses) == 4


def test_the_nearest_choice_of_the_right_number():
    given = task()
    for asked, chosen in (
        ([1] * 10, [2, 3, 4]),
        ([0] * 10, [2, 3, 4]),
        ([0] * 9 + [1], [2, 3, 11]),
        ([0] * 6 + [1] * 4, [8, 9, 10]),
    ):
        bits = nomad.nearest(given, np.array(asked, dtype=bool))
        assert np.flatnonzero(bits).tolist() == chosen


def test_every_neighbour_of_a_start_is_another_choice():
    """Also of a start that the prior itself would choose."""
    given = replace(task(), start=np.arange(12) < 5)
    for n in range(10):
        asked = given.start[given.free]
        asked[n] ^= True
        bits = nomad.nearest(given, asked)
        assert bits.sum() == 5
        assert bits[given.free][n] == asked[n]
        assert (bits != given.start).sum() == 2


def test_a_crash_leaves_what_was_found(caplog):
    crash = ASKS + 'say({"bits": [1] * 10}); hear(); sys.stderr.write("boom"); sys.exit(11)'
    best = nomad.mads(task(), fake(crash))
    assert np.flatnonzero(best).tolist() == [2, 3, 4]
    assert "ended with code 11 (boom) after 2 questions" in caplog.text


def test_a_silent_child_is_given_up(caplog):
    hang = ASKS + "import time; time.sleep(600)"
    assert nomad.mads(task(), fake(hang), patience=3.0).sum() == 3
    assert "was silent for 3 s after 1 questions" in caplog.text


@pytest.mark.parametrize("code", ["raise SystemExit(3)", 'print("hello")'])
def test_a_child_that_asks_nothing_is_an_error(code):
    with pytest.raises(Impossible, match=r'after 0 questions; take solver "lns"'):
        nomad.mads(task(), fake(code))


def test_a_loss_that_is_none_is_told_as_null():
    checks = ASKS + 'say({"done": "x"}) if first is None else sys.exit(1)'

    assert nomad.mads(task(objective=lambda b: [np.inf] * len(b)), fake(checks)).sum() == 3


def test_a_stop_ends_the_child_too():
    def objective(batch):
        if objective.calls:
            raise Stop
        objective.calls += 1
        return [0.0] * len(batch)

    objective.calls = 0
    with pytest.raises(Stop):
        nomad.mads(task(objective=objective), fake(FLIPS))


def test_without_nomad_a_search_does_not_begin(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(Impossible, match=r'pip install "afbs-compile\[nomad\]"'):
        Search(Layout((3, 3)), 0.5, 10, solver="nomad")


@pytest.mark.skipif(not importlib.util.find_spec("PyNomad"), reason="PyNomadBBO is not installed")
def test_nomad_itself_finds_better_heads_and_the_same_again():
    rng = np.random.default_rng(2)
    layout = Layout((4,) * 6)
    harm = rng.random(24)
    wanted = Search(layout, 0.5, 120, rng.random(24), solver="nomad", stages=("exchange",))

    def objective(batch):
        return [float(harm @ bits) for bits in batch]

    found, again = search(objective, wanted), search(objective, wanted)
    assert found.bits.sum() == 12
    assert found.loss < found.history[0][1] - 0.5
    assert found.history == again.history
