"""Train a hybrid model on: heads get a window, and the others learn to do without what it hides.

Run: python examples/continued_training.py [--text FILE]. A small Llama over bytes stands for your
model; with a trained one, `Policy.read` what `afbs hybridize` wrote. Backend "afbs" puts the
windows into the forward and the backward. Dense training lowers the loss as well: for what
windows cost and training gives back, beside a dense run, see `afbs bench recovery`.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import afbs_compile
from afbs_compile.demo import text

LENGTH, BATCH, WINDOW, RATIO = 128, 8, 16, 0.5


def made() -> nn.Module:
    """A small model; yours comes from a checkpoint."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def documents(path: Path | None) -> Tensor:
    """A text's bytes as documents int64 [n, LENGTH]."""
    body = text.read(path) if path else text.default()
    every = torch.tensor(list(body.encode()))
    count = len(every) // LENGTH
    return every[: count * LENGTH].view(count, LENGTH)


def hybrid(model: nn.Module, calibration: Tensor, folder: Path) -> nn.Module:
    """The model with windows on the heads that can live with them, compiled for training."""
    inputs = [{"input_ids": calibration, "use_cache": False}]
    policy = afbs_compile.hybridize(
        model, inputs, ratio=RATIO, window=WINDOW, budget=30, cache_dir=folder
    )
    path = folder / "policy.json"
    path.write_text(policy.to_json())
    options = {"policy": str(path), "min_length": LENGTH}
    return torch.compile(model, backend="afbs", options=options)


def main() -> None:
    """Train, and print the loss on documents that are not trained on."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--text", type=Path, help="default: Python's own documentation")
    parser.add_argument("--steps", type=int, default=48)
    args = parser.parse_args()
    every, model = documents(args.text), made()
    held_out, calibration, trained = every[:BATCH], every[-BATCH:], every[BATCH:-BATCH]
    with tempfile.TemporaryDirectory() as folder:
        compiled = hybrid(model, calibration, Path(folder))

        def loss_of(ids: Tensor) -> Tensor:
            return compiled(input_ids=ids, labels=ids, use_cache=False).loss

        before = loss_of(held_out).item()
        optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
        for step in range(args.steps):
            at = torch.arange(step * BATCH, (step + 1) * BATCH) % len(trained)
            loss_of(trained[at]).backward()
            optimizer.step()
            optimizer.zero_grad()
        after = loss_of(held_out).item()
    told = afbs_compile.explain()
    print(f"windows in {told.rewritten} of {len(told.sites)} layers")
    print(f"held-out loss {before:.4f} before, {after:.4f} after {args.steps} steps")


if __name__ == "__main__":
    main()
