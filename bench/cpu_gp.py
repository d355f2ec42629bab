"""How long do the tuner's own computations take on one core? Bars: research, tuner.md §8.

Run: OMP_NUM_THREADS=1 pytest bench -o python_files='cpu_*.py' --benchmark-only
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from afbs_compile.tuner.allocate import allocate
from afbs_compile.tuner.batched_gp import BatchedGP
from afbs_compile.tuner.curves import GRID
from afbs_compile.tuner.gp import GP

Array = NDArray[np.float64]
Benchmark = Callable[..., Any]


def problem(n: int) -> tuple[Array, Array, Array]:
    """A plane's points, a smooth function there with noise, and where to predict it."""
    rng = np.random.default_rng(0)
    x = rng.random((n, 2))
    y = np.sin(5.0 * x[:, 0]) + x[:, 1] ** 2 + 0.01 * rng.standard_normal(n)
    return x, y, rng.random((600, 2))


def stack(heads: int, n: int) -> tuple[Array, Array, Array]:
    """Such a problem for every head."""
    rng = np.random.default_rng(0)
    x = rng.random((heads, n, 2))
    return x, np.sin(5.0 * x[..., 0]) + x[..., 1] * rng.random((heads, 1)), rng.random((600, 2))


@pytest.mark.benchmark(group="gp fit")
@pytest.mark.parametrize("n", [25, 200])
def test_fit(benchmark: Benchmark, n: int) -> None:
    """Hyper-parameters by their likelihood."""
    x, y, _ = problem(n)
    benchmark(lambda: GP().fit(x, y))


@pytest.mark.benchmark(group="gp predict 600")
@pytest.mark.parametrize("n", [25, 200])
def test_predict(benchmark: Benchmark, n: int) -> None:
    """Mean and variance at 600 points."""
    x, y, at = problem(n)
    gp = GP().fit(x, y)
    benchmark(gp.predict, at)


@pytest.mark.benchmark(group="batched posterior, 32 heads, 600 candidates")
@pytest.mark.parametrize("n", [10, 30])
def test_batched_posterior(benchmark: Benchmark, n: int) -> None:
    """All heads at once, hyper-parameters known."""
    x, y, at = stack(32, n)
    gp = BatchedGP().fit(x, y)
    hyper = gp.hyper
    benchmark(lambda: gp.fit(x, y, hyper).predict(at))


@pytest.mark.benchmark(group="batched fit, 32 heads")
@pytest.mark.parametrize("n", [4, 8])
def test_batched_fit(benchmark: Benchmark, n: int) -> None:
    """Hyper-parameters of all heads at once."""
    x, y, _ = stack(32, n)
    benchmark(lambda: BatchedGP().fit(x, y))


@pytest.mark.benchmark(group="allocation, 1024 heads")
def test_allocate(benchmark: Benchmark) -> None:
    """A target for every head."""
    rng = np.random.default_rng(0)
    slope = rng.uniform(0.8, 2.4, (1024, 1))
    error = rng.uniform(0.1, 0.7, (1024, 1)) * np.exp(-slope * GRID)
    density = 1.0 / (1.0 + np.exp(rng.uniform(1.0, 3.0, (1024, 1)) - 1.3 * GRID))
    benchmark(allocate, error, density, 0.2, 0.06)
