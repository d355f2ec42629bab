"""`afbs bench generate`: answers are compared token by token, prompts share none with tuning."""

import json

import pytest
import torch

from afbs_compile import cli
from afbs_compile.bench import generate, generate_show
from afbs_compile.bench.generate_ways import Answer, agreed, gap
from afbs_compile.commands.errors import CommandError

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers


@pytest.mark.parametrize(("prompts", "texts", "found"), [(20, 3, "7,7,6"), (2, 2, "1,1")])
def test_prompts_are_spread_over_the_texts(prompts, texts, found):
    assert generate.spread(prompts, texts) == found


def test_a_text_without_a_prompt_is_refused():
    with pytest.raises(CommandError, match="3 texts"):
        generate.spread(2, 3)


@pytest.mark.parametrize(
    ("option", "value"), [("--dense", "flash"), ("--tokens", "8,16"), ("--new", "0")]
)
def test_what_cannot_be_asked(capsys, option, value):
    assert cli.main(["bench", "generate", option, value]) == 1
    assert value in capsys.readouterr().err or option == "--tokens"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_another_device_is_refused(capsys):
    assert cli.main(["bench", "generate", "--device", "cuda"]) == 1
    assert "there is no GPU" in capsys.readouterr().err


def answer(tokens):
    """An answer whose logits fall by one a token of the vocabulary."""
    logits = -torch.arange(10.0).expand(len(tokens), 10)
    return Answer(torch.tensor(tokens), logits, 0.0, 0.0)


def test_answers_agree_up_to_the_first_difference():
    dense = answer([0, 0, 0, 0])
    assert agreed(torch.tensor([0, 0, 3, 0]), dense.tokens) == 2
    assert gap(answer([0, 0, 3, 0]), dense) == 3.0
    assert gap(answer([0, 0, 0, 0]), dense) is None


def row(variant, window, first_s, agreed, **more):
    """A row of the result."""
    return {
        "model": "m", "dtype": "bfloat16", "text": "t", "tokens": 8, "window": window, "new": 4,
        "decode": "eager", "variant": variant, "reference": "inductor", "agreed": agreed,
        "same": agreed == 4, "gap": None if agreed == 4 else 0.5, "first_s": first_s,
        "reference_first_s": 0.2,
        "total_s": 1.0, "density": 0.5, "sites": 3, "rewritten": 2, "tuning_seconds": 7.0,
        "gaining": 1,
    } | more  # fmt: skip


def test_table():
    dense = [row("inductor", n, 0.2, 4, sites=None, tuning_seconds=None) for n in range(2)]
    ours = [row("afbs x", 0, 0.1, 4), row("afbs x", 1, 0.05, 1)]
    lines = generate_show.lines({"rows": [*dense, *ours], "notes": ["left out: 1"]})
    assert lines[4] == "| inductor | 2 | 100% | 4.0 of 4 | – | 0.50 | – | 200.0 ms | 1.00× | – |"
    assert lines[5] == (
        "| afbs x | 2 | 50% | 2.5 of 4 | 0.50 | 0.50 | 2 of 3 | 75.0 ms | 3.00× | 7.0 s |"
    )
    assert lines[-1] == "- left out: 1"


@pytest.mark.skipif(torch.cuda.is_available(), reason="the processor's path")
@pytest.mark.usefixtures("fresh_dynamo", "uncompiled")
def test_from_prompt_to_row(tiny_model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(generate, "INNER", "eager")
    draw = torch.Generator().manual_seed(0)
    letters = torch.randint(97, 123, (3000,), generator=draw).tolist()
    (tmp_path / "words.txt").write_text(bytes(letters).decode())
    asked = [
        "bench", "generate", "--model", str(tiny_model), "--text", f"w={tmp_path / 'words.txt'}",
        "--tokens", "512", "--prompts", "2", "--new", "3", "--dense", "eager",
        "--settings", "dense", "max_error=.3", "--dtype", "float32", "--json",
        "--output", str(tmp_path / "out"),
    ]  # fmt: skip
    assert cli.main(asked) == 0
    path = tmp_path / "out" / "generate_cpu.json"
    rows = json.loads(path.read_text())["rows"]
    assert [(r["window"], r["variant"]) for r in rows] == [
        (n, name) for n in range(2) for name in ("eager", "afbs dense", "afbs max_error=0.3")
    ]
    for found in rows:
        assert 0 < found["first_s"] <= found["total_s"]
        if found["variant"] != "eager":
            assert (found["sites"], found["rewritten"]) == (2, 2)
    dense = [r for r in rows if r["variant"] == "afbs dense"]
    assert all(r["same"] and r["density"] == 1 for r in dense)
    tuned = [r for r in rows if r["variant"] == "afbs max_error=0.3"]
    assert all(0 < r["density"] < 1 and r["tuning_seconds"] > 0 for r in tuned)
    capsys.readouterr()
    assert cli.main(asked) == 0  # all is known: nothing is measured again
    assert json.loads(path.read_text())["rows"] == rows
