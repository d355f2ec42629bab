"""Is a graph in pieces the graph, and is as little kept as can be?"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from afbs_compile.hybrid_calls import record
from afbs_compile.hybrid_objective import Evaluator
from afbs_compile.hybrid_samples import Sample
from afbs_compile.resume import Resumable

LAYERS, LENGTH, WIDTH = 5, 96, 64
pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class Model(nn.Module):
    """Layers with causal attention of two heads; what precedes them is used by all."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.table = nn.Embedding(50, WIDTH)
            self.heads = nn.ModuleList([nn.Linear(WIDTH, 3 * WIDTH) for _ in range(LAYERS)])
            self.last = nn.Linear(WIDTH, 50)

    def forward(self, ids):
        x = self.table(ids)
        scale = 1 + torch.linspace(0, 1, ids.shape[1])[:, None]
        for layer in self.heads:
            qkv = layer(x * scale).chunk(3, -1)
            q, k, v = (t.unflatten(-1, (2, WIDTH // 2)).transpose(1, 2) for t in qkv)
            x = x + F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(
                1, 2
            ).flatten(2)
        return self.last(x)


@pytest.fixture
def call():
    ids = torch.arange(LENGTH)[None].expand(3, -1) % 50
    ((made,), _) = record(Model(), [Sample(ids)], 16)
    return made


def evaluator(call, memory):
    return Evaluator([call], window=16, sink=2, memory_bytes=memory)


def choices(count):
    rng = np.random.default_rng(0)
    return [rng.random(2 * LAYERS) < 0.5 for _ in range(count)]


def test_only_the_stream_is_alive_between_layers(call):
    own = evaluator(call, 1 << 30)
    own(np.zeros(2 * LAYERS, dtype=bool))
    pieces = own.runs[0].pieces
    assert len(pieces.pieces) == LAYERS + 1
    assert pieces.pure
    *others, last = pieces.pieces[1:]
    assert {len(piece.made) for piece in others[:-1]} == {1}
    assert last.made == ()
    assert not any(node.op == "output" for piece in pieces.pieces for node in piece.given)


def test_resumed_runs_are_whole_runs(call):
    whole, resumed = evaluator(call, 0), evaluator(call, 1 << 30)
    for bits in choices(8):
        torch.testing.assert_close(resumed(bits), whole(bits), rtol=1e-5, atol=1e-9)
    assert whole.dense_passes() == 9  # the dense one, too
    assert resumed.dense_passes() < 9


@pytest.mark.parametrize("paths", [0.5, 1.0, 3.0])
def test_memory_is_kept_to_and_used(call, paths):
    size = 3 * LENGTH * WIDTH * 4 + LENGTH * 4
    limit = int(paths * LAYERS * size)
    own = evaluator(call, limit)
    base = np.zeros(2 * LAYERS, dtype=bool)
    base[:2] = True
    own(base)
    run: Resumable = own.runs[0]
    assert 0 < run.size_bytes <= limit
    assert (run.every > 1) == (paths < 2)
    before = run.ran
    end = base.copy()
    end[-1] = True
    own(end)
    assert run.ran - before < LAYERS
