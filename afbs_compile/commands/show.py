"""`afbs show`: what was decided for a model, by site."""

from argparse import Namespace
from pathlib import Path
from typing import Any

from rich.table import Table

from afbs_compile import cache
from afbs_compile.commands.errors import CommandError
from afbs_compile.commands.output import console, emit_json, milliseconds, number
from afbs_compile.commands.picture import write_heatmap
from afbs_compile.policy import Policy
from afbs_compile.summary import summary


def run(args: Namespace) -> int:
    """Print a policy, and draw its heat map if asked."""
    policy = chosen(args.policy, args.cache_dir)
    if args.heatmap:
        write_heatmap(newest(policy), args.heatmap, policy.model_name or policy.model)
    if args.json:
        emit_json(summary(policy))
    else:
        for tuning in summary(policy)["tunings"]:
            print_tuning(policy, tuning)
    return 0


def chosen(which: str | None, cache_dir: Path | None) -> Policy:
    """The policy that the user means: a file, a key's beginning, or the newest."""
    if which and Path(which).is_file():
        return Policy.read(Path(which))
    stored = [entry.policy for entry in cache.entries(cache_dir) if entry.policy]
    fitting = [policy for policy in stored if policy.model.startswith(which or "")]
    if not fitting:
        asked = f"no policy file and no key in the cache begins with {which!r}" if which else None
        raise CommandError(
            f"{asked or 'no policy is stored'} in {cache.folder(cache_dir)}; see `afbs cache ls`, "
            "or make one with `afbs tune` or `afbs demo`"
        )
    if which and len(fitting) > 1:
        keys = ", ".join(policy.model for policy in fitting)
        raise CommandError(f"{which!r} begins several keys: {keys}; give more of it")
    return max(fitting, key=lambda policy: max((t.created for t in policy.tunings), default=""))


def newest(policy: Policy) -> Any:
    """The newest tuning of a policy."""
    if not policy.tunings:
        raise CommandError(f"the policy of {policy.model} holds no tuning; run `afbs tune`")
    return max(policy.tunings, key=lambda tuning: tuning.created)


def counted(inputs: list[str]) -> str:
    """How many inputs were measured."""
    return f"{len(inputs)} input{'s' if len(inputs) != 1 else ''}"


def print_tuning(policy: Policy, tuning: dict[str, Any]) -> None:
    """A table of one tuning."""
    table = Table(title=f"{policy.model_name or ''} {policy.model}".strip())
    columns = ("density", "error", "dense ms", "sparse ms", "decision")
    table.add_column("site")
    for column in columns:
        table.add_column(column, justify="left" if column == "decision" else "right")
    for site in tuning["sites"]:
        low, high = number(site["error_min"], 3), number(site["error_max"], 3)
        table.add_row(
            site["name"],
            number(site["density"]),
            f"{low} – {high}",
            milliseconds(site["seconds_dense"]),
            milliseconds(site["seconds_sparse"]),
            site["decision"] + (f": {site['reason']}" if site["reason"] else ""),
        )
    table.caption = (
        f"up to {tuning['bucket']} tokens, {tuning['created']}, {tuning['device']}: "
        f"mean density {number(tuning['density'])}, largest error "
        f"{number(tuning['max_error'], 3)}, {tuning['evaluations']} evaluations in "
        f"{number(tuning['seconds'], 1)} s on {counted(tuning['inputs'])}: on another one "
        f"like them a head keeps max_error with probability {tuning['confidence']:.0%} or more"
        + (f", KL {number(tuning['kl'], 4)}" if tuning["kl"] is not None else "")
        + ("" if tuning["complete"] else ", not complete")
    )
    console().print(table)
