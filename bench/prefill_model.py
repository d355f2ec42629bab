"""Models that read a long prompt or denoise a long video, for a benchmark: random weights."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from afbs_compile.bench import decode_model
from afbs_compile.commands.errors import CommandError

Inputs = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Subject:
    """A model with its inputs.

    Attributes:
        module: In evaluation mode.
        inputs: Makes the arguments for a length in tokens.
        causal: Whether a token sees later ones.
    """

    module: nn.Module
    inputs: Callable[[int], Inputs]
    causal: bool


def subject(name: str, layers: int | None, device: torch.device, dtype: torch.dtype) -> Subject:
    """A model by name; `layers` replaces its depth.

    Raises:
        CommandError: A package is missing.
    """
    video = {"wan-14b": (40, 13824, 4), "tiny-video": (2, 64, 1)}
    if name in video:
        heads, ffn, depth = video[name]
        return wan(heads, ffn, layers or depth, device, dtype)
    return llama(name, layers, device, dtype)


def llama(name: str, layers: int | None, device: torch.device, dtype: torch.dtype) -> Subject:
    """A Llama that returns the logits of the last token only."""
    module = decode_model.network(name, device, dtype, layers)
    vocabulary = module.config.vocab_size

    def inputs(tokens: int) -> Inputs:
        generator = torch.Generator(device).manual_seed(0)
        ids = torch.randint(vocabulary, (1, tokens), generator=generator, device=device)
        return {"input_ids": ids, "logits_to_keep": 1, "use_cache": False}

    return Subject(module, inputs, True)


def wan(heads: int, ffn: int, layers: int, device: torch.device, dtype: torch.dtype) -> Subject:
    """Blocks of a video transformer of Wan's shape: 128 a head, no mask, cross-attention to text.

    Raises:
        CommandError: diffusers is not installed.
    """
    try:
        from diffusers import WanTransformer3DModel
    except ImportError as error:
        raise CommandError(f"{error}; run `pip install diffusers`") from error
    with device:
        made: Any = WanTransformer3DModel
        module = made(
            num_attention_heads=heads, attention_head_dim=128, ffn_dim=ffn, num_layers=layers,
            text_dim=512,
        ).to(dtype)  # fmt: skip

    def inputs(tokens: int) -> Inputs:
        frames, height, width = grid(tokens)
        video = torch.randn(1, 16, frames, 2 * height, 2 * width, device=device, dtype=dtype)
        text = torch.randn(1, 512, 512, device=device, dtype=dtype)
        step: Tensor = torch.tensor([500], device=device)
        return {
            "hidden_states": video,
            "encoder_hidden_states": text,
            "timestep": step,
            "return_dict": False,
        }

    return Subject(module.eval(), inputs, False)


def grid(tokens: int) -> tuple[int, int, int]:
    """Frames, rows and columns of patches of about so many tokens, 30 × 52 a frame if they fit."""
    rows, columns = (45, 80) if tokens > 40000 else (30, 52) if tokens > 3120 else (4, 8)
    return max(1, round(tokens / (rows * columns))), rows, columns
