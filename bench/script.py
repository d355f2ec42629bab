"""`python bench/NAME.py …` is `afbs bench NAME …`, stored among the committed results."""

import sys

from afbs_compile import cli
from afbs_compile.bench.harness import RESULTS


def main(name: str) -> int:
    """Run a benchmark with the script's own arguments; the exit code."""
    given = sys.argv[1:]
    elsewhere = any(argument.split("=")[0] == "--output" for argument in given)
    return cli.main(["bench", name, *given, *([] if elsewhere else ["--output", str(RESULTS)])])
