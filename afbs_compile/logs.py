"""How does afbs-compile speak to its user? Warnings of one class, and one logger tree.

`AFBS_LOG` works like `TORCH_LOGS`: `info` sets the level of everything; `passes` shows the info of
one folder or module, `+passes` its debug messages, `-passes` nothing but errors. Several are
separated by commas: `AFBS_LOG=warning,+passes,kernels`.
"""

import difflib
import functools
import logging
import warnings
from pathlib import Path

from afbs_compile import options

LOGGER = logging.getLogger("afbs_compile")
LEVELS = ("debug", "info", "warning", "error")
PREFIXES = {"+": logging.DEBUG, "-": logging.ERROR}
FOLDER = Path(__file__).parent


class AfbsWarning(UserWarning):
    """Something did not work, nothing is lost, and the message says what to do."""


def warn(message: str) -> None:
    """Tell the user, once for a message and place (Python's default filter)."""
    warnings.warn(message, AfbsWarning, stacklevel=3)


@functools.cache
def warn_once(message: str) -> None:
    """Tell the user once in this process, whatever the filters."""
    warnings.warn(message, AfbsWarning, stacklevel=4)


def configure() -> None:
    """Send the log to stderr as `AFBS_LOG` asks; without it, leave logging alone.

    Raises:
        ValueError: A word of `AFBS_LOG` is neither a level nor one of our modules.
    """
    words = options.log_words()
    if not words:
        return
    for name, level in map(meaning, words):
        logging.getLogger(f"afbs_compile.{name}" if name else "afbs_compile").setLevel(level)
    if not LOGGER.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
        LOGGER.addHandler(handler)


def meaning(word: str) -> tuple[str, int]:
    """The module that a word of `AFBS_LOG` names (`""`: all of them), and its level."""
    if word.lower() in LEVELS:
        return "", logging.getLevelNamesMapping()[word.upper()]
    name = word.lstrip("+-").replace("/", ".").removeprefix("afbs_compile.")
    place = FOLDER.joinpath(*name.split("."))
    if name and (place.is_dir() or place.with_suffix(".py").is_file()):
        return name, PREFIXES.get(word[0], logging.INFO)
    modules = sorted(path.stem for path in FOLDER.iterdir() if not path.stem.startswith("_"))
    close = difflib.get_close_matches(name.lower(), [*LEVELS, *modules], n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ";"
    raise ValueError(
        f"AFBS_LOG names {word!r}{hint} set it to one of {', '.join(LEVELS)}, or to modules of "
        "afbs_compile such as passes,+kernels"
    )
