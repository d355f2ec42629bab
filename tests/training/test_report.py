"""What a straggler report says follows from the times that it was given."""

import io
import json
from importlib.util import find_spec

import numpy as np
import pytest
from rich.console import Console

from afbs_compile.training import report_show
from afbs_compile.training.report import Record, StragglerReport, scalars, tensorboard


class Writer:
    def __init__(self):
        self.seen = []

    def add_scalar(self, tag, value, step):
        self.seen.append((tag, value, step))


def made(writer=None):
    report = StragglerReport(writer)
    report.add(Record(0, 0, (1.0, 2.0), (0.3, 0.2), 1.5))
    report.add(Record(0, 1, (None, 4.0), (0.3, 0.2), 1.5))
    report.add(Record(0, 2, (3.0, 3.0), (0.3, 0.3), None, "no cost is known yet"))
    report.add(Record(0, 3, (None, None)))
    return report


def test_bubbles_are_shares_of_the_time_waited():
    summary = made().summary()
    assert summary["steps"] == 3
    assert summary["step_seconds"] == pytest.approx(3.0)
    assert summary["bubble"] == pytest.approx((0.25 + 0.0 + 0.0) / 3)
    first, second = summary["replicas"]
    assert first["bubble"] == pytest.approx(1 - 4 / 5)
    assert (first["steps"], second["steps"]) == (2, 3)
    assert second["bubble"] == 0.0
    assert second["slowest_in"] == 1.0
    assert summary["at_base"] == 1


def test_json_is_whole_and_readable(tmp_path):
    path = tmp_path / "stragglers.json"
    made().write(path)
    found = json.loads(path.read_text())
    assert found["summary"] == made().summary()
    assert found["records"][1]["seconds"] == [None, 4.0]
    assert [p.name for p in tmp_path.iterdir()] == ["stragglers.json"]


def test_a_writer_is_told_of_every_step():
    writer = Writer()
    made(writer)
    bubbles = [(value, step) for tag, value, step in writer.seen if tag == "balance/bubble"]
    assert bubbles == [(0.25, 1), (0.0, 2), (0.0, 3)]
    assert scalars(Record(0, 0, (None,))) == {}


def test_table_and_plot(tmp_path):
    out = io.StringIO()
    Console(width=100, file=out).print(report_show.table(made()))
    text = out.getvalue()
    assert "20.0%" in text
    assert "1 steps at base budgets" in text
    report_show.draw(made(), tmp_path / "report.svg")
    assert (tmp_path / "report.svg").read_text().startswith("<?xml")


def test_many_replicas_are_cut_with_a_word():
    report = StragglerReport()
    report.add(Record(0, 0, tuple(np.linspace(1.0, 2.0, 100).tolist())))
    table = report_show.table(report)
    assert table.row_count == report_show.SHOWN
    assert "68 faster replicas are not listed" in table.caption


def test_nothing_timed_is_said():
    assert "– " in report_show.table(StragglerReport()).caption
    with pytest.raises(ValueError, match="no step was timed"):
        report_show.draw(StragglerReport(), None)


def test_tensorboard_writes_or_says_what_is_missing(tmp_path):
    if not find_spec("tensorboard"):
        with pytest.raises(ModuleNotFoundError, match="pip install tensorboard"):
            tensorboard(tmp_path)
        return
    writer = tensorboard(tmp_path)
    made(writer)
    writer.close()
    assert list(tmp_path.iterdir())
