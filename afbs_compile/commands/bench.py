"""`afbs bench`: what do kernels, tuning, the backend and balanced training reach?"""

from argparse import Namespace

from afbs_compile.commands.output import emit_json, emit_text


def run(args: Namespace) -> int:
    """Measure, and print tables or the whole result."""
    kinds = {
        "attention": attention, "tuner": tuner, "quality": quality, "retrieval": retrieval,
        "coverage": coverage, "fuzz": fuzz, "balance": balance, "decode": decode,
        "hybrid": hybrid,
    }  # fmt: skip
    return kinds[args.what](args)


def attention(args: Namespace) -> int:
    """The kernels against their rivals, as the README's table."""
    from afbs_compile.bench import attention, tables

    document = attention.run(args, args.output)
    if args.json:
        emit_json(document)
    else:
        emit_text(tables.attention(document))
    return 0


def tuner(args: Namespace) -> int:
    """Strategies side by side."""
    from afbs_compile.bench import tuner, tuner_show

    document = tuner.run(args, args.output)
    if args.json:
        emit_json(document)
    else:
        tuner_show.show(document)
    return 0


def quality(args: Namespace) -> int:
    """Perplexity and KL by setting."""
    from afbs_compile.bench import quality, quality_show

    document = quality.run(args, args.output)
    if args.plot:
        quality_show.draw(document, args.plot)
    if args.json:
        emit_json(document)
    else:
        quality_show.show(document)
    return 0


def retrieval(args: Namespace) -> int:
    """What is still found, by setting."""
    from afbs_compile.bench import retrieval

    document = retrieval.run(args, args.output)
    if args.json:
        emit_json(document)
    else:
        retrieval.show(document)
    return 0


def balance(args: Namespace) -> int:
    """Balanced training on simulated clusters."""
    from afbs_compile.bench import balance, balance_show

    document = balance.run(args, args.output)
    if args.json:
        emit_json(document)
    else:
        balance_show.show(document)
    return 0


def coverage(args: Namespace) -> int:
    """The matrix; 1 if a cell is wrong."""
    from afbs_compile.bench import coverage, coverage_table

    document = coverage.run(args, args.output)
    if args.json:
        emit_json(document)
    else:
        emit_text(coverage_table.coverage(document))
    return int(any(coverage_table.wrong(row) for row in document["rows"]))


def fuzz(args: Namespace) -> int:
    """Random models; 1 if one is wrong."""
    from afbs_compile.bench import fuzz

    document = fuzz.run(args, args.output)
    if args.json:
        emit_json(document)
    else:
        emit_text(fuzz.summary(document))
    return int(any(row["wrong"] for row in document["rows"]))


def decode(args: Namespace) -> int:
    """Tokens a second of a hybrid cache."""
    from afbs_compile.bench import decode, decode_show

    document = decode.run(args, args.output)
    if args.json:
        emit_json(document)
    else:
        decode_show.show(document)
    return 0


def hybrid(args: Namespace) -> int:
    """Ways to choose sliding-window heads side by side."""
    from afbs_compile.bench import hybrid, hybrid_show

    document = hybrid.run(args, args.output)
    if args.json:
        emit_json(document)
    else:
        hybrid_show.show(document)
    return 0
