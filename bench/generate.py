"""Does a model still write the same after a long prompt, and how soon does it begin?

`python bench/generate.py`, or `afbs bench generate`: greedy `generate()` after prompts cut from
texts, dense and under settings that were tuned on other parts of them. `docs/benchmarks.md` says
what a row means.
"""

import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from afbs_compile.bench import forced, generate_show, script, settings, subject, tuned, windows
from afbs_compile.bench.generate_ways import Answer, Way, Writer, agreed, gap, heads_of
from afbs_compile.bench.ledger import Ledger, Row
from afbs_compile.bench.settings import Setting
from afbs_compile.bench.subject import TUNING_SHARE, Subject
from afbs_compile.bench.windows import Text
from afbs_compile.commands.errors import CommandError
from afbs_compile.commands.generate_options import DENSE
from afbs_compile.policy import bucket_of
from afbs_compile.progress import Progress
from afbs_compile.report import JOURNAL

KEY = ("model", "dtype", "text", "tokens", "window", "new", "decode", "variant")
DEFAULTS = ("dense", "max_error=.03,.05,.1")
INNER = "inductor"  # what compiles our graphs
MIN_LENGTH = 128  # shorter calls are not what is asked about


def run(args: Namespace, output: Path | None) -> dict[str, Any]:
    """Measure what was asked for and is not known yet; kept in `output` after every prompt.

    Raises:
        CommandError: An argument is wrong, or there is nothing to measure.
    """
    dense = checked(args)
    args.windows = spread(args.prompts, max(1, len(args.text)))
    wanted = settings.settings(args.settings or DEFAULTS)
    if len({(s.selector, s.compensation) for s in wanted}) > 1 or wanted[0].compensation != "none":
        raise CommandError("the settings must share a selector, and have no compensation")
    name = "generate" if torch.cuda.is_available() else "generate_cpu"
    ledger = Ledger(name, KEY, output, args.seconds)
    found = subject.load(args, DEFAULTS)
    with Progress() as progress:
        for row in measured(found, args, dense, ledger, progress):
            ledger.add(row)
            told = generate_show.line(row)
            progress.bars.console.print(told, markup=False, highlight=False, soft_wrap=True)
    ledger.notes += subject.refusals(found.variants)
    ledger.write()
    return ledger.document()


def checked(args: Namespace) -> list[str]:
    """The dense ways that were asked for.

    Raises:
        CommandError: An argument is wrong.
    """
    here = "cuda" if torch.cuda.is_available() else "cpu"
    if args.device not in (None, here):
        hint = "hide the GPU with CUDA_VISIBLE_DEVICES=" if here == "cuda" else "there is no GPU"
        raise CommandError(f"--device {args.device}, and this would run on {here}; {hint}")
    if len(windows.numbers(args.tokens, "--tokens")) > 1:
        raise CommandError("--tokens takes one length here")
    if args.new < 1:
        raise CommandError(f"--new is {args.new}; give at least 1")
    dense = [name.strip() for name in args.dense.split(",")]
    if unknown := [name for name in dense if name not in DENSE]:
        raise CommandError(f"no dense way {unknown[0]!r}; there are {', '.join(DENSE)}")
    return list(dict.fromkeys(dense))


def spread(prompts: int, texts: int) -> str:
    """How many prompts are cut from every text, with commas: as even as can be.

    Raises:
        CommandError: There are more texts than prompts.
    """
    if prompts < texts:
        raise CommandError(f"--prompts is {prompts} for {texts} texts; give one a text or more")
    return ",".join(str(prompts // texts + (n < prompts % texts)) for n in range(texts))


def measured(
    found: Subject, args: Namespace, dense: list[str], ledger: Ledger, progress: Progress
) -> Iterator[Row]:
    """The rows that are missing, a prompt of every text after the other."""
    length = found.lengths[0]
    names = [*dense, *(f"afbs {s.name}" for s in found.settings)]

    def about(text: Text, window: int, name: str) -> Row:
        values = (found.model.name, found.dtype, text.name, length, window, args.new, args.decode)
        return dict(zip(KEY, (*values, name), strict=True))

    steps = [
        (text, window)
        for window in range(max(text.windows for text in found.texts))
        for text in found.texts
        if window < text.windows
        and not all(ledger.has(about(text, window, name)) for name in names)
    ]
    if not steps:
        return
    ways = [*(Way(name) for name in dense), *tunings(found, length, ledger, progress)]
    told_positions(found, length + args.new, ledger)
    torch._dynamo.reset()
    first = next(way.thresholds for way in ways if way.thresholds)
    with forced.forced(heads_of(first), INNER) as force:
        options = {
            "selector": first.selector, "min_length": min(MIN_LENGTH, length),
            "cache_dir": force.cache_dir,
        }  # fmt: skip
        writer = Writer(found.model.module, force, options, args.decode == "compiled")
        for done, (text, window) in enumerate(steps):
            if ledger.over():
                ledger.notes.append(f"left out for want of time: {len(steps) - done} prompts")
                return
            progress(done, len(steps), "prompts", f"{text.name}, {length} tokens")
            prompt = windows.measured(text, length)[window]
            for way, row in prompted(found, writer, ways, prompt, args.new, done):
                if not ledger.has(where := about(text, window, way.name)):
                    yield where | row
        progress(len(steps), len(steps), "prompts", "")


def tunings(found: Subject, length: int, ledger: Ledger, progress: Progress) -> list[Way]:
    """Our ways; tunings that the time does not suffice for are noted.

    Raises:
        CommandError: Nothing is left to be measured.
    """
    ways = []
    for done, setting in enumerate(found.settings):
        progress(done, len(found.settings), f"thresholds, {length} tokens", setting.name)
        if setting.options and ledger.over(TUNING_SHARE):
            ledger.notes.append(f"not tuned in time: {setting.name}")
            continue
        ways.append(way(found, setting, length))
    progress(len(found.settings), len(found.settings), f"thresholds, {length} tokens", "")
    if not ways:
        raise CommandError("no setting was tuned in time; give more --seconds, or --policies")
    return ways


def way(found: Subject, setting: Setting, length: int) -> Way:
    """The way of a setting; a tuned one is tuned now, or read.

    Raises:
        CommandError: Nothing can be tuned.
    """
    name = f"afbs {setting.name}"
    if setting.head is not None:
        thresholds = tuned.thresholds(setting, found.model, found.calibration, length)
        return Way(name, thresholds)
    policy = tuned.policy(setting, found.model, found.calibration, length)
    thresholds = tuned.of_policy(policy, setting, length)
    tuning = policy.find_any(bucket_of(length))
    assert tuning is not None  # `of_policy` would have raised
    gaining = sum(site.decision == "sparse" for site in tuning.sites.values())
    return Way(name, thresholds, tuning.seconds, gaining)


def told_positions(found: Subject, most: int, ledger: Ledger) -> None:
    """Note that prompt and answer are longer than what the model was trained for."""
    config: Any = found.model.module.config
    known = getattr(config, "max_position_embeddings", None)
    if known and most > known:
        ledger.notes.append(f"positions reach {most}, the model was made for {known}")


def prompted(
    found: Subject, writer: Writer, ways: list[Way], prompt: Tensor, new: int, turn: int
) -> list[tuple[Way, Row]]:
    """What all ways make of a prompt int64 `[n]`, in turn; prompt by prompt another one begins.

    Raises:
        CommandError: No attention call of the model can be sparse.
    """
    answers: dict[str, Answer] = {}
    seen: dict[str, tuple[int | None, int]] = dict.fromkeys((w.name for w in ways), (None, 0))
    start = turn % len(ways)
    for one in ways[start:] + ways[:start]:
        writer.ready(one)
        JOURNAL.clear()
        for _ in range(1 if turn else 2):  # looks up thresholds that were put in; compiles first,
            writer.answer(one, prompt, 1)  # and a processor's kernels in the second call again
        answers[one.name] = writer.answer(one, prompt, new)
        if one.thresholds:
            seen[one.name] = became()
    wanted = answers[ways[0].name]
    rows = []
    for one in ways:
        answer = answers[one.name]
        same = agreed(answer.tokens, wanted.tokens)
        rows.append((one, {
            "reference": ways[0].name, "agreed": same, "same": same == new,
            "gap": gap(answer, wanted), "first_s": answer.first_s, "total_s": answer.total_s,
            "reference_first_s": wanted.first_s, "density": density(found, one, prompt),
            "sites": seen[one.name][0], "rewritten": seen[one.name][1],
            "tuning_seconds": one.tuning_seconds, "gaining": one.gaining,
        }))  # fmt: skip
    return rows


def became() -> tuple[int, int]:
    """Sites of the prompt's graph, and how many of them are sparse.

    Raises:
        CommandError: None is sparse: answers would be dense ones.
    """
    sites = {s.name: s for s in JOURNAL.report().sites}
    sparse = sum(s.decision == "sparse" for s in sites.values())
    if not sparse:
        reasons = "; ".join(sorted({str(s.reason) for s in sites.values()}))
        raise CommandError(f"no call of a prompt is sparse: {reasons or 'none was seen'}")
    return len(sites), sparse


def density(found: Subject, one: Way, prompt: Tensor) -> float:
    """Visited over visible blocks of a prompt, counted in a run of its own.

    Raises:
        CommandError: No attention call of the model can be sparse.
    """
    if one.thresholds is None:
        return 1.0
    inputs = found.model.inputs(prompt) | {"logits_to_keep": 1}
    try:
        return found.variants.sparse(inputs, one.thresholds)[1]
    except ValueError as error:
        raise CommandError(f"{found.model.name}: {error}") from error


if __name__ == "__main__":
    sys.exit(script.main("generate"))
