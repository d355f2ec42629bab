"""What can `afbs bench balance` be asked? Its options, without loading what they need."""

import argparse
from pathlib import Path


def add_balance_options(command: argparse.ArgumentParser) -> None:
    """What `afbs bench balance` and `bench/balance.py` share."""
    command.add_argument(
        "--model", default="qwen2.5-3b", metavar="NAME", help="whose shape (qwen2.5-3b)"
    )
    command.add_argument("--ranks", default="8,64,1024", help="replicas, with commas (8,64,1024)")
    command.add_argument(
        "--mixtures", default="long-tail,uniform", help="of lengths (long-tail,uniform)"
    )
    command.add_argument(
        "--densities", default="known,content", help="fixed by length, or by content (both)"
    )
    command.add_argument("--sync", default="step,micro", help="when ranks wait (step,micro)")
    command.add_argument(
        "--bounds", default="0.75:1.5,0.5:2", help="of budgets over usual ones (0.75:1.5,0.5:2)"
    )
    command.add_argument("--seeds", type=int, default=3, help="runs of each (3)")
    command.add_argument(
        "--steps", type=int, metavar="N", help="of an epoch (fewer the more ranks there are)"
    )
    command.add_argument("--output", type=Path, metavar="DIR", help="write balance.json there")
    command.add_argument("--plot", type=Path, metavar="FILE", help="draw speed-up over ranks")
