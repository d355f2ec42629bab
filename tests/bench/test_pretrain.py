"""Training runs of the benchmark: their text, their samples, and what is told of them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from afbs_compile import cli
from afbs_compile.bench import live, live_data, live_show, pretrain_model, pretrain_show
from afbs_compile.bench import pretrain_text as text
from afbs_compile.bench.live_rank import BASE, Budgets
from afbs_compile.bench.pretrain_text import Source
from afbs_compile.commands.errors import CommandError
from afbs_compile.policy import bucket_of

ROOT = Path(__file__).parents[2]
CODE = "import os\n\n\ndef one():\n    return 1\n\n\n@decorated\nclass Two:\n    pass\n"


def test_code_is_cut_where_something_begins(tmp_path):
    (tmp_path / "a.py").write_text(CODE)
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "b.py").write_text("no\n")
    (tmp_path / "c.txt").write_text(" = Ships = \n\nSail.\n = = Masts = = \nTall.\n")
    found = text.read([f"both={tmp_path}"])[0].documents
    assert b"".join(found).decode() == CODE + " = Ships = \n\nSail.\n = = Masts = = \nTall.\n"
    assert [d.split(b"\n")[0] for d in found] == [
        b"import os", b"def one():", b"@decorated", b"class Two:", b" = Ships = ",
        b" = = Masts = = ",
    ]  # fmt: skip
    twice = text.read([f"x={tmp_path}/a.py", f"x={tmp_path}/c.txt"])
    assert [(s.name, s.documents) for s in twice] == [("x", found)]


def test_what_is_no_text_is_refused(tmp_path):
    with pytest.raises(CommandError, match="does not exist"):
        text.read([f"a={tmp_path}/none"])
    with pytest.raises(CommandError, match="no text below a"):
        text.read([f"a={tmp_path}"])


def test_windows_share_no_byte_and_all_are_read():
    every = torch.arange(100, dtype=torch.uint8)
    trained, held_out = text.windows(every, 10, 3)
    assert sorted(torch.cat([trained, held_out]).flatten().tolist()) == list(range(100))
    assert held_out[:, 0].tolist() == [0, 30, 60]
    order = text.order(len(trained), 5, 2, seed=1)
    assert order.shape == (5, 2)
    assert sorted(order.flatten()[:7].tolist()) == list(range(7))
    assert torch.equal(order, text.order(7, 5, 2, seed=1))
    with pytest.raises(CommandError, match="100 bytes"):
        text.windows(every, 40, 2)


def test_samples_are_of_one_source_and_one_length_bucket():
    rng = np.random.default_rng(0)
    sources = [Source(str(n), [bytes([n]) * int(k) for k in rng.integers(100, 9000, 41)])
               for n in range(2)]  # fmt: skip
    every = live_data.samples(sources, 4, 512, 4096)
    assert {s.length for s in every} > {4096}
    for sample in every:
        assert bucket_of(sample.length) == sample.length <= 4096
        assert sample.length % 128 == 0
        assert sample.tokens.shape == (4, sample.length + 1)
        assert (sample.tokens == sample.source).all()
    held_out = {id(every[n]) for n in live_data.spread(len(every), 3)}
    chosen = live_data.divided(every, 12, 3, seed=5)
    assert len({id(s) for s in chosen}) == 12
    assert len(held_out) == 3
    assert not held_out & {id(s) for s in chosen}
    with pytest.raises(CommandError, match="can be made"):
        live_data.divided(every, 100, 3, seed=5)


def test_budgets_are_the_sources_times_the_plans(monkeypatch):
    model = pretrain_model.made(pretrain_model.config("tiny"), 0, torch.device("cpu"))
    said = []
    monkeypatch.setattr("afbs_compile.set_budget", lambda _, budgets: said.append(budgets))
    budgets = Budgets(model, [0.2, 0.7])
    first, second = model.sites
    budgets.use(0)
    budgets.use(0)
    budgets.plan({first: BASE * 2, second: BASE / 2})
    budgets.use(1)
    assert said == [{first: 0.2, second: 0.2}, {first: 1.0, second: pytest.approx(0.35)}]


def test_a_model_is_told_by_its_seed():
    sizes = pretrain_model.config("tiny")
    one, same, other = (pretrain_model.made(sizes, n, torch.device("cpu")) for n in (1, 1, 2))
    tokens = torch.randint(0, 256, (1, 65))
    with torch.no_grad():
        losses = [model(tokens).item() for model in (one, same, other)]
    assert losses[0] == losses[1] != losses[2]
    assert losses[0] == pytest.approx(np.log(256), rel=0.05)
    rate = pretrain_model.warm_up(1.0, 4)
    assert [rate(n) for n in (0, 3, 9)] == [0.25, 1.0, 1.0]


def row(method, seed, step, held_out=2.0):
    return {"method": method, "seed": seed, "step_ms": step, "bubble": 0.1, "kept_ratio": 1.0,
            "held_out": held_out, "ranks": 2, "backend": "gloo", "micro_batches": 3, "rows": 4,
            "steps": 6}  # fmt: skip


def test_speed_ups_are_of_the_same_seed():
    rows = [
        row("random", 0, 120.0), row("random", 1, 60.0), row("length", 0, 100.0),
        row("length", 1, 50.0), row("sparsity", 0, 80.0), row("sparsity", 1, 40.0, 2.001),
    ]  # fmt: skip
    told = live_show.markdown({"rows": rows, "notes": ["late"]})
    sparsity = next(line for line in told.split("\n") if line.startswith("| sparsity"))
    assert "| 1.500 ± 0.000 | 1.250 ± 0.000 | 1.000 ± 0.000 |" in sparsity
    assert "at most 1.0e-03 apart" in told
    assert told.endswith("late")
    assert told.startswith("2 ranks (gloo), 3 micro-batches of 4 documents each, 6 steps:")


def test_settings_have_tables_of_their_own():
    rows = [row("random", 0, 120.0), row("length", 0, 60.0) | {"rows": 8}]
    told = live_show.markdown({"rows": rows})
    assert told.count("| method |") == 2
    assert " | 2.000 ± 0.000 | " not in told  # another setting's step is no base


def test_turns_and_numbers():
    assert live.turned(["a", "b", "c"], 4) == ["b", "c", "a"]
    assert live.budgets_of("0.2", 2) == [0.2, 0.2]
    for wrong in ("0.2,0.3", "0", "x"):
        with pytest.raises(CommandError, match="--budgets"):
            live.budgets_of(wrong, 3)
    assert live.bounds_of("0.5:2") == (0.5, 2.0)
    for wrong in ("1", "2:3", "0:1"):
        with pytest.raises(CommandError, match="--bounds"):
            live.bounds_of(wrong)


def test_alone_there_is_nothing_to_balance(monkeypatch, capsys):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert cli.main(["bench", "live"]) == 1
    assert "torchrun --nproc-per-node 2" in capsys.readouterr().err


def test_runs_are_drawn(tmp_path):
    runs = [
        {"run": name, "steps": 30, "losses": [5 - n / 10 for n in range(30)], "step_ms": ms,
         "held_out": [(15, 4.0), (30, 3.0)], "tokens_per_s": 1e6 / ms, "peak_mib": 2048.0}
        for name, ms in (("dense", 30.0), ("sparse", 20.0))
    ]  # fmt: skip
    told = pretrain_show.markdown({"rows": runs, "notes": []})
    assert "| sparse | 30 | 2.550 | 3.000 | 20.0 ms | 50,000 | 1.50x | 2.0 GiB |" in told
    pretrain_show.draw({"rows": runs}, tmp_path / "a.svg")
    assert "loss, nats a byte" in (tmp_path / "a.svg").read_text()


@pytest.mark.slow
def test_both_runs_learn_alike(tmp_path):
    command = [
        sys.executable, str(ROOT / "bench/pretrain.py"), "--model", "tiny", "--tokens", "512",
        "--steps", "30", "--every", "15", "--held-out", "2", "--rate", "3e-3",
        "--output", str(tmp_path),
    ]  # fmt: skip
    ran(command)
    document = json.loads((tmp_path / "pretrain.json").read_text())
    dense, sparse = document["rows"]
    assert dense["losses"][0] == pytest.approx(sparse["losses"][0], abs=0.02)
    assert dense["losses"] != sparse["losses"]
    for one in (dense, sparse):
        assert one["held_out"][-1][0] == 30
        assert one["held_out"][-1][1] < one["losses"][0] - 0.5


@pytest.mark.slow
def test_ranks_take_the_same_steps_whoever_computes_what(tmp_path):
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
        "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", str(ROOT / "bench/live.py"),
        "--device", "cpu", "--model", "tiny", "--shortest", "256", "--longest", "1024",
        "--rows", "1", "--steps", "6", "--seeds", "1", "--output", str(tmp_path),
    ]  # fmt: skip
    ran(command)
    rows = {r["method"]: r for r in json.loads((tmp_path / "live.json").read_text())["rows"]}
    assert len(rows) == 5
    losses = [rows[m]["held_out"] for m in live_show.SAME]
    assert max(losses) - min(losses) < 1e-3
    assert len({r["tokens"] for r in rows.values()}) == 1
    assert {rows[m]["kept_ratio"] for m in live_show.SAME} == {1.0}
    assert 0.5 <= rows["controller"]["kept_ratio"] <= 2.0
    assert 1.0 <= rows["bubble"]["kept_ratio"] <= 2.0
    ran(command)  # everything is known


def ran(command):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=400, check=False
    )
    assert run.returncode == 0, run.stderr[-3000:]
