"""How long do the tuner's own computations take on one core? Bars: research, tuner.md §8.

Run: OMP_NUM_THREADS=1 pytest bench -o python_files='cpu_*.py' --benchmark-only
"""

import numpy as np
import pytest

from afbs_compile.tuner.allocate import allocate
from afbs_compile.tuner.batched_gp import BatchedGP
from afbs_compile.tuner.curves import GRID
from afbs_compile.tuner.gp import GP


def problem(n):
    rng = np.random.default_rng(0)
    x = rng.random((n, 2))
    y = np.sin(5.0 * x[:, 0]) + x[:, 1] ** 2 + 0.01 * rng.standard_normal(n)
    return x, y, rng.random((600, 2))


def stack(heads, n):
    rng = np.random.default_rng(0)
    x = rng.random((heads, n, 2))
    return x, np.sin(5.0 * x[..., 0]) + x[..., 1] * rng.random((heads, 1)), rng.random((600, 2))


@pytest.mark.benchmark(group="gp fit")
@pytest.mark.parametrize("n", [25, 200])
def test_fit(benchmark, n):
    x, y, _ = problem(n)
    benchmark(lambda: GP().fit(x, y))


@pytest.mark.benchmark(group="gp predict 600")
@pytest.mark.parametrize("n", [25, 200])
def test_predict(benchmark, n):
    x, y, at = problem(n)
    gp = GP().fit(x, y)
    benchmark(gp.predict, at)


@pytest.mark.benchmark(group="batched posterior, 32 heads, 600 candidates")
@pytest.mark.parametrize("n", [10, 30])
def test_batched_posterior(benchmark, n):
    x, y, at = stack(32, n)
    gp = BatchedGP().fit(x, y)
    hyper = gp.hyper
    benchmark(lambda: gp.fit(x, y, hyper).predict(at))


@pytest.mark.benchmark(group="batched fit, 32 heads")
@pytest.mark.parametrize("n", [4, 8])
def test_batched_fit(benchmark, n):
    x, y, _ = stack(32, n)
    benchmark(lambda: BatchedGP().fit(x, y))


@pytest.mark.benchmark(group="allocation, 1024 heads")
def test_allocate(benchmark):
    rng = np.random.default_rng(0)
    slope = rng.uniform(0.8, 2.4, (1024, 1))
    error = rng.uniform(0.1, 0.7, (1024, 1)) * np.exp(-slope * GRID)
    density = 1.0 / (1.0 + np.exp(rng.uniform(1.0, 3.0, (1024, 1)) - 1.3 * GRID))
    benchmark(allocate, error, density, 0.2, 0.06)
