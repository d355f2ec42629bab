"""What all tests share: hypothesis profiles, the GPU rule, a private cache, poisoned memory."""

import functools
import logging
import math
import os

import pytest
import torch

if not torch.cuda.is_available():  # read when triton is imported, whoever imports it first
    os.environ["TRITON_INTERPRET"] = "1"

from hypothesis import HealthCheck, settings

from afbs_compile.kernels import dispatch, flex, reference
from afbs_compile.kernels import policy_columns as col

SLOW_START = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]

settings.register_profile("dev", max_examples=25, deadline=None, suppress_health_check=SLOW_START)
settings.register_profile("ci", settings.get_profile("dev"), derandomize=True, print_blob=True)
settings.register_profile("gpu", settings.get_profile("dev"), max_examples=25)
settings.register_profile("nightly", settings.get_profile("dev"), max_examples=2000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))

torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


TORCH_ITSELF = (  # warnings of torch's own imports, in 2.13
    "ignore:.torch.jit.script_method. is deprecated:DeprecationWarning",
)


def pytest_configure(config):
    for line in TORCH_ITSELF:
        config.addinivalue_line("filterwarnings", line)
    logging.getLogger("torch.__trace").propagate = False  # thousands of lines at a failure


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no CUDA device here")


@pytest.fixture(autouse=True)
def private_cache(tmp_path, monkeypatch):
    """Every test has a policy cache of its own and an environment that asks for nothing."""
    monkeypatch.setenv("AFBS_CACHE_DIR", str(tmp_path / "afbs-cache"))
    monkeypatch.delenv("AFBS_DISABLE", raising=False)
    monkeypatch.delenv("AFBS_LOG", raising=False)
    return tmp_path / "afbs-cache"


@pytest.fixture(autouse=True)
def plain_scores(request, monkeypatch):
    """Selection on a CPU runs uncompiled, unless a test is marked `fused_scores`.

    It is half of what there is to compile. That it is the same compiled: `kernels/test_selection`.
    """
    if not request.node.get_closest_marker("fused_scores"):
        monkeypatch.setattr(dispatch, "fused_scores", lambda *_: None)


@pytest.fixture
def poisoned_empty(monkeypatch):
    """`torch.empty` and `empty_like` give NaN, so output that nobody wrote is seen."""
    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))


def poisoned(make):
    @functools.wraps(make)
    def filled(*args, **kwargs):
        tensor = make(*args, **kwargs)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    return filled


@pytest.fixture(scope="session")
def policy_tensor():
    """Makes the policy tensor of some equal heads."""
    return equal_heads


def equal_heads(heads, mode=col.SPARSE, tau=0.9, window=20, sink=16, neighbours=1, theta=-1.0):
    policy = torch.zeros(heads, col.COLUMNS)
    policy[:, col.MODE], policy[:, col.TAU], policy[:, col.THETA] = mode, tau, theta
    policy[:, col.LAMBDA], policy[:, col.WINDOW] = -math.inf, window
    policy[:, col.SINK], policy[:, col.NEIGHBOURS] = sink, neighbours
    return policy


@pytest.fixture
def fresh_dynamo():
    """Compile from nothing, and leave nothing compiled behind."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def uncompiled(monkeypatch):
    """The kernels' oracles in their places: nothing to compile."""
    monkeypatch.setattr(flex, "forward", oracle)


def oracle(*args, beside=None, masked=None, **keywords):
    data = None if masked is None else masked.data
    o, lse = reference.forward(*args, data=data, **keywords)
    if beside is None:
        return o
    total = torch.logaddexp(lse, beside[1])
    return (
        o * torch.exp(lse - total)[..., None] + beside[0] * torch.exp(beside[1] - total)[..., None]
    )


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """The folder of a two-layer Llama with random weights, whose tokens are bytes."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from tokenizers.decoders import ByteLevel
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny-llama")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: n for n, c in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=256,
            hidden_size=128,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
        )
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder
