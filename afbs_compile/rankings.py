"""What do single runs tell about which heads need their context? Static rankings, by KV group.

Each is an expected harm of windowing a KV group, larger for heads that should stay global:
- `locality`: attention mass outside window and sink, mean over the queries;
- `retrieval`: on random tokens that come twice, attention mass on the earlier copy and on what
  followed it (Razor-like: induction heads find what they need there);
- `fisher`: ½ E (∂ log p / ∂g)², g leading from the head's dense output to its windowed one: the
  second-order term of KL(dense ‖ hybrid), of each head alone;
- `curvature`: the same with all pairs of heads, at the choice that costs least by it
  (`tuner.curvature`), so it is one ranking for each number of windowed heads.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import Interpreter, Node
from torch.utils.checkpoint import checkpoint

from afbs_compile.capture import Layer, Stream, layer_of, private
from afbs_compile.damage import logits_of
from afbs_compile.hybrid_objective import Call, Evaluator, windowed
from afbs_compile.kernels import dispatch
from afbs_compile.kernels.geometry import Mask, token_visible
from afbs_compile.passes.rewrite import Site
from afbs_compile.policy_tensor import rows
from afbs_compile.tuner import curvature
from afbs_compile.tuner.arrays import Floats

CURVATURE = "curvature"
RANKINGS = (CURVATURE, "fisher", "locality", "retrieval")
SLOPES = (CURVATURE, "fisher")  # rankings that `forms` tells
DRAWS = 8  # of directions, for every call
QUERIES = 256  # rows of attention at once
TINY = 1e-30


def ranking(name: str, evaluator: Evaluator, *, window: int, sink: int, seed: int = 0) -> Floats:
    """Expected harm of windowing, of every bit of the evaluator's layout [N].

    Raises:
        ValueError: No such ranking, or one that the calls cannot give.
    """
    calls = evaluator.calls
    if name == "locality":
        return by_sites([outside(call, window, sink) for call in calls])
    if name == "retrieval":
        return by_sites([looked_up(call, seed) for call in calls[:1]])
    raise ValueError(f"no ranking {name!r} of attention; there are locality, retrieval")


def forms(evaluator: Evaluator, *, window: int, sink: int, seed: int = 0) -> Floats:
    """What windowing costs in every task, as quadratic forms [T, N, N], nats a prediction."""
    evaluator.prepare()
    generator = torch.Generator(evaluator.device).manual_seed(seed)
    found: dict[str, list[Floats]] = {}
    for call, (counted, _) in zip(evaluator.calls, evaluator.dense, strict=True):
        own = slopes(call, counted.rows, window, sink, generator)
        found.setdefault(call.sample.task, []).append(own)
    return np.array([curvature.shrunk(np.concatenate(own)) for own in found.values()])


def of_forms(name: str, costs: Floats, count: int) -> Floats:
    """The ranking that quadratic forms [T, N, N] tell, where `count` bits will be windowed."""
    if name == CURVATURE:
        return curvature.harms(costs, count)
    alone = np.einsum("tnn->tn", costs)  # tasks weigh the same
    return np.asarray((alone / np.maximum(alone.sum(1), TINY)[:, None]).mean(0))


def by_sites(found: Sequence[Sequence[Tensor]]) -> Floats:
    """The mean over calls of tensors [Hkv] a site, as one array [N]."""
    flat = torch.stack([torch.cat([x.double() for x in sites]) for sites in found])
    return np.asarray(flat.mean(0).cpu().numpy(), dtype=np.float64)


@torch.no_grad()
def outside(call: Call, window: int, sink: int) -> list[Tensor]:
    """Mean mass beyond window and sink, `[Hkv]` a site."""
    head = rows([windowed(window, sink)])
    found = []
    for layer, site in layers(call):
        mass = torch.zeros(layer.q.shape[1], device=layer.q.device)
        for weights, i, j in attention(layer):
            seen = token_visible(layer.mask, head.to(i.device), i, j)
            mass += (weights * ~seen).sum((0, 2, 3))
        found.append(by_group(mass / (layer.q.shape[0] * layer.q.shape[2]), site.kv_heads))
    return found


@torch.no_grad()
def looked_up(call: Call, seed: int) -> list[Tensor]:
    """Mean mass on the earlier copy of a token and on its follower, `[Hkv]` a site."""
    args, half = repeated(call.args, seed)
    found = []
    for layer, site in layers(Call(call.gm, args, call.sites, call.sample)):
        mass = torch.zeros(layer.q.shape[1], device=layer.q.device)
        for weights, i, j in attention(layer):
            back = i[:, None] - j
            target = (back == half) | (back == half - 1)
            mass += (weights * target).sum((0, 2, 3))
        found.append(by_group(mass / (layer.q.shape[0] * half), site.kv_heads))
    return found


def layers(call: Call) -> Iterator[tuple[Layer, Site]]:
    """What every site of a call sees."""
    stream = Stream(call.gm, call.args, call.sites)
    return ((stream.layer(site.name), site) for site in call.sites)


def repeated(args: Sequence[Any], seed: int) -> tuple[list[Any], int]:
    """The inputs with random tokens that come twice, and after how many they come again.

    Raises:
        ValueError: No input holds tokens.
    """
    result = list(args)
    for n, x in enumerate(args):
        if isinstance(x, Tensor) and x.dtype == torch.int64 and x.dim() == 2 and x.shape[1] > 3:
            half = x.shape[1] // 2
            generator = torch.Generator().manual_seed(seed)
            at = torch.randint(0, x.numel(), (x.shape[0], half), generator=generator)
            once = x.flatten()[at.to(x.device)]  # tokens of the text, so that all are usual ones
            result[n] = torch.cat([once, once, once], 1)[:, : x.shape[1]]
            return result, half
    raise ValueError("the ranking `retrieval` needs token ids of shape [B, L] among the inputs")


def attention(layer: Layer) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Attention weights `[B, Hq, rows, Lk]` of some queries, with their and the keys' places."""
    repeat = layer.q.shape[1] // layer.k.shape[1]
    k = layer.k.float().repeat_interleave(repeat, 1)
    j = torch.arange(k.shape[2], device=k.device)
    for i in torch.split(torch.arange(layer.q.shape[2], device=k.device), QUERIES):
        scores = layer.q[:, :, i].float() @ k.transpose(2, 3) * layer.scale
        seen = site_sees(layer.mask, i, j)
        yield scores.masked_fill(~seen, -torch.inf).softmax(-1), i, j


def site_sees(mask: Mask, i: Tensor, j: Tensor) -> Tensor:
    """Bool `[len(i), len(j)]` under the site's own mask."""
    low, high = mask.spans(i, i)
    return (j <= high[:, None]) & (j >= low[:, None])


def by_group(harm: Tensor, groups: int) -> Tensor:
    """Sums over the query heads of each KV group."""
    return harm.view(groups, -1).sum(1)


def slopes(
    call: Call, counted: Tensor, window: int, sink: int, generator: torch.Generator
) -> Floats:
    """Slopes x [M, N] of the predictions along the gates: E x xᵀ is half the Fisher information.

    A direction is √p ⊙ ξ − p ⟨√p, ξ⟩ for each prediction, ξ random signs: its covariance is
    diag p − p pᵀ, as that of predictions drawn from the model, but no draw is a rare large one.
    """
    run = Gated(call, window, sink)
    logs = run.logits()[counted].float().log_softmax(-1)
    root = logs.detach().div(2).exp_()
    found = []
    for draw in range(DRAWS):
        signs = torch.randint(0, 2, root.shape, generator=generator, device=root.device)
        drawn = root * signs.mul_(2).sub_(1)
        direction = drawn - root.square() * drawn.sum(-1, keepdim=True)
        own = torch.autograd.grad(
            (logs * direction).sum(), run.gates, retain_graph=draw + 1 < DRAWS
        )  # fmt: skip
        found.append(torch.cat([slope.flatten(1) for slope in own], 1).double())
    documents = len(run.gates[0])
    scale = (documents / (2 * len(counted))) ** 0.5
    return np.asarray(torch.cat(found).mul_(scale).cpu().numpy())


class Gated(Interpreter):
    """Runs a graph whose heads lead from their dense to their windowed output by gates at 0."""

    def __init__(self, call: Call, window: int, sink: int) -> None:
        """One gate a document, site and KV group: `[B, Hkv, 1, 1]`."""
        super().__init__(call.gm, garbage_collect_values=False)  # keys of a site are used early
        self.call = call
        self.by_node = {site.call.node: n for n, site in enumerate(call.sites)}
        self.head = rows([windowed(window, sink)])
        self.gates: list[Tensor] = []

    def logits(self) -> Tensor:
        """Logits `[N, V]`, to be differentiated."""
        with torch.enable_grad():
            given = [detached(x) for x in private(self.call.gm, self.call.args)]
            return logits_of(self.run(*given)).flatten(0, -2)

    def run_node(self, n: Node) -> Any:
        """Run a node, a site through its gate."""
        if n not in self.by_node:
            return super().run_node(n)
        site = self.call.sites[self.by_node[n]]
        layer = layer_of(self, site)
        repeat = layer.q.shape[1] // layer.k.shape[1]
        gate = torch.zeros(
            layer.q.shape[0], site.kv_heads, 1, 1, device=layer.q.device, requires_grad=True
        )  # fmt: skip
        self.gates.append(gate)

        def attend(q: Tensor, k: Tensor, v: Tensor, opened: Tensor) -> Tensor:
            dense = dispatch.dense(q, k, v, mask=layer.mask, scale=layer.scale)
            local = self.windowed(q, k, v, layer)
            moved = dense.float() + opened.repeat_interleave(repeat, 1) * (local - dense).float()
            return moved.to(dense.dtype)

        # done again in the backward pass: else every layer's attention matrix is kept
        return checkpoint(attend, layer.q, layer.k, layer.v, gate, use_reentrant=False)

    def windowed(self, q: Tensor, k: Tensor, v: Tensor, layer: Layer) -> Tensor:
        """All heads with window and sink."""
        i, j = (torch.arange(x.shape[2], device=x.device) for x in (q, k))
        seen = token_visible(layer.mask, self.head.to(i.device), i, j)
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, seen, scale=layer.scale, enable_gqa=q.shape[1] != k.shape[1]
        )


def detached(x: Any) -> Any:
    """A tensor without its gradient; what is asked for are the gates' slopes alone."""
    return x.detach() if isinstance(x, Tensor) else x
