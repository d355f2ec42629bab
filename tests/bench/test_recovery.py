"""Continued training of hybrids: documents, heads at random, what is told, and a short run."""

import json

import numpy as np
import pytest
import torch

from afbs_compile import cli
from afbs_compile.bench import recovery, recovery_model, recovery_show
from afbs_compile.commands.errors import CommandError
from afbs_compile.hybrid_objective import GLOBAL, windowed
from afbs_compile.policy import Policy, Site, Tuning


def test_documents_share_no_text_and_come_again():
    tokens = torch.arange(40 * 100)
    found = recovery_model.documents(tokens, 40, 7, 5)
    parts = (found.held_out, found.searched, found.trained)
    assert [len(part) for part in parts] == [5, 7, 88]
    assert len(torch.cat(parts)[:, :30].unique()) == 100 * 30
    every = torch.cat(parts)
    assert torch.equal(every[:, 31:] - every[:, 30:-1], torch.ones(100, 9, dtype=torch.int64))
    start = every[:, 30] - every[:, 0]
    assert int(start.min()) >= 0
    assert int(start.max()) < 20
    assert len(start.unique()) > 10
    for length, held_out in ((40, 60), (42, 1)):
        with pytest.raises(CommandError, match="a multiple of 4 tokens"):
            recovery_model.documents(tokens, length, 1, held_out)


def policy(bits, heads_each=2):
    """One site for every two bits."""
    sites = {}
    for n in range(0, len(bits), 2):
        heads = tuple(
            windowed(8, 1) if bit else GLOBAL for bit in bits[n : n + 2] for _ in range(heads_each)
        )
        name = f"layers.{n // 2}.attention"
        sites[name] = Site(name, heads, 2, 32, "causal", "sparse")
    tuning = Tuning(128, 128, {}, True, 9, 0.0, 0.0, "", "cpu", {}, (), sites)
    return Policy("key", "Model", (tuning,))


def test_other_heads_of_the_same_number():
    bits = [True, False] * 11
    ours = policy(bits)
    assert recovery.bits_of(ours).tolist() == bits
    other = recovery.at_random(ours, 3)
    assert recovery.bits_of(other).sum() == 11
    assert recovery.bits_of(other).tolist() != bits
    none = recovery.with_bits(ours, np.arange(22) >= 2)
    site = none.tunings[0].sites["layers.0.attention"]
    assert (site.decision, site.reason) == ("dense", "no head is windowed")
    assert recovery.bits_of(none).tolist() == [n >= 2 for n in range(22)]


def row(method, seed, curve):
    about = {"model": "tiny", "parameters": 2e6, "base_steps": 5, "texts": "a", "tokens": 64,
             "held_out": 3, "ratio": 0.5, "window": 8, "steps": 8, "batch": 2}  # fmt: skip
    points = [(4 * n, loss, loss, 2 * loss) for n, loss in enumerate(curve)]
    return about | {"method": method, "seed": seed, "curve": points}


def test_lost_is_what_a_hybrid_has_above_the_dense_model_after_as_many_steps():
    rows = [
        row("dense", 0, [1.0, 0.9, 0.8]), row("bosch", 0, [1.4, 1.1, 0.9]),
        row("dense", 1, [1.0, 0.9, 0.8]), row("bosch", 1, [1.4, 1.1, 0.8]),
        row("random", 1, [2.0, 1.9, 1.8]), row("bosch", 2, [9.0, 9.0, 9.0]),
    ]  # fmt: skip
    document = {"rows": rows, "notes": ["late"]}
    found = recovery_show.lost(document)
    assert found["bosch"][0] == pytest.approx([0.4, 0.2, 0.1])
    assert set(found["bosch"]) == {0, 1}
    assert recovery_show.recovered(found["bosch"][0]) == pytest.approx(0.75)
    told = recovery_show.markdown(document)
    ours = next(line for line in told.split("\n") if line.startswith("| bosch | all"))
    assert "| 0.4000 ± 0.0000 | 0.2000 ± 0.0000 | 0.0500 ± 0.0707 | 0.88 ± 0.18 | 2 |" in ours
    assert "| random | all | 1.0000 | 1.0000 | 1.0000 | 0.00 | 1 |" in told
    assert "1.0000 before, 0.8000 ± 0.0000 after" in told
    assert told.endswith("late")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--ratio", "1"), "--ratio is between 0 and 1"),
        (("--steps", "0"), "at least 1"),
        (("--window", "33", "--tokens", "128"), "at most a quarter of --tokens"),
        (("--model", "huge"), "no model 'huge'; there are small, tiny"),
    ],
)
def test_wrong_arguments(arguments, says, capsys):
    assert cli.main(["bench", "recovery", *arguments]) == 1
    assert says in capsys.readouterr().err


@pytest.mark.slow
def test_a_short_run_trains_both_hybrids_and_the_dense_model(tmp_path):
    arguments = [
        "bench", "recovery", "--model", "tiny", "--base-steps", "8", "--tokens", "128",
        "--window", "16", "--batch", "2", "--steps", "6", "--every", "3", "--seeds", "1",
        "--budget", "12", "--searched", "2", "--unseen", "4", "--output", str(tmp_path),
    ]  # fmt: skip
    assert cli.main(arguments) == 0
    rows = {r["method"]: r for r in json.loads((tmp_path / "recovery.json").read_text())["rows"]}
    assert list(rows) == ["dense", "bosch", "random"]
    for one in rows.values():
        assert [point[0] for point in one["curve"]] == [0, 3, 6]
        assert one["curve"][-1][1] < one["curve"][0][1]
    assert rows["bosch"]["heads"].count("1") == rows["random"]["heads"].count("1") == 2
    assert rows["bosch"]["curve"][0][1] != rows["dense"]["curve"][0][1]
    assert cli.main(arguments) == 0  # everything is known
