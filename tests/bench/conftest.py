"""Devices and problems of the benchmark where there is no GPU."""

import time

import pytest
import torch

from afbs_compile.bench import baselines, harness, problems
from afbs_compile.bench.baselines import QUICK, Flex, Notes
from afbs_compile.bench.cases import Bench
from afbs_compile.bench.problems import Shape


class Clock:
    """An event of a device that has no queue."""

    def record(self):
        self.at = time.perf_counter()

    def elapsed_time(self, later):
        return 1e3 * (later.at - self.at)


class Cpu:
    """A device without a queue: what is enqueued is done at once."""

    def event(self):
        return Clock()

    def hold(self, milliseconds):
        pass

    def flush(self):
        pass

    def synchronize(self):
        pass

    def now(self):
        return time.perf_counter()


def refuse():
    raise RuntimeError("not on this device")


@pytest.fixture
def on_cpu(monkeypatch):
    """Times are the processor's, and plain SDPA stands for cuDNN's."""
    monkeypatch.setattr(harness, "cuda", Cpu)
    monkeypatch.setattr(baselines, "cudnn", lambda problem: lambda: baselines.sdpa(problem))
    monkeypatch.setattr(baselines, "fa2", lambda problem: refuse)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


@pytest.fixture
def notes():
    return Notes(tell=lambda text: None)


@pytest.fixture
def bench(notes):
    return Bench(Flex(QUICK, notes), notes, kept=(1.0, 0.25), repeats=7)


def small(length=300, causal=True, kv_heads=2, kind="randn"):
    shape = Shape(length, causal, 64, kv_heads)
    return problems.make(shape, kind, heads=2, device="cpu", dtype=torch.float32)


@pytest.fixture(name="small", scope="session")
def small_problem():
    """Makes a problem that an interpreter can do: two heads, a length that fills no block."""
    return small
