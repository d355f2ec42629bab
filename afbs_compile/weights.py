"""Whose attention is this? Weights are known by identity: training changes what they hold.

One compiled graph serves many layers (regional compilation, FSDP2's blocks), and one layer many
graphs (other lengths). What tells layers apart is the set of parameter objects that a call brings:
`id` of each, no content. Under FSDP2 these are the unsharded parameters, which FSDP2 makes once
and whose memory alone it frees and allocates again. Content is hashed once, when a set is first
seen; the key made then stays that of the layer while it is trained. Weights that were never
trained here and have changed all the same (another checkpoint was loaded) are a new layer.
"""

import threading
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from afbs_compile.identity import key_of, rows_of

LOCK = threading.RLock()
Fraction = float | tuple[float, ...]  # of a site, or of each of its heads


@dataclass(slots=True)
class Layer:
    """What is known of one set of weights.

    Attributes:
        key: Of the content when the weights were first seen.
        heads: Query heads, by site.
        sites: Key of the weights below each site's module, by site.
        ids: `id` of each weight, by its path in the graph.
        versions: How often the weights had been written to.
        trained: Whether a graph that computes gradients has used them.
        policy: Key of the policy that it runs by: its own, or a whole model's.
        names: The sites' names in that policy.
        budgets: What `set_budget` put in place of the policy's, by site.
    """

    key: str
    heads: dict[str, int]
    sites: dict[str, str]
    ids: dict[str, int]
    versions: int
    policy: str
    trained: bool = False
    names: dict[str, str] = field(default_factory=dict)
    budgets: dict[str, Fraction] = field(default_factory=dict)


LAYERS: dict[frozenset[int] | str, Layer] = {}  # by `id` of the weights, or by code


def layer_of(
    weights: Sequence[tuple[str, Tensor]], sites: Mapping[str, int], code: str, training: bool
) -> Layer:
    """The layer that some weights belong to; hashes them when it is new.

    Args:
        weights: Path in the graph and tensor of every weight.
        sites: Query heads of the graph's attention calls, by path.
        code: What tells layers without weights apart.
        training: Whether the graph computes gradients.
    """
    identity = frozenset(id(tensor) for _, tensor in weights) or code
    with LOCK:
        known = LAYERS.get(identity)
        if known is None or not (known.trained or known.versions == versions(weights)):
            known = LAYERS[identity] = new_layer(weights, sites, code)
            for _, tensor in weights:  # an id may be given out again once its tensor is gone
                weakref.finalize(tensor, LAYERS.pop, identity, None)
        elif missing := [site for site in sites if site not in known.sites]:
            known.sites.update(site_keys(rows_of(weights), missing))
        known.heads |= sites
        known.trained |= training
        return known


def new_layer(weights: Sequence[tuple[str, Tensor]], sites: Mapping[str, int], code: str) -> Layer:
    """A layer, from the content of its weights."""
    rows = rows_of(weights)
    key = key_of(rows, "" if weights else code)
    ids = {name: id(tensor) for name, tensor in weights}
    return Layer(key, dict(sites), site_keys(rows, sites), ids, versions(weights), policy=key)


def named(key: str) -> Layer:
    """A layer of which nothing but its key is known."""
    return Layer(key, {}, {}, {}, 0, policy=key)


def versions(weights: Iterable[tuple[str, Tensor]]) -> int:
    """How often some weights were written to, in all."""
    return sum(tensor._version for _, tensor in weights if not tensor.is_inference())


def site_keys(rows: Sequence[Sequence[object]], sites: Iterable[str]) -> dict[str, str]:
    """Key of the weights below each site's module, named from there; none without weights."""
    found = {}
    for site in sites:
        path = module_of(site)
        below = [(str(row[0]), row) for row in rows]
        inside = [[name[len(path) :].lstrip("."), *row[1:]] for name, row in below
                  if not path or name.startswith(f"{path}.")]  # fmt: skip
        if inside:
            found[site] = key_of(inside, ordinal_of(site))
    return found


def module_of(site: str) -> str:
    """The path of the module that makes the call; empty for the root of the graph."""
    path = site.partition("#")[0]
    return "" if path in ("function", "model") else path


def ordinal_of(site: str) -> str:
    """Which of the module's calls it is."""
    return site.partition("#")[2]


def full_name(prefix: str, site: str) -> str:
    """The site's name where the module that was compiled is called `prefix`."""
    path = ".".join(part for part in (prefix, module_of(site)) if part) or site.partition("#")[0]
    return f"{path}#{ordinal_of(site)}" if ordinal_of(site) else path
