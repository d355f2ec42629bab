"""What of the loss that windows cost does training give back, and from which heads faster?

`python bench/recovery.py`, or `afbs bench recovery`. A model is made hybrid with BOSCH's heads and
with as many random ones, and both are trained on under backend "afbs": their windows act in the
forward and in the backward. Training lowers the dense model's loss as well, so it is trained
beside them, on the same documents in the same order. Lost is what a hybrid has above it.
"""

import copy
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import afbs_compile
from afbs_compile import hybrid_calibration
from afbs_compile.bench import recovery_model, script, windows
from afbs_compile.bench.ledger import Ledger, Row
from afbs_compile.bench.pretrain_text import order
from afbs_compile.bench.recovery_model import Documents
from afbs_compile.commands.errors import CommandError
from afbs_compile.commands.hybridize import groups
from afbs_compile.demo.model import LanguageModel
from afbs_compile.hybrid_objective import GLOBAL
from afbs_compile.policy import Policy
from afbs_compile.progress import OnProgress, Progress
from afbs_compile.report import explain
from afbs_compile.summary import in_order
from afbs_compile.tuner.heads import Bits, text

KEY = ("model", "texts", "tokens", "batch", "base_steps", "rate", "steps", "ratio", "window",
       "sink", "budget", "searched", "held_out", "method", "seed")  # fmt: skip
METHODS = ("dense", "bosch", "random")
BASE_SEED = 1000  # of the order in which the base model reads


@dataclass(frozen=True, slots=True, eq=False)
class Setup:
    """A trained dense model and what it is measured on."""

    args: Namespace
    base: LanguageModel
    documents: Documents

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.base.device


def run(args: Namespace, output: Path | None) -> dict[str, Any]:
    """Measure what is not known yet; kept in `output` run by run.

    Raises:
        CommandError: An argument is wrong, the text is too short, or a site stayed dense.
    """
    checked(args)
    ledger = Ledger("recovery", KEY, output, args.seconds)
    wanted = [(seed, method) for seed in range(args.seeds) for method in METHODS]
    if not all(ledger.has(slot(args, *one)) for one in wanted):
        with Progress() as progress, tempfile.TemporaryDirectory() as folder:
            ready = setup(args, progress)
            for seed in range(args.seeds):
                for row in rows(ready, seed, ledger, Path(folder), progress):
                    ledger.add(row)
    ledger.write()
    return ledger.document()


def checked(args: Namespace) -> None:
    """Refuse what cannot be.

    Raises:
        CommandError: An argument is out of range.
    """
    counts = (args.tokens, args.batch, args.steps, args.every, args.searched, args.unseen,
              args.seeds, args.budget, args.window)  # fmt: skip
    if min(counts) < 1 or min(args.base_steps, args.sink) < 0 or not 0 < args.ratio < 1:
        raise CommandError(
            "--ratio is between 0 and 1, --base-steps and --sink are at least 0, all other counts "
            "at least 1"
        )
    if 4 * args.window > args.tokens:
        raise CommandError(f"--window is {args.window}; at most a quarter of --tokens")


def slot(args: Namespace, seed: int, method: str) -> Row:
    """The fields that say what a row measures."""
    names = [split.partition("=")[0] for split in args.text] or [windows.DEFAULT_TEXT]
    same = {name: getattr(args, name) for name in KEY if hasattr(args, name)}
    about = {"texts": ",".join(names), "held_out": args.unseen, "method": method, "seed": seed}
    return same | about


def setup(args: Namespace, on_progress: OnProgress) -> Setup:
    """The base model, trained from scratch, and its documents."""
    model = recovery_model.scratch(args.model)
    texts = windows.read(args.text, "1", model)
    tokens = torch.cat([one.tokens for one in texts])
    found = recovery_model.documents(tokens, args.tokens, args.searched, args.unseen)
    ready = Setup(args, model, found)
    batches = order(len(found.trained), args.base_steps, args.batch, BASE_SEED)
    for step, loss in trained(ready, model.module, batches, args.base_rate):
        on_progress(step, args.base_steps, "base model", f"loss {loss:.3f}")
    model.module.requires_grad_(False)
    return ready


def rows(
    ready: Setup, seed: int, ledger: Ledger, folder: Path, on_progress: OnProgress
) -> Iterator[Row]:
    """The rows of a seed that are missing."""
    about = {method: slot(ready.args, seed, method) for method in METHODS}
    if all(map(ledger.has, about.values())):
        return
    if ledger.over():
        ledger.notes.append(f"left out: seed {seed}")
        return
    policies: dict[str, Policy | None] = {"dense": None, "bosch": searched(ready, seed, folder)}
    policies["random"] = at_random(policies["bosch"], seed)
    for n, (method, policy) in enumerate(policies.items()):
        on_progress(seed * len(METHODS) + n, ready.args.seeds * len(METHODS), "runs", method)
        if not ledger.has(about[method]):
            yield about[method] | measured(ready, policy, seed, folder)


def searched(ready: Setup, seed: int, folder: Path) -> Policy:
    """BOSCH's heads for the documents of the search."""
    args = ready.args
    samples = hybrid_calibration.samples(
        ready.base, list(ready.documents.searched), ["text"], args.window, seed
    )
    return afbs_compile.hybridize(
        ready.base.module, samples, ratio=args.ratio, window=args.window, sink=args.sink,
        budget=args.budget, prior="best", seed=seed, cache_dir=folder,
    )  # fmt: skip


def bits_of(policy: Policy) -> Bits:
    """Which KV groups a policy windows [N]."""
    return np.array([bit for site in in_order(policy.tunings[0]) for bit in groups(site)])


def at_random(policy: Policy | None, seed: int) -> Policy:
    """As many windowed groups as in a policy, any ones."""
    assert policy is not None
    return with_bits(policy, np.random.default_rng(seed).permutation(bits_of(policy)))


def with_bits(policy: Policy, bits: Bits) -> Policy:
    """A hybrid policy with other windowed groups [N]."""
    tuning, left = policy.tunings[0], list(map(bool, bits))
    every = [head for site in tuning.sites.values() for head in site.heads]
    local = next(head for head in every if head.mode == "window")
    sites = {}
    for site in in_order(tuning):
        own, left = left[: site.kv_heads], left[site.kv_heads :]
        heads = tuple(
            local if bit else replace(GLOBAL, density=1.0)
            for bit in own
            for _ in range(len(site.heads) // site.kv_heads)
        )
        decision, reason = ("sparse", None) if any(own) else ("dense", "no head is windowed")
        sites[site.name] = replace(site, heads=heads, decision=decision, reason=reason)
    other = replace(tuning, sites=sites, evaluations=0, kl=None)
    return replace(policy, tunings=(other,))


def measured(ready: Setup, policy: Policy | None, seed: int, folder: Path) -> Row:
    """One continued training, from the base model's weights on."""
    args, begun = ready.args, time.perf_counter()
    model = copy.deepcopy(ready.base.module).requires_grad_(True)
    before = explain().rewritten
    compiled = with_policy(model, policy, args.tokens, folder)
    batches = order(len(ready.documents.trained), args.steps, args.batch, seed)
    held_out = [(0, *judged(ready, compiled))]
    if policy:
        require_windows(policy, explain().rewritten - before)
    for step, _ in trained(ready, compiled, batches, args.rate):
        if (step + 1) % args.every == 0 or step + 1 == args.steps:
            held_out.append((step + 1, *judged(ready, compiled)))
    return {
        "curve": held_out,
        "parameters": sum(p.numel() for p in model.parameters()),
        "heads": text(bits_of(policy)) if policy else None,
        "evaluations": policy.tunings[0].evaluations if policy else 0,
        "seconds": time.perf_counter() - begun,
    }


def with_policy(model: nn.Module, policy: Policy | None, tokens: int, folder: Path) -> Any:
    """The model compiled with "afbs" under a policy; as it is, dense, without one."""
    if policy is None:
        return model
    path = folder / "policy.json"
    path.write_text(policy.to_json())
    options: dict[str, Any] = {"policy": str(path), "min_length": tokens}
    return torch.compile(model, backend="afbs", options=options)


def require_windows(policy: Policy, rewritten: int) -> None:
    """Nothing is compared unless every windowed head is windowed.

    Raises:
        CommandError: A site stayed dense.
    """
    wanted = sum(site.decision == "sparse" for site in policy.tunings[0].sites.values())
    if rewritten != wanted:
        raise CommandError(f"{rewritten} of {wanted} hybrid layers have windows; {explain()}")


def trained(
    ready: Setup, model: nn.Module, batches: Tensor, rate: float
) -> Iterator[tuple[int, float]]:
    """Train on batches [steps, B] of documents; every step and its loss, nats a prediction."""
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.0)
    steps = len(batches)
    for step, chosen in enumerate(batches):
        for group in optimizer.param_groups:  # a short rise, then down to a tenth
            rise, fall = (step + 1) / max(1, steps // 20), 1 - 0.9 * step / steps
            group["lr"] = rate * min(1.0, rise, fall)
        ids = ready.documents.trained[chosen].to(ready.device)
        loss = recovery_model.losses(model, ids).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        yield step, loss.item()


def judged(ready: Setup, model: nn.Module) -> tuple[float, float, float]:
    """Held-out loss, nats a prediction: of all, of what is new and of what comes again.

    In the graph that trains: without gradients another one would compile.
    """
    every = [
        recovery_model.losses(model, ids.to(ready.device)).detach()
        for ids in torch.split(ready.documents.held_out, ready.args.batch)
    ]
    found, again = torch.cat(every).double(), 3 * ready.args.tokens // 4 - 1
    return found.mean().item(), found[:, :again].mean().item(), found[:, again:].mean().item()


if __name__ == "__main__":
    sys.exit(script.main("recovery"))
