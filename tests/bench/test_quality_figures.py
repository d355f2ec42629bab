"""Are figures of quality what they are called? Divergence, settings, windows, curves, ledger."""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from afbs_compile.bench import divergence as divergences
from afbs_compile.bench import frontier, ledger, quality_show, settings, tables, windows
from afbs_compile.bench.divergence import divergence
from afbs_compile.bench.frontier import Point
from afbs_compile.bench.windows import Text
from afbs_compile.commands.errors import CommandError


def logits(seed, tokens=30, words=11, scale=2.0):
    return scale * torch.randn(tokens, words, generator=torch.Generator().manual_seed(seed))


@given(seed=st.integers(0, 99), chunk=st.integers(1, 40), shift=st.floats(-50, 50))
def test_divergence_is_that_of_the_definition(seed, chunk, shift):
    dense, sparse = logits(seed), logits(seed + 1)
    targets = torch.randint(0, 11, (30,), generator=torch.Generator().manual_seed(seed))
    p, q = dense.double().softmax(-1), sparse.double().softmax(-1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(divergences, "CHUNK", chunk)
        # the same number on every word's logit of a token changes nothing
        found = divergence(dense.double() + shift, sparse, targets)
    assert found.kl == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), rel=1e-6)
    expected = math.exp(-float(q.gather(1, targets[:, None]).log().mean()))
    assert found.perplexity_sparse == pytest.approx(expected, rel=1e-9)
    assert found.agreement == float((p.argmax(-1) == q.argmax(-1)).double().mean())


def test_a_model_is_no_way_from_itself():
    found = divergence(logits(0), logits(0), torch.zeros(30, dtype=torch.int64))
    assert found.kl == 0
    assert found.agreement == 1
    assert found.perplexity_dense == found.perplexity_sparse


def test_words_that_cannot_come_cost_nothing():
    never = logits(0)
    never[:, 3] = -math.inf
    found = divergence(never, never, torch.zeros(30, dtype=torch.int64))
    assert found.kl == 0


def test_divergence_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="29 next tokens"):
        divergence(logits(0), logits(1), torch.zeros(29, dtype=torch.int64))


def test_settings_expand_into_families():
    given = ["dense", "sub8@.9,.95", "mean-n0@.9", "max_error=.05,.1", "dense",
             '{"max_error": [0.1, 0.2], "selector": "mean"}']  # fmt: skip
    found = settings.settings(given)
    assert [s.name for s in found] == [
        "dense", "sub8@0.9", "sub8@0.95", "mean-n0@0.9", "max_error=0.05", "max_error=0.1",
        "max_error=0.1, selector=mean", "max_error=0.2, selector=mean",
    ]  # fmt: skip
    assert [s.family for s in found[1:3]] == ["sub8"] * 2
    assert {s.family for s in found[4:6]} == {"max_error"}
    assert {s.family for s in found[6:]} == {"max_error, selector=mean"}
    assert (found[3].selector, found[3].head.neighbours, found[3].head.tau) == ("mean", 0, 0.9)
    assert found[1].head.neighbours == 2
    assert found[5].options == {"max_error": 0.1}
    assert found[6].selector == "mean"


@pytest.mark.parametrize(
    "text", ["sub9@.9", "sub8@1.5", "sub8@x", "max_error=2", "max_eror=.1", "{", "{}", "", "x"]
)
def test_settings_that_are_none(text):
    with pytest.raises(CommandError):
        settings.settings([text])


@given(
    length=st.integers(1, 20),
    counts=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    each=st.integers(1, 3),
    spare=st.integers(0, 30),
)
def test_tuned_and_measured_windows_share_no_token(length, counts, each, spare):
    texts = [
        Text(str(n), torch.arange((count + each) * length + spare) + 1000 * n, count)
        for n, count in enumerate(counts)
    ]
    for_tuning = windows.in_turn(windows.calibration(texts, length, each))
    measured = [w for text in texts for w in windows.measured(text, length)]
    every = torch.cat([*for_tuning, *measured])
    assert len(for_tuning) == each * len(counts)
    assert len(every) == length * (each * len(counts) + sum(counts))
    assert len(every.unique()) == len(every)


def test_a_text_that_is_too_short_for_both():
    text = Text("a", torch.arange(29), 2)
    assert len(windows.measured(text, 10)) == 2
    with pytest.raises(CommandError, match="need 30"):
        windows.calibration([text], 10, 1)
    with pytest.raises(CommandError, match="no text b; there are a"):
        windows.calibration([text], 5, 1, ["b"])


def curve(*places):
    return [Point("s", "f", 1, s, change, None, kl) for s, change, kl in places]


@given(budget=st.floats(0.2, 7.9), sparsity=st.floats(0.3, 0.9))
def test_reading_an_exact_curve_gives_its_values_back(budget, sparsity):
    straight = curve(*[(s, 10 * s - 1, 1e-3 * 10 ** (3 * s)) for s in (0.1, 0.3, 0.5, 0.9)])
    found = frontier.sparsity_at(straight, budget)
    assert found.where == "at"
    assert found.value == pytest.approx((budget + 1) / 10)
    assert frontier.kl_at(straight, sparsity).value == pytest.approx(1e-3 * 10 ** (3 * sparsity))


def test_beyond_its_ends_a_curve_says_only_so():
    short = curve((0.4, 0.5, 1e-3), (0.5, 0.9, 2e-3))
    assert frontier.sparsity_at(short, 1.0) == frontier.Reading(0.5, "above")
    assert frontier.sparsity_at(short, 0.1) == frontier.Reading(0.4, "below")
    assert frontier.kl_at(short, 0.7) == frontier.Reading(2e-3, "above")
    assert frontier.kl_at(short, 0.1) == frontier.Reading(1e-3, "below")


def test_the_first_crossing_counts():
    wavy = curve((0.2, 0.0, 1e-4), (0.4, 2.0, 1e-3), (0.6, 0.5, 2e-3), (0.8, 3.0, 1e-2))
    assert frontier.sparsity_at(wavy, 1.0).value == pytest.approx(0.3)


def row(setting, window, density, dense, sparse, kl, family="sub8", **more):
    where = {"model": "m", "dtype": "float32", "text": "t", "tokens": 64, "calibration": None}
    return where | more | {
        "setting": setting, "family": family, "window": window, "density": density,
        "perplexity_dense": dense, "perplexity_sparse": sparse, "kl": kl,
    }  # fmt: skip


ROWS = [
    row("dense", 0, 1.0, 10, 10, 0.0, "dense"),
    *[row("sub8@0.9", n, 0.5, p, p * 1.02, 0.01) for n, p in enumerate((5.0, 50.0, 500.0))],
    *[row("sub8@0.95", n, 0.7, p, p * c, 0.002) for n, (p, c) in enumerate([(5, 1.0), (9, 1.01)])],
    *[row("sub8@0.8", n, 0.2, p, p * 1.1, 0.04) for n, p in enumerate((5.0, 50.0))],
]


def test_points_are_paired():
    (points,) = frontier.groups(ROWS).values()
    found = {p.setting: p for p in points}
    # windows differ by orders of magnitude; what sparsity costs is the same in each
    assert found["sub8@0.9"].change == pytest.approx(2.0)
    assert found["sub8@0.9"].error == pytest.approx(0, abs=1e-9)
    assert found["sub8@0.95"].change == pytest.approx(0.5, abs=0.01)
    assert found["sub8@0.95"].error == pytest.approx(0.5, rel=0.02)
    assert found["dense"].error is None
    assert found["sub8@0.9"].windows == 3
    families = frontier.families(points)
    assert [p.setting for p in families["sub8"]] == ["sub8@0.95", "sub8@0.9", "sub8@0.8"]
    assert "dense" not in families


def test_tunings_on_other_windows_are_other_curves():
    rows = [row("max_error=0.1", 0, 0.5, 5, 6, 0.1, "max_error", calibration=c) for c in "ab"]
    (points,) = frontier.groups(rows).values()
    assert {p.family for p in points} == {"max_error (a)", "max_error (b)"}


def test_the_readme_table_and_the_pictures(tmp_path, capsys):
    about = {"device": "D", "date": "2026-01-01T00:00", "command": "c", "versions": {"torch": "2"}}
    document = about | {"rows": ROWS, "notes": ["a [note]"]}
    table = tables.quality(document)
    assert "| m, t, 64 | 0.37 (0.025) |" in table
    quality_show.show(document)
    out = capsys.readouterr().out
    assert "+2.00 %" in out
    assert "0.367" in out
    assert "a [note]" in out
    quality_show.draw(document, tmp_path / "new" / "q.png")
    assert (tmp_path / "new" / "q.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(CommandError, match="nothing was measured"):
        quality_show.draw(document | {"rows": []}, tmp_path / "q.png")


def test_a_ledger_is_taken_up_again(tmp_path):
    first = ledger.Ledger("quality", ("text", "window"), tmp_path, None)
    first.add(ROWS[0])
    again = ledger.Ledger("quality", ("text", "window"), tmp_path, None)
    assert again.has(ROWS[0])
    assert not again.has(ROWS[0] | {"window": 1})
    again.add(ROWS[0] | {"window": 1})
    assert json.loads((tmp_path / "quality.json").read_text())["rows"] == again.rows
    assert len(again.rows) == 2


def test_a_ledger_of_another_device(tmp_path):
    path = tmp_path / "quality.json"
    path.write_text(json.dumps({"rows": [], "device": "another"}))
    with pytest.raises(CommandError, match="measured on another"):
        ledger.Ledger("quality", ("text",), tmp_path, None)
    path.write_text("{")
    with pytest.raises(CommandError, match="cannot be continued"):
        ledger.Ledger("quality", ("text",), tmp_path, None)


def test_time_runs_out():
    assert ledger.Ledger("quality", (), None, 0).over()
    assert not ledger.Ledger("quality", (), None, None).over()
