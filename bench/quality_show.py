"""How are figures of quality shown? Tables for people, and curves over sparsity."""

from pathlib import Path
from typing import Any

from rich.table import Table

from afbs_compile.bench import frontier
from afbs_compile.bench.frontier import BUDGET, SPARSITY, Group, Point, Reading
from afbs_compile.commands.errors import CommandError
from afbs_compile.commands.output import console, number

SIGNS = {"at": "", "below": "<", "above": ">"}


def show(document: dict[str, Any]) -> None:
    """Print a table of settings and one of families for every text and length."""
    for group, points in frontier.groups(document["rows"]).items():
        console().print(settings_table(group, points))
        console().print(families_table(group, points))
    for note in document.get("notes", ()):
        console().print(note, markup=False)


def title(group: Group) -> str:
    """Model, text and length."""
    model, dtype, text, tokens = group
    return f"{model} ({dtype}), {text}, {tokens} tokens"


def settings_table(group: Group, points: list[Point]) -> Table:
    """A row a setting."""
    table = Table(title=title(group))
    for column in ("setting", "windows", "sparsity", "perplexity", "± error", "KL per token"):
        table.add_column(column, justify="left" if column == "setting" else "right")
    for one in points:
        table.add_row(
            one.setting,
            str(one.windows),
            number(one.sparsity, 3),
            f"{one.change:+.2f} %",
            number(one.error),
            f"{one.kl:.2e}",
        )
    return table


def families_table(group: Group, points: list[Point]) -> Table:
    """A row a family: its curve read at one point each way."""
    table = Table(title=f"{title(group)}, by family")
    table.add_column("family")
    table.add_column(f"sparsity at +{BUDGET:g} % perplexity", justify="right")
    table.add_column(f"KL at {SPARSITY:.0%} sparsity", justify="right")
    for family, curve in frontier.families(points).items():
        sparsity, kl = frontier.sparsity_at(curve), frontier.kl_at(curve)
        table.add_row(family, shown(sparsity, ".3f"), shown(kl, ".2e"))
    return table


def shown(reading: Reading, form: str) -> str:
    """A reading, with < or > where the curve ends before it."""
    return f"{SIGNS[reading.where]}{reading.value:{form}}"


def draw(document: dict[str, Any], path: Path) -> None:
    """Draw KL and perplexity against sparsity, a column for every text and length.

    Raises:
        CommandError: There is nothing to draw, matplotlib is missing, or `path` cannot be written.
    """
    found = frontier.groups(document["rows"])
    if not found:
        raise CommandError("nothing was measured, so there is nothing to draw")
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise CommandError(
            f'{error.name} is missing; run `pip install "afbs-compile[demo]"`'
        ) from error
    figure = Figure(figsize=(1 + 3.6 * len(found), 7), layout="constrained")
    axes = figure.subplots(2, len(found), squeeze=False, sharex="col")
    names = [name for points in found.values() for name in frontier.families(points)]
    colours = {name: f"C{n % 10}" for n, name in enumerate(dict.fromkeys(names))}
    for column, (group, points) in enumerate(found.items()):
        curves(axes[:, column], group, frontier.families(points), colours)
    axes[0, 0].set_ylabel("KL(dense ‖ sparse) per token, nats")
    axes[1, 0].set_ylabel("perplexity, change in %")
    handles = {h.get_label(): h for a in axes[0] for h in a.get_legend_handles_labels()[0]}
    figure.legend(handles=list(handles.values()), loc="outside lower center", ncols=4)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110)
    except (OSError, ValueError) as error:
        raise CommandError(f"the plot {path} cannot be written: {error}") from error


def curves(
    axes: Any, group: Group, families: dict[str, list[Point]], colours: dict[str, str]
) -> None:
    """One column: KL above, perplexity with its standard errors below."""
    above, below = axes
    for name, curve in families.items():
        sparsity = [p.sparsity for p in curve]
        style = {"color": colours[name], "ms": 3}
        above.semilogy(sparsity, [p.kl for p in curve], "o-", label=name, **style)
        below.errorbar(
            sparsity, [p.change for p in curve], yerr=[p.error or 0 for p in curve],
            fmt="o-", **style,
        )  # fmt: skip
    model, _, text, tokens = group
    above.set_title(f"{model}\n{text}, {tokens} tokens", fontsize=9)
    below.axhline(BUDGET, color="grey", lw=0.8, ls=":")
    below.set_xlabel("sparsity (blocks left out)")
    for one in axes:
        one.grid(alpha=0.3)
