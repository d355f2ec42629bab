"""Which calls that need gradients may be rewritten?"""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from afbs_compile.passes.guard import gradient_refusal


def tensors(device, *needed):
    with FakeTensorMode():
        made = [torch.empty(1, 4, 64, 32, device=device) for _ in range(3)]
    return [x.requires_grad_(n in needed) for n, x in enumerate(made)]


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (0, 1, 2)])
def test_gradients_need_a_device_with_a_backward(needed):
    assert "needs gradients: no backward on META" in gradient_refusal(tensors("meta", *needed))
    for device in ("cpu", "cuda"):
        assert gradient_refusal(tensors(device, *needed)) is None


def test_nothing_is_refused_where_no_gradient_is_needed():
    assert gradient_refusal(tensors("meta")) is None
    with torch.no_grad():
        assert gradient_refusal(tensors("meta", 0, 1, 2)) is None


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_gradients_are_refused_with_compensation(device):
    reason = gradient_refusal(tensors(device, 0), "tangent")
    assert reason.startswith("needs gradients: no backward with compensation 'tangent'")
    with torch.no_grad():
        assert gradient_refusal(tensors(device, 0), "tangent") is None


def test_tensors_may_come_from_an_iterator():
    assert "needs gradients" in gradient_refusal(iter(tensors("meta", 2)))
