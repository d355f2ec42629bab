"""How do all ranks learn how long each replica worked? One scalar a rank, beside the step.

The scalar travels over a gloo group of its own: no kernel, no stream and no synchronisation of a
GPU is involved, and the wait is over long before the next step asks. Every rank gathers the same
numbers, so tensor-, context- and pipeline-parallel peers decide the same without a broadcast.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from afbs_compile.training.sampler import initialized
from afbs_compile.tuner.arrays import Floats
from afbs_compile.tuner.step_cost import CostModel


class ScalarExchange:
    """Gathers one number of every rank; without a process group there is one rank."""

    def __init__(self, replica_of: Sequence[int] | None = None) -> None:
        """Make the group; every rank has to.

        Args:
            replica_of: The data-parallel replica of every rank [ranks]; peers of one replica share
                a number. By default every rank is a replica.

        Raises:
            ValueError: There is not one replica for every rank, or a replica has no rank.
        """
        ranks = dist.get_world_size() if initialized() else 1
        self.replica_of = np.arange(ranks) if replica_of is None else np.asarray(replica_of)
        self.replicas = int(self.replica_of.max(initial=-1)) + 1
        if sorted(set(self.replica_of.tolist())) != list(range(self.replicas)) or (
            len(self.replica_of) != ranks
        ):
            raise ValueError(
                f"replicas {self.replica_of.tolist()} for {ranks} ranks: give every "
                "rank one number, and every number from 0 on to some rank"
            )
        self.group: Any = dist.new_group(backend="gloo") if initialized() else None
        self.rounds = 0
        self._gathered: torch.Tensor | None = None
        self._handle: Any = None

    @property
    def replica(self) -> int:
        """The replica of this rank."""
        return int(self.replica_of[dist.get_rank() if initialized() else 0])

    def start(self, value: float) -> None:
        """Send this rank's number (NaN: none is known), without waiting."""
        own = torch.tensor([value], dtype=torch.float64)
        self.rounds += 1
        self._gathered, self._handle = own, None
        if self.group is not None:
            self._gathered = torch.empty(len(self.replica_of), dtype=torch.float64)
            self._handle = dist.all_gather_into_tensor(
                self._gathered, own, group=self.group, async_op=True
            )

    def finish(self) -> Floats | None:
        """Largest number of each replica's ranks [R], NaN if none; None if nothing was sent."""
        if self._gathered is None:
            return None
        if self._handle is not None:
            self._handle.wait()
        values, self._gathered = self._gathered.numpy(), None
        found = np.full(self.replicas, -math.inf)
        np.maximum.at(found, self.replica_of, np.where(np.isfinite(values), values, -math.inf))
        return np.where(np.isfinite(found), found, np.nan)

    def agree(self, cost: CostModel) -> CostModel:
        """Rank 0's cost model, on every rank; waits. Other costs would make other plans."""
        if self.group is None:
            return cost
        state = [cost.state_dict()]
        dist.broadcast_object_list(state, src=0, group=self.group)
        shared = CostModel()
        shared.load_state_dict(state[0])
        return shared

    def total(self, values: Floats) -> Floats:
        """The sum over all ranks; waits. For what is seen of densities, once an epoch."""
        summed = torch.as_tensor(np.array(values, dtype=np.float64))
        if self.group is not None:
            dist.all_reduce(summed, group=self.group)
        return summed.numpy()
