"""Lengths with a long tail, and samplers of all ranks."""

import socket

import numpy as np
import pytest

from afbs_compile.training.sampler import SparsityAwareBatchSampler


@pytest.fixture(scope="session")
def long_tail():
    """Makes n lengths in tokens."""

    def make(n, seed=0):
        lengths = np.random.default_rng(seed).lognormal(8.0, 1.0, n)
        return np.clip(lengths, 128, 65536).astype(int)

    return make


@pytest.fixture(scope="session")
def samplers():
    """Makes the samplers of all ranks."""

    def make(lengths, world, *args, **options):
        return [
            SparsityAwareBatchSampler(lengths, *args, world=world, rank=rank, **options)
            for rank in range(world)
        ]

    return make


@pytest.fixture
def free_port():
    """A port that nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
