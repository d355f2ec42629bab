"""Every spelling of SDPA is found and normalised; every module path is spelt one way."""

import pytest
import torch
import torch.nn.functional as F
from torch.fx import Graph, GraphModule

from afbs_compile.passes.sites import dotted, find

aten = torch.ops.aten.scaled_dot_product_attention


def graph_of(target, *args, **kwargs):
    graph = Graph()
    q, k, v, m = (graph.placeholder(n) for n in "qkvm")
    named = {"q": q, "k": k, "v": v, "m": m}
    args = [named.get(a, a) if isinstance(a, str) else a for a in args]
    kwargs = {n: named.get(a, a) if isinstance(a, str) else a for n, a in kwargs.items()}
    graph.output(graph.call_function(target, tuple(args), kwargs))
    return GraphModule({}, graph)


@pytest.mark.parametrize(
    "target",
    [
        F.scaled_dot_product_attention,
        torch._C._nn.scaled_dot_product_attention,
        aten,
        aten.default,
    ],
)
@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        (("q", "k", "v", "m", 0.5, False), {"scale": 0.25, "enable_gqa": True}),
        (("q", "k", "v"), {"attn_mask": "m", "dropout_p": 0.5, "scale": 0.25, "enable_gqa": True}),
        ((), {"query": "q", "key": "k", "value": "v", "attn_mask": "m", "dropout_p": 0.5,
              "is_causal": False, "scale": 0.25, "enable_gqa": True}),
    ],
)  # fmt: skip
def test_spellings(target, args, kwargs):
    (call,) = find(graph_of(target, *args, **kwargs))
    names = [n.name for n in (call.query, call.key, call.value, call.attn_mask)]
    assert names == ["q", "k", "v", "m"]
    rest = (call.dropout_p, call.is_causal, call.scale, call.enable_gqa)
    assert rest == (0.5, False, 0.25, True)
    assert call.name == "function"


def test_defaults():
    (call,) = find(graph_of(F.scaled_dot_product_attention, "q", "k", "v"))
    assert (call.attn_mask, call.dropout_p, call.is_causal) == (None, 0.0, False)
    assert (call.scale, call.enable_gqa) == (None, False)


def test_other_calls_are_left_alone():
    assert find(graph_of(torch.add, "q", "k")) == []


@pytest.mark.parametrize(
    "source",
    [
        "L['self'].model.layers.0.attn",
        "L['self']._modules['model']._modules['layers']._modules['0']._modules['attn']",
        "L['self'].__dict__['_modules']['model']._modules['layers'].0.attn",
        "L['m'].model.layers[0].attn",
    ],
)
def test_one_module_has_one_path(source):
    assert dotted(source) == "model.layers.0.attn"


def test_the_root_has_a_name():
    assert dotted("L['self']") == "model"
    assert dotted("L['self']._modules['a']._parameters['weight']") == "a.weight"
