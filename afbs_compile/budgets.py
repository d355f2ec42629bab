"""How much may each site keep from the next call on? Budgets of running models, by site.

A budget is the share of the visible blocks that a sparse head keeps: its cost is known before the
step. It is one column of a policy tensor, so a change recompiles nothing and reads no file.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from afbs_compile.logs import warn
from afbs_compile.runner import RUNNERS, Runner
from afbs_compile.weights import LAYERS, LOCK, Layer, full_name, module_of

WRAPPERS = frozenset({"_orig_mod", "module", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})
Budget = float | Sequence[float] | None


def set_budget(model: nn.Module | str, budgets: Mapping[str, Budget]) -> int:
    """Give the sparse heads of some sites of a running model other budgets.

    They hold from the next call on, for every graph and length; no graph is recompiled. Heads that
    the policy keeps dense stay dense. Call it between steps, not between a forward and its
    backward: activation checkpointing would choose other blocks in the second run.

    Args:
        model: The model (also wrapped by DDP, FSDP2 or `torch.compile`), or the key of the policy
            that it runs by.
        budgets: By site, the share of its visible blocks to keep, in (0, 1], one for all heads or
            one for each query head; None goes back to the policy's. Names of sites are paths in
            the model, or, for a key, those of the policy.

    Returns:
        How many sites took one; a layer that has not run yet takes none.

    Raises:
        ValueError: A budget is out of range, or there is not one for each head.
    """
    wanted = {name: checked(name, budget) for name, budget in budgets.items()}
    with LOCK:
        known = list(sites_of(model))
        changed: dict[int, Layer] = {}
        for name, layer, site in known:
            if name in wanted:
                put(layer, site, wanted[name])
                changed[id(layer)] = layer
        for runner in [r for r in RUNNERS if isinstance(r, Runner)]:
            for layer in changed.values():
                runner.refresh(layer)
    names = {name for name, _, _ in known}
    if unknown := sorted(wanted.keys() - names):
        warn(f"no site called {', '.join(unknown)} has run in the model; it has "
             f"{', '.join(sorted(names)) or 'none'}")  # fmt: skip
    return len(wanted.keys() & names)


def checked(name: str, budget: Any) -> float | tuple[float, ...] | None:
    """A budget in range."""
    if budget is None:
        return None
    values = tuple(budget) if isinstance(budget, Sequence) else (budget,)
    if not values or not all(isinstance(b, int | float) and 0 < b <= 1 for b in values):
        raise ValueError(f"the budget of {name!r} is {budget!r}; give numbers above 0, at most 1")
    return values if isinstance(budget, Sequence) else float(budget)


def put(layer: Layer, site: str, budget: float | tuple[float, ...] | None) -> None:
    """Set one budget, or take it away."""
    if budget is None:
        layer.budgets.pop(site, None)
        return
    heads = layer.heads[site]
    if isinstance(budget, tuple) and len(budget) != heads:
        raise ValueError(f"{len(budget)} budgets for the {heads} heads of {site!r}")
    layer.budgets[site] = budget


def sites_of(model: nn.Module | str) -> Iterator[tuple[str, Layer, str]]:
    """Every site of a model that has run: its name in the model, its layer, its name there."""
    paths = None if isinstance(model, str) else parameter_paths(model)
    for layer in list(LAYERS.values()):
        if paths is None:
            if model in (layer.key, layer.policy):
                for site in layer.heads:
                    name = layer.names.get(site, site) if model == layer.policy else site
                    yield name, layer, site
        elif place := place_of(layer, paths):
            for site in layer.heads:
                inside = name_in_model(site, *place)
                if inside is not None:
                    yield inside, layer, site


def parameter_paths(model: nn.Module) -> dict[int, str]:
    """Path of every parameter by `id`, without wrappers; FSDP2's whole ones too."""
    found = {id(weight): bare(path) for path, weight in model.named_parameters()}
    for path, module in model.named_modules():
        for whole, name in unsharded(module):
            found[id(whole)] = bare(f"{path}.{name}")
    return found


def unsharded(module: nn.Module) -> Iterator[tuple[Any, str]]:
    """The whole parameters that FSDP2 keeps for a module's forward, with their names below it.

    FSDP2 has no public way to them.
    """
    state = getattr(module, "_get_fsdp_state", lambda: None)()
    groups = getattr(state, "_fsdp_param_groups", None)  # from torch 2.12 on
    if groups is None:
        groups = [g for g in [getattr(state, "_fsdp_param_group", None)] if g]
    paths = {id(inner): path for path, inner in module.named_modules()}
    for group in groups:
        for param in group.fsdp_params:
            info, whole = param._module_info, getattr(param, "_unsharded_param", None)
            if whole is not None and id(info.module) in paths:
                yield whole, f"{paths[id(info.module)]}.{info.param_name}".lstrip(".")


def bare(path: str) -> str:
    """A parameter's path without what wrappers put into it."""
    parts = [part for part in path.split(".") if part]
    while parts and parts[0] == "module":
        parts = parts[1:]
    return ".".join(part for part in parts if part not in WRAPPERS - {"module"})


def place_of(layer: Layer, paths: Mapping[int, str]) -> tuple[str, str] | None:
    """Where a layer is in a model: what to put before its names, or what to take off them."""
    for name, key in layer.ids.items():
        name = bare(name)
        path = paths.get(key)
        if path is not None and path.endswith(name):
            return path[: -len(name)].rstrip("."), ""
        if path is not None and name.endswith(path):
            return "", name[: -len(path)].rstrip(".")
    return None


def name_in_model(site: str, before: str, off: str) -> str | None:
    """A site's name in the model; None if it is not inside the model."""
    name = bare(full_name(before, site))
    if not off:
        return name
    return name[len(off) + 1 :] if module_of(name).startswith(f"{off}.") else None
