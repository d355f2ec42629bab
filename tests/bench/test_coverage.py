"""A sample of the coverage matrix, and: does the matrix see what is wrong?"""

from argparse import Namespace

import pytest

from afbs_compile.bench import coverage, coverage_table, forced, zoo
from afbs_compile.bench.zoo import Cell
from afbs_compile.kernels import dispatch

pytestmark = pytest.mark.usefixtures("fresh_dynamo")
SAMPLE = [
    ("Llama", Cell(130), "transformers"),
    ("Gemma-3", Cell(7, batch=3, mask="left", cache=True), "transformers"),
    ("BERT", Cell(65), "transformers"),
    ("ViT", Cell(65, batch=3), "transformers"),
    ("nn.TransformerEncoder", Cell(64, batch=3, mask="right"), "torch"),
    ("nn.MultiheadAttention", Cell(7, mask="ones"), "torch"),
    ("by hand", Cell(1), "torch"),
    ("by hand", Cell(128, grad=True), "torch"),
    ("Wan", Cell(100), "diffusers"),
]


@pytest.mark.filterwarnings("ignore")  # of the models' packages
@pytest.mark.parametrize(("model", "cell", "package"), SAMPLE, ids=str)
def test_a_cell_is_right(model, cell, package):
    pytest.importorskip(package)
    with forced.interpreted():
        row = coverage.attempt(coverage.ENTRIES[model], cell, tuned=False, inner="interpreted")
    assert row["failure"] is None
    assert row["kept_error"] <= coverage_table.EXACT
    assert row["graphs"] <= row["graphs_dense"]
    if cell.grad:
        assert row["grad_error"] <= coverage_table.EXACT_GRADIENT
    elif row["rewritten"]:
        assert row["policy_error"] <= coverage_table.EXACT
    told = row["rewritten"] + sum(row["reasons"].values())
    assert told == row["sites"]


def by_hand(monkeypatch, attention):
    monkeypatch.setattr(dispatch, "attention", attention)
    with forced.interpreted():
        return coverage.attempt(coverage.ENTRIES["by hand"], Cell(100), False, "interpreted")


def test_a_wrong_output_is_seen(monkeypatch):
    right = dispatch.attention
    row = by_hand(monkeypatch, lambda *a, **k: right(*a, **k) * 1.001)
    assert row["rewritten"] == 1
    assert coverage_table.wrong(row).startswith("kept_error")


def test_an_exception_is_seen(monkeypatch):
    def fails(*args, **settings):
        raise RuntimeError("no kernel")

    assert "no kernel" in coverage_table.wrong(by_hand(monkeypatch, fails))


def test_a_broken_promise_is_seen(monkeypatch):
    monkeypatch.setattr(coverage, "head_errors", lambda key, problem: [0.1, 0.21])
    with forced.interpreted():
        row = coverage.attempt(coverage.ENTRIES["by hand"], Cell(100), True, "interpreted")
    assert coverage_table.wrong(row).startswith("head_error")


def row(model, **changes):
    cell = {"model": model, "length": 7, "batch": 1, "mask": "none", "cache": False,
            "grad": False, "tuned": False, "sites": 2, "rewritten": 2, "short": 0, "reasons": {},
            "kept_error": 1e-7, "policy_error": None, "grad_error": None, "head_error": None,
            "graphs": 1, "graphs_dense": 1, "failure": None}  # fmt: skip
    return cell | changes


def test_the_table_counts_models_and_reasons():
    refused = row("B", rewritten=0, reasons={"dropout": 2}, graphs=2)
    about = {"device": "CPU", "versions": {"torch": "2"}, "date": "2026-01-01T00", "command": "c"}
    rows = [row("A"), row("A", kept_error=1.0), refused]
    document = about | {"rows": rows, "notes": ["C was skipped"]}
    lines = coverage_table.coverage(document).splitlines()
    assert "| A | 2 | 4 of 4 | 1.0e+00 | – | – | 0 | 1 |" in lines
    assert "| B | 1 | 0 of 2 | 1.0e-07 | – | – | 1 | 1 |" in lines
    assert "- 2 × dropout (B)" in lines
    assert "- C was skipped" in lines
    assert any("4 of 6 sites run sparse (66.7%)" in line for line in lines)


def test_unseen_calls_are_wrong():
    assert "not seen" in coverage_table.wrong(row("A", reasons={"not seen": 1}))


def test_every_model_has_cells_of_every_length():
    for entry in coverage.ENTRIES.values():
        ways = coverage.cells(entry)
        assert {way.length for way in ways} == {1, 7, 128, 1000, 4096}
        assert {way.grad for way in ways} == {False, True}
        assert {way.batch for way in ways} == {1, 3}
        assert ("cache" in entry.knobs) == any(way.cache for way in ways)
        assert ("mask" in entry.knobs) == any(way.mask != "none" for way in ways)


def test_a_run_goes_on_where_it_stopped(tmp_path, monkeypatch):
    """Breadth first; what cannot be built is told; nothing is run twice."""
    ran = []

    def attempt(entry, cell, tuned, inner, place):
        if entry is coverage.ENTRIES["timm ViT"]:
            raise zoo.Missing("timm: not installed")
        ran.append((entry, cell))
        known = row("")
        return {name: known[name] for name in known if name not in coverage.KEY} | {
            "cpu_seconds": 0.0
        }

    monkeypatch.setattr(coverage, "attempt", attempt)
    args = Namespace(models="by hand;BERT;timm ViT", longest=7, inner="eager", seconds=None,
                     starred=False, device="cpu", dtype="float32")  # fmt: skip
    first = coverage.run(args, tmp_path)
    assert first["notes"] == ["timm ViT was skipped: timm: not installed"]
    assert [entry for entry, _ in ran[:2]] == [coverage.ENTRIES[n] for n in ("by hand", "BERT")]
    assert ran[0][1] == ran[1][1]
    assert {cell.length for _, cell in ran} == {1, 7}
    assert len(ran) == len(first["rows"]) == len(set(ran))
    assert len(coverage.run(args, tmp_path)["rows"]) == len(ran)


def test_half_precision_is_held_to_what_dense_loses():
    row = {
        "failure": None, "dtype": "bfloat16", "kept_error": 0.02, "dense_error": 0.009,
        "policy_error": None, "grad_error": None, "dense_grad_error": None, "head_error": None,
        "reasons": {}, "graphs": None,
    }  # fmt: skip
    assert coverage_table.wrong(row) is None
    assert "kept_error" in coverage_table.wrong(row | {"dense_error": 0.007})
    assert "kept_error" in coverage_table.wrong(row | {"dtype": "float32"})
