"""How does afbs-compile speak to its user? Warnings of one class, and one logger tree."""

import logging
import warnings

from afbs_compile import options

LOGGER = logging.getLogger("afbs_compile")


class AfbsWarning(UserWarning):
    """Something did not work, nothing is lost, and the message says what to do."""


def warn(message: str) -> None:
    """Tell the user, once for a message and place (Python's default filter)."""
    warnings.warn(message, AfbsWarning, stacklevel=3)


def configure() -> None:
    """Send the log to stderr at the level of `AFBS_LOG`; without it, leave logging alone."""
    level = options.log_level()
    if level is None:
        return
    LOGGER.setLevel(level)
    if not LOGGER.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
        LOGGER.addHandler(handler)
