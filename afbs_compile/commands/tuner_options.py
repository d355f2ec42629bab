"""What can `afbs bench tuner` be asked? Its options, without loading what they need."""

import argparse
from pathlib import Path

from afbs_compile.options import STRATEGIES


def add_tuner_options(command: argparse.ArgumentParser) -> None:
    """What `afbs bench tuner` and `bench/tuner.py` share."""
    command.add_argument("--model", type=Path, metavar="DIR", help="default: SmolLM2-135M")
    command.add_argument(
        "--text", type=Path, metavar="FILE", help="to calibrate on (default: Python's manual)"
    )
    command.add_argument(
        "--unseen", type=Path, metavar="FILE", help="held out (default: the end of --text)"
    )
    command.add_argument("--tokens", type=int, default=2048, help="of a window (2048)")
    command.add_argument("--layers", type=int, default=6, help="that are tuned (6)")
    command.add_argument("--documents", default="1,2", help="windows to calibrate on (1,2)")
    command.add_argument("--max-errors", default="0.05,0.1", help="with commas (0.05,0.1)")
    command.add_argument("--seeds", type=int, default=3, help="of what is random (3)")
    command.add_argument(
        "--strategies", default=",".join(STRATEGIES), help="with commas (all of them)"
    )
    command.add_argument("--output", type=Path, metavar="DIR", help="write tuner.json there")
    command.add_argument("--plot", type=Path, metavar="FILE", help="draw sparsity against cost")
