"""What the clock says of a layer: the dense call, and the sparse one by density."""

import numpy as np
import pytest
import torch

from afbs_compile import timing
from afbs_compile.capture import Layer
from afbs_compile.evaluators import DirectEvaluator, policy_at
from afbs_compile.kernels.geometry import Mask
from afbs_compile.tuner.objective import FULL, U_MAX, tau_of_u


@pytest.fixture
def layer():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 500, 32, generator=generator) for _ in range(3))
    return Layer(q * 3, k, v, Mask(causal=True), 32**-0.5)


@pytest.mark.usefixtures("uncompiled")
def test_density_is_the_evaluators(layer):
    direct = DirectEvaluator(timing.One(layer), "one", 2, "sub8")
    for u in (0.0, 0.5, U_MAX):
        wanted = direct(np.full(2, u), FULL).density.mean()
        policy = policy_at(np.asarray(tau_of_u(np.full(2, u))), layer.q.device)
        assert direct.density(policy) == pytest.approx(wanted)


@pytest.mark.usefixtures("uncompiled")
def test_a_line_through_the_least_and_the_largest_density(layer, monkeypatch):
    monkeypatch.setattr(timing, "interleaved", lambda calls, device: [5.0, 2.0, 2.2])
    direct = DirectEvaluator(timing.One(layer), "one", 2, "sub8")
    low, high = (direct.density(policy_at(1 - 10.0**-np.full(2, u), layer.q.device))
                 for u in (0.0, U_MAX))  # fmt: skip
    speed = timing.measure(layer, "sub8")
    assert 0 < low < high
    assert speed.dense == 5.0
    assert speed.sparse(low) == pytest.approx(2.0)
    assert speed.sparse(high) == pytest.approx(2.2)
