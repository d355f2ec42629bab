"""What was decided for every attention site and head of a model? The policy and its JSON.

One document a model, for people and programs: schema-versioned, sorted keys, no pickle. A tuning
belongs to a length bucket and to the options it was made with.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from afbs_compile import strict_json
from afbs_compile.checks import check, check_measured, mean_known
from afbs_compile.schema import SCHEMA, unwrapped

MODES = ("dense", "sparse", "window")
DECISIONS = ("sparse", "dense")
KEY = re.compile(r"[A-Za-z0-9_-]{1,64}")
NEXT_STEP = "delete it or make it again with `afbs tune`"


class PolicyError(ValueError):
    """A policy file or document that cannot be used; the message says why and what to do."""


def bucket_of(length: int) -> int:
    """The length bucket in tokens: 4, 5, 6 or 7 times a power of two, no less than `length`.

    So the lengths of a bucket differ by a quarter at most; over a quarter, the error of a
    threshold moves by less than the margin that tuning leaves (research: u by 0.03).
    """
    if length < 1:
        raise ValueError(f"length is {length}; a bucket needs at least 1 token")
    step = 1 << max(0, (length - 1).bit_length() - 3)
    return -(-length // step) * step


@dataclass(frozen=True, slots=True)
class Head:
    """What one query head does, and what was measured of it.

    Attributes:
        mode: `dense`, `sparse` (blocks chosen by their mass) or `window`.
        tau: Pooled mass that is kept, in [0, 1].
        theta: Self-similarity gate of the selector `mean`, in [-1, 1]; -1 is off.
        lambda_: PV skip in log2 units, or None for off.
        window: Keys a query sees including itself (only with `window`).
        sink: Tokens at the start that are always visible.
        neighbours: Key blocks before the diagonal that are always kept.
        error: Relative L1 error of the head's output, or None if not measured.
        density: Visited over visible blocks, or None if not measured.
        budget: Share of the visible blocks that a sparse head keeps, in (0, 1], in place of tau;
            None leaves that to the option `rule`.
    """

    mode: str
    tau: float
    theta: float = -1.0
    lambda_: float | None = None
    window: int = 0
    sink: int = 64
    neighbours: int = 2
    error: float | None = None
    density: float | None = None
    budget: float | None = None

    def __post_init__(self) -> None:
        """Check every range."""
        check(self.mode in MODES, "mode", self.mode, f"one of {', '.join(MODES)}")
        check(0 <= self.tau <= 1, "tau", self.tau, "a number from 0 to 1")
        check(-1 <= self.theta <= 1, "theta", self.theta, "a number from -1 to 1")
        check(math.isfinite(self.lambda_ or 0), "lambda_", self.lambda_, "null or a finite number")
        least = 1 if self.mode == "window" else 0
        check(self.window >= least, "window", self.window, f"at least {least} keys")
        check(self.sink >= 0, "sink", self.sink, "at least 0 tokens")
        check(self.neighbours >= 0, "neighbours", self.neighbours, "at least 0 blocks")
        check_measured("error", self.error)
        check_measured("density", self.density, 1.0)
        share = self.budget is None or 0 < self.budget <= 1
        check(share, "budget", self.budget, "null or a number above 0, at most 1")


@dataclass(frozen=True, slots=True)
class Site:
    """One attention call of the model; `heads` in the order of its query heads.

    `weights` is the key of the weights of the module that makes the call: by it the site is found
    where its block is compiled alone.
    """

    name: str
    heads: tuple[Head, ...]
    kv_heads: int
    head_dim: int
    mask: str
    decision: str
    reason: str | None = None
    seconds_dense: float | None = None
    seconds_sparse: float | None = None
    weights: str | None = None

    def __post_init__(self) -> None:
        """Check the head counts, the decision and the times."""
        check(bool(self.heads), "heads", self.heads, "at least one head")
        groups = self.kv_heads >= 1 and len(self.heads) % self.kv_heads == 0
        check(groups, "kv_heads", self.kv_heads, f"a divisor of the {len(self.heads)} heads")
        check(self.head_dim >= 1, "head_dim", self.head_dim, "at least 1")
        known = self.decision in DECISIONS
        check(known, "decision", self.decision, f"one of {', '.join(DECISIONS)}")
        check_measured("seconds_dense", self.seconds_dense)
        check_measured("seconds_sparse", self.seconds_sparse)


@dataclass(frozen=True, slots=True)
class Tuning:
    """What one search found, for one length bucket and one set of options.

    Attributes:
        bucket: The length bucket in tokens (`bucket_of`).
        length: The length that was measured, in tokens.
        options: `Options.tuning_fingerprint()`.
        complete: Whether every site was tuned; an incomplete tuning may be continued.
        evaluations: Candidates that were evaluated.
        cost_dense_passes: What that cost, in dense passes over one input.
        seconds: Wall-clock time of calibration and search.
        created: When, ISO 8601.
        device: The device's name.
        versions: Of Python and the packages.
        inputs: A description of every calibration input.
        sites: By site name.
        kl: KL(dense ‖ sparse) of the model's predictions, nats a token, worst over the inputs it
            was measured on; None if it was not.
        perplexity_increase: The same for the relative increase of perplexity; may be negative.
    """

    bucket: int
    length: int
    options: dict[str, float | str]
    complete: bool
    evaluations: int
    cost_dense_passes: float
    seconds: float
    created: str
    device: str
    versions: dict[str, str]
    inputs: tuple[str, ...]
    sites: dict[str, Site]
    kl: float | None = None
    perplexity_increase: float | None = None

    def __post_init__(self) -> None:
        """Check the bucket against the length, the counts, and that names agree."""
        check(self.length >= 1, "length", self.length, "at least 1 token")
        fitting = self.bucket == bucket_of(self.length)
        check(fitting, "bucket", self.bucket, f"{bucket_of(self.length)}, of length {self.length}")
        check(self.evaluations >= 0, "evaluations", self.evaluations, "at least 0")
        check_measured("cost_dense_passes", self.cost_dense_passes)
        check_measured("seconds", self.seconds)
        check_measured("kl", self.kl)
        for name, site in self.sites.items():
            check(site.name == name, f"sites.{name}.name", site.name, f"{name!r}, as its key")

    @property
    def confidence(self) -> float:
        """Least chance that a head's error on a further input is at most `max_error`.

        For inputs that are exchangeable, n / (n + 1) after n of them (conformal prediction, Vovk
        et al. 2005): each head's threshold is the most careful that one of them asked for. The
        margin that tuning leaves below `max_error` comes on top. Targets that were fitted to the
        same inputs are not accounted for.
        """
        return len(self.inputs) / (len(self.inputs) + 1)

    @property
    def density(self) -> float | None:
        """Mean density over all heads with a known one; a dense site or head counts as 1."""
        known = [
            1.0 if "dense" in (site.decision, head.mode) else head.density
            for site in self.sites.values()
            for head in site.heads
        ]
        return mean_known(known)

    @property
    def holds_at_any_length(self) -> bool:
        """Are heads windowed, and none sparse? Thresholds belong to a length, windows do not."""
        acting = [site for site in self.sites.values() if site.decision == "sparse"]
        return {head.mode for site in acting for head in site.heads} in (
            {"window"}, {"window", "dense"},
        )  # fmt: skip

    @property
    def errors(self) -> list[float]:
        """The measured error of every head that runs sparse."""
        sparse = [site for site in self.sites.values() if site.decision == "sparse"]
        return [head.error for site in sparse for head in site.heads if head.error is not None]

    @property
    def max_error(self) -> float | None:
        """The largest measured error of a head that runs sparse."""
        return max(self.errors, default=None)

    @property
    def mean_error(self) -> float | None:
        """The mean measured error of the heads that run sparse."""
        return mean_known(self.errors)


@dataclass(frozen=True, slots=True)
class Policy:
    """Everything known about one model (`identity.model_key`)."""

    model: str
    model_name: str | None
    tunings: tuple[Tuning, ...] = ()

    def __post_init__(self) -> None:
        """Check that the key can name a file and no tuning comes twice."""
        check(bool(KEY.fullmatch(self.model)), "model", self.model, "1-64 of A-Z a-z 0-9 _ -")
        slots = {slot(tuning) for tuning in self.tunings}
        once = len(slots) == len(self.tunings)
        check(once, "tunings", [slot(t) for t in self.tunings], "each bucket and options once")

    def find(self, bucket: int, fingerprint: Mapping[str, float | str]) -> Tuning | None:
        """The tuning of this bucket made with these options, or None."""
        fitting = (t for t in self.tunings if t.bucket == bucket and t.options == fingerprint)
        return next(fitting, None)

    def find_any(self, bucket: int) -> Tuning | None:
        """The newest tuning of this bucket, complete ones first, or None."""
        fitting = [t for t in self.tunings if t.bucket == bucket]
        return max(fitting, key=lambda t: (t.complete, t.created), default=None)

    def find_longer(self, length: int) -> Tuning | None:
        """The tuning of the closest length above this one and below twice of it, or None.

        Thresholds err less at a shorter length than at the one that they were tuned at.
        """
        fitting = [t for t in self.tunings if length <= t.length < 2 * length]
        return min(fitting, key=lambda t: (t.length, not t.complete), default=None)

    def with_tuning(self, tuning: Tuning) -> "Policy":
        """This policy with `tuning` in place of one of the same bucket and options."""
        others = [t for t in self.tunings if slot(t) != slot(tuning)]
        return replace(self, tunings=tuple(sorted([*others, tuning], key=slot)))

    def sites(self) -> tuple[str, ...]:
        """The names of all sites in any tuning."""
        return tuple(sorted({name for tuning in self.tunings for name in tuning.sites}))

    def to_json(self) -> str:
        """The document; `from_json` gives back an equal policy."""
        return strict_json.dumps({"schema": SCHEMA, "policy": self})

    @staticmethod
    def from_json(text: str, source: str = "the policy") -> "Policy":
        """The policy in a document; `source` names it in messages.

        Raises:
            PolicyError: It is damaged, incomplete, out of range or of another schema.
        """
        try:
            return strict_json.decode(Policy, unwrapped(strict_json.loads(text)))
        except ValueError as error:
            raise PolicyError(f"{source} cannot be used: {error}; {NEXT_STEP}") from error

    @staticmethod
    def read(path: Path) -> "Policy":
        """The policy in a file.

        Raises:
            PolicyError: The file cannot be read, or its content cannot be used.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise PolicyError(f"{path} cannot be read: {error}; {NEXT_STEP}") from error
        return Policy.from_json(text, source=str(path))


def slot(tuning: Tuning) -> tuple[int, str]:
    """What tells the tunings of a policy apart: the bucket and the options."""
    return tuning.bucket, json.dumps(tuning.options, sort_keys=True)
