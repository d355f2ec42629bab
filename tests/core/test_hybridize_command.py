"""`afbs hybridize` and `afbs bench hybrid`, on a tiny model."""

import json

import pytest
import torch

from afbs_compile import cli
from afbs_compile.bench import hybrid_show, merge
from afbs_compile.demo import model as models
from afbs_compile.hybrid_cache import HybridCache
from afbs_compile.hybrid_policy import forecast
from afbs_compile.policy import Policy

pytestmark = [
    pytest.mark.usefixtures("fresh_dynamo", "uncompiled"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="the processor's path"),
]
SMALL = ("--window", "64", "--tokens", "384", "--documents", "1", "--budget", "8", "--tasks",
         "text,needle")  # fmt: skip


@pytest.fixture
def afbs(capsys):
    """Run `afbs …`: exit code, stdout, stderr."""

    def run(*arguments):
        code = cli.main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return run


def test_hybridize_writes_a_policy_and_a_picture(afbs, tiny_model, tmp_path):
    out, picture = tmp_path / "hybrid.json", tmp_path / "heads.png"
    code, text, _ = afbs(
        "hybridize", tiny_model, *SMALL, "--prior", "locality", "--out", out, "--heatmap", picture,
        "--forecast", 1024, "--json",
    )  # fmt: skip
    told = json.loads(text)
    assert code == 0
    assert told["complete"]
    assert told["evaluations"] <= 8
    windowed = [bit for bits in told["windowed"].values() for bit in bits]
    assert (sum(windowed), len(windowed)) == (2, 4)
    assert told["forecast"]["decode_reads"] == pytest.approx(0.5 + 0.5 * 68 / 1024)
    (tuning,) = Policy.read(out).tunings
    assert tuning.holds_at_any_length
    assert picture.stat().st_size > 0
    config = models.from_folder(tiny_model).module.config
    cache = HybridCache.from_policy(
        Policy.read(out), config, 1, 1024, dtype=torch.float32, device="cpu"
    )
    assert cache.size_bytes == forecast(tuning, 1024, bytes_each=4)["kv_bytes"]
    code, text, _ = afbs("hybridize", tiny_model, *SMALL, "--prior", "locality")
    assert code == 0
    assert text.count("■") == 2 + 1  # two groups, and the legend
    code, text, _ = afbs("show", out)
    assert code == 0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (("--window", "0"), "window is 0"),
        (("--ratio", "2"), "ratio is 2"),
        (("--documents", "0"), "--documents is 0"),
        (("--tasks", "text,magic"), "no task magic"),
        (("--window", "600"), "the longest input has 384 tokens"),
        (("--tokens", "1000000"), "give a longer --text"),
        (("--policy", "nowhere.json"), "cannot be read"),
    ],
)
def test_what_is_wrong_is_said(afbs, tiny_model, wrong, message):
    code, out, error = afbs("hybridize", tiny_model, *SMALL, *wrong)
    assert (code, out) == (1, "")
    assert message in error


def test_bench_hybrid_measures_and_goes_on(afbs, tiny_model, tmp_path):
    arguments = (
        "bench", "hybrid", "--model", tiny_model, "--methods", "bosch,begin,locality",
        "--ratios", "0.25,0.5", "--windows", "64", "--tokens", "384", "--documents", "1",
        "--unseen", "1", "--seeds", "1", "--budget", "8", "--held", "1", "--tasks",
        "text,needle", "--measure", "text,copy", "--output", tmp_path,
    )  # fmt: skip
    code, text, _ = afbs(*arguments, "--json", "--plot", tmp_path / "scores.svg")
    assert code == 0
    document = json.loads(text)
    rows = document["rows"]
    assert len(rows) == 3 * 2 * 2
    assert {row["heads"].count("1") for row in rows if row["ratio"] == 0.25} == {1}
    assert {row["heads"].count("1") for row in rows if row["ratio"] == 0.5} == {2}
    assert {(row["task"], row["searched"]) for row in rows} == {("text", True), ("copy", False)}
    for row in rows:
        assert row["score"] == (-row["kl"] if row["task"] == "text" else -row["surprise"])
        assert row["evaluations"] == 0 or row["method"] == "bosch"
    assert (tmp_path / "scores.svg").stat().st_size > 0
    code, again, _ = afbs(*arguments, "--json")
    assert json.loads(again)["rows"] == rows  # nothing was measured again
    name = next(tmp_path.glob("hybrid*.json")).stem
    parts = [str(tmp_path), str(tmp_path)]
    assert merge.main([name, *parts, "--output", str(tmp_path / "all")]) == 0
    assert json.loads((tmp_path / "all" / f"{name}.json").read_text())["rows"] == rows
    hybrid_show.show(document)


def test_bench_hybrid_names_unknown_methods(afbs, tiny_model):
    code, _, error = afbs("bench", "hybrid", "--model", tiny_model, "--methods", "magic")
    assert code == 1
    assert "no method magic; there are bosch" in error
