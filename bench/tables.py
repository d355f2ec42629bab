"""The README's tables, made from committed results. `python bench/tables.py [--check]`."""

import argparse
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"


def origin(document: dict) -> str:
    """Where, when and how a result was measured."""
    versions = document["versions"]
    triton = f", triton {versions['triton']}" if "triton" in versions else ""
    return (
        f"{document['device']}, torch {versions['torch']}{triton}, {document['date'][:10]}, "
        f"`{document['command']}`"
    )


def demo(document: dict) -> str:
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
    return "\n".join([*lines, "", origin(document)])


def attention(document: dict) -> str:
    """Speed of the whole op against cuDNN's dense SDPA; the file has more shapes."""
    whole = [r for r in document["rows"] if r["case"] == "whole_op"]
    dense = [r["ratio_cudnn"] for r in whole if r["kept"] > 0.99]
    few = [r for r in whole if r["kept"] < 0.99 and r["head_dim"] == 128]
    rows = [r for r in few if r["length"] in (8192, 32768)]
    lines = ["| tokens | mask | kept | ours ms | cuDNN ms | ratio |", "|---|---|---|---|---|---|"]
    lines += [
        f"| {r['length']} | {'causal' if r['causal'] else 'none'} | {r['kept']:.2f} "
        f"| {r['ours_ms']:.2f} | {r['cudnn_ms']:.2f} | {r['ratio_cudnn']:.2f}× |"
        for r in rows
    ]
    everything = (
        f"With every block kept: {min(dense):.2f} to {max(dense):.2f}×; such sites stay SDPA."
    )
    return "\n".join([*lines, "", everything, origin(document)])


TABLES = {"demo": ("demo_cpu", demo), "attention": ("attention", attention)}


def rendered(text: str) -> str:
    """The README with every table made anew; one without a result is left empty."""
    for name, (file, make) in TABLES.items():
        path = RESULTS / f"{file}.json"
        body = make(json.loads(path.read_text())) if path.exists() else "*not measured yet*"
        block = f"<!-- table:{name} -->\n{body}\n<!-- end -->"
        pattern = rf"<!-- table:{name} -->.*?<!-- end -->"
        text = re.sub(pattern, lambda _, new=block: new, text, flags=re.DOTALL)
    return text


def main() -> int:
    """Write the README, or with --check say whether it is up to date."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    readme = ROOT / "README.md"
    old = readme.read_text()
    new = rendered(old)
    if check:
        return int(new != old)
    readme.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
