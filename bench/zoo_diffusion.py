"""Which diffusion transformers does the coverage matrix run? Tiny random ones of diffusers.

The cell's length is that of the attended sequence, text included where image and text attend
jointly; image shapes are strips, or squares where a model knows no others.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from afbs_compile.bench.zoo import (
    HEADS,
    LAYERS,
    PLAIN,
    WIDTH,
    Cell,
    Entry,
    Inputs,
    Missing,
    drawn,
)

CHANNELS, TEXT = 4, 32  # of a latent; of a text embedding
WORDS = 8


def diffusers(name: str, **changes: Any) -> nn.Module:
    """A model of diffusers by its class.

    Raises:
        Missing: The package is not installed, or does not load.
    """
    try:
        import diffusers as package

        make = getattr(package, name)
    except (ImportError, RuntimeError, AttributeError) as error:
        raise Missing(f"diffusers: {error}") from error
    sizes = {"num_attention_heads": HEADS, "attention_head_dim": WIDTH // HEADS}
    return drawn(make(**sizes | changes))


def words(cell: Cell, count: int = WORDS) -> Tensor:
    """Embeddings of a prompt `[batch, count, TEXT]`."""
    return torch.randn(cell.batch, count, TEXT)


def step(cell: Cell) -> Tensor:
    """Time of the denoising process `[batch]`."""
    return torch.full((cell.batch,), 500.0)


def flux(cell: Cell) -> tuple[nn.Module, Inputs]:
    """One layer with streams for image and text, one with a single stream."""
    module = diffusers(
        "FluxTransformer2DModel", in_channels=16, num_layers=1, num_single_layers=1,
        joint_attention_dim=TEXT, pooled_projection_dim=TEXT, axes_dims_rope=(8, 12, 12),
    )  # fmt: skip
    length = max(1, cell.length - WORDS)
    return module, {
        "hidden_states": torch.randn(cell.batch, length, 16),
        "encoder_hidden_states": words(cell, min(WORDS, cell.length)),
        "pooled_projections": torch.randn(cell.batch, TEXT),
        "timestep": step(cell) / 1000,
        "img_ids": torch.stack([torch.arange(length).float()] * 3, -1),
        "txt_ids": torch.zeros(min(WORDS, cell.length), 3),
        "return_dict": False,
    }


def sd3(cell: Cell) -> tuple[nn.Module, Inputs]:
    """Layers with streams for image and text, the last of which drops the text."""
    side = max(1, math.isqrt(cell.length))
    module = diffusers(
        "SD3Transformer2DModel", sample_size=side, patch_size=1, in_channels=CHANNELS,
        out_channels=CHANNELS, num_layers=LAYERS, joint_attention_dim=TEXT,
        caption_projection_dim=WIDTH, pooled_projection_dim=TEXT, pos_embed_max_size=side,
    )  # fmt: skip
    return module, {
        "hidden_states": torch.randn(cell.batch, CHANNELS, side, side),
        "encoder_hidden_states": words(cell),
        "pooled_projections": torch.randn(cell.batch, TEXT),
        "timestep": step(cell),
        "return_dict": False,
    }


def wan(cell: Cell) -> tuple[nn.Module, Inputs]:
    """Self-attention over a video and cross-attention to the text."""
    module = diffusers(
        "WanTransformer3DModel", in_channels=CHANNELS, out_channels=CHANNELS, text_dim=TEXT,
        freq_dim=32, ffn_dim=WIDTH, num_layers=LAYERS, rope_max_seq_len=8192,
    )  # fmt: skip
    return module, {
        "hidden_states": torch.randn(cell.batch, CHANNELS, 1, 2, 2 * cell.length),
        "encoder_hidden_states": words(cell),
        "timestep": step(cell).long(),
        "return_dict": False,
    }


def cogvideox(cell: Cell) -> tuple[nn.Module, Inputs]:
    """Joint attention over text and video."""
    length = max(1, cell.length - WORDS)
    module = diffusers(
        "CogVideoXTransformer3DModel", in_channels=CHANNELS, out_channels=CHANNELS,
        time_embed_dim=8, text_embed_dim=TEXT, num_layers=LAYERS, sample_width=2 * length,
        sample_height=2, sample_frames=1, max_text_seq_length=WORDS,
    )  # fmt: skip
    return module, {
        "hidden_states": torch.randn(cell.batch, 1, CHANNELS, 2, 2 * length),
        "encoder_hidden_states": words(cell),
        "timestep": step(cell).long(),
        "return_dict": False,
    }


def ltx(cell: Cell) -> tuple[nn.Module, Inputs]:
    """Self-attention over a video and masked cross-attention to the text."""
    module = diffusers(
        "LTXVideoTransformer3DModel", in_channels=CHANNELS, out_channels=CHANNELS,
        cross_attention_dim=WIDTH, num_layers=LAYERS, caption_channels=TEXT,
    )  # fmt: skip
    seen = torch.ones(cell.batch, WORDS)
    seen[-1, WORDS // 2 :] = 0
    return module, {
        "hidden_states": torch.randn(cell.batch, cell.length, CHANNELS),
        "encoder_hidden_states": words(cell),
        "timestep": step(cell),
        "encoder_attention_mask": seen,
        "num_frames": 1,
        "height": 1,
        "width": cell.length,
        "return_dict": False,
    }


ENTRIES: Mapping[str, Entry] = {
    "Flux": Entry(flux, 2, PLAIN),
    "SD3": Entry(sd3, 2, PLAIN),
    "Wan": Entry(wan, 4, PLAIN),
    "CogVideoX": Entry(cogvideox, 2, PLAIN),
    "LTX-Video": Entry(ltx, 4, PLAIN),
}
