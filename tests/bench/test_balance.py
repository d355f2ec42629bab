"""The simulation follows from what it is given, and its command writes what it shows."""

import json
from dataclasses import replace

import numpy as np
import pytest

from afbs_compile import cli
from afbs_compile.bench import balance, balance_show
from afbs_compile.bench.balance_run import Case, simulate
from afbs_compile.bench.balance_world import (
    MIXTURES,
    MODELS,
    attention_cost,
    by_count,
    cluster,
    data,
    kept_blocks,
)
from afbs_compile.bench.harness import RESULTS

MODEL = MODELS["qwen2.5-3b"]
QUICK = ["--ranks", "4", "--steps", "3", "--seeds", "1", "--densities", "known"]


@pytest.fixture(scope="module")
def world():
    return data("long-tail", 8 * 8 * 6, MODEL, 0), cluster(8, MODEL, 0)


def fared(world, method, **options):
    return simulate(Case(method, **options), *world)


def test_the_cost_fits_what_was_measured():
    a, b, c = attention_cost()
    rows = json.loads((RESULTS / "attention.json").read_text())["rows"]
    rows = [r for r in rows if r["case"] == "forward_backward" and r["head_dim"] == 128]
    assert len(rows) >= 6
    for row in rows:
        predicted = a * row["heads"] * row["length"] + b * kept_blocks(row) + c
        assert predicted == pytest.approx(row["ours_ms"] / 1e3, rel=0.25)


@pytest.mark.parametrize("mixture", sorted(MIXTURES))
def test_densities_are_shares(mixture):
    for densities in ("known", "content"):
        known = data(mixture, 500, MODEL, 1, densities)
        assert ((known.density > 0) & (known.density <= 1)).all()
        assert (known.density == known.prior).all() == (densities == "known")


def test_a_count_of_blocks_is_all_of_a_short_sequence():
    lengths = np.array([1000.0, 8192.0, 16384.0])
    density = by_count(lengths)
    assert density[:2].tolist() == [1.0, 1.0]
    visible = lengths[2] ** 2 / 2
    kept = visible - (lengths[2] - 8192) ** 2 / 2  # every query sees 8192 keys or all before it
    assert density[2] == pytest.approx(kept / visible)


def test_better_batches_are_faster(world):
    steps = {m: fared(world, m)["step_ms"] for m in ("random", "sorted", "sparsity", "both")}
    assert steps["both"] < steps["sparsity"] < steps["sorted"] < steps["random"]


def test_a_controller_keeps_its_bounds(world):
    found = fared(world, "both", shrink=0.75, grow=1.5)
    assert 0.75 <= found["kept_ratio"] <= 1.5
    nothing = fared(world, "both", shrink=1.0, grow=1.0)
    assert nothing["kept_ratio"] == pytest.approx(1.0)
    assert nothing["step_ms"] == pytest.approx(fared(world, "sparsity")["step_ms"], rel=1e-2)


def test_filling_bubbles_keeps_more_in_the_same_time(world):
    base = fared(world, "sparsity")
    filled = fared(world, "both", anchor="max")
    assert filled["kept_ratio"] > 1.05
    assert filled["step_ms"] == pytest.approx(base["step_ms"], rel=0.02)


def test_waiting_more_often_takes_longer(world):
    machines = world[1]
    assert fared(world, "random", sync="micro")["step_ms"] > fared(world, "random")["step_ms"]
    times = np.random.default_rng(0).uniform(1, 2, (8, 4))
    step, micro = (machines.step_seconds(times, sync) for sync in ("step", "micro"))
    assert times.sum(1).mean() < step < micro
    assert replace(machines, stages=4).step_seconds(times, "step") > step / 4


def test_the_command_writes_what_it_shows(tmp_path, capsys):
    plot = tmp_path / "balance.svg"
    command = ["bench", "balance", *QUICK, "--output", str(tmp_path), "--plot", str(plot)]
    assert cli.main([*command, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "balance.json").read_text())
    rows = printed["rows"]
    assert {row["setup"] for row in rows} == {"simulated"}
    assert {row["ranks"] for row in rows if row["case"] == "grid"} == {4}
    for row in rows:
        if row["method"] == "random":
            assert row["speedup_random"] == 1.0
    assert plot.read_text().startswith("<?xml")
    table = balance_show.markdown(printed)
    assert table.count("\n| long-tail") == 2
    assert "| both | 1.35 |" in table


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ranks", "0"], "--ranks is '0'"),
        (["--mixtures", "odd"], "--mixtures has no odd"),
        (["--bounds", "2:3"], "--bounds has '2:3'"),
        (["--model", "none"], "no model 'none'"),
    ],
)
def test_arguments_that_name_nothing(options, message, capsys):
    assert cli.main(["bench", "balance", *options]) == 1
    assert message in capsys.readouterr().err


def test_the_same_seed_makes_the_same_row(world):
    first, second = (fared(world, "both") for _ in range(2))
    first.pop("plan_ms")
    second.pop("plan_ms")
    assert first == second
    assert balance.short(1.23456789) == 1.2346
