"""What does a profile cost in dense passes, where does the time go, and is it what torch finds?

`python bench/profile_cost.py`, on a GPU: a layer of 32 heads of dimension 128 in bfloat16 at 4096
and 32768 tokens, at one lambda level and at eight. `dense_passes` is the whole, with the tables on
the host, over SDPA on the same tensors, both wall clock; `kernels` are the parts by CUDA events.
`--sweep` tries tiles of the walk.
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from afbs_compile import evaluators
from afbs_compile.bench import harness, tuning_time
from afbs_compile.bench.ledger import Row
from afbs_compile.bench.tuner_sites import LAMBDAS
from afbs_compile.capture import Layer
from afbs_compile.evaluators import profiled
from afbs_compile.kernels import profile, profile_walk
from afbs_compile.kernels.profile import Profile
from afbs_compile.timing import synchronise

RUNS = 10
SWEEP = [(64, 8, 2), (64, 8, 3), (64, 8, 4), (64, 4, 2), (32, 4, 2), (32, 4, 3), (128, 8, 2)]
AGREED = 1e-5  # Σ|o − o*| of a query block over that of the head's whole output


def events_ms(call: Callable[[], Any], runs: int = RUNS) -> float:
    """Median milliseconds that a call keeps the device busy, its launches not waited for."""
    device = harness.cuda()
    call()
    device.synchronize()
    times: list[float] = []
    for _ in range(runs):
        begin, end = device.event(), device.event()
        device.hold(1.0)  # until everything is enqueued
        begin.record()
        call()
        end.record()
        device.synchronize()
        times.append(begin.elapsed_time(end))
    return sorted(times)[runs // 2]


class Parts:
    """The arguments of the kernels in a profile, caught on their way."""

    def __init__(self) -> None:
        """Nothing yet."""
        self.calls: dict[str, Callable[[], Any]] = {}

    def catch(self, where: Any, name: str) -> Any:
        """Patch `where.name` so that its latest call can be repeated."""
        inner = getattr(where, name)

        def run(*args: Any, **given: Any) -> Any:
            self.calls[name] = lambda: inner(*args, **given)
            return inner(*args, **given)

        return patch.object(where, name, run)


def parts_ms(layer: Layer, levels: int) -> dict[str, float]:
    """Milliseconds of the device by part."""
    caught = Parts()
    with (
        caught.catch(profile_walk, "dense"),
        caught.catch(profile_walk, "walk"),
        caught.catch(profile, "ranked_rows"),
        caught.catch(profile_walk, "tables"),
        caught.catch(evaluators, "as_numpy"),
    ):
        tuning_time.profile_of(layer, levels)
    found = {name: events_ms(call) for name, call in caught.calls.items()}
    host = caught.calls["ranked_rows"]
    return {f"{name}_ms": ms for name, ms in found.items()} | {
        "ranked_rows_host_ms": tuning_time.seconds(host, layer.q.device, RUNS) * 1e3
    }


def agreement(layer: Layer, levels: int) -> dict[str, float]:
    """How far the tables are from those that torch makes of the same ranks.

    A block may come as close to a level as the last bit of its score: where the two count
    different blocks (`counts_differ`, a share of the entries), errors are not compared.
    """
    with patch.object(evaluators, "as_numpy", lambda tables: tables):
        ours: Any = tuning_time.profile_of(layer, levels).tables
        with patch.object(profile, "no_kernel", lambda *_, **__: "measured against"):
            torchs: Any = tuning_time.profile_of(layer, levels).tables
    return compared(ours, torchs)


def compared(ours: Profile, torchs: Profile) -> dict[str, float]:
    """`agreement` of two profiles of the same rows."""
    column = torch.arange(ours.error.shape[-1], device=ours.error.device)
    there = (column <= (torchs.visible - torchs.forced)[..., None]).expand(ours.error.shape)
    same = (ours.computed == torchs.computed) & there
    whole = torchs.norm.sum((0, 2))[None, None, :, None, None]
    apart = torch.where(same, (ours.error - torchs.error).abs(), 0.0) / whole
    own = torch.where(same, (ours.error - torchs.error).abs(), 0.0) / torchs.norm[..., None]
    heads = [tables_error(t, same) for t in (ours, torchs)]
    return {
        "largest_difference": float(apart.max()),
        "largest_difference_of_block": float(own.nan_to_num(0).max()),
        "largest_difference_of_head": float(((heads[0] - heads[1]).abs() / whole[..., 0]).max()),
        "counts_differ": float(1 - same.sum() / there.sum()),
        "order_equal": float(torch.equal(ours.before, torchs.before)),
    }


def tables_error(tables: Profile, same: Tensor) -> Tensor:
    """Errors `[Z, B, H, N]` summed over the query blocks of a head, where both can be compared."""
    return torch.where(same, tables.error, 0.0).sum(3)


def rows(lengths: list[int], device: torch.device, check: bool) -> Iterator[Row]:
    """Two rows a length."""
    for length in lengths:
        layer = tuning_time.clustered(tuning_time.SHAPES["llama-2-7b"], length, device)
        dense = tuning_time.seconds(lambda: tuning_time.dense_of(layer), device, 20)  # noqa: B023
        for levels in (1, len(LAMBDAS)):
            call = lambda: tuning_time.profile_of(layer, levels)  # noqa: B023
            took = tuning_time.seconds(call, device, RUNS)
            yield {
                "case": "profile_cost", "tokens": length, "levels": levels, "heads": 32,
                "head_dim": layer.q.shape[3], "dtype": str(layer.q.dtype), "seconds": took,
                "seconds_dense": dense, "dense_passes": took / dense, "dense_ms": dense * 1e3,
            } | {f"kernels_{k}": ms for k, ms in parts_ms(layer, levels).items()} | (
                agreement(layer, levels) if check else {}
            )  # fmt: skip


def swept(length: int, device: torch.device) -> Iterator[Row]:
    """The walk of eight levels and of one with other tiles; a tile that does not fit is noted."""
    layer = tuning_time.clustered(tuning_time.SHAPES["llama-2-7b"], length, device)
    for levels in (1, len(LAMBDAS)):
        caught = Parts()
        with caught.catch(profile_walk, "walk"):
            profiled(layer, selector="sub8", heads=32, lambdas=LAMBDAS[:levels])
        for rows_, warps, stages in SWEEP:
            tile = profile_walk.Tiling(rows_, 64, warps, stages)
            row = {"case": "walk", "tokens": length, "levels": levels, "tile": list(tile)}
            with patch.object(profile_walk, "tiling", lambda *_: tile):  # noqa: B023
                try:
                    yield row | {"walk_ms": events_ms(caught.calls["walk"])}
                except Exception as error:
                    yield row | {"walk_ms": math.nan, "failed": str(error)[:200]}


def main() -> int:
    """0 if every difference is below `AGREED`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", default="4096,32768", help="lengths, with commas")
    parser.add_argument("--sweep", action="store_true", help="try tiles of the walk instead")
    parser.add_argument("--no-check", action="store_true", help="do not compare with torch")
    parser.add_argument("--output", type=Path, default=harness.RESULTS, help="folder of the JSON")
    args = parser.parse_args()
    device = torch.device("cuda")
    lengths = [int(n) for n in args.tokens.split(",")]
    found = []
    made = (
        (row for n in lengths for row in swept(n, device))
        if args.sweep
        else rows(lengths, device, not args.no_check)
    )
    for row in made:
        found.append(row)
        print(*(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()))
        synchronise(device)
        name = "profile_tiles" if args.sweep else "profile_cost"
        harness.write(harness.document(name, found), args.output)
    worst = max((row.get("largest_difference", 0.0) for row in found), default=0.0)
    return int(worst > AGREED)


if __name__ == "__main__":
    sys.exit(main())
