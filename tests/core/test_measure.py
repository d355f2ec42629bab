"""The demo's measurements: perplexity by its definition, times in turns."""

import math
from types import SimpleNamespace

import pytest
import torch

from afbs_compile.demo import measure


def model_of(logits):
    return lambda **_: SimpleNamespace(logits=logits)


def inputs(tokens):
    return {"input_ids": torch.tensor([tokens])}


def test_uniform_model_is_as_perplexed_as_it_has_words():
    length = measure.CHUNK * 2 + 7
    forward = model_of(torch.zeros(1, length, 50))
    assert measure.perplexity(forward, inputs([3] * length)) == pytest.approx(50, rel=1e-5)


def test_perplexity_is_that_of_the_next_token():
    tokens = torch.randint(0, 7, (20,), generator=torch.Generator().manual_seed(0))
    logits = torch.randn(1, 20, 7, generator=torch.Generator().manual_seed(1))
    chance = logits[0].double().softmax(-1)
    surprise = [-math.log(chance[i, tokens[i + 1]]) for i in range(19)]
    expected = math.exp(sum(surprise) / 19)
    found = measure.perplexity(model_of(logits), inputs(tokens.tolist()))
    assert found == pytest.approx(expected, rel=1e-5)


def test_compare_runs_in_turns_and_takes_the_median(monkeypatch):
    calls, steps = [], []
    times = {"dense": iter([1, 4, 9, 6]), "sparse": iter([1, 2, 3, 1])}

    def forward(name):
        def run(**_):
            calls.append(name)
            return SimpleNamespace(logits=torch.zeros(1, 4, 2 if name == "dense" else 3))

        run.name = name
        return run

    def seconds(run, given):
        run(**given)
        return next(times[run.name])

    monkeypatch.setattr(measure, "seconds", seconds)
    progress = lambda done, total, phase, site: steps.append((done, total))
    found = measure.compare(forward("dense"), forward("sparse"), inputs([0, 1, 0, 1]), progress)
    assert calls == ["dense", "sparse"] * (1 + measure.ROUNDS)
    assert found.perplexity_dense == pytest.approx(2)
    assert found.perplexity_sparse == pytest.approx(3)
    assert found.forward_speedup == 2  # of 1, 2, 3
    assert steps[0] == (0, 5)
    assert steps[-1] == (5, 5)


def test_seconds_is_the_time_of_the_call():
    import time

    assert measure.seconds(lambda **_: time.sleep(0.05), inputs([0])) >= 0.05
