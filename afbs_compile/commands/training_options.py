"""What can `afbs bench pretrain`, `live` and `recovery` be asked? Loads nothing heavy."""

import argparse
from pathlib import Path

METHODS = ("random", "length", "sparsity", "controller", "bubble")


def add_pretrain_options(command: argparse.ArgumentParser) -> None:
    """What `afbs bench pretrain` and `bench/pretrain.py` share."""
    add_text(command)
    command.add_argument("--model", default="small", help="sizes: small, wide or tiny (small)")
    command.add_argument("--tokens", type=int, default=16384, help="of a window, bytes (16384)")
    command.add_argument("--batch", type=int, default=1, help="windows of a step (1)")
    command.add_argument("--budget", type=float, default=0.25, help="share of blocks kept (0.25)")
    command.add_argument("--steps", type=int, default=300, help="of each run (300)")
    command.add_argument("--rate", type=float, default=6e-4, help="of AdamW (6e-4)")
    command.add_argument("--seed", type=int, default=0, help="of weights and batches (0)")
    command.add_argument(
        "--every", type=int, default=25, metavar="N", help="held-out loss every N steps (25)"
    )
    command.add_argument("--held-out", type=int, default=8, metavar="N", help="windows (8)")
    command.add_argument("--seconds", type=float, metavar="N", help="start no step later")
    command.add_argument("--output", type=Path, metavar="DIR", help="write pretrain.json there")
    command.add_argument("--plot", type=Path, metavar="FILE", help="draw loss curves")


def add_live_options(command: argparse.ArgumentParser) -> None:
    """What `afbs bench live` and `bench/live.py` share."""
    add_text(command)
    command.add_argument("--device", choices=("cuda", "cpu"), help="NCCL or gloo (what is there)")
    command.add_argument("--model", default="wide", help="sizes: small, wide or tiny (wide)")
    command.add_argument("--shortest", type=int, default=512, help="bytes of a document (512)")
    command.add_argument("--longest", type=int, default=8192, help="longer ones are cut (8192)")
    command.add_argument(
        "--rows", type=int, default=4, help="documents of equal length in a micro-batch (4)"
    )
    command.add_argument("--micro-batches", type=int, default=5, help="of a rank in a step (5)")
    command.add_argument(
        "--budgets",
        default="0.25",
        metavar="B",
        help="one, or one a source, with commas",
    )
    command.add_argument("--bounds", default="0.5:2", help="of budgets over these (0.5:2)")
    command.add_argument("--steps", type=int, default=24, help="of a run (24)")
    command.add_argument("--seeds", type=int, default=3, help="runs of each method (3)")
    command.add_argument("--methods", default=",".join(METHODS), help="with commas")
    command.add_argument("--rate", type=float, default=1e-3, help="of AdamW (1e-3)")
    command.add_argument("--seconds", type=float, metavar="N", help="begin no run after N seconds")
    command.add_argument("--output", type=Path, metavar="DIR", help="write live.json there")


def add_recovery_options(command: argparse.ArgumentParser) -> None:
    """What `afbs bench recovery` and `bench/recovery.py` share."""
    command.add_argument("--model", default="small", help="sizes: small or tiny (small)")
    command.add_argument(
        "--text", action="append", default=[], metavar="NAME=FILE",
        help="a text; give as many as you like (default: Python's own documentation)",
    )  # fmt: skip
    command.add_argument("--tokens", type=int, default=128, help="bytes of a document (128)")
    command.add_argument("--batch", type=int, default=16, help="documents of a step (16)")
    command.add_argument(
        "--base-steps", type=int, default=400, metavar="N", help="that make the dense model (400)"
    )
    command.add_argument("--base-rate", type=float, default=3e-3, help="of AdamW then (3e-3)")
    command.add_argument("--steps", type=int, default=24, help="of continued training (24)")
    command.add_argument("--rate", type=float, default=3e-4, help="of AdamW then (3e-4)")
    command.add_argument("--ratio", type=float, default=0.75, help="of windowed KV groups (0.75)")
    command.add_argument("--window", type=int, default=8, help="keys that they see (8)")
    command.add_argument("--sink", type=int, default=4, help="first tokens they see, too (4)")
    command.add_argument("--budget", type=int, default=100, help="choices to evaluate (100)")
    command.add_argument(
        "--searched", type=int, default=16, help="documents that the search reads (16)"
    )
    command.add_argument("--unseen", type=int, default=96, help="held-out documents (96)")
    command.add_argument(
        "--every", type=int, default=4, metavar="N", help="held-out loss every N steps (4)"
    )
    command.add_argument("--seeds", type=int, default=3, help="of search and training (3)")
    command.add_argument(
        "--seconds", type=float, metavar="N", help="begin no seed after N seconds"
    )
    command.add_argument(
        "--output", type=Path, metavar="DIR",
        help="write recovery.json there, and continue older results",
    )  # fmt: skip


def add_text(command: argparse.ArgumentParser) -> None:
    """What both read."""
    command.add_argument(
        "--text", action="append", default=[], metavar="NAME=PATH",
        help="a file or folder, or NAME=stdlib; by default Python's library and documentation",
    )  # fmt: skip
