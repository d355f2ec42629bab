"""What `explain` says: every reason has a next step; lines, table and JSON agree."""

import ast
import json
from pathlib import Path

import pytest
from rich.console import Console

from afbs_compile import advice
from afbs_compile.report import Journal, SiteReport

ROOT = Path(__file__).parents[2]
PLACES = ("passes/guard.py", "passes/masks.py", "passes/plan.py", "afbs_compile/calls.py")
DENSE = SiteReport("layers.0", "dense", "not faster: 2.00e-03 s sparse, 1.00e-03 s dense")
SPARSE = SiteReport("layers.1", "sparse", None, "causal", 8, 2, 64, 4096, 0.25, 0.1, 2.0, "Gluon")


def texts(node):
    """The strings that an expression may be, with `x` for what is filled in."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif isinstance(node, ast.JoinedStr):
        yield "".join(str(part.value) if isinstance(part, ast.Constant) else "7 x"
                      for part in node.values)  # fmt: skip
    elif isinstance(node, ast.IfExp):
        yield from texts(node.body)
        yield from texts(node.orelse)


def reasons():
    for place in PLACES:
        for node in ast.walk(ast.parse((ROOT / place).read_text())):
            if isinstance(node, ast.Return):
                yield from texts(node.value)


def test_every_reason_has_a_next_step():
    found = list(reasons())
    assert len(found) > 15
    lost = [reason for reason in found if advice.next_step(reason) == advice.UNKNOWN]
    assert not lost, "add a step for them to afbs_compile/advice.py"


def test_a_reason_that_nobody_knows_still_has_one():
    assert advice.next_step("the moon is full") == advice.UNKNOWN
    assert advice.next_step(None) == ""


@pytest.fixture
def report():
    journal = Journal()
    journal.add_sites([DENSE, SPARSE])
    for _ in range(3):
        journal.add_call(SiteReport("f", "refused", "dropout"))
    return journal.report()


def test_equal_calls_are_one_site_with_a_count(report):
    assert [site.calls for site in report.sites] == [None, None, 3]
    assert report.reasons == {"dropout": 3, DENSE.reason: 1}
    assert report.rewritten == 1


def test_lines_table_and_json_say_the_same(report):
    console = Console(width=160)
    with console.capture() as captured:
        console.print(report)
    document = json.dumps(report.to_dict())
    for text in (str(report), captured.get(), document):
        for word in ("layers.0", "layers.1", "not faster", "dropout", "Gluon", "0.25",
                     advice.next_step("dropout")):  # fmt: skip
            assert word in text
    assert "2.00×" in captured.get()
    assert json.loads(document)["reasons"] == {"dropout": 3, DENSE.reason: 1}


def test_an_empty_report_prints():
    report = Journal().report()
    assert "0 of 0" in str(report)
    Console(quiet=True).print(report)
