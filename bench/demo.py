"""The demo's figures as a committed result. `python bench/demo.py [--tokens N]`."""

import argparse
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch

from afbs_compile.bench.harness import document, write
from afbs_compile.demo.run import Setup, demo
from afbs_compile.options import parse


def main() -> None:
    """Tune in an empty cache, measure, store."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=4096)
    tokens = parser.parse_args().tokens
    models = parse().cache_folder / "models"
    models.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as empty:
        (Path(empty) / "models").symlink_to(models)
        result, _ = demo(Setup(None, None, tokens, {"cache_dir": empty}))
    row = asdict(result) | {"model": "SmolLM2-135M", "tokens": tokens, "policy_path": None}
    name = "demo_gpu" if torch.cuda.is_available() else "demo_cpu"
    print(write(document(name, [row])))


if __name__ == "__main__":
    main()
