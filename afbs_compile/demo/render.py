"""How are the demo's figures shown? As tables on stdout."""

from rich.table import Table

from afbs_compile.commands.output import console, milliseconds, number
from afbs_compile.demo.run import Result
from afbs_compile.policy import Tuning
from afbs_compile.summary import in_order, site_summary


def show(result: Result, tuning: Tuning | None) -> None:
    """Print the tables."""
    if tuning:
        console().print(sites_table(tuning))
    console().print(figures_table(result))


def sites_table(tuning: Tuning) -> Table:
    """A row a site: density of every head, error, time."""
    table = Table(title="Density of every head")
    for column in ("site", "heads", "error", "dense ms", "sparse ms", "decision"):
        table.add_column(column)
    for site in in_order(tuning):
        row = site_summary(site)
        table.add_row(
            site.name,
            " ".join(number(head.density) for head in site.heads),
            number(row["error_max"], 3),
            milliseconds(site.seconds_dense),
            milliseconds(site.seconds_sparse),
            site.decision + (f": {site.reason}" if site.reason else ""),
        )
    return table


def figures_table(result: Result) -> Table:
    """The demo's figures."""
    table = Table(title="Dense against sparse", show_header=False)
    change = 100 * (result.perplexity_sparse / result.perplexity_dense - 1)
    dense, sparse = number(result.perplexity_dense, 3), number(result.perplexity_sparse, 3)
    rows = {
        "attention sites found, rewritten": f"{result.sites}, {result.rewritten}",
        "mean density": number(result.density),
        "perplexity on unseen text": f"{dense} dense, {sparse} sparse ({change:+.2f} %)",
        "attention": f"{number(result.attention_speedup)} × as fast as dense",
        "whole forward": f'{number(result.forward_speedup)} × as fast as backend="inductor"',
        "tuning": tuning_words(result),
        "policy": result.policy_path or "could not be kept",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def tuning_words(result: Result) -> str:
    """Where the policy came from."""
    if result.cache == "hit":
        return "cached: 0 evaluations, 0 s"
    return f"{result.evaluations} evaluations in {result.tuning_seconds:.1f} s"
