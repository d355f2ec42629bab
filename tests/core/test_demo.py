"""The demo: its figures are those of the report and the policy, and a second run is a hit."""

import json

import pytest
import torch

from afbs_compile import cache, cli
from afbs_compile.demo import render, run
from afbs_compile.demo.measure import Comparison
from afbs_compile.demo.run import Result, kept, result
from afbs_compile.options import Options
from afbs_compile.report import CalibrationReport, Report, SiteReport

COMPARISON = Comparison(20.0, 20.2, 1.5)
KEYS = {
    "sites", "rewritten", "density", "perplexity_dense", "perplexity_sparse", "attention_speedup",
    "forward_speedup", "tuning_seconds", "evaluations", "cache", "policy_path",
}  # fmt: skip


def report(*caches, path=None):
    sites = [
        SiteReport("a", "sparse", density=0.2),
        SiteReport("b", "sparse", density=0.3),
        SiteReport("c", "dense", "not faster", density=0.5),
        SiteReport("d", "refused", "dropout"),
    ]
    graphs = [CalibrationReport(c, "key", 4096, 10, 2.0, path) for c in caches]
    return Report(sites, graphs)


def test_result_counts_dense_and_refused_sites_as_dense():
    found = result(report("miss"), None, COMPARISON)
    assert (found.sites, found.rewritten) == (4, 2)
    assert found.density == pytest.approx((0.2 + 0.3 + 1 + 1) / 4)
    assert found.attention_speedup is None


@pytest.mark.parametrize(
    ("caches", "says"), [(["hit"], "hit"), (["hit", "miss"], "miss"), (["miss"], "miss")]
)
def test_one_graph_that_was_tuned_is_a_miss(caches, says):
    found = result(report(*caches), None, COMPARISON)
    assert found.cache == says
    assert found.evaluations == 10 * len(caches)
    assert found.tuning_seconds == 2.0 * len(caches)


def test_result_has_the_agreed_names():
    assert set(Result.__dataclass_fields__) == KEYS


def test_kept_finds_the_tuning_of_these_options(policy, tuning):
    mine = tuning(options=Options().tuning_fingerprint())
    path = cache.store(policy(mine, tuning(max_error=0.5)))
    assert kept(report("miss", path=str(path)), Options()) == mine
    assert kept(report("miss", path=str(path)), Options(max_error=0.01)) is None
    assert kept(report("miss"), Options()) is None


def test_tables_show_what_came_out(tuning, capsys):
    found = result(report("miss", path="/there/key.json"), tuning(), COMPARISON)
    render.show(found, tuning())
    out = capsys.readouterr().out
    for words in ("0.20 0.40", "4, 2", "+1.00 %", "1.50 ×", "10 evaluations", "/there/key.json"):
        assert words in out


def test_tables_of_a_second_run(capsys):
    render.show(result(report("hit"), None, COMPARISON), None)
    out = capsys.readouterr().out
    assert "cached: 0 evaluations, 0 s" in out
    assert "could not be kept" in out


def test_demo_refuses_a_short_text(tiny_model, tmp_path, capsys):
    path = tmp_path / "short.txt"
    path.write_text("Too short.")
    arguments = ["demo", "--model", tiny_model, "--text", path, "--tokens", 64]
    assert cli.main([str(argument) for argument in arguments]) == 1
    output = capsys.readouterr()
    assert output.out == ""
    assert "the text has 10 tokens, 2 windows of 64 need 128" in output.err


@pytest.fixture
def fake_demo(monkeypatch, tmp_path, tuning):
    """`demo` that needs no model, run from an empty folder."""
    found = result(report("miss"), None, COMPARISON)
    monkeypatch.setattr(run, "demo", lambda setup: (found, tuning()))
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("fake_demo")
def test_picture_is_drawn_for_people_and_on_request(tmp_path, capsys):
    assert cli.main(["demo", "--json"]) == 0
    assert json.loads(capsys.readouterr().out).keys() == KEYS
    assert list(tmp_path.glob("*.png")) == []
    assert cli.main(["demo"]) == 0
    assert "Heat map: afbs-demo.png" in capsys.readouterr().out
    assert (tmp_path / "afbs-demo.png").is_file()


@pytest.mark.usefixtures("fake_demo")
def test_picture_that_fails_loses_no_figures(capsys):
    assert cli.main(["demo", "--json", "--heatmap", "no/such/folder.png"]) == 1
    output = capsys.readouterr()
    assert json.loads(output.out).keys() == KEYS
    assert "cannot be written" in output.err


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_dynamo")
def test_first_run_tunes_and_second_run_is_cached(tiny_model, tmp_path, capsys):
    picture = tmp_path / "map.png"
    arguments = ["demo", "--json", "--model", tiny_model, "--tokens", 1024, "--min-length", 512]
    runs = []
    for _ in range(2):
        torch._dynamo.reset()  # as a new process would
        assert cli.main([*map(str, arguments), "--heatmap", str(picture)]) == 0
        runs.append(json.loads(capsys.readouterr().out))
    first, second = runs
    assert first.keys() == KEYS
    assert (first["cache"], second["cache"]) == ("miss", "hit")
    assert first["evaluations"] > 0
    assert (second["evaluations"], second["tuning_seconds"]) == (0, 0)
    assert first["sites"] == 2
    assert first["perplexity_sparse"] == pytest.approx(second["perplexity_sparse"], rel=1e-3)
    assert picture.read_bytes().startswith(b"\x89PNG")
