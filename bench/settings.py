"""Which settings are compared? Dense, one threshold for all heads, and tunings.

| spelling | meaning |
|---|---|
| `dense` | every block, through the same kernel: the noise of the measurement |
| `sub8@.95,.9` | a tau for all heads, one setting each, with the selector's usual neighbours |
| `mean-n0@.9` | the same with 0 neighbours, which is SpargeAttn's rule with a sink |
| `max_error=.05,.1` | tuned, one setting each |
| `{"max_error": [0.1, 0.2], "selector": "mean"}` | options of `afbs_compile.tune`; lists expand |
"""

import itertools
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from afbs_compile.commands.errors import CommandError
from afbs_compile.options import SELECTORS, parse
from afbs_compile.policy import Head

UNIFORM = re.compile(rf"({'|'.join(SELECTORS)})(?:-n(\d+))?@(.+)")
TUNED = re.compile(r"(\w+)=(.+)")
DEFAULTS = (
    "dense",
    "sub8@.97,.95,.9,.85,.8",
    "sub4@.97,.95,.9,.85,.8",
    "mean@.97,.95,.9,.85,.8",
    "mean-n0@.98,.97,.95,.9,.85",
    "max_error=.03,.05,.1,.2",
)


@dataclass(frozen=True, slots=True)
class Setting:
    """One way to run a model.

    Attributes:
        name: In rows and tables.
        family: What it shares with settings that differ only in a number: one curve of a plot.
        selector: How block scores are made.
        head: What every head does, or None if it is tuned.
        options: Of `afbs_compile.tune`; empty if it is not tuned.
        compensation: What stands for a block that is left out.
    """

    name: str
    family: str
    selector: str
    head: Head | None
    options: Mapping[str, Any]
    compensation: str = "none"


def settings(given: Iterable[str]) -> list[Setting]:
    """The settings that were asked for, each once, in order.

    Raises:
        CommandError: One cannot be read, or a value is out of range.
    """
    found = [setting for text in given for setting in read(text.strip())]
    return list({setting.name: setting for setting in found}.values())


def read(text: str) -> list[Setting]:
    """The settings of one spelling."""
    try:
        if text == "dense":
            return [Setting("dense", "dense", SELECTORS[0], Head("dense", 1.0), {})]
        if match := UNIFORM.fullmatch(text):
            selector, neighbours, taus = match.groups()
            return [uniform(selector, neighbours, float(tau)) for tau in taus.split(",")]
        if text.startswith("{"):
            return expanded(json.loads(text))
        if match := TUNED.fullmatch(text):
            name, levels = match.groups()
            return expanded({name: [plain(level) for level in levels.split(",")]})
    except ValueError as error:
        raise CommandError(f"the setting {text!r} cannot be used: {error}") from error
    raise CommandError(
        f"no setting {text!r}; give `dense`, `SELECTOR[-nN]@TAU,…` with one of "
        f"{', '.join(SELECTORS)}, `OPTION=VALUE,…`, or a JSON object of options of "
        "afbs_compile.tune"
    )


def uniform(selector: str, neighbours: str | None, tau: float) -> Setting:
    """The same tau for all heads."""
    family = selector if neighbours is None else f"{selector}-n{neighbours}"
    head = (
        Head("sparse", tau)
        if neighbours is None
        else Head("sparse", tau, neighbours=int(neighbours))
    )
    return Setting(f"{family}@{tau:g}", family, selector, head, {})


def expanded(options: dict[str, Any]) -> list[Setting]:
    """One tuned setting for every combination of values in lists."""
    choices = [v if isinstance(v, list) else [v] for v in options.values()]
    return [
        tuned(dict(zip(options, values, strict=True))) for values in itertools.product(*choices)
    ]


def tuned(options: dict[str, Any]) -> Setting:
    """A tuning; numbers are levels inside a family, words make families."""
    if not options:
        raise ValueError("it names no option")
    wishes = parse(options)
    name = ", ".join(f"{key}={shown(value)}" for key, value in options.items())
    family = ", ".join(
        key if is_number(value) else f"{key}={shown(value)}" for key, value in options.items()
    )
    return Setting(name, family, wishes.selector, None, options, wishes.compensation)


def plain(text: str) -> Any:
    """A number if it is one, else the word."""
    try:
        return float(text)
    except ValueError:
        return text


def shown(value: Any) -> str:
    """A value as in a name."""
    return f"{value:g}" if is_number(value) else str(value)


def is_number(value: Any) -> bool:
    """Whether it is a level."""
    return isinstance(value, int | float) and not isinstance(value, bool)
