"""`afbs bench tuner`: does every row say what was found and what it cost?"""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from afbs_compile import cli
from afbs_compile.bench import tuner, tuner_show
from afbs_compile.bench.tuner_sites import LAMBDAS, Documents, Subject, chosen, subject
from afbs_compile.commands.errors import CommandError
from afbs_compile.demo.model import LanguageModel
from afbs_compile.evaluators import profiled
from afbs_compile.options import STRATEGIES
from afbs_compile.tuner.objective import FULL, Measured

HEADS = 4
COST = 5.0


class Window:
    """A layer's heads on one window: log error a line in u, lambda adds to it."""

    heads, lambdas = HEADS, (-np.inf, -4.0, -1.0)

    def __init__(self, seed, factor=1.0):
        random = np.random.default_rng(seed)
        self.start, self.slope = random.uniform(0.2, 0.6, HEADS), random.uniform(1.0, 2.0, HEADS)
        self.amount, self.factor = random.uniform(0.01, 0.1, HEADS), factor

    def __call__(self, u, fidelity, level=None):
        level = np.zeros(HEADS, dtype=int) if level is None else level
        strict = level / 2.0
        error = np.hypot(self.start * np.exp(-self.slope * u), self.amount * strict)
        return Measured(self.factor * error, (0.1 + 0.2 * u) * (1.0 - 0.3 * strict))


def sites(seeds, factors):
    return {f"layer{s}": Documents([Window(s, f) for f in factors], COST) for s in seeds}


def made(unseen=1.0):
    tuned, probes = range(3), range(7, 9)
    calibration = {1: sites(tuned, [1.0]), 2: sites(tuned, [1.0, 1.05])}
    prior = {1: sites(probes, [1.0]), 2: sites(probes, [1.0, 1.05])}
    return Subject("small", 64, calibration, prior, sites(tuned, [unseen]))


def rows(subject, *wanted):
    return list(tuner.rows(subject, wanted, lambda *_: None))


CASES = tuner.cases(STRATEGIES, [0.1], [1, 2], 2)


def test_what_knows_no_chance_runs_once():
    count = {name: sum(case.strategy == name for case in CASES) for name in STRATEGIES}
    per_goal = {"afbs-bo": 4, "afbs-bo-paper": 2, "random": 2}  # AFBS-BO with and without probes
    assert count == {name: 2 * per_goal.get(name, 1) for name in STRATEGIES}


def test_rows_of_all_strategies():
    found = rows(made(), *CASES)
    assert [(row["strategy"], row["documents"], row["seed"]) for row in found] == [
        (case.strategy, case.documents, case.seed) for case in CASES
    ]
    for row in found:
        assert (row["model"], row["tokens"], row["layers"], row["heads"]) == ("small", 64, 3, 12)
        assert row["high_evaluations"] <= row["evaluations"]
        assert row["gap"] >= -0.002  # searches are finer than the grid of the optimum
        assert row["gap_tau"] <= row["gap"]
        assert row["heldout_over"] == row["heldout_over_1_1"] == 0.0
        if row["documents"] == 2:
            continue
        if row["strategy"] == "one-pass":
            assert (row["evaluations"], row["cost_dense_passes"]) == (0.0, COST)
            assert row["gap"] == pytest.approx(0.0, abs=1e-12)
        if row["strategy"] == "grid":
            assert row["evaluations"] == row["cost_dense_passes"] == 3 * 11
    assert len({json.dumps(row) for row in found}) == len(found)


def test_probes_are_charged_and_lambda_pays():
    without, probed = (tuner.Case("afbs-bo", probes, 0.1, 1, 0) for probes in (False, True))
    plain, helped = rows(made(), without, probed)
    assert (plain["probes"], plain["probe_cost_dense_passes"]) == (0, 0.0)
    assert (helped["probes"], helped["probe_cost_dense_passes"]) == (2, 2 * COST / 3)
    assert helped["cost_dense_passes"] > helped["probe_cost_dense_passes"]
    assert helped["sparsity"] > plain["sparsity"]


@pytest.mark.parametrize(
    ("factor", "over", "far"), [(1.0, 0.0, 0.0), (1.2, 1.0, 0.0), (1.5, 1.0, 1.0)]
)
def test_unseen_windows_tell_what_is_over_the_cap(factor, over, far):
    (row,) = rows(made(factor), tuner.Case("bisect", False, 0.1, 1, 0))
    assert row["heldout_over"] == pytest.approx(over, abs=0.35)
    assert row["heldout_over_1_1"] == pytest.approx(far, abs=0.35)


def test_several_windows_are_the_worst_error_and_the_mean_density():
    windows = [Window(0, 1.0), Window(1, 2.0)]
    both = Documents(windows, COST)
    u, level = np.linspace(0.0, 2.0, HEADS), np.array([0, 1, 2, 0])
    found, alone = both(u, FULL, level), [window(u, FULL, level) for window in windows]
    np.testing.assert_array_equal(found.error, np.maximum(alone[0].error, alone[1].error))
    np.testing.assert_allclose(found.density, (alone[0].density + alone[1].density) / 2)
    assert both.lambdas == Window.lambdas


@pytest.mark.parametrize(("sites", "layers"), [(30, 6), (4, 2), (3, 1), (40, 38)])
def test_tuned_layers_and_probes_are_spread(sites, layers):
    tuned, probes = chosen(sites, layers)
    assert (len(set(tuned)), len(set(probes))) == (layers, 2)
    assert not set(tuned) & set(probes)
    assert 0 <= min(tuned + probes) <= max(tuned + probes) < sites
    assert probes[0] < sites / 2 <= probes[1]


@pytest.mark.parametrize("layers", [0, 29])
def test_too_few_or_too_many_layers(layers):
    with pytest.raises(CommandError, match="the model has 30 and 2 are probes"):
        chosen(30, layers)


class Attention(nn.Module):
    """A layer of causal self-attention."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(64, 192)

    def forward(self, x):
        q, k, v = self.qkv(x).view(1, -1, 3, 2, 32).permute(2, 0, 3, 1, 4)
        o = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + o.transpose(1, 2).reshape(x.shape)


class Small(nn.Module):
    """Four such layers over embedded tokens."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 64)
        self.layers = nn.ModuleList(Attention() for _ in range(4))

    def forward(self, input_ids, use_cache):
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.usefixtures("fresh_dynamo")
def test_layers_of_a_model(monkeypatch):
    torch.manual_seed(0)
    model = LanguageModel("small", Small().eval(), None)
    windows = list(torch.randint(50, (3, 512)).unbind())
    seen = []

    def spied(layer, **how):
        seen.append(layer)
        return profiled(layer, **how)

    monkeypatch.setattr("afbs_compile.bench.tuner_sites.profiled", spied)
    found = subject(model, windows, [1, 2], 2, lambda *_: None)
    assert (found.model, found.tokens) == ("small", 512)
    assert list(found.calibration[2]) == list(found.unseen) != list(found.probes[2])
    assert {len(site.windows) for site in found.calibration[2].values()} == {2}
    assert {len(site.windows) for site in found.unseen.values()} == {1}
    assert len(seen) == 4 * 3  # every layer on every window
    site = next(iter(found.calibration[1].values()))
    assert (site.lambdas, site.heads) == (LAMBDAS, 2)
    assert site.profile_cost > 0.0
    assert np.all(site(np.full(2, 4.0), FULL).error < site(np.zeros(2), FULL).error)
    first = model.module.layers[0].qkv(model.module.embed(windows[0])).view(512, 3, 2, 32)
    torch.testing.assert_close(seen[0].q[0].transpose(0, 1), first[:, 0], rtol=1e-5, atol=1e-5)


@pytest.fixture
def afbs(capsys, monkeypatch):
    """The command on synthetic layers."""
    wanted = [replace(case, documents=1) for case in CASES if case.seed == 0]
    monkeypatch.setattr(tuner, "measure", lambda args, progress: rows(made(), *wanted))

    def run(*arguments):
        code = cli.main(["bench", "tuner", *(str(argument) for argument in arguments)])
        return code, *capsys.readouterr()

    return run


def test_table_and_plot(afbs, tmp_path):
    code, out, _ = afbs("--plot", tmp_path / "tuner.svg")
    assert code == 0
    assert "max_error 0.1, calibrated on 1 window" in out
    for name in STRATEGIES:
        assert name in out
    assert "afbs-bo + 2 probes" in out
    assert (tmp_path / "tuner.svg").read_text().startswith("<?xml")


def test_json_and_file(afbs, tmp_path):
    code, out, _ = afbs("--json", "--output", tmp_path)
    document, stored = json.loads(out), json.loads((tmp_path / "tuner.json").read_text())
    assert code == 0
    assert document["name"] == "tuner"
    assert document["rows"] == stored["rows"]
    assert document["notes"] == list(tuner.NOTES)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--strategies", "grid,magic"), "no strategy magic; choose of afbs-bo"),
        (("--documents", "1,0"), "--documents is '1,0'; give numbers above 0"),
        (("--max-errors", "small"), "--max-errors is 'small'"),
        (("--model", "nowhere"), "nowhere holds no config.json"),
    ],
)
def test_what_it_refuses(capsys, arguments, says):
    assert cli.main(["bench", "tuner", *arguments]) == 1
    out, error = capsys.readouterr()
    assert out == ""
    assert says in error


def test_means_are_over_the_seeds():
    base = rows(made(), tuner.Case("bisect", False, 0.1, 1, 0))[0]
    pair = [base | {"seed": n, "sparsity": value} for n, value in enumerate((0.2, 0.4))]
    means = tuner_show.means({"rows": pair})
    assert means[1, 0.1]["bisect"]["sparsity"] == pytest.approx(0.3)
