"""What did the user ask for? The one reader of `torch.compile(options=…)` and of the environment.

Names that are not ours are Inductor's (`torch._inductor.config`) and are forwarded to it as
configuration patches; anything else is an error that names the closest valid option.
"""

import difflib
import math
import numbers
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_origin

import platformdirs

MAX_ERROR = 0.2  # of a head, by default
LIMITED_ERROR = 0.5  # the same where an end-to-end limit is what protects
MIN_LENGTH = 2048  # tokens
MEAN_ERROR_SHARE = 0.3  # of max_error: the mean over heads that tuning may spend by default

STRATEGIES = ("afbs-bo", "afbs-bo-paper", "one-pass", "bisect", "grid", "sparge", "random")
EVALUATORS = ("profile", "direct")
FIDELITIES = ("query-blocks", "sequence-length")
SELECTORS = ("sub8", "sub4", "mean")
EXECUTORS = ("local", "torchrun", "ray")
RULES = ("auto", "tau", "budget")
COMPENSATIONS = ("none", "tangent")


@dataclass(frozen=True, slots=True)
class Options:
    """The user's wishes, checked.

    Attributes:
        max_error: Largest relative L1 error of one head's output, in [0, 1]; 0 keeps all dense.
            None takes `MAX_ERROR`, or `LIMITED_ERROR` with a limit.
        mean_error: Largest mean of those errors over the heads, in [0, 1]; None takes
            `MEAN_ERROR_SHARE` of `max_error`.
        max_kl: A limit: largest KL(dense ‖ sparse) of the model's predictions, nats a token,
            measured end to end. It takes the place of `mean_error`.
        max_ppl_increase: A limit: largest relative increase of perplexity, likewise.
        policy: A policy file to use as it is, instead of tuning.
        cache_dir: Where policies are kept; None asks the environment, then the platform.
        strategy: How to search, one of `STRATEGIES`.
        evaluator: How a candidate is measured, one of `EVALUATORS`.
        fidelity: What a cheap evaluation looks at, one of `FIDELITIES`.
        selector: How block scores are made, one of `SELECTORS`.
        compensation: What stands for a block that is left out, one of `COMPENSATIONS`.
        rule: How many blocks a sparse head keeps, one of `RULES`: as many as hold the share tau
            of the mass, a fixed share of those that are visible (the density that it was tuned
            at, unless its policy has a budget), or by default the latter in training.
        min_length: Calls with fewer query tokens stay dense.
        tuning_budget_s: Seconds after which the first call stops measuring and leaves the rest
            dense until a later start; None measures everything.
        calibration_calls: How many of a program's calls are measured, in each length bucket: the
            first tunes, each further one may only make thresholds more careful.
        inductor: Configuration patches for Inductor.
    """

    max_error: float | None = None
    mean_error: float | None = None
    max_kl: float | None = None
    max_ppl_increase: float | None = None
    policy: Path | None = None
    cache_dir: Path | None = None
    strategy: str = "afbs-bo"
    evaluator: str = "profile"
    fidelity: str = "query-blocks"
    selector: str = "sub8"
    compensation: str = "none"
    rule: str = "auto"
    min_length: int = MIN_LENGTH
    tuning_budget_s: float | None = None
    calibration_calls: int = 1
    inductor: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse limits together with what they replace or need."""
        if self.limited and self.mean_error is not None:
            raise ValueError("mean_error and an end-to-end limit exclude each other; give one")
        if self.limited and self.strategy != "afbs-bo":
            raise ValueError(
                f"strategy {self.strategy!r} knows no end-to-end limit; give 'afbs-bo', or "
                "max_error without max_kl and max_ppl_increase"
            )

    @property
    def limited(self) -> bool:
        """Whether what all heads do together is limited, end to end."""
        return self.max_kl is not None or self.max_ppl_increase is not None

    @property
    def error_cap(self) -> float:
        """The largest error of a head, with the default filled in."""
        if self.max_error is not None:
            return self.max_error
        return LIMITED_ERROR if self.limited else MAX_ERROR

    @property
    def mean_error_budget(self) -> float:
        """The mean error that tuning may spend, with the default filled in."""
        return MEAN_ERROR_SHARE * self.error_cap if self.mean_error is None else self.mean_error

    @property
    def cache_folder(self) -> Path:
        """The cache directory with the environment and the platform's default filled in."""
        return self.cache_dir or default_cache_dir()

    def rule_for(self, training: bool) -> str:
        """The rule, `tau` or `budget`, with the default filled in."""
        if self.rule != "auto":
            return self.rule
        return "budget" if training else "tau"

    def tuning_fingerprint(self) -> dict[str, float | str]:
        """The options that change what is tuned; two tunings are comparable if these agree."""
        limits = {"max_kl": self.max_kl, "max_ppl_increase": self.max_ppl_increase}
        given = {name: most for name, most in limits.items() if most is not None}
        return {
            **given,
            "max_error": self.error_cap,
            "mean_error": self.mean_error_budget,
            "strategy": self.strategy,
            "evaluator": self.evaluator,
            "fidelity": self.fidelity,
            "selector": self.selector,
            "compensation": self.compensation,
        }


def parse(options: Mapping[str, Any] | None = None, mode: str | None = None) -> Options:
    """Check `options` (ours and Inductor's) and `mode` (Inductor's presets).

    Raises:
        ValueError: An unknown name, or a value of the wrong type or out of range.
    """
    ours: dict[str, Any] = {}
    inductor = mode_patches(mode)
    for name, value in (options or {}).items():
        if name in CHECKS:
            ours[name] = CHECKS[name](name, value)
        else:
            inductor.update(inductor_patch(name, value))
    return Options(**ours, inductor=inductor)


def mode_patches(mode: str | None) -> dict[str, Any]:
    """Inductor's configuration patches for a `torch.compile(mode=…)` preset."""
    if mode is None:
        return {}
    from torch._inductor import list_mode_options

    presets: dict[str, dict[str, Any]] = list_mode_options()
    if mode not in presets:
        raise ValueError(f"mode {mode!r} is unknown; give one of {', '.join(presets)}")
    return dict(presets[mode])


def inductor_patch(name: str, value: Any) -> dict[str, Any]:
    """`{name: value}` if Inductor has such an option of such a type, else ValueError."""
    from torch._inductor import config

    known = config.get_config_copy()
    key = str(name).replace("-", "_")
    if key not in known:
        close = difflib.get_close_matches(key, [*CHECKS, *known], n=1)
        hint = f"; did you mean {close[0]!r}?" if close else "."
        raise ValueError(
            f"option {name!r} is unknown{hint} afbs takes {', '.join(CHECKS)}, and every option "
            "of torch._inductor.config"
        )
    needed = config.get_type(key)  # type: ignore[attr-defined]
    if get_origin(needed) is None and not isinstance(value, needed):
        raise ValueError(
            f"Inductor's option {key!r} is {value!r}, a {type(value).__name__}; "
            f"give a value like {known[key]!r}"
        )
    return {key: value}


def fraction(name: str, value: Any) -> float:
    """A real number in [0, 1]."""
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not real or not math.isfinite(value) or not 0 <= value <= 1:
        raise ValueError(f"option {name!r} is {value!r}; give a number from 0 to 1")
    return float(value)


def fraction_or_none(name: str, value: Any) -> float | None:
    """A real number in [0, 1], or None."""
    return None if value is None else fraction(name, value)


def seconds_or_none(name: str, value: Any) -> float | None:
    """A finite number of seconds of at least 0, or None."""
    if value is None:
        return None
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not real or not math.isfinite(value) or value < 0:
        raise ValueError(f"option {name!r} is {value!r}; give a number of seconds, or None")
    return float(value)


def limit_or_none(name: str, value: Any) -> float | None:
    """A real number above 0, or None."""
    if value is None:
        return None
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not real or not 0 < value < math.inf:
        raise ValueError(f"option {name!r} is {value!r}; give a number above 0, or None")
    return float(value)


def positive(name: str, value: Any) -> int:
    """An integer of at least 1."""
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not whole or value < 1:
        raise ValueError(f"option {name!r} is {value!r}; give a whole number of at least 1")
    return int(value)


def path_or_none(name: str, value: Any) -> Path | None:
    """A path with `~` expanded, or None."""
    if value is None:
        return None
    if not isinstance(value, str | os.PathLike) or not str(value):
        raise ValueError(f"option {name!r} is {value!r}; give a path, or None")
    return Path(value).expanduser()


def one_of(choices: tuple[str, ...]) -> Callable[[str, Any], str]:
    """A check that the value is one of `choices`."""

    def check(name: str, value: Any) -> str:
        if not isinstance(value, str) or value not in choices:
            close = difflib.get_close_matches(str(value), choices, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ";"
            raise ValueError(
                f"option {name!r} is {value!r}{hint} give one of {', '.join(choices)}"
            )
        return value

    return check


CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "max_error": fraction,
    "mean_error": fraction_or_none,
    "max_kl": limit_or_none,
    "max_ppl_increase": limit_or_none,
    "policy": path_or_none,
    "cache_dir": path_or_none,
    "strategy": one_of(STRATEGIES),
    "evaluator": one_of(EVALUATORS),
    "fidelity": one_of(FIDELITIES),
    "selector": one_of(SELECTORS),
    "compensation": one_of(COMPENSATIONS),
    "rule": one_of(RULES),
    "min_length": positive,
    "tuning_budget_s": seconds_or_none,
    "calibration_calls": positive,
}


def default_cache_dir() -> Path:
    """`AFBS_CACHE_DIR`, or else the platform's cache directory."""
    chosen = os.environ.get("AFBS_CACHE_DIR")
    return Path(chosen).expanduser() if chosen else platformdirs.user_cache_path("afbs-compile")


def disabled() -> bool:
    """Whether `AFBS_DISABLE` asks to leave every attention call dense."""
    return os.environ.get("AFBS_DISABLE", "").lower() not in ("", "0", "false", "no")


def torchrun_rank() -> int | None:
    """This process's number among those that torchrun started, or None."""
    rank = os.environ.get("RANK")
    return int(rank) if rank is not None and "WORLD_SIZE" in os.environ else None


def torchrun_local_rank() -> int:
    """Its number on this machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def log_words() -> list[str]:
    """The words of `AFBS_LOG`; `afbs_compile.logs` says what they mean."""
    return [word for word in os.environ.get("AFBS_LOG", "").replace(" ", "").split(",") if word]
