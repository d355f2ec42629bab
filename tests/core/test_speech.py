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


def test_log_level_comes_from_the_environment(monkeypatch):
    logger = logging.Logger("afbs_compile")
    monkeypatch.setattr(logs, "LOGGER", logger)
    logs.configure()
    assert not logger.handlers
    monkeypatch.setenv("AFBS_LOG", "info")
    logs.configure()
    logs.configure()
    assert logger.level == logging.INFO
    assert len(logger.handlers) == 1


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
