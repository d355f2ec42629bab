"""Do the benchmarks of quality run a model as the backend does, and count what it visits?"""

import json
from argparse import Namespace

import pytest
import torch

from afbs_compile import cli, recall
from afbs_compile.bench import retrieval, settings, tuned
from afbs_compile.bench.tuned import Calibration
from afbs_compile.bench.variants import Thresholds, Variants
from afbs_compile.bench.windows import Text
from afbs_compile.commands.errors import CommandError
from afbs_compile.demo import model as models
from afbs_compile.policy import Head

LENGTH = 512  # 8 blocks of 64

pytestmark = [
    pytest.mark.usefixtures("fresh_dynamo", "uncompiled"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="the processor's path"),
]


@pytest.fixture
def model(tiny_model):
    return models.from_folder(tiny_model, torch.float32)


@pytest.fixture
def words(tmp_path):
    """A text of 12 thousand letters."""
    draw = torch.Generator().manual_seed(0)
    letters = torch.randint(97, 123, (12_000,), generator=draw).tolist()
    path = tmp_path / "words.txt"
    path.write_text(bytes(letters).decode())
    return path


def inputs(model, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return model.inputs(torch.randint(0, 256, (LENGTH,), generator=draw))


def test_every_block_kept_is_the_dense_model(model):
    runs = Variants(model.module)
    dense = runs.dense(inputs(model))
    same, density = runs.sparse(inputs(model), Thresholds("sub8", Head("dense", 1.0)))
    assert density == 1
    assert torch.allclose(dense, same, atol=1e-4)
    with torch.no_grad():
        assert torch.allclose(dense, model.module(**inputs(model)).logits[0], atol=1e-4)
    assert len(runs.sites) == 2


@pytest.mark.parametrize("selector", ["sub8", "sub4", "mean"])
def test_density_is_that_of_the_run(model, selector):
    runs = Variants(model.module)
    # tau 0 keeps what is forced: the sink, the diagonal and no neighbour
    least = Thresholds(selector, Head("sparse", 0.0, neighbours=0))
    sparse, density = runs.sparse(inputs(model), least)
    assert density == pytest.approx((1 + 7 * 2) / 36)
    wider = Thresholds(selector, Head("sparse", 0.0, neighbours=1))
    assert runs.sparse(inputs(model), wider)[1] == pytest.approx((1 + 2 + 6 * 3) / 36)
    again, _ = runs.sparse(inputs(model), least)
    assert torch.equal(sparse, again)
    # the first 64 tokens of the last layer see but their own block: nothing was left out there
    assert torch.allclose(sparse[:64], runs.dense(inputs(model))[:64], atol=1e-4)
    assert not torch.allclose(sparse, runs.dense(inputs(model)), atol=1e-4)


def test_compensation_comes_closer_at_the_same_blocks(model):
    runs = Variants(model.module)
    dense = runs.dense(inputs(model))
    least = Head("sparse", 0.0, neighbours=0)
    plain, kept = runs.sparse(inputs(model), Thresholds("sub8", least))
    tangent = Thresholds("sub8", least, compensation="tangent")
    closer, same = runs.sparse(inputs(model), tangent)
    assert kept == same
    assert (closer - dense).abs().mean() < 0.9 * (plain - dense).abs().mean()


def test_a_setting_knows_its_compensation():
    plain, tangent = settings.settings(['{"max_error": 0.1, "compensation": ["none", "tangent"]}'])
    assert [plain.compensation, tangent.compensation] == ["none", "tangent"]


def test_sites_follow_their_own_thresholds(model):
    runs = Variants(model.module)
    runs.dense(inputs(model))
    dense, least = Head("dense", 1.0), Head("sparse", 0.0, neighbours=0)
    half = Thresholds("sub8", dense, {runs.sites[0]: (least,) * 4})
    assert runs.sparse(inputs(model), half)[1] == pytest.approx((1 + 15 / 36) / 2)
    heads = Thresholds("sub8", dense, {runs.sites[1]: (least, dense, dense, dense)})
    assert runs.sparse(inputs(model), heads)[1] == pytest.approx((7 + 15 / 36) / 8)


def test_a_model_without_attention():
    class Flat(torch.nn.Module):
        def forward(self, input_ids):
            return Namespace(logits=torch.nn.functional.one_hot(input_ids, 4).float())

    with pytest.raises(ValueError, match="no attention call"):
        Variants(Flat()).sparse(
            {"input_ids": torch.zeros(1, 8, dtype=torch.int64)},
            Thresholds("sub8", Head("dense", 1.0)),
        )


def test_tuned_thresholds_ignore_the_clock_and_are_kept(model, tmp_path, monkeypatch):
    draw = torch.Generator().manual_seed(0)
    text = Text("t", torch.randint(0, 256, (3 * LENGTH,), generator=draw), 1)
    calibration = Calibration([text], 2, None, tmp_path / "policies")
    (setting,) = settings.settings(["max_error=.5"])
    found = tuned.thresholds(setting, model, calibration, LENGTH)
    assert len(found.sites) == 2
    assert any(head.mode == "sparse" for heads in found.sites.values() for head in heads)
    monkeypatch.setattr(tuned, "tune", None)
    assert tuned.thresholds(setting, model, calibration, LENGTH) == found
    assert calibration.label() == "t:2"
    # other windows, another policy
    other = tuned.kept_at(setting, model, Calibration([text], 1, None, tmp_path), LENGTH)
    assert other.name != tuned.kept_at(setting, model, calibration, LENGTH).name


def command(what, tiny_model, words, tmp_path, *more):
    return cli.main([
        "bench", what, "--model", str(tiny_model), "--name", "tiny", "--text", f"words={words}",
        "--tokens", str(LENGTH), "--windows", "2", "--output", str(tmp_path / "out"), *more,
    ])  # fmt: skip


def stored(tmp_path, name):
    return json.loads((tmp_path / "out" / f"{name}.json").read_text())


def test_quality_command_resumes(tiny_model, words, tmp_path, capsys):
    run = ["quality", tiny_model, words, tmp_path, "--settings", "dense"]
    assert command(*run) == 0
    first = stored(tmp_path, "quality_cpu")["rows"]
    assert [(r["setting"], r["window"]) for r in first] == [("dense", 0), ("dense", 1)]
    assert all(r["density"] == 1 and abs(r["kl"]) < 1e-9 for r in first)
    capsys.readouterr()
    assert command(*run, "sub8@.5", "--plot", str(tmp_path / "q.png"), "--json") == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert rows[:2] == first
    assert [(r["setting"], r["window"]) for r in rows[2:]] == [("sub8@0.5", 0), ("sub8@0.5", 1)]
    assert all(0 < r["density"] < 1 and r["kl"] > 0 for r in rows[2:])
    assert (tmp_path / "q.png").exists()
    assert "smol" not in stored(tmp_path, "quality_cpu")["command"]


def test_quality_says_what_time_left_out(tiny_model, words, tmp_path):
    more = ("--settings", "dense", "max_error=.5", "--seconds", "0")
    assert command("quality", tiny_model, words, tmp_path, *more) == 0
    found = stored(tmp_path, "quality_cpu")
    assert found["rows"] == []
    assert any("not tuned in time: max_error=0.5" in note for note in found["notes"])
    assert any("4 rows of 512 tokens" in note for note in found["notes"])


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--settings", "sub9@.9"), "no setting 'sub9@.9'"),
        (("--tokens", "0"), "--tokens is '0'"),
        (("--windows", "1,2"), "--windows has 2 numbers for 1 texts"),
        (("--windows", "22", "--settings", "max_error=.1"), "measured windows and 2 for tuning"),
        (("--calibrate-on", "moby", "--settings", "max_error=.1"), "no text moby"),
        (("--text", "words"), "has no name"),
    ],
)
def test_quality_refuses(tiny_model, words, tmp_path, capsys, more, says):
    assert command("quality", tiny_model, words, tmp_path, *more) == 1
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("task", recall.TASKS)
@pytest.mark.parametrize("depth", recall.DEPTHS)
def test_problems_hold_what_they_ask_for(model, task, depth):
    filler = torch.full((1500,), 256)  # a token that no text has
    if task == "copy":
        filler = torch.arange(1000, 2500)
    found = recall.TASKS[task](model.tokens, filler, depth, 3)
    again = recall.TASKS[task](model.tokens, filler, depth, 3)
    other = recall.TASKS[task](model.tokens, filler, depth, 4)
    assert len(found.ids) == len(filler)
    assert torch.equal(found.ids, again.ids)
    assert not torch.equal(found.ids, other.ids)
    answer, before = found.ids[-found.answer :], found.ids[: -found.answer]
    places = [n for n in range(len(before)) if torch.equal(before[n : n + len(answer)], answer)]
    assert len(places) == 1
    # the further the depth, the later it stands
    room = len(filler) * depth
    assert room - 600 <= places[0] <= room + 600


def test_problems_that_do_not_fit(model):
    with pytest.raises(CommandError, match="does not fit into 20 tokens"):
        recall.needle(model.tokens, torch.zeros(20, dtype=torch.int64), 0.5, 0)


def test_an_answer_is_right_if_greedy_decoding_writes_it(model):
    problem = recall.Problem("needle", 0.0, torch.tensor([1, 2, 3, 4]), 2)
    logits = torch.nn.functional.one_hot(torch.tensor([0, 3, 4, 0]), 8).float()
    assert retrieval.right(retrieval.asked(logits, problem), problem.ids[-2:])
    logits[2] = 0  # the last token of the answer is not the likeliest any more
    assert not retrieval.right(retrieval.asked(logits, problem), problem.ids[-2:])


def test_only_what_dense_gets_right_is_counted():
    def row(dense, sparse):
        return {"dense": dense, "sparse": sparse, "agreement": 1.0, "kl": 0.1, "density": 0.25}

    found = retrieval.summary([row(True, True), row(True, False), row(False, True)])
    assert (found["dense"], found["sparse"], found["kept"]) == (2, 2, 0.5)
    assert found["sparsity"] == 0.75
    assert retrieval.summary([row(False, False)])["kept"] is None


def test_retrieval_command(tiny_model, words, tmp_path, capsys):
    run = ["retrieval", tiny_model, words, tmp_path, "--tasks", "needle", "--windows", "1"]
    assert command(*run, "--settings", "dense") == 0
    rows = stored(tmp_path, "retrieval_cpu")["rows"]
    assert [row["depth"] for row in rows] == list(recall.DEPTHS)
    assert all(r["agreement"] == 1 and r["dense"] == r["sparse"] for r in rows)
    assert "needle" in capsys.readouterr().out
    assert command(*run, "--settings", "dense", "sub8@.5") == 0
    more = stored(tmp_path, "retrieval_cpu")["rows"]
    assert more[:5] == rows
    assert [r["setting"] for r in more[5:]] == ["sub8@0.5"] * 5
    assert command(*run, "--tasks", "dance") == 1
