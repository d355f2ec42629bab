"""Where is a model sparse? A picture of density by layer and head."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from afbs_compile.policy import Site, Tuning
from afbs_compile.summary import in_order


def densities(tuning: Tuning) -> NDArray[np.float64]:
    """Density [sites, most heads]; a dense site is 1, unknown or missing heads are NaN."""
    sites = in_order(tuning)
    table = np.full((len(sites), max((len(site.heads) for site in sites), default=0)), np.nan)
    for row, site in zip(table, sites, strict=True):
        row[: len(site.heads)] = head_densities(site)
    return table


def head_densities(site: Site) -> list[float]:
    """Density of every head of a site, NaN where it is not known."""
    if site.decision == "dense":
        return [1.0] * len(site.heads)
    return [np.nan if head.density is None else head.density for head in site.heads]


def draw(tuning: Tuning, path: Path, title: str) -> None:
    """Write the picture to `path`; its suffix says the format.

    Raises:
        ValueError: The tuning has no sites, or matplotlib does not know the format.
        OSError: The file cannot be written.
    """
    table = densities(tuning)
    if not table.size:
        raise ValueError("the tuning has no sites, so there is nothing to draw")
    layers, heads = table.shape
    figure = Figure(figsize=(3 + 0.3 * heads, max(3, 1.5 + 0.2 * layers)), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(table, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    axes.set(xlabel="head", ylabel="attention site", title=title)
    axes.set_xticks(range(0, heads, 1 + heads // 16))
    axes.set_yticks(range(0, layers, 1 + layers // 40))
    figure.colorbar(image, label="density (visited / visible blocks)")
    figure.savefig(path, dpi=120)
