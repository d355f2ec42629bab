"""Do documents hold what they are asked for, several times over?"""

import pytest
import torch

from afbs_compile import hybrid_calibration, quiz
from afbs_compile.commands.errors import CommandError
from afbs_compile.hybrid_calibration import PREDICTIONS, parts, samples
from afbs_compile.quiz import QUIZZES

LENGTH = 1500


class Model:
    """A token a character; the filler has characters that no question has."""

    device = torch.device("cpu")

    def tokens(self, text):
        return torch.tensor([ord(letter) for letter in text])


def filler(seed=0):
    return torch.randint(1000, 2000, (LENGTH,), generator=torch.Generator().manual_seed(seed))


def made(task, most=600, depth=0.5, seed=3, length=LENGTH):
    return quiz.quiz(task, Model().tokens, filler()[:length], depth, seed, most)


@pytest.mark.parametrize("task", QUIZZES)
def test_every_answer_stands_in_the_document_before(task):
    found, again, other = made(task), made(task), made(task, seed=4)
    assert len(found.ids) == LENGTH
    assert torch.equal(found.ids, again.ids)
    assert not torch.equal(found.ids, other.ids)
    count = int(found.questions[-1]) + 1
    assert 1 < count <= quiz.QUESTIONS
    ids = found.ids.tolist()
    first = int(found.places[0])
    for n in range(count):
        places = found.places[found.questions == n]
        assert torch.equal(places, torch.arange(int(places[0]), int(places[-1]) + 1))
        answer = found.ids[places].tolist()
        told = [k for k in range(first) if ids[k : k + len(answer)] == answer]
        assert told
    assert int(found.places[-1]) == LENGTH - 1
    assert (found.places.diff() > 0).all()


@pytest.mark.parametrize("task", QUIZZES)
def test_questions_take_no_more_than_they_may(task):
    tail = [LENGTH - int(made(task, most).places[0]) for most in (1, 200, 375)]
    assert tail[0] < tail[1] <= 200 < tail[2] <= 375
    assert int(made(task, 1).questions.max()) == 0  # one at least
    quarter = made(task, 1000)
    assert LENGTH - int(quarter.places[0]) <= LENGTH // 4


def test_facts_stand_at_even_distances():
    ids = made("needle", 375).ids.tolist()
    said = Model().tokens("The secret number of").tolist()
    places = [n for n in range(LENGTH) if ids[n : n + len(said)] == said]
    gaps = torch.tensor(places).diff()
    assert len(places) > 2
    assert gaps.max() - gaps.min() < 30


def test_what_all_questions_share_stands_once_at_its_depth():
    begin, end = (made("key_value", 375, depth).ids.tolist() for depth in (0.0, 1.0))
    assert begin.count(ord("}")) == end.count(ord("}")) == 1
    assert begin.index(ord("}")) < end.index(ord("}"))


def test_no_room():
    with pytest.raises(CommandError, match="needle does not fit into 60 tokens"):
        made("needle", length=60)
    with pytest.raises(ValueError, match="no task riddle; there are needle"):
        samples(Model(), [filler()], ["riddle"], 64, 0)


@pytest.mark.parametrize(
    ("documents", "tokens", "calls"),
    [(12, 2048, 2), (9, 4096, 3), (1, 100_000, 1), (7, 2048, 7), (4, 512, 1), (2, 20_000, 2)],
)
def test_calls_hold_equally_many_documents(documents, tokens, calls):
    found = parts(range(documents), tokens)
    assert [one for part in found for one in part] == list(range(documents))
    assert len(found) == calls
    assert len({len(part) for part in found}) == 1


def test_calls_ask_for_the_answers(monkeypatch):
    monkeypatch.setattr(hybrid_calibration, "TOGETHER", 2 * LENGTH)
    windows = [filler(seed) for seed in range(4)]
    found = samples(Model(), windows, ["text", "people"], 64, 0)
    assert [one.task for one in found] == ["text"] * 2 + ["people"] * 2
    for one in found:
        ids, keep = one.inputs["input_ids"], one.inputs["logits_to_keep"]
        assert ids.shape == (2, LENGTH)
        assert keep.shape == (PREDICTIONS,)
        after = ids[:, keep + 1].flatten()  # what each prediction that is made should be
        assert torch.equal(after[one.counted], one.targets)
        assert torch.equal(one.answers.unique(), torch.arange(int(one.answers.max()) + 1))
    assert len(found[0].targets) == 2 * PREDICTIONS
    letters = "".join(map(chr, found[2].targets[found[2].answers == 0].tolist()))
    assert " from " in letters
    assert letters.endswith(".")


def test_short_documents_are_asked_for_what_they_have():
    (one,) = samples(Model(), [filler()[:100]], ["text"], 16, 0)
    assert one.inputs["logits_to_keep"].shape == (99,)
    assert int(one.inputs["logits_to_keep"].min()) >= 16
