"""The summary of a policy: every figure from the heads it stands for."""

from dataclasses import replace

import pytest

from afbs_compile.summary import attention_speedup, natural, summary


def test_summary(policy):
    (tuning,) = summary(policy())["tunings"]
    sparse, dense = tuning["sites"]
    assert sparse["name"] == "layers.0.attn"
    assert sparse["density"] == pytest.approx(0.3)
    assert (sparse["error_min"], sparse["error_max"]) == (0.05, 0.1)
    assert sparse["error_mean"] == pytest.approx(0.075)
    assert dense["reason"] == "it is not faster"
    assert tuning["max_error"] == 0.1
    assert tuning["confidence"] == 0.5  # one input


def test_confidence_grows_with_inputs(policy, tuning):
    chances = [tuning(inputs=("x",) * count).confidence for count in (0, 1, 3, 99)]
    assert chances == [0, 0.5, 0.75, 0.99]


def test_attention_speedup_counts_dense_sites_as_they_are(tuning):
    base = tuning()
    sparse, dense = base.sites.values()
    timed = replace(dense, seconds_dense=0.4, seconds_sparse=9.0)
    both = replace(base, sites={sparse.name: sparse, timed.name: timed})
    assert attention_speedup(both) == pytest.approx(0.8 / (0.1 + 0.4))
    assert attention_speedup(base) is None  # the dense site was not timed
    assert attention_speedup(replace(base, sites={})) is None


def test_natural_order():
    names = ["layers.10.attn", "layers.9.attn", "attn", "layers.9.attn#1"]
    assert sorted(names, key=natural) == [
        "attn", "layers.9.attn", "layers.9.attn#1", "layers.10.attn"
    ]  # fmt: skip
