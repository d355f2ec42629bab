"""Tables of README and docs, made from committed results: `python bench/tables.py [--check]`."""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
DOCS = ("benchmarks", "coverage", "hybrid", "sparse_training", "training")
PAGES = (ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in DOCS))
LENGTHS = (8192, 16384, 32768)
SHOWN, NEAR, ALL = 0.25, 0.05, 0.99  # share of the visible blocks
LEGEND = "A quarter of the blocks, the same for all but cuDNN; bf16, head dim 128, 32 heads."
Row = dict[str, Any]
Document = dict[str, Any]


def origin(document: Document) -> str:
    """Where, when and how a result was measured."""
    versions = document["versions"]
    triton = f", triton {versions['triton']}" if "triton" in versions else ""
    return (
        f"{document['device']}, torch {versions['torch']}{triton}, {document['date'][:10]}, "
        f"`{document['command']}`"
    )


def demo(document: Document) -> str:
    """Dense against sparse, end to end."""
    lines = [
        "| model, tokens | sites | density | perplexity dense → sparse | attention | forward "
        "| tuning |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in document["rows"]:
        change = 100 * (row["perplexity_sparse"] / row["perplexity_dense"] - 1)
        lines.append(
            f"| {row['model']}, {row['tokens']} | {row['rewritten']} of {row['sites']} "
            f"| {row['density']:.2f} | {row['perplexity_dense']:.2f} → "
            f"{row['perplexity_sparse']:.2f} ({change:+.1f} %) | {row['attention_speedup']:.2f}× "
            f"| {row['forward_speedup']:.2f}× | {row['tuning_seconds']:.0f} s |"
        )
    meaning = "Perplexity: an unseen window. Forward: interleaved runs. Attention: one layer."
    return "\n".join([*lines, "", f"{origin(document)}. {meaning}"])


def attention(document: Document) -> str:
    """Speed over cuDNN's dense SDPA, and over rivals on the same blocks, at a quarter of them."""
    lines = [
        "| tokens | mask | whole op over cuDNN | attention over cuDNN | over FlexAttention "
        "| over FA4 | selection, of dense |",
        "|---|---|---|---|---|---|---|",
    ]
    for length in LENGTHS:
        for causal in (False, True):
            rows = [r for r in document["rows"] if is_shape(r, length, causal)]
            whole, alone, scored = best(rows, "whole_op"), best(rows, "forward"), chosen(rows)
            if not (whole or alone or scored):
                continue
            flex, fa4 = (best(rows, "forward", f"ratio_{name}") for name in ("flex", "fa4"))
            lines.append(
                f"| {length} | {'causal' if causal else 'none'} | {times(whole, 'ratio_cudnn')} "
                f"| {times(alone, 'ratio_cudnn')} "
                f"| {times(flex, 'ratio_flex')} | {times(fa4, 'ratio_fa4')} | {percent(scored)} |"
            )
    told = "; ".join([origin(document), *joined(document)])
    about = [LEGEND, *trained(document), *everything(document), told]
    return "\n".join([*lines, "", *about])


def joined(document: Document) -> list[str]:
    """What its notes say of rows that come from elsewhere."""
    return [note for note in document.get("notes", []) if note.startswith("rows of ")]


def is_shape(row: Row, length: int, causal: bool) -> bool:
    """Whether a row is of the README's kind: head dim 128, 32 heads, plain noise."""
    shape = (row["length"], row["causal"], row["head_dim"], row["kv_heads"])
    return shape == (length, causal, 128, 32) and row.get("inputs") in (None, "randn")


def best(
    rows: list[Row], case: str, column: str = "ratio_cudnn", kept: float = SHOWN
) -> Row | None:
    """The row of a case with about so many blocks that has the most to show for a column."""
    found = [
        r
        for r in rows
        if r["case"] == case and r.get(column) is not None and abs(r["kept"] - kept) < NEAR
    ]
    if column == "ratio_cudnn":  # the coarser lists are there for FlashAttention-4 alone
        found = [r for r in found if r.get("granularity") != "128x128"]
    return max(found, key=lambda r: r[column], default=None)


def chosen(rows: list[Row]) -> Row | None:
    """The selection of the default selector."""
    found = [r for r in rows if r["case"] == "selection" and r.get("selector") == "sub8"]
    return found[0] if found else None


def times(row: Row | None, column: str) -> str:
    """A ratio, or a dash."""
    value = row.get(column) if row else None
    return "–" if value is None else f"{value:.2f}×"


def percent(row: Row | None) -> str:
    """The cost of a selection, or a dash."""
    value = row.get("percent_of_dense") if row else None
    return "–" if value is None else f"{value:.1f} %"


def trained(document: Document) -> list[str]:
    """What the backward gains, if it was measured."""
    found = []
    for length in LENGTHS:
        for causal in (False, True):
            rows = [r for r in document["rows"] if is_shape(r, length, causal)]
            if row := best(rows, "backward"):
                mask = "causal" if causal else "no mask"
                found.append(f"{times(row, 'ratio_cudnn')} at {length} ({mask})")
    return [f"Backward over cuDNN's, the same share of blocks: {', '.join(found)}."] * bool(found)


def everything(document: Document) -> list[str]:
    """What sparsity costs where there is none to gain from."""
    rows = [r for r in document["rows"] if r["case"] == "whole_op" and r["kept"] > ALL]
    ratios = [r["ratio_cudnn"] for r in rows if r["ratio_cudnn"] is not None]
    if not ratios:
        return []
    span = f"{min(ratios):.2f} to {max(ratios):.2f}×"
    return [f"With every block kept, the whole op: {span}; such sites stay SDPA."]


def quality(document: Document) -> str:
    """Sparsity at +1 % perplexity by family, and KL per token at 70 % sparsity."""
    from afbs_compile.bench import frontier  # other tables are made without the package

    curves = {
        group: frontier.families(points)
        for group, points in frontier.groups(document["rows"]).items()
    }
    names = list(dict.fromkeys(name for found in curves.values() for name in found))
    lines = [f"| model, text, tokens | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for (model, _, text, tokens), found in curves.items():
        cells = [cell(frontier, found[name]) if name in found else "–" for name in names]
        lines.append(f"| {model}, {text}, {tokens} | {' | '.join(cells)} |")
    about = (
        f"Sparsity at +{frontier.BUDGET:g} % perplexity (KL per token at "
        f"{frontier.SPARSITY:.0%} sparsity); < and >: the curve ends there."
    )
    return "\n".join([*lines, "", about, origin(document)])


def cell(frontier: Any, curve: list[Any]) -> str:
    """A family's curve, read both ways."""
    signs = {"at": "", "below": "< ", "above": "> "}
    sparsity, kl = frontier.sparsity_at(curve), frontier.kl_at(curve)
    return f"{signs[sparsity.where]}{sparsity.value:.2f} ({signs[kl.where]}{kl.value:.3f})"


def balance(document: Document) -> str:
    """What balanced batches and budgets gain on simulated clusters."""
    from afbs_compile.bench import balance_show  # other tables are made without the package

    return f"{balance_show.markdown(document)}\n\n{origin(document)}"


def coverage(document: Document) -> str:
    """What became of the attention of many models."""
    from afbs_compile.bench import coverage_table

    return coverage_table.coverage(document)


def tuner(document: Document) -> str:
    """What strategies find and cost, means over goals and seeds."""
    from afbs_compile.bench import tuner_show

    return f"{tuner_show.markdown(document)}\n\n{origin(document)}"


def unseen(document: Document) -> str:
    """How many heads are above max_error on text that calibration did not see."""
    rows = document["rows"]
    lines = ["| max_error | documents | margin | above max_error | above 1.1 × | density |"]
    lines.append("|---|---|---|---|---|---|")
    lines += [
        f"| {r['max_error']:g} | {r['documents']} | {r['margin']:g} | {r['heldout_over']:.1%} "
        f"| {r['heldout_over_1_1']:.1%} | {r['density']:.3f} |"
        for r in rows
        if r["margin"] in (1.0, 0.9, 0.85, 0.75, 0.6)
    ]
    about = rows[0]
    text = f"{about['model']}, {about['text']}, {about['tokens']} tokens, {about['heads']} heads"
    return "\n".join([*lines, "", f"{text}. {origin(document)}"])


def decode(document: Document) -> str:
    """Tokens a second of a hybrid cache and of the fastest dense one."""
    lines = [
        "| model | batch × tokens | windowed KV heads | tokens/s | dense | speed-up | cache GB "
        "| dense |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['model']} | {r['batch']} × {r['tokens']} | {r['ratio']:.0%} "
        f"| {r['ours_tokens_per_s']:.0f} | {r['dense_tokens_per_s']:.0f} "
        f"| {r['ours_tokens_per_s'] / r['dense_tokens_per_s']:.2f}× "
        f"| {r['kv_bytes'] / 1e9:.1f} | {r['kv_bytes_dense'] / 1e9:.1f} |"
        for r in document["rows"]
        if r["dense_tokens_per_s"]
    ]
    return "\n".join([*lines, "", origin(document)])


def prefill(document: Document) -> str:
    """Whole forwards of a long prompt or video."""
    from afbs_compile.bench import prefill  # other tables are made without the package

    notes = "".join(f"- {note}\n" for note in document.get("notes", []))
    return f"{prefill.table(document)}\n\n{notes}\n{origin(document)}"


def prompt(document: Document) -> str:
    """One sentence on the longest prompt that every way ran."""
    rows = [r for r in document["rows"] if r["model"] == "llama-3-8b"]
    whole = {r["tokens"] for r in rows} - {r["tokens"] for r in rows if r["failure"]}
    if not whole:
        return "*not measured yet*"
    ways = {r["variant"]: r for r in rows if r["tokens"] == max(whole)}
    ours, less = ways["afbs 1"], ways["afbs 0.25"]
    return (
        f"A prompt of {max(whole)} tokens through Llama-3-8B "
        f"(random weights, {device(document)}): "
        f"eager {ways['eager']['seconds']:.2f} s, Inductor {ways['inductor']['seconds']:.2f} s; "
        f"ours {ours['seconds']:.2f} s with nothing left out ({over(ours)}), "
        f"{less['seconds']:.2f} s on a quarter of the blocks ({over(less)}). "
        f"`python bench/prefill.py --tokens {max(whole)} --repeats {ours['repeats']}`, in turn."
    )


STRATEGIES = ("afbs-bo", "grid", "bisect", "one-pass")  # those that the README names


def strategies(document: Document) -> str:
    """What ways to search cost and reach, as one sentence: means over seeds, thresholds alone."""
    told = []
    for name in STRATEGIES:
        rows = [r for r in document["rows"] if (r["strategy"], r["probes"]) == (name, 0)]
        cost = sum(r["cost_dense_passes"] for r in rows) / len(rows)
        kept = sum(r["sparsity"] for r in rows) / len(rows)
        told.append(f"`{name}` {cost:.1f} dense passes for {100 * kept:.1f} %")
    return (
        "What tuning a layer costs, and the sparsity that it finds at an error of "
        f"{document['rows'][0]['max_error']:g} ({device(document)}): {', '.join(told)}. The pass "
        "that finds every threshold pays; the rest matters where a kernel must be run "
        "([all strategies](docs/benchmarks.md))."
    )


def device(document: Document) -> str:
    """Where and when."""
    return f"{document['device']}, torch {document['versions']['torch']}, {document['date'][:10]}"


def over(row: Row) -> str:
    """How much faster a row is than both dense ways."""
    return f"{row['over_inductor']:.2f}× and {row['over_eager']:.2f}×"


def generate(document: Document) -> str:
    """What a model writes after long prompts, dense and sparse."""
    from afbs_compile.bench import generate_show  # other tables are made without the package

    return f"{generate_show.markdown(document)}\n\n{origin(document)}"


def pretrain(document: Document) -> str:
    """A small model trained dense and sparse."""
    from afbs_compile.bench import pretrain_show  # other tables are made without the package

    return f"{pretrain_show.markdown(document)}\n\n{origin(document)}"


def hybrid(document: Document) -> str:
    """Which heads BOSCH finds, beside rankings that need no search."""
    from afbs_compile.bench import hybrid_show  # other tables are made without the package

    told = (hybrid_show.summary(document), hybrid_show.markdown(document), origin(document))
    return "\n\n".join(told)


def ablation(document: Document) -> str:
    """What each part of BOSCH's search gives, and how much its heads change with the ratio."""
    from afbs_compile.bench import hybrid_show

    turned = "\n".join(f"- {line}" for line in hybrid_show.turnover(document))
    return f"{hybrid_show.ablation(document)}\n\n{turned}"


def live(document: Document) -> str:
    """Training steps of real ranks, balanced and not."""
    from afbs_compile.bench import live_show  # other tables are made without the package

    return f"{live_show.markdown(document)}\n\n{origin(document)}"


def recovery(document: Document) -> str:
    """What continued training gives back to a hybrid model."""
    from afbs_compile.bench import recovery_show  # other tables are made without the package

    return f"{recovery_show.markdown(document)}\n\n{origin(document)}"


TABLES = {
    "live": ("live", live),
    "hybrid": ("hybrid", hybrid),
    "hybrid_ablation": ("hybrid", ablation),
    "recovery": ("recovery", recovery),
    "pretrain": ("pretrain", pretrain),
    "decode": ("decode", decode),
    "prefill": ("prefill", prefill),
    "prompt": ("prefill", prompt),
    "strategies": ("tuner", strategies),
    "generate": ("generate", generate),
    "tuner": ("tuner", tuner),
    "unseen": ("unseen", unseen),
    "balance": ("balance", balance),
    "demo": ("demo_cpu", demo),
    "attention": ("attention", attention),
    "quality": ("quality", quality),
    "coverage": ("coverage_cpu", coverage),
    "coverage_cuda_bf16": ("coverage_cuda_bf16", coverage),
}


def rendered(text: str) -> str:
    """A page with every table made anew; one without a result is left empty."""
    for name, (file, make) in TABLES.items():
        path = RESULTS / f"{file}.json"
        body = make(json.loads(path.read_text())) if path.exists() else "*not measured yet*"
        block = f"<!-- table:{name} -->\n{body}\n<!-- end -->"
        pattern = rf"<!-- table:{name} -->.*?<!-- end -->"
        text = re.sub(pattern, block.replace("\\", r"\\"), text, flags=re.DOTALL)
    return text


def main() -> int:
    """Write the pages, or with --check say whether they are up to date."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    stale = 0
    for page in PAGES:
        old = page.read_text()
        new = rendered(old)
        stale += new != old
        if not check:
            page.write_text(new)
    return int(check and stale > 0)


if __name__ == "__main__":
    sys.exit(main())
