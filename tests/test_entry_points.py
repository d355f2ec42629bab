"""Every entry point of the distribution loads, and PyTorch finds the backend."""

from importlib import metadata

import pytest

POINTS = list(metadata.distribution("afbs-compile").entry_points)


def test_the_promised_entry_points_exist():
    assert {(point.group, point.name) for point in POINTS} == {
        ("console_scripts", "afbs"),
        ("torch_dynamo_backends", "afbs"),
    }


@pytest.mark.parametrize("point", POINTS, ids=lambda point: f"{point.group}:{point.name}")
def test_loads(point):
    assert callable(point.load())


def test_torch_lists_the_backend():
    import torch

    assert "afbs" in torch.compiler.list_backends()
