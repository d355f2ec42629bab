"""Policies for the tests of this folder, made from a document that schema 1 must always read."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from afbs_compile.policy import Policy, bucket_of

DOCUMENT = Path(__file__).with_name("policy_v1.json")


def tuning(length=4096, max_error=0.2, tau=0.9, **changes):
    """The document's tuning: a sparse site of two heads that keep `tau`, and a dense site."""
    (stored,) = Policy.read(DOCUMENT).tunings
    options = stored.options | {"max_error": max_error}
    site = stored.sites["layers.0.attn"]
    kept = replace(site, heads=tuple(replace(head, tau=tau) for head in site.heads))
    where = {"bucket": bucket_of(length), "length": length, "options": options}
    return replace(stored, **({"sites": stored.sites | {site.name: kept}} | where | changes))


def policy(*tunings, key="ab" * 16):
    """A policy of `tunings`, or of the document's."""
    return replace(Policy.read(DOCUMENT), model=key, tunings=tunings or (tuning(),))


@pytest.fixture(name="tuning")
def tuning_factory():
    return tuning


@pytest.fixture(name="policy")
def policy_factory():
    return policy


@pytest.fixture
def always_faster(monkeypatch):
    """Small problems are not worth their selection; say that they are, to whoever asks."""
    from afbs_compile import looks, source, timing  # noqa: F401  whoever asks is loaded

    real, speed = timing.measure, timing.Speed(dense=1.0, fixed=0.0, per_density=0.5)
    for name, module in list(sys.modules.items()):
        if name.startswith("afbs_compile.") and getattr(module, "measure", None) is real:
            monkeypatch.setattr(module, "measure", lambda *_: speed)
