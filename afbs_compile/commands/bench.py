"""`afbs bench`: what do kernels, selection, tuning and search strategies reach on this machine?"""

from argparse import Namespace

from afbs_compile.commands.output import emit_json, emit_text


def run(args: Namespace) -> int:
    """Measure, and print tables or the whole result."""
    kinds = {
        "attention": attention,
        "tuner": tuner,
        "quality": quality,
        "retrieval": retrieval,
        "decode": decode,
    }
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


def decode(args: Namespace) -> int:
    """Tokens a second of a hybrid cache."""
    from afbs_compile.bench import decode, decode_show

    document = decode.run(args, args.output)
    if args.json:
        emit_json(document)
    else:
        decode_show.show(document)
    return 0
