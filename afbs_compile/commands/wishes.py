"""Which options did the command line ask for? Only those that were given."""

from argparse import Namespace
from typing import Any

from afbs_compile.commands.errors import CommandError
from afbs_compile.options import parse

NAMES = (
    "max_error",
    "mean_error",
    "strategy",
    "evaluator",
    "fidelity",
    "selector",
    "compensation",
    "min_length",
    "tuning_budget_s",
    "cache_dir",
)


def wishes(args: Namespace) -> dict[str, Any]:
    """`options=` for `torch.compile`, checked.

    Raises:
        CommandError: A value is out of range.
    """
    given = {name: getattr(args, name) for name in NAMES if getattr(args, name) is not None}
    try:
        parse(given)
    except ValueError as error:
        raise CommandError(str(error)) from error
    return given
