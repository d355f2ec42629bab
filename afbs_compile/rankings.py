"""What do single runs tell about which heads need their context? Static rankings, by KV group.

Each is an expected harm of windowing a KV group, larger for heads that should stay global:
- `locality`: attention mass outside window and sink, mean over the queries;
- `retrieval`: on random tokens that come twice, attention mass on the earlier copy and on what
  followed it (Razor-like: induction heads find what they need there);
- `fisher`: ½ E (∂ log p / ∂g)², g leading from the head's dense output to its windowed one, the
  predictions drawn from the model: the second-order term of KL(dense ‖ hybrid).
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
from afbs_compile.tuner.arrays import Floats

RANKINGS = ("fisher", "locality", "retrieval")
DRAWS = 4  # of the predictions, for every call
QUERIES = 256  # rows of attention at once


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
    if name != "fisher":
        raise ValueError(f"no ranking {name!r}; there are {', '.join(RANKINGS)}")
    evaluator.prepare()
    generator = torch.Generator(evaluator.device).manual_seed(seed)
    found = [
        fisher(call, counted.rows, window, sink, generator)
        for call, (counted, _) in zip(calls, evaluator.dense, strict=True)
    ]
    tasks = per_task(found, [call.sample.task for call in calls])
    return np.asarray(np.mean(tasks, 0), dtype=np.float64)


def per_task(found: Sequence[Floats], tasks: Sequence[str]) -> list[Floats]:
    """Means over the calls of each task, in units of their sum: tasks weigh the same."""
    means = [
        np.mean([x for x, name in zip(found, tasks, strict=True) if name == task], 0)
        for task in dict.fromkeys(tasks)
    ]
    return [mean / max(float(mean.sum()), 1e-30) for mean in means]


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


def fisher(
    call: Call, counted: Tensor, window: int, sink: int, generator: torch.Generator
) -> Floats:
    """Half the squared slope of the log-likelihood along every gate [N], nats a prediction."""
    run = Gated(call, window, sink)
    logs = run.logits()[counted].float().log_softmax(-1)
    total = [torch.zeros(site.kv_heads, device=logs.device) for site in call.sites]
    for draw in range(DRAWS):
        with torch.no_grad():
            drawn = torch.multinomial(logs.exp(), 1, generator=generator)
        likelihood = logs.gather(1, drawn).sum()
        slopes = torch.autograd.grad(likelihood, run.gates, retain_graph=draw + 1 < DRAWS)
        for sum_, slope in zip(total, slopes, strict=True):
            sum_ += slope.squeeze(-1).squeeze(-1).square().sum(0) / (2 * DRAWS * len(counted))
    return by_sites([total])


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
