"""What the package says: progress, log and versions."""

import io
import logging
import sys

import pytest
import torch

from afbs_compile import logs, versions
from afbs_compile.progress import Progress


def test_bar_shows_phase_site_and_count(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("COLUMNS", "200")
    with Progress(shown=True) as progress:
        progress(0, 30, "Tuning", "layers.0")
        progress(30, 30, "Tuning", "layers.29")
    assert "Tuning" in stream.getvalue()
    assert "30/30" in stream.getvalue()
    assert "layers.29" in stream.getvalue()


def test_without_a_terminal_one_log_line_a_phase(capfd, caplog):
    caplog.set_level(logging.INFO, "afbs_compile")
    with Progress() as progress:
        for phase in ("Calibrating", "Tuning"):
            for done in range(3):
                progress(done, 3, phase)
    assert [record.message for record in caplog.records] == ["Calibrating", "Tuning"]
    assert capfd.readouterr() == ("", "")


@pytest.fixture
def restored_levels():
    """Levels and handlers of our loggers are put back."""
    loggers = [logging.getLogger(f"afbs_compile{name}") for name in ("", ".passes", ".cache")]
    before = [(one, one.level, list(one.handlers)) for one in loggers]
    yield
    for one, level, handlers in before:
        one.setLevel(level)
        one.handlers[:] = handlers


@pytest.mark.usefixtures("restored_levels")
def test_log_levels_come_from_the_environment(monkeypatch):
    logs.LOGGER.handlers.clear()
    logs.configure()
    assert not logs.LOGGER.handlers
    monkeypatch.setenv("AFBS_LOG", "info,+passes,-cache")
    logs.configure()
    logs.configure()
    assert logs.LOGGER.level == logging.INFO
    assert len(logs.LOGGER.handlers) == 1
    plan = logging.getLogger("afbs_compile.passes.plan")
    assert plan.getEffectiveLevel() == logging.DEBUG
    assert logging.getLogger("afbs_compile.cache").getEffectiveLevel() == logging.ERROR
    assert logging.getLogger("afbs_compile.runner").getEffectiveLevel() == logging.INFO


@pytest.mark.parametrize("word", ["loud", "+passses", "+", "../x", "-"])
def test_a_wrong_word_of_the_log_names_what_there_is(monkeypatch, word):
    monkeypatch.setenv("AFBS_LOG", word)
    with pytest.raises(ValueError, match=r"AFBS_LOG names .* set it to one of debug"):
        logs.configure()


def test_warning_points_at_the_caller():
    with pytest.warns(logs.AfbsWarning, match="careful") as caught:
        speak()
    assert caught[0].filename == __file__


def speak():
    logs.warn("careful")


def test_versions_name_what_runs():
    found = versions.versions()
    assert found["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert found["afbs-compile"]
    assert versions.version("no-such-distribution") is None
    assert versions.device_name(torch.device("cpu"))
    assert versions.device_name(torch.device("meta")) == "meta"
