"""What the examples share: a small language model, documents of many lengths, and options."""

import argparse

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from afbs_compile.training.profile import profiled
from afbs_compile.training.sampler import SparsityAwareBatchSampler
from afbs_compile.tuner.step_cost import CostModel
from afbs_compile.tuner.workload import visible_blocks

LAYERS, HEADS, DIM, VOCABULARY = 3, 2, 64, 64
PADDING = 0  # a token that no document has


class Block(nn.Module):
    """Causal attention and a multi-layer perceptron."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.between = nn.RMSNorm(DIM), nn.RMSNorm(DIM)
        self.qkv, self.out = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
        self.mlp = nn.Sequential(nn.Linear(DIM, 4 * DIM), nn.SiLU(), nn.Linear(4 * DIM, DIM))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            t.unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for t in self.qkv(self.before(x)).chunk(3, -1)
        )
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(o.transpose(1, 2).flatten(2))
        return x + self.mlp(self.between(x))


class Model(nn.Module):
    """Predicts the next token; forward gives the mean loss of documents [B, length]."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, DIM)
        self.layers = nn.ModuleList([Block() for _ in range(LAYERS)])
        self.head = nn.Linear(DIM, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens[:, :-1])
        for layer in self.layers:
            x = layer(x)
        return F.cross_entropy(
            self.head(x).flatten(0, 1), tokens[:, 1:].flatten(), ignore_index=PADDING
        )


class Documents(Dataset[Tensor]):
    """Sequences that repeat a phrase of their own, most short and some long."""

    def __init__(self, count: int) -> None:
        rng = np.random.default_rng(0)
        self.lengths = np.clip(rng.lognormal(5.0, 1.0, count), 32, 1024).astype(int)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Tensor:
        rng = np.random.default_rng([1, index])
        phrase = rng.integers(1, VOCABULARY, 16)
        return torch.from_numpy(np.resize(phrase, self.lengths[index]))


def together(documents: list[Tensor]) -> Tensor:
    """Documents as one batch [B, longest]; the last step of an epoch may have two in a batch.

    One forward pass each micro-batch, whatever it holds: under FSDP ranks need to make as many.
    """
    return pad_sequence(documents, batch_first=True, padding_value=PADDING)


def arguments() -> argparse.Namespace:
    """What an example was asked."""
    return options().parse_args()


def options() -> argparse.ArgumentParser:
    """The options of every example."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--samples", type=int, default=96)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--micro-batches", type=int, default=4)
    return parser


def made(device: torch.device) -> Model:
    """A model with the same weights on every rank."""
    torch.manual_seed(0)
    return Model().to(device)


def sampler_of(
    data: Documents, micro_batches: int, cost: CostModel, sync: str
) -> SparsityAwareBatchSampler:
    """Balanced batches of single documents: nothing is padded."""
    return SparsityAwareBatchSampler(
        data.lengths, 1, micro_batches, sync=sync, layers=LAYERS, cost=cost
    )


def measured(model: nn.Module, device: torch.device) -> CostModel:
    """What documents cost here; every block is kept."""

    def step(tokens: int, _: float) -> None:
        model(torch.ones(1, tokens, dtype=torch.long, device=device)).backward()
        model.zero_grad()

    cases = [(tokens, 1.0) for tokens in (32, 64, 128, 256, 512, 1024)]
    return profiled(step, cases, lambda n: LAYERS * float(visible_blocks(n)), device)
