"""Which tuning applies to a graph at a length? A given file, the cache, or a calibration now."""

import logging
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from afbs_compile import cache
from afbs_compile.calibrate import calibrate, describe, finished, tuning
from afbs_compile.carry import carry, neighbour
from afbs_compile.kernels.data_mask import KINDS
from afbs_compile.logs import warn
from afbs_compile.measurements import begun
from afbs_compile.options import Options
from afbs_compile.passes.rewrite import Site
from afbs_compile.policy import Policy, PolicyError, Tuning, bucket_of
from afbs_compile.policy import Site as SitePolicy
from afbs_compile.problem import Problem, store_of
from afbs_compile.progress import Progress
from afbs_compile.recheck import recheck
from afbs_compile.report import JOURNAL, CalibrationReport
from afbs_compile.store import Store
from afbs_compile.tuner.trace import Trace
from afbs_compile.weights import Layer

LOGGER = logging.getLogger(__name__)
LOCK = threading.RLock()  # one calibration at a time: it saturates the device anyway


class Unusable(ValueError):
    """No tuning can be had; the message is the reason why sites stay dense."""


def resolve(problem: Problem, layer: Layer, given: Policy | None = None) -> Tuning:
    """The tuning of a problem.

    Args:
        problem: Graph, inputs, sites and options.
        layer: Whose weights they are; told which policy it runs by.
        given: A policy to use as it is.

    Raises:
        Unusable: Nothing fits, and nothing can be measured.
    """
    key = layer.key
    with LOCK:
        if given is None and problem.options.policy is not None:
            given = read_given(problem.options)
        if given is not None:
            return from_given(given, problem, layer)
        stored = cache.load(key, problem.options.cache_folder)
        known, fitting = look_up(stored, problem)
        if known and len(fitting) == len(problem.sites):
            note("hit", key, problem, None, cache.path_of(key, problem.options.cache_folder))
            return known
        return measure_now(problem, key, stored)


def look_up(
    stored: Policy | None, problem: Problem
) -> tuple[Tuning | None, dict[str, SitePolicy]]:
    """The stored tuning for a problem, and the sites that it has tuned."""
    known = stored.find(bucket_of(problem.length), fingerprint(problem)) if stored else None
    return known, finished_sites(fitting_sites(known, problem.sites)) if known else {}


def read_given(options: Options) -> Policy:
    """The policy file of `options={"policy": …}`."""
    assert options.policy is not None
    try:
        return Policy.read(options.policy)
    except PolicyError as error:
        warn(f"{error}. The model runs dense.")
        raise Unusable("the policy file cannot be used") from error


def from_given(policy: Policy, problem: Problem, layer: Layer) -> Tuning:
    """The tuning of a given policy for the problem's length; sites it lacks stay dense."""
    found = policy.find_any(bucket_of(problem.length)) or policy.find_longer(problem.length)
    found = found or next((t for t in policy.tunings if t.holds_at_any_length), None)
    names = {site.name: site.name for site in problem.sites}
    if policy.model != layer.key:
        names = names_by_weights(policy, problem)
        if not names:
            warn(
                f"{problem.options.policy or 'the policy'} is of model {policy.model}, this is "
                f"model {layer.key}: the weights differ. The model runs dense; make its own with "
                "`afbs tune`."
            )
            raise Unusable("the policy file is of another model")
    if found is None:
        have = ", ".join(str(t.bucket) for t in policy.tunings) or "none"
        raise Unusable(f"the policy has no tuning for {problem.length} tokens (buckets: {have})")
    note("file", policy.model, problem, None, problem.options.policy)
    layer.policy, layer.names = policy.model, names
    known = {
        name: replace(found.sites[full], name=name)
        for name, full in names.items() if full in found.sites
    }  # fmt: skip
    return replace(found, sites=fitting_sites(replace(found, sites=known), problem.sites))


def names_by_weights(policy: Policy, problem: Problem) -> dict[str, str]:
    """What a whole model's policy calls the problem's sites: those with the same weights.

    A site whose weights several sites share is left out: which one it is cannot be told.
    """
    sites = {s.name: s.weights for t in policy.tunings for s in t.sites.values() if s.weights}
    found = {}
    for site, key in problem.weights.items():
        fitting = [name for name, weights in sites.items() if weights == key]
        if len(fitting) == 1:
            found[site] = fitting[0]
    return found


def measure_now(
    problem: Problem, key: str, stored: Policy | None, *, afresh: bool = False
) -> Tuning:
    """Calibrate the sites that nothing is known of (`afresh`: all), and keep what was found.

    A tuning that ended early on the same inputs goes on where it stopped, all sites together, and
    finds what it would have found in one go. On other inputs only the missing sites are tuned.

    Raises:
        Unusable: The inputs cannot be measured.
    """
    known, fitting = look_up(stored, problem)
    with store_of(problem, key) as store:
        if afresh or (known and not known.complete and begun(problem, store)):
            missing = problem
        else:
            missing = replace(problem, sites=[s for s in problem.sites if s.name not in fitting])
        keep = partial(kept, store, stored or Policy(key, None), known, fitting, problem)
        found: dict[str, SitePolicy] = {}
        near = None if afresh or known else neighbour(stored, problem)
        try:
            with Progress() as progress:
                new = carried(problem, near, progress) or calibrate(
                    missing, store, progress, found
                )
        except KeyboardInterrupt:
            if finished_sites(found):
                keep(tuning(missing, found, Trace(), 0.0))
            raise
        except (ValueError, torch.OutOfMemoryError) as error:
            warn(f"calibration failed: {error}. The model runs dense.")
            raise Unusable(f"calibration failed: {error}") from error
        result, path = keep(new)
    note("miss", key, problem, result, path)
    return result


def check_again(problem: Problem, key: str, known: Tuning) -> Tuning:
    """The tuning after one more call, stored. What cannot be measured changes nothing."""
    with LOCK:
        try:
            with Progress() as progress:
                new = recheck(problem, known, progress)
        except (ValueError, torch.OutOfMemoryError) as error:
            warn(f"a further call could not be measured: {error}. Thresholds stay as they are.")
            return known
        stored = cache.load(key, problem.options.cache_folder) or Policy(key, None)
        cache.store(stored.with_tuning(new), problem.options.cache_folder)
        return new


def carried(problem: Problem, near: Tuning | None, progress: Progress) -> Tuning | None:
    """The tuning of a close length if it holds here, too; an end-to-end limit is never assumed."""
    fitting = finished_sites(fitting_sites(near, problem.sites)) if near else {}
    if len(fitting) < len(problem.sites) or problem.options.limited:
        return None
    return carry(problem, fitting, progress)


def kept(
    store: Store,
    policy: Policy,
    known: Tuning | None,
    fitting: dict[str, SitePolicy],
    problem: Problem,
    new: Tuning,
) -> tuple[Tuning, Path | None]:
    """Put a new tuning into the cache, with what is still good of an older one."""
    result = merged(new, known, fitting)
    path = cache.store(policy.with_tuning(result), problem.options.cache_folder)
    if path and new.complete:
        store.finish(sweep=result.complete)
    return result, path


def merged(new: Tuning, known: Tuning | None, fitting: dict[str, SitePolicy]) -> Tuning:
    """A new tuning together with the sites that are still good of an older one.

    What was tuned wins over what was left for later, and new over old.
    """
    others = {n: s for n, s in known.sites.items() if n not in new.sites} if known else {}
    sites = others | new.sites | fitting | finished_sites(new.sites)
    return replace(new, sites=sites, complete=len(finished_sites(sites)) == len(sites))


def finished_sites(sites: dict[str, SitePolicy]) -> dict[str, SitePolicy]:
    """The sites that were tuned, rather than left for later."""
    return {name: site for name, site in sites.items() if finished(site)}


def fitting_sites(found: Tuning, sites: Sequence[Site]) -> dict[str, SitePolicy]:
    """The sites of a tuning whose shape and mask are those of the graph's."""
    return {
        site.name: found.sites[site.name]
        for site in sites
        if site.name in found.sites and fits(found.sites[site.name], site)
    }


def fits(policy: SitePolicy, site: Site) -> bool:
    """Was this policy made for such a site?

    Calls with and without key padding share one: padding shortens texts inside a length bucket.
    """
    made_for = (len(policy.heads), policy.kv_heads, policy.head_dim, unpadded(policy.mask))
    return made_for == (site.heads, site.kv_heads, site.head_dim, unpadded(describe(site)))


def unpadded(mask: str) -> str:
    """A mask's description without key padding."""
    return mask.replace(f" + {KINDS[0]}", "")


def fingerprint(problem: Problem) -> Mapping[str, float | str]:
    """The options that the tuning must have been made with."""
    return problem.options.tuning_fingerprint()


def note(
    origin: str, key: str, problem: Problem, made: Tuning | None, path: object | None
) -> None:
    """Write down where a tuning came from."""
    LOGGER.info("%s tokens: cache %s, policy %s", problem.length, origin, path)
    JOURNAL.add_calibration(
        CalibrationReport(
            cache=origin,
            model=key,
            length=problem.length,
            evaluations=made.evaluations if made else 0,
            seconds=made.seconds if made else 0.0,
            policy_path=str(path) if path else None,
        )
    )
