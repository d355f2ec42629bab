"""What is made hybrid and trained on? A small Llama over bytes, and text that comes again.

A model of this size that reads plain text hardly looks further than a window, so no window would
cost it anything. Therefore the last quarter of every document repeats a passage of its first
half: who predicts it has to look back further than any window.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from afbs_compile.commands.errors import CommandError
from afbs_compile.demo.model import LanguageModel

BYTES = 256  # the vocabulary
SMALL: dict[str, Any] = {
    "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 32,
}  # fmt: skip
TINY = SMALL | {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
SIZES = {"small": SMALL, "tiny": TINY}


def tokenizer(text: str, **_: Any) -> dict[str, list[int]]:
    """The text's bytes, as a tokenizer gives tokens."""
    return {"input_ids": list(text.encode())}


def scratch(name: str) -> LanguageModel:
    """A Llama over bytes with random weights, those of seed 0.

    Raises:
        CommandError: There is no such size, or transformers is missing.
    """
    if name not in SIZES:
        raise CommandError(f"no model {name!r}; there are {', '.join(SIZES)}")
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError as error:
        raise CommandError('run `pip install "afbs-compile[demo]"` for transformers') from error
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = LlamaConfig(vocab_size=BYTES, tie_word_embeddings=True, **SIZES[name])
    module: nn.Module = LlamaForCausalLM(config)
    return LanguageModel(f"Llama over bytes, {name}", module.to(device), tokenizer)


@dataclass(frozen=True, slots=True)
class Documents:
    """Documents int64 [n, L] that share no text.

    Attributes:
        trained: Read by every kind of training.
        searched: Read by the search for heads.
        held_out: Read by nobody but the judge.
    """

    trained: Tensor
    searched: Tensor
    held_out: Tensor


def documents(tokens: Tensor, length: int, searched: int, held_out: int) -> Documents:
    """Documents of a text: held-out ones from its beginning, those of the search from its end.

    Args:
        tokens: The text int64 [n].
        length: Of a document, a multiple of 4.
        searched: How many.
        held_out: How many.

    Raises:
        CommandError: The text is too short.
    """
    count = tokens.numel() // length
    if length % 4 or count < 2 * (searched + held_out):
        raise CommandError(
            f"the text has {count} documents of {length} tokens; needed: a multiple of 4 tokens, "
            f"and {2 * (searched + held_out)} documents: give more --text or fewer --tokens"
        )
    every = recurring(tokens[: count * length].view(count, length))
    return Documents(every[held_out : count - searched], every[count - searched :],
                     every[:held_out])  # fmt: skip


def recurring(windows: Tensor) -> Tensor:
    """Windows [n, L] whose last quarter repeats a passage that begins in their first half."""
    length = windows.shape[1]
    quarter = length // 4
    chance = torch.Generator().manual_seed(0)
    start = torch.randint(0, 2 * quarter, (len(windows), 1), generator=chance)
    found = windows.clone()
    found[:, 3 * quarter :] = windows.gather(1, start + torch.arange(quarter))
    return found


def losses(model: nn.Module, ids: Tensor) -> Tensor:
    """Nats of every prediction [B, L − 1] of documents [B, L]."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.float().transpose(1, 2), ids[:, 1:], reduction="none")
