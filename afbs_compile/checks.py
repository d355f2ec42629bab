"""Is a number of a policy in its range? Checks that name the field, and means that skip None."""

import math
from collections.abc import Sequence


def check(holds: bool, field: str, came: object, needed: str) -> None:
    """Raise a ValueError about `field` unless `holds`."""
    if not holds:
        raise ValueError(f"{field} is {came!r}; needed: {needed}")


def check_measured(field: str, came: float | None, top: float = math.inf) -> None:
    """Raise unless `came` is None or a finite number in [0, top]."""
    inside = came is None or (math.isfinite(came) and 0 <= came <= top)
    check(inside, field, came, f"null or a finite number from 0 to {top}")


def mean_known(values: Sequence[float | None]) -> float | None:
    """The mean of the values that are not None, or None if there are none."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
