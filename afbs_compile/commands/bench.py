"""`afbs bench`: what do kernels, tuning, the backend and balanced training reach?"""

from argparse import Namespace
from collections.abc import Callable
from typing import Any

from afbs_compile.commands.output import emit_json, emit_text

Document = dict[str, Any]


def run(args: Namespace) -> int:
    """Measure, and print tables or the whole result."""
    kinds = {
        "attention": attention, "tuner": tuner, "quality": quality, "retrieval": retrieval,
        "coverage": coverage, "fuzz": fuzz, "balance": balance, "decode": decode,
        "hybrid": hybrid, "prefill": prefill, "tuning-time": tuning_time,
        "pretrain": pretrain, "live": live, "generate": generate, "recovery": recovery,
    }  # fmt: skip
    return kinds[args.what](args)


def tell(args: Namespace, document: Document, show: Callable[[Document], None]) -> int:
    """Print the whole result, or what `show` makes of it."""
    if args.json:
        emit_json(document)
    else:
        show(document)
    return 0


def attention(args: Namespace) -> int:
    """The kernels against their rivals, as the README's table."""
    from afbs_compile.bench import attention, tables

    document = attention.run(args, args.output)
    return tell(args, document, lambda found: emit_text(tables.attention(found)))


def tuner(args: Namespace) -> int:
    """Strategies side by side."""
    from afbs_compile.bench import tuner, tuner_show

    document = tuner.run(args, args.output)
    return tell(args, document, tuner_show.show)


def quality(args: Namespace) -> int:
    """Perplexity and KL by setting."""
    from afbs_compile.bench import quality, quality_show

    document = quality.run(args, args.output)
    if args.plot:
        quality_show.draw(document, args.plot)
    return tell(args, document, quality_show.show)


def tuning_time(args: Namespace) -> int:
    """Seconds of tuning."""
    from afbs_compile.bench import tuning_time

    document = tuning_time.run(args, args.output)
    return tell(
        args, document, lambda found: emit_text("\n".join(map(tuning_time.line, found["rows"])))
    )


def retrieval(args: Namespace) -> int:
    """What is still found, by setting."""
    from afbs_compile.bench import retrieval

    document = retrieval.run(args, args.output)
    return tell(args, document, retrieval.show)


def balance(args: Namespace) -> int:
    """Balanced training on simulated clusters."""
    from afbs_compile.bench import balance, balance_show

    document = balance.run(args, args.output)
    return tell(args, document, balance_show.show)


def coverage(args: Namespace) -> int:
    """The matrix; 1 if a cell is wrong."""
    from afbs_compile.bench import coverage, coverage_table

    document = coverage.run(args, args.output)
    tell(args, document, lambda found: emit_text(coverage_table.coverage(found)))
    return int(any(coverage_table.wrong(row) for row in document["rows"]))


def fuzz(args: Namespace) -> int:
    """Random models; 1 if one is wrong."""
    from afbs_compile.bench import fuzz

    document = fuzz.run(args, args.output)
    tell(args, document, lambda found: emit_text(fuzz.summary(found)))
    return int(any(row["wrong"] for row in document["rows"]))


def decode(args: Namespace) -> int:
    """Tokens a second of a hybrid cache."""
    from afbs_compile.bench import decode, decode_show

    document = decode.run(args, args.output)
    return tell(args, document, decode_show.show)


def hybrid(args: Namespace) -> int:
    """Ways to choose sliding-window heads side by side."""
    from afbs_compile.bench import hybrid, hybrid_show

    document = hybrid.run(args, args.output)
    return tell(args, document, hybrid_show.show)


def prefill(args: Namespace) -> int:
    """Whole forwards of a long prompt or video."""
    from afbs_compile.bench import prefill

    document = prefill.run(args, args.output)
    return tell(args, document, lambda found: emit_text(prefill.table(found)))


def generate(args: Namespace) -> int:
    """What a model writes after long prompts, and how soon."""
    from afbs_compile.bench import generate, generate_show

    document = generate.run(args, args.output)
    return tell(args, document, lambda found: emit_text(generate_show.markdown(found)))


def pretrain(args: Namespace) -> int:
    """A small model trained sparse and dense."""
    from afbs_compile.bench import pretrain, pretrain_show

    document = pretrain.run(args, args.output)
    if args.plot:
        pretrain_show.draw(document, args.plot)
    return tell(args, document, pretrain_show.show)


def recovery(args: Namespace) -> int:
    """What continued training gives back to a hybrid model."""
    from afbs_compile.bench import recovery, recovery_show

    document = recovery.run(args, args.output)
    return tell(args, document, lambda found: emit_text(recovery_show.markdown(found)))


def live(args: Namespace) -> int:
    """Balanced training on the ranks of torchrun; the first one tells."""
    from afbs_compile.bench import live, live_show

    document = live.run(args, args.output)
    return 0 if document is None else tell(args, document, live_show.show)
