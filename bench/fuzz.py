"""Does the backend ever change what a model says? Random models against dense and an oracle.

`python bench/fuzz.py --count 2000`, or `afbs bench fuzz`. Every model of `random_models` is
compiled twice over: with all blocks kept it must say what the eager model says; with random
thresholds what the same model says with block-sparse attention in plain torch, where the mask of
every rewritten layer is known without looking at data.
"""

import copy
import random
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.eval_frame import remove_from_cache

from afbs_compile.bench import forced, random_models, script
from afbs_compile.bench.forced import Forced, distance
from afbs_compile.bench.ledger import Ledger, Row
from afbs_compile.bench.random_models import Description
from afbs_compile.passes.rewrite import Site
from afbs_compile.policy import Head
from afbs_compile.policy_tensor import rows
from afbs_compile.progress import Progress
from afbs_compile.report import JOURNAL

KEY = ("seed", "inner")
EXACT = 1e-5  # of the largest output
ROUNDING = {"float32": 0.0, "bfloat16": 1e-2, "float16": 2e-3}
FORGET_AFTER = 50  # models, then Dynamo drops what it compiled
FORWARDS = (random_models.Model.forward, random_models.Layer.forward, random_models.Opaque.forward)


def run(args: Namespace, output: Path | None) -> dict[str, Any]:
    """Try the seeds that were asked for and are not known yet; kept in `output` now and then.

    Raises:
        CommandError: `output` cannot be continued.
    """
    ledger = Ledger("fuzz_cpu", KEY, output, args.seconds)
    seeds = range(args.seed, args.seed + args.count)
    with Progress() as progress:
        for done, seed in enumerate(seeds):
            row: Row = {"seed": seed, "inner": args.inner}
            if ledger.has(row):
                continue
            if ledger.over():
                ledger.notes.append(f"left out for want of time: seeds {seed} and later")
                break
            progress(done, len(seeds), "random models", str(seed))
            row |= attempt(random_models.describe(seed), args.inner)
            ledger.rows.append(row)
            if row["wrong"]:
                told = f"seed {seed}: {row['wrong']}\n  {random_models.describe(seed)}"
                progress.bars.console.print(told, markup=False, highlight=False, soft_wrap=True)
            if done % FORGET_AFTER == 0:
                torch._dynamo.reset()
                ledger.write()
    ledger.write()
    return ledger.document()


def attempt(what: Description, inner: str = "interpreted") -> Row:
    """What came of a model; an exception is a result as well."""
    begun = time.process_time()
    found: Row = {"sites": 0, "rewritten": 0, "error": None, "policy_error": None, "wrong": None}
    try:
        with torch.no_grad(), forced.interpreted() if inner == "interpreted" else nullcontext():
            found |= compared(what, inner)
        found["wrong"] = verdict(what, found)
    except Exception as error:
        found["wrong"] = f"{type(error).__name__}: {error}"[:300]
    return found | {"cpu_seconds": round(time.process_time() - begun, 3)}


def compared(what: Description, inner: str) -> Row:
    """Errors of the compiled model at both thresholds."""
    values = random_models.inputs(what)
    model = random_models.build(what)
    want, rounded = precise(model, values)
    for forward in FORWARDS:
        remove_from_cache(forward)
    with forced.forced(forced.every(1.0), inner) as force:
        compiled = afbs(model, what, force)
        found: Row = {"error": distance(compiled(**values), want), "rounded": rounded}
        sites = JOURNAL.report().sites
        found |= {"sites": len(sites), "rewritten": sum(s.decision == "sparse" for s in sites)}
        found["reasons"] = sorted({s.reason for s in sites if s.reason})
        if policies := oracles(what, force):
            force.move(lambda site: heads(site, what.seed))
            sparse = random_models.build(what, policies)(**values)
            found["policy_error"] = distance(compiled(**values), sparse)
            found["policy_change"] = distance(sparse, want)
    return found


def precise(model: nn.Module, values: dict[str, Tensor]) -> tuple[Tensor, float]:
    """What a model says in float64, and how far from it its own dtype is."""
    wide = {name: x.double() if x.is_floating_point() else x for name, x in values.items()}
    want = copy.deepcopy(model).double()(**wide)
    return want, distance(model(**values), want)


def afbs(model: nn.Module, what: Description, force: Forced) -> Callable[..., Any]:
    """The model under our backend."""
    options: dict[str, Any] = {"min_length": 1, "cache_dir": force.cache_dir}
    return torch.compile(model, backend="afbs", dynamic=what.dynamic, options=options)


def oracles(what: Description, force: Forced) -> dict[int, Tensor] | None:
    """Random policies by layer; None if there is no oracle for one that was rewritten."""
    found: dict[int, Tensor] = {}
    for problem in (p for ps in force.problems.values() for p in ps):
        for site in problem.sites:
            n = layer_of(site)
            if n is None or not random_models.independent(what.layers[n]):
                return None
            found[n] = rows(heads(site, what.seed))
    return found or None


def layer_of(site: Site) -> int | None:
    """Which layer a site is in, from its name."""
    parts = site.name.replace("#", ".").split(".")
    return int(parts[1]) if parts[0] == "layers" and parts[1:] else None


def heads(site: Site, seed: int) -> tuple[Head, ...]:
    """Random thresholds, windows and dense heads of a site."""
    return tuple(random_head(random.Random(f"{seed} {site.name} {n}")) for n in range(site.heads))


def random_head(draw: random.Random) -> Head:
    """One of them."""
    mode = draw.choice(("sparse", "sparse", "sparse", "dense", "window"))
    return Head(
        mode,
        draw.choice((1.0, 0.95, 0.8, 0.5, 0.1, 0.0)),
        window=draw.choice((1, 30, 64, 100)),
        sink=draw.choice((0, 1, 64, 100)),
        neighbours=draw.choice((0, 1, 2)),
    )


def verdict(what: Description, found: Row) -> str | None:
    """What is wrong with errors that were measured, or None.

    It may err twice as much as the eager model does for want of digits, and a rounding more.
    """
    for column in ("error", "policy_error"):
        bar = EXACT + 2 * found["rounded"] + ROUNDING[what.dtype]
        if found[column] is not None and not found[column] <= bar:
            return f"{column} {found[column]:.1e}"
    return None


def summary(document: dict[str, Any]) -> str:
    """How many models, how many sites, and every seed that failed."""
    rows = document["rows"]
    bad = [row for row in rows if row["wrong"]]
    oracle = sum(row["policy_error"] is not None for row in rows)
    sites, sparse = (sum(row[c] for row in rows) for c in ("sites", "rewritten"))
    lines = [
        f"{len(rows)} models, {sparse} of {sites} attention calls rewritten, {oracle} models "
        f"compared under random thresholds as well: {len(bad)} mismatches"
    ]
    exact = [r["error"] for r in rows if r["error"] is not None and r["rounded"] < EXACT]
    if exact:
        lines.append(f"largest error in float32 with every block kept: {max(exact):.1e}")
    lines += [f"seed {row['seed']}: {row['wrong']}" for row in bad]
    return "\n".join([*lines, *document.get("notes", [])])


def reproduced(seeds: list[int], inner: str) -> Iterator[Row]:
    """Rows of some seeds, one after another."""
    for seed in seeds:
        yield {"seed": seed} | attempt(random_models.describe(seed), inner)


if __name__ == "__main__":
    sys.exit(script.main("fuzz"))
