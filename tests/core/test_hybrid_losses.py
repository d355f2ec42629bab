"""How do several tasks become one loss?"""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import numpy as np
import pytest
import torch

from afbs_compile.hybrid_losses import Losses, NothingToChoose
from afbs_compile.store import Store
from afbs_compile.tuner.heads import bits

TASKS = ("text", "text", "needle")
KL = {  # nats of every call
    "0000": (0.0, 0.0, 0.0),
    "1111": (0.1, 0.3, 8.0),
    "1100": (0.01, 0.03, 0.8),
    "1000": (0.02, 0.06, 0.8),
    "0100": (0.01, 0.03, 1.6),
    "0010": (0.2, 0.6, 0.8),
    "0001": (0.0, 0.0, 4.0),
}


class Memory:
    """A store that keeps nothing."""

    def once(self, job, make):
        return {}, make()[1]


@pytest.fixture
def losses():
    def evaluate(choice):
        name = "".join("01"[int(bit)] for bit in choice)
        return torch.tensor([(kl, 0.0, 0.0) for kl in KL[name]])

    return Losses(evaluate, 4, TASKS, Memory())


def test_dense_is_0_and_everything_windowed_is_1(losses):
    dense, every, tenth = losses([bits("0000"), bits("1111"), bits("1100")])
    assert dense == pytest.approx(0.0, abs=1e-12)
    assert every == pytest.approx(1.0, rel=1e-3)
    assert tenth == pytest.approx(0.1, rel=1e-3)


def test_twice_the_cost_counts_the_same_in_every_task(losses):
    text, needle = losses([bits("1000"), bits("0100")])
    assert text == pytest.approx(needle, rel=1e-3)
    assert text == pytest.approx(0.1 * 2**0.5, rel=1e-3)


def test_what_exceeds_the_best_of_some_choices_counts_more(losses):
    text, needle = bits("1000"), bits("0100")
    assert losses.counting() == ["text", "needle"]
    np.testing.assert_allclose(losses.costs([text, needle]), [[0.2, 0.1], [0.1, 0.2]], rtol=1e-6)
    losses.compare([text, needle])
    assert losses.rivals == pytest.approx({"text": 0.1, "needle": 0.1})
    none, alike, half, worse = losses([bits("0000"), bits("1100"), bits("1000"), bits("0010")])
    assert none < 0.01
    assert 1.0 < alike < 1.5 < half < worse
    assert losses.cost(losses.figures([text])[0]) == pytest.approx(0.1 * 2**0.5, rel=1e-3)


def test_a_task_that_costs_nothing_buys_little(losses):
    """Below the floor costs are noise: a free task must not make up for any loss in another."""
    free, tenth = losses([bits("0001"), bits("1100")])
    assert 0.005 < free < tenth


def test_nothing_to_choose_says_so():
    same = Losses(lambda _: torch.zeros(3, 3), 4, TASKS, Memory())
    with pytest.raises(NothingToChoose):
        same([np.zeros(4, dtype=bool)])


def test_two_workers_share_a_batch(tmp_path):
    """Neither ends its first evaluation before the other has begun one."""
    both = Barrier(2, timeout=60)

    def work(_):
        def evaluate(choice):
            both.wait()
            return torch.full((3, 3), float(choice.sum()))

        with Store("model", {"run": "shared"}, {}, tmp_path) as store:
            losses = Losses(evaluate, 4, TASKS, store)
            found = losses.figures([bits("0111"), bits("0001")])
        return losses.measured, [float(one[0, 0]) for one in found]

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(work, range(2))) == [(1, [3.0, 1.0])] * 2
