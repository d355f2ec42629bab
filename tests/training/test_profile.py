"""A profile finds what samples cost, from the fastest run of each."""

import time

import pytest

from afbs_compile.training.exchange import ScalarExchange
from afbs_compile.training.profile import name_of, profiled, seconds

A, B = 2e-6, 3e-6


def work(tokens):
    return tokens**2 / 1e4


def test_costs_are_found_in_spite_of_runs_that_were_disturbed(monkeypatch):
    now, runs = [0.0], []
    monkeypatch.setattr(time, "process_time", lambda: now[0])

    def step(tokens, budget):
        runs.append((tokens, budget))
        late = 5.0 if len(runs) % 3 == 0 else 1.0
        now[0] += late * (A * tokens + B * budget * work(tokens))

    cases = [(n, budget) for n in (1000, 4000, 16000) for budget in (0.2, 1.0)]
    cost = profiled(step, cases, work)
    assert cost.device == "cpu"
    for tokens, budget in cases:
        expected = A * tokens + B * budget * work(tokens)
        assert cost.predict([tokens], [budget * work(tokens)])[0] == pytest.approx(expected, 0.02)
    assert len(runs) == 4 * len(cases)
    assert ScalarExchange().agree(cost) is cost


def test_a_cpu_is_timed_by_its_processor_time():
    import torch

    device = torch.device("cpu")
    assert seconds(lambda *_: time.sleep(0.2), 1, 1.0, device) < 0.1
    assert name_of(device) == "cpu"
