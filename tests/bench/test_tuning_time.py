"""`afbs bench tuning-time`: the parts add up, and what is known is not measured again."""

import json

import pytest
import torch

from afbs_compile import cli
from afbs_compile.bench import tuning_time

TINY = ("bench", "tuning-time", "--model", "tiny", "--tokens", "256", "--json")


@pytest.fixture
def afbs(capsys):
    def run(*arguments):
        code = cli.main(list(arguments))
        return code, *capsys.readouterr()

    return run


def test_phases_of_a_tuning(afbs, tmp_path):
    code, _, error = afbs(*TINY, "--documents", "2", "--output", str(tmp_path))
    assert code == 0, error
    path = next(tmp_path.glob("tuning_time*.json"))
    rows = json.loads(path.read_text())["rows"]
    assert [(row["case"], row["run"], row["levels"]) for row in rows] == [
        ("profile", "second", 1), ("profile", "second", 8),
        ("model", "first", 1), ("model", "second", 1),
    ]  # fmt: skip
    for row in rows[2:]:
        parts = [row[f"seconds_{part}"] for part in ("profile", "timing", "search")]
        assert 0 < row["seconds_validation"] < row["seconds_search"]
        assert min(parts) > 0
        assert sum(parts) < row["seconds"]
        assert (row["sites"], row["heads"]) == (2, 4)
    assert rows[1]["seconds"] > 0
    assert rows[1]["dense_passes"] == rows[1]["seconds"] / rows[1]["seconds_dense"]
    code, _, error = afbs(*TINY, "--documents", "2", "--output", str(tmp_path))
    assert code == 0, error
    again = json.loads(path.read_text())["rows"]
    assert [row for row in again if row["case"] == "model"] == rows[2:]
    assert len(again) == len(rows)


def test_an_unknown_model_is_named(afbs):
    code, _, error = afbs("bench", "tuning-time", "--model", "gpt-9")
    assert code == 1
    assert "gpt-9" in error
    assert "llama-2-7b" in error


def test_neighbours_of_a_layer_are_alike():
    layer = tuning_time.clustered(tuning_time.SHAPES["tiny"], 256, torch.device("cpu"))
    scores = (layer.q @ layer.k.mT)[0, 0] * layer.scale
    inside = scores[:12, :12].mean()
    assert inside > scores[:12, 12:24].mean() + 3
