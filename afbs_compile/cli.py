"""What can be asked on the command line? Parsers only: a command's module loads when it runs.

Results go to stdout (one JSON object with `--json`), progress and messages to stderr; the exit
code is 0 only for success.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from afbs_compile import logs
from afbs_compile.commands.balance_options import add_balance_options
from afbs_compile.commands.coverage_options import add_coverage_options, add_fuzz_options
from afbs_compile.commands.decode_options import add_decode_options
from afbs_compile.commands.errors import CommandError
from afbs_compile.commands.generate_options import add_generate_options
from afbs_compile.commands.hybrid_options import (
    add_bench_hybrid_options,
    add_hybridize_options,
)
from afbs_compile.commands.prefill_options import add_prefill_options
from afbs_compile.commands.quality_options import add_quality_options, add_retrieval_options
from afbs_compile.commands.training_options import (
    add_live_options,
    add_pretrain_options,
    add_recovery_options,
)
from afbs_compile.commands.tuner_options import add_tuner_options
from afbs_compile.commands.tuning_time_options import add_tuning_time_options
from afbs_compile.options import (
    COMPENSATIONS,
    EVALUATORS,
    EXECUTORS,
    FIDELITIES,
    SELECTORS,
    STRATEGIES,
)
from afbs_compile.policy import PolicyError
from afbs_compile.versions import version

BENCH_CASES = ("forward", "selection", "whole_op", "backward", "forward_backward", "host")
INTERRUPTED = 130  # what a shell reports after Ctrl-C


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit code."""
    args = parser().parse_args(arguments)
    try:
        code = run(args)
    except (CommandError, PolicyError) as error:
        sys.stderr.write(f"afbs {args.command}: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write(f"afbs {args.command}: interrupted\n")
        return INTERRUPTED
    return code


def run(args: argparse.Namespace) -> int:
    """Load the command's module and run it; the exit code."""
    try:
        logs.configure()
    except ValueError as error:
        raise CommandError(str(error)) from error
    module = importlib.import_module(f"afbs_compile.commands.{args.command}")
    code: int = module.run(args)
    return code


def parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    top = argparse.ArgumentParser(
        prog="afbs", description="Block-sparse attention that tunes itself."
    )
    top.add_argument("--version", action="version", version=f"afbs {version('afbs-compile')}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    add_demo(commands.add_parser("demo", help="make a real language model sparse, and measure it"))
    add_tune(commands.add_parser("tune", help="tune a local model ahead of time"))
    add_hybridize(
        commands.add_parser("hybridize", help="find the heads that can live with a window")
    )
    add_show(commands.add_parser("show", help="show a policy by site and head"))
    add_cache(commands.add_parser("cache", help="list, check and delete stored policies"))
    add_bench(commands.add_parser("bench", help="measure kernels, quality and search strategies"))
    add_doctor(commands.add_parser("doctor", help="check what this machine can do"))
    return top


def add_json(command: argparse.ArgumentParser) -> None:
    """`--json`, which every command has."""
    command.add_argument("--json", action="store_true", help="print one JSON object on stdout")


def add_cache_dir(command: argparse.ArgumentParser) -> None:
    """`--cache-dir`."""
    command.add_argument(
        "--cache-dir", type=Path, metavar="DIR", help="where policies are kept (AFBS_CACHE_DIR)"
    )


def add_tuning(command: argparse.ArgumentParser) -> None:
    """The options of a search; `options.parse` checks their values."""
    command.add_argument("--max-error", type=float, help="largest relative L1 error of a head")
    command.add_argument("--mean-error", type=float, help="largest mean of those errors")
    command.add_argument(
        "--max-kl", type=float, help="largest KL of the predictions, nats a token"
    )
    command.add_argument("--max-ppl-increase", type=float, help="largest increase of perplexity")
    command.add_argument("--strategy", choices=STRATEGIES)
    command.add_argument("--evaluator", choices=EVALUATORS)
    command.add_argument("--fidelity", choices=FIDELITIES)
    command.add_argument("--selector", choices=SELECTORS)
    command.add_argument("--compensation", choices=COMPENSATIONS)
    command.add_argument("--min-length", type=int, help="shorter calls stay dense, in tokens")
    command.add_argument(
        "--tuning-budget-s",
        type=float,
        metavar="N",
        help="stop measuring after N seconds; the same command goes on later",
    )
    add_cache_dir(command)
    add_json(command)


def add_demo(command: argparse.ArgumentParser) -> None:
    """`afbs demo`."""
    command.add_argument(
        "--model", type=Path, metavar="DIR", help="a Hugging Face model (default: SmolLM2-135M)"
    )
    command.add_argument(
        "--text", type=Path, metavar="FILE", help="a text (default: Python's own documentation)"
    )
    command.add_argument("--tokens", type=int, default=4096, help="tokens of a window (4096)")
    command.add_argument(
        "--heatmap",
        type=Path,
        metavar="PNG",
        help="where the heat map goes (afbs-demo.png; none with --json)",
    )
    add_tuning(command)


def add_tune(command: argparse.ArgumentParser) -> None:
    """`afbs tune`."""
    command.add_argument("--model", type=Path, required=True, metavar="DIR")
    command.add_argument("--text", type=Path, required=True, metavar="FILE")
    command.add_argument("--tokens", type=int, required=True, help="tokens of the input")
    command.add_argument(
        "--out", type=Path, metavar="FILE", help="write the policy here as well as to the cache"
    )
    command.add_argument("--executor", choices=EXECUTORS, help="share the work with processes")
    command.add_argument(
        "--workers", type=int, metavar="N", help="processes of --executor (one a GPU)"
    )
    add_tuning(command)


def add_hybridize(command: argparse.ArgumentParser) -> None:
    """`afbs hybridize`."""
    add_hybridize_options(command)
    add_json(command)


def add_show(command: argparse.ArgumentParser) -> None:
    """`afbs show`."""
    command.add_argument(
        "policy",
        nargs="?",
        metavar="MODEL_KEY|FILE",
        help="a policy file, or the beginning of a key in the cache (default: the newest)",
    )
    command.add_argument(
        "--heatmap", type=Path, metavar="PNG", help="draw density by layer and head"
    )
    add_cache_dir(command)
    add_json(command)


def add_cache(command: argparse.ArgumentParser) -> None:
    """`afbs cache`."""
    actions = command.add_subparsers(dest="action", metavar="ACTION", required=True)
    for name, about in (
        ("ls", "list what is kept"),
        ("path", "print the folder"),
        ("verify", "check every file; exit code 1 if one cannot be used"),
        ("rm", "delete a policy"),
    ):
        action = actions.add_parser(name, help=about)
        if name == "rm":
            which = action.add_mutually_exclusive_group(required=True)
            which.add_argument("key", nargs="?", help="the model's key")
            which.add_argument("--all", action="store_true", help="every policy")
        add_cache_dir(action)
        add_json(action)


def add_bench(command: argparse.ArgumentParser) -> None:
    """`afbs bench`."""
    kinds = command.add_subparsers(dest="what", metavar="WHAT", required=True)
    for name, about, add in (
        ("attention", "the kernels of a GPU against their rivals", add_bench_options),
        ("tuner", "search strategies side by side on a language model", add_tuner_options),
        ("quality", "perplexity and KL of a language model by setting", add_quality_options),
        ("hybrid", "ways to choose sliding-window heads side by side", add_bench_hybrid_options),
        ("retrieval", "what a language model still finds by setting", add_retrieval_options),
        ("balance", "balanced training on simulated clusters", add_balance_options),
        ("coverage", "many models run in many ways: rewritten, and right?", add_coverage_options),
        ("fuzz", "random models against dense ones", add_fuzz_options),
        ("tuning-time", "how long tuning takes, by phase", add_tuning_time_options),
        ("decode", "tokens a second and bytes of a hybrid cache", add_decode_options),
        ("prefill", "seconds and memory of a long prompt or video", add_prefill_options),
        ("generate", "what is written after long prompts, and how soon", add_generate_options),
        ("pretrain", "a small model trained sparse and dense", add_pretrain_options),
        ("recovery", "what training gives back to a hybrid model", add_recovery_options),
        ("live", "balanced training on the ranks of torchrun", add_live_options),
    ):
        kind = kinds.add_parser(name, help=about)
        add(kind)
        add_json(kind)


def add_bench_options(command: argparse.ArgumentParser) -> None:
    """What `afbs bench attention` and `bench/attention.py` share."""
    command.add_argument("--quick", action="store_true", help="fewer and shorter shapes")
    command.add_argument(
        "--case", metavar="NAMES", help=f"a part, with commas: {', '.join(BENCH_CASES)}"
    )
    command.add_argument(
        "--shapes",
        metavar="SHAPES",
        help="LENGTH[:causal|:full][:dHEAD_DIM][:kvHEADS], with commas: 8192,16384:causal:d64",
    )
    command.add_argument(
        "--seconds", type=float, metavar="N", help="begin nothing after N seconds"
    )
    command.add_argument("--output", type=Path, metavar="DIR", help="write attention.json there")


def add_doctor(command: argparse.ArgumentParser) -> None:
    """`afbs doctor`."""
    command.add_argument(
        "--model", type=Path, metavar="DIR", help="also list a Hugging Face model's attention"
    )
    command.add_argument("--tokens", type=int, default=4096, help="of its input (4096)")
    command.add_argument("--min-length", type=int, help="shorter calls stay dense, in tokens")
    add_cache_dir(command)
    add_json(command)
