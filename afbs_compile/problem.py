"""What is to be tuned? A graph, real inputs, sites, and the user's wishes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import GraphModule

from afbs_compile.options import Options
from afbs_compile.passes.rewrite import Site
from afbs_compile.policy import bucket_of
from afbs_compile.store import Store, input_digest
from afbs_compile.versions import device_name, versions


@dataclass(frozen=True, slots=True)
class Problem:
    """What is to be tuned.

    Attributes:
        gm: Dynamo's graph, not rewritten.
        inputs: One or more sets of real inputs; with two or more the last is held out.
        sites: The sites to tune.
        options: The user's wishes.
        length: Tokens; names the bucket.
        weights: Key of the weights of each site's module, by site, where it has any.
        spent_s: What was measured for it already took so many seconds.
        interrupted: Ctrl-C was pressed then: no more is measured, what is there makes a policy.
    """

    gm: GraphModule
    inputs: Sequence[Sequence[Any]]
    sites: Sequence[Site]
    options: Options
    length: int
    weights: Mapping[str, str] = field(default_factory=dict)
    spent_s: float = 0.0
    interrupted: bool = False

    @property
    def device(self) -> torch.device:
        """Where the inputs are."""
        tensors = (x for x in self.inputs[0] if isinstance(x, torch.Tensor))
        return next((x.device for x in tensors), torch.device("cpu"))


def store_of(problem: Problem, key: str) -> Store:
    """Where the measurements for a problem of the model `key` are kept."""
    slot = {"bucket": bucket_of(problem.length), "options": problem.options.tuning_fingerprint()}
    circumstances = {
        "graph": problem.gm.code,
        "device": device_name(problem.device),
        "versions": versions(),
    }
    return Store(key, slot, circumstances, problem.options.cache_folder)


def digests(problem: Problem) -> list[str]:
    """What tells the inputs apart."""
    return [input_digest(values) for values in problem.inputs]


def cuda_devices(inputs: Sequence[Sequence[Any]]) -> list[int]:
    """Indices of the CUDA devices that inputs live on."""
    tensors = [x for group in inputs for x in group if isinstance(x, torch.Tensor)]
    return sorted({t.device.index for t in tensors if t.device.type == "cuda"})


def untraced() -> Any:
    """Hide Dynamo's tracing context: kernels that compile on first use must not inherit it."""
    return torch._guards.tracing(None)
