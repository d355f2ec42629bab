"""Does the README's table show what rows hold, whatever they lack?"""

import json

import pytest

from afbs_compile.bench import tables

OLD = {"head_dim": 128, "heads": 32, "kv_heads": 32, "ours_ms": 1.0, "cudnn_ms": 2.0,
       "ratio_flex": None, "ratio_fa4": None}  # fmt: skip
ABOUT = {"device": "GPU", "date": "2026-01-01T00:00", "command": "c", "versions": {"torch": "2"}}


def row(case, ratio, length=8192, causal=False, kept=0.26, **more):
    shape = {"length": length, "causal": causal, "kept": kept}
    return OLD | shape | {"case": case, "ratio_cudnn": ratio} | more


def lines(*rows):
    return tables.attention(ABOUT | {"rows": list(rows)}).splitlines()


def test_all_columns():
    table = lines(
        row("whole_op", 2.5, selector="sub8"),
        row("whole_op", 9.0, inputs="clustered"),
        row("whole_op", 5.0, kept=0.1),
        row("whole_op", 0.9, kept=1.0),
        row("forward", 1.5, kernel="triton", ratio_flex=1.1),
        row("forward", 3.5, kernel="gluon", ratio_flex=1.4),
        row("forward", 4.5, kernel="gluon", granularity="128x128", ratio_fa4=1.2),
        row("selection", 25.0, selector="mean", percent_of_dense=2.0),
        row("selection", 30.0, selector="sub8", percent_of_dense=3.25, kept=0.5),
        row("backward", 2.9),
        row("forward", 7.0, head_dim=64),
    )
    assert "| 8192 | none | 2.50× | 3.50× | 1.40× | 1.20× | 3.2 % |" in table
    assert sum(line.startswith("| 8192") for line in table) == 1
    assert "Backward over cuDNN's, the same share of blocks: 2.90× at 8192 (no mask)." in table
    assert any("0.90 to 0.90×" in line for line in table)


def test_missing_columns_are_dashes():
    table = lines(row("whole_op", 2.0, causal=True))
    assert "| 8192 | causal | 2.00× | – | – | – | – |" in table


def test_rows_of_another_kind_and_no_cudnn():
    host = dict.fromkeys(row("host", None)) | {"case": "host", "host_us": 3.0}
    table = lines(host, row("whole_op", None, kept=1.0), row("forward", None))
    assert not any(line.startswith("| 8192") for line in table)


def test_no_rows():
    assert lines()[-1] == "GPU, torch 2, 2026-01-01, `c`"


@pytest.mark.parametrize("name", tables.TABLES)
def test_the_committed_results(name):
    file, make = tables.TABLES[name]
    path = tables.RESULTS / f"{file}.json"
    if not path.exists():
        pytest.skip("not measured yet")
    told = make(json.loads(path.read_text()))
    sentences = {"prompt": "A prompt of ", "strategies": "What tuning a layer costs"}
    if name in sentences:
        assert told.startswith(sentences[name])
    else:
        assert any(line.startswith("| ") for line in told.split("\n")[:3])


def test_a_prompt_that_only_some_ways_ran_is_not_told_of():
    def rows(tokens, failure=None):
        names = ("eager", "inductor", "afbs 1", "afbs 0.25")
        return [
            {"model": "llama-3-8b", "tokens": tokens, "variant": name, "failure": failure,
             "seconds": 8.0 / n, "repeats": 5, "over_inductor": n / 2, "over_eager": n / 1}
            for n, name in enumerate(names, 1)
        ]  # fmt: skip

    told = tables.prompt(ABOUT | {"rows": rows(64) + rows(128, "out of memory")})
    assert told.startswith("A prompt of 64 tokens")
    assert "(1.50× and 3.00×)" in told
    assert "(2.00× and 4.00×)" in told
    assert tables.prompt(ABOUT | {"rows": rows(128, "out of memory")}) == "*not measured yet*"
