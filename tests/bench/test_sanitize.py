"""Is the memory checker's program itself right?"""

import pytest
import torch

pytest.importorskip("triton")

from afbs_compile.kernels import dispatch


@pytest.fixture
def sanitize(monkeypatch):
    monkeypatch.setenv("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")  # as it sets itself, until the end
    from afbs_compile.bench import sanitize

    if not torch.cuda.is_available():  # the GPU's kernels, interpreted, with the GPU's blocks
        monkeypatch.setattr(dispatch, "block_sizes", lambda device_type: (128, 64))
    return sanitize


@pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # NumPy, of infinities
@pytest.mark.skipif(torch.cuda.is_available(), reason="interpreted")
@pytest.mark.parametrize("index", range(4))
def test_every_site(sanitize, index):
    errors = sanitize.run(sanitize.SITES[index], 64, "sub8", "cpu")
    assert "triton_forward" in errors
    assert max(errors.values()) < sanitize.BAR


def test_without_a_device(sanitize, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert sanitize.main() == 1
    assert "machine with an NVIDIA GPU" in capsys.readouterr().err


def test_a_wrong_result_fails(sanitize, monkeypatch):
    monkeypatch.setattr(sanitize, "run", lambda *_: {"dq": float("nan")})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert sanitize.main() == 1
