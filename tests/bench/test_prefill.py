"""`afbs bench prefill`: what was asked is read, ratios are run by run, rows become a table."""

import pytest
import torch

from afbs_compile import cli
from afbs_compile.bench import prefill, prefill_model
from afbs_compile.commands.errors import CommandError


@pytest.mark.parametrize("text", ["0", "1.5", "x", ""])
def test_shares_that_cannot_be_kept(text):
    with pytest.raises(CommandError):
        prefill.shares(text)


@pytest.mark.parametrize("text", ["0", "-1", "1.5", ""])
def test_lengths_that_no_prompt_has(text):
    with pytest.raises(CommandError):
        prefill.lengths(text)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu(capsys):
    assert cli.main(["bench", "prefill", "--tokens", "128"]) != 0
    assert "--model tiny" in capsys.readouterr().err


def test_heads_that_keep_a_share():
    site = type("Site", (), {"heads": 3})()
    whole, part = prefill.keeping(1)(site), prefill.keeping(0.25)(site)
    assert [head.mode for head in whole] == ["dense"] * 3
    assert [(head.mode, head.budget) for head in part] == [("sparse", 0.25)] * 3


def test_what_does_not_fit_is_a_row():
    def too_large():
        raise torch.OutOfMemoryError

    way = prefill.Variant(too_large, lambda: None, {"variant": "inductor", "failure": None})
    way.start()
    way.run(again=False)
    assert way.row["failure"] == "out of memory"
    assert prefill.median_ratio([1.0], way.runs) is None
    later = prefill.Variant(too_large, lambda: None, {"variant": "eager", "failure": None})
    later.run(again=True)
    assert later.runs is None
    assert later.row["failure"] == "out of memory"
    assert prefill.median_ratio([2.0, 9.0, 4.0], [1.0, 3.0, 1.0]) == 3.0


def test_table():
    row = {
        "model": "m", "tokens": 8, "variant": "eager", "seconds": 2.0, "over_eager": 1.0,
        "over_inductor": None, "peak_gib": 1.25, "failure": None,
    }  # fmt: skip
    failed = row | {"failure": "out of memory", "seconds": None, "peak_gib": None}
    lines = prefill.table({"rows": [row, failed]}).splitlines()
    assert lines[2] == "| m | 8 | eager | 2 | – | 1.00× | 1.2 |"
    assert "out of memory" in lines[3]


@pytest.mark.parametrize("tokens", [512, 32760, 75600])
def test_a_video_has_about_as_many_patches(tokens):
    frames, rows, columns = prefill_model.grid(tokens)
    assert abs(frames * rows * columns - tokens) <= rows * columns / 2
