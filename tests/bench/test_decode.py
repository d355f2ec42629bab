"""`afbs bench decode`: every variant runs end to end, and rows say what was measured."""

import json

import pytest
import torch

from afbs_compile import cli
from afbs_compile.bench import decode, decode_model, decode_prompt, decode_show
from afbs_compile.kernels import flex

TINY = ("bench", "decode", "--model", "tiny", "--window", "8", "--sink", "2", "--json")
BYTES = 2 * 2 * 4 * 32 * 4  # k and v, layers, KV heads, head dim, float32: of a token


@pytest.fixture
def afbs(capsys):
    def run(*arguments):
        code = cli.main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return run


@pytest.mark.usefixtures("on_cpu")
def test_end_to_end(afbs, tmp_path):
    arguments = (*TINY, "--cases", "2x40,1x30", "--ratios", "0.5,1", "--output", tmp_path)
    code, out, _ = afbs(*arguments)
    rows = json.loads(out)["rows"]
    assert code == 0
    assert [(r["batch"], r["tokens"], r["ratio"]) for r in rows] == [
        (2, 40, 0.5), (2, 40, 1.0), (1, 30, 0.5), (1, 30, 1.0)
    ]  # fmt: skip
    for row in rows:
        assert row["ours_tokens_per_s"] > 0
        assert row["dense_tokens_per_s"] > 0
        longest = row["tokens"] + decode_model.SLACK
        assert row["kv_bytes_dense"] == row["batch"] * longest * BYTES
        kept = row["ratio"] * 10 + (1 - row["ratio"]) * longest
        assert row["kv_bytes"] == row["batch"] * kept * BYTES
    runs = json.loads((tmp_path / "decode_runs.json").read_text())["rows"]
    assert {r["variant"] for r in runs} == {"hybrid", "ratio0", "whole", "static"}
    assert afbs(*arguments)[0] == 0
    assert json.loads((tmp_path / "decode_runs.json").read_text())["rows"] == runs


@pytest.mark.usefixtures("on_cpu")
def test_one_layer(afbs):
    code, out, _ = afbs(*TINY, "--cases", "2x40", "--case", "op")
    rows = json.loads(out)["rows"]
    assert code == 0
    assert [row["variant"] for row in rows] == ["hybrid", "ratio0", "whole", "static"]
    assert all(row["gb_per_s"] > 0 for row in rows)


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_a_prompt(afbs, monkeypatch):
    monkeypatch.setattr(flex, "fused", lambda function, kind: function)
    arguments = (*TINY, "--cases", "1x200", "--ratios", "0.5,0", "--case", "prompt")
    code, out, _ = afbs(*arguments)
    rows = json.loads(out)["rows"]
    assert code == 0
    assert [(row["variant"], row["ratio"]) for row in rows] == [("hybrid", 0.5), ("hybrid", 0.0)]
    assert all(row["ours_ms"] > 0 and row["ratio_cudnn"] > 0 for row in rows)
    seen = decode_prompt.token_visible
    monkeypatch.setattr(decode_prompt, "token_visible", lambda *a: seen(*a) & (a[3] != 0))
    code, _, error = afbs(*arguments)
    assert code == 1
    assert "afbs::attention with windows: relative error" in error


@pytest.mark.usefixtures("on_cpu")
def test_a_wrong_kernel(afbs, monkeypatch, tmp_path):
    right = decode.decode.on_cpu
    monkeypatch.setattr(  # the op's own run is wrong, the comparison's is not
        decode.decode, "require", lambda q, *_: monkeypatch.setattr(decode.decode, "on_cpu", wrong)
    )

    def wrong(q, *_):
        monkeypatch.setattr(decode.decode, "on_cpu", right)
        return torch.ones_like(q)

    code, _, error = afbs(*TINY, "--cases", "1x30", "--output", tmp_path)
    assert code == 1
    assert "afbs::decode: relative error" in error
    assert not (tmp_path / "decode.json").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--cases", "8by4"), "cases are BATCHxTOKENS"),
        (("--cases", "0x4"), "at least 1"),
        (("--ratios", "1.5"), "ratios from 0 to 1"),
        (("--variants", "ours"), "no variant ours"),
        (("--model", "gpt"), "no model 'gpt'"),
    ],
)
def test_what_it_refuses(afbs, arguments, says):
    code, out, error = afbs(*TINY, *arguments)
    assert (code, out) == (1, "")
    assert says in error


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device(afbs):
    code, _, error = afbs("bench", "decode")
    assert code == 1
    assert "run it on a machine with an NVIDIA GPU" in error


def test_the_fastest_dense_variant_counts():
    same = {"case": "decode", "model": "m", "tokens": 9, "batch": 1, "window": 4, "sink": 0}
    speeds = {"static": 10, "whole": 30, "ratio0": 20, "hybrid": 50}
    rows = [
        same | {"variant": v, "ratio": 0.5 * (v == "hybrid"), "tokens_per_s": s, "kv_bytes": 7}
        for v, s in speeds.items()
    ]
    (row,) = decode_show.compared([*rows, rows[0] | {"tokens": 8, "tokens_per_s": 99}])
    assert (row["ours_tokens_per_s"], row["dense_tokens_per_s"], row["dense"]) == (50, 30, "whole")
    (row,) = decode_show.compared(rows[-1:])
    assert row["dense_tokens_per_s"] is None
