"""How far are a model's predictions from another's? Surprise at the text, and KL per token.

Everything is computed in float64, some tokens at a time: float64 logits of a whole window with a
large vocabulary would fill a machine.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK = 256  # tokens at a time: 0.1 GB a copy with 49k words


@dataclass(frozen=True, slots=True)
class Divergence:
    """Two models on one text.

    Attributes:
        nll_dense: Mean surprise of the first at the next token, in nats.
        nll_sparse: The same of the second.
        kl: Mean of KL(first ‖ second) per token, in nats.
        agreement: Share of tokens at which both would say the same word.
    """

    nll_dense: float
    nll_sparse: float
    kl: float
    agreement: float

    @property
    def perplexity_dense(self) -> float:
        """Of the first model."""
        return math.exp(self.nll_dense)

    @property
    def perplexity_sparse(self) -> float:
        """Of the second model."""
        return math.exp(self.nll_sparse)


@torch.no_grad()
def divergence(dense: Tensor, sparse: Tensor, targets: Tensor) -> Divergence:
    """Compare logits [n, V] at n tokens whose next tokens are `targets` int64 [n].

    Raises:
        ValueError: The shapes do not fit.
    """
    count = targets.numel()
    if dense.shape != sparse.shape or len(dense) != count or not count:
        raise ValueError(f"logits {dense.shape} and {sparse.shape} for {count} next tokens")
    total = torch.zeros(4, dtype=torch.float64)
    for start in range(0, count, CHUNK):
        part = slice(start, start + CHUNK)
        total += sums(dense[part], sparse[part], targets[part]).cpu()
    return Divergence(*(total / count).tolist())


def sums(dense: Tensor, sparse: Tensor, targets: Tensor) -> Tensor:
    """Summed surprise of both, KL and agreement over some tokens: float64 [4]."""
    p, q = dense.double().log_softmax(-1), sparse.double().log_softmax(-1)
    at = targets.to(p.device)[:, None]
    # where p is 0, so is its term; 0 times an infinite difference would be no number
    kl = torch.where(p == -math.inf, 0.0, p.exp() * (p - q)).sum()
    same = (p.argmax(-1) == q.argmax(-1)).sum()
    return torch.stack([-p.gather(1, at).sum(), -q.gather(1, at).sum(), kl, same.double()])
