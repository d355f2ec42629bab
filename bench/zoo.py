"""Which models does the coverage matrix run? Tiny random ones of every family, built for a cell.

Real classes of transformers, torch, diffusers and timm with few and narrow layers: heads of 32
channels, two layers, float32. Weights are drawn anew with a spread of 1/√fan_in, so that attention
is neither flat nor one-hot. An entry whose package is missing says so and is skipped.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, HEADS, LAYERS, VOCABULARY = 128, 4, 2, 64
MOST = 4224  # positions that a model knows: the longest cell and what it decodes
WINDOW = 256  # keys of a sliding-window layer
Inputs = dict[str, Any]


class Missing(Exception):
    """A package that an entry needs is not there, or does not load."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One way of running a model.

    Attributes:
        length: Tokens, those of padding included.
        batch: Sequences; with `right` or `left` they are of different lengths.
        mask: `none`, `ones`, `right` or `left`: what is given as attention mask.
        cache: Fill a key-value cache, then decode one token.
        grad: Ask for gradients.
    """

    length: int
    batch: int = 1
    mask: str = "none"
    cache: bool = False
    grad: bool = False

    def padding(self) -> Tensor | None:
        """The attention mask `[batch, length]`, 1 for a token."""
        if self.mask == "none":
            return None
        lengths = torch.tensor([max(1, self.length * (3 - n) // 3) for n in range(self.batch)])
        if self.mask == "ones":
            lengths = torch.full((self.batch,), self.length)
        right = (torch.arange(self.length) < lengths[:, None]).long()
        return right.flip(1) if self.mask == "left" else right

    def tokens(self) -> Tensor:
        """Random tokens `[batch, length]`."""
        return torch.randint(2, VOCABULARY, (self.batch, self.length))

    def masked(self, name: str = "attention_mask") -> Inputs:
        """The mask as an argument, if there is one."""
        padding = self.padding()
        return {} if padding is None else {name: padding}


@dataclass(frozen=True, slots=True)
class Entry:
    """A model of the matrix.

    Attributes:
        build: The module and its inputs for a cell.
        sites: Attention calls of one forward pass.
        knobs: What its cells vary beside batch and gradients: `mask`, `cache`.
    """

    build: Callable[[Cell], tuple[nn.Module, Inputs]]
    sites: int
    knobs: frozenset[str]


def drawn(module: nn.Module) -> nn.Module:
    """The module in evaluation with its matrices drawn anew."""
    with torch.no_grad():
        for weight in module.parameters():
            if weight.dim() > 1:
                weight.normal_(0, weight[0].numel() ** -0.5)
    return module.eval()


def transformers() -> Any:
    """The package, or why there is none.

    Raises:
        Missing: It is not installed, or does not load.
    """
    try:
        import transformers
    except (ImportError, RuntimeError) as error:
        raise Missing(f"transformers: {error}") from error
    return transformers


def hugging_face(name: str, model: str, attention: str = "sdpa", **changes: Any) -> nn.Module:
    """A model of transformers by its configuration's and its own class."""
    package = transformers()
    config = getattr(package, name)(**changes, attn_implementation=attention)
    return drawn(getattr(package, model)(config))


def text(
    family: str, attention: str = "sdpa", model: str = "Model", **changes: Any
) -> Callable[[Cell], tuple[nn.Module, Inputs]]:
    """Builder of a model that reads tokens, decoder or encoder."""
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "max_position_embeddings": MOST,
        "pad_token_id": 0,
    }

    def build(cell: Cell) -> tuple[nn.Module, Inputs]:
        module = hugging_face(f"{family}Config", f"{family}{model}", attention, **sizes | changes)
        caching = {"use_cache": True} if cell.cache else {}
        return module, {"input_ids": cell.tokens()} | cell.masked() | caching

    return build


def pixels(
    family: str, square: bool = False, **changes: Any
) -> Callable[[Cell], tuple[nn.Module, Inputs]]:
    """Builder of a vision transformer: a strip or a square of patches, and a class token."""

    def build(cell: Cell) -> tuple[nn.Module, Inputs]:
        patches = max(1, cell.length - 1)
        side = math.isqrt(patches)
        size = (2 * side, 2 * side) if square else (2, 2 * patches)
        module = hugging_face(
            f"{family}Config", f"{family}Model", image_size=size[0] if square else size,
            patch_size=2, hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
            **changes,
        )  # fmt: skip
        return module, {"pixel_values": torch.randn(cell.batch, 3, *size)}

    return build


def clip(cell: Cell) -> tuple[nn.Module, Inputs]:
    """Text of the cell's length beside an image of about as many patches."""
    side = max(1, math.isqrt(cell.length - 1))
    tower = {
        "hidden_size": WIDTH, "intermediate_size": WIDTH, "projection_dim": 32,
        "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
    }  # fmt: skip
    words = {"vocab_size": VOCABULARY, "max_position_embeddings": MOST, "eos_token_id": 1}
    module = hugging_face(
        "CLIPConfig", "CLIPModel", text_config=tower | words,
        vision_config=tower | {"image_size": 2 * side, "patch_size": 2}, projection_dim=32,
    )  # fmt: skip
    image = torch.randn(cell.batch, 3, 2 * side, 2 * side)
    return module, {"input_ids": cell.tokens(), "pixel_values": image} | cell.masked()


def whisper(cell: Cell) -> tuple[nn.Module, Inputs]:
    """A recording of twice the cell's length, which the encoder halves, and as many tokens."""
    module = hugging_face(
        "WhisperConfig", "WhisperModel", vocab_size=VOCABULARY, d_model=WIDTH, num_mel_bins=8,
        encoder_layers=LAYERS, decoder_layers=LAYERS, encoder_attention_heads=HEADS,
        decoder_attention_heads=HEADS, encoder_ffn_dim=WIDTH, decoder_ffn_dim=WIDTH,
        max_source_positions=cell.length, max_target_positions=MOST, pad_token_id=0,
        bos_token_id=1, eos_token_id=1, decoder_start_token_id=1,
    )  # fmt: skip
    features = torch.randn(cell.batch, 8, 2 * cell.length)
    decoder = cell.masked("decoder_attention_mask") | {"use_cache": cell.cache}
    return module, {"input_features": features, "decoder_input_ids": cell.tokens()} | decoder


def t5(cell: Cell) -> tuple[nn.Module, Inputs]:
    """As many tokens into the encoder as into the decoder."""
    module = hugging_face(
        "T5Config", "T5Model", vocab_size=VOCABULARY, d_model=WIDTH, d_kv=WIDTH // HEADS,
        d_ff=WIDTH, num_layers=LAYERS, num_decoder_layers=LAYERS, num_heads=HEADS,
    )  # fmt: skip
    inputs = {"input_ids": cell.tokens(), "decoder_input_ids": cell.tokens()}
    return module, inputs | cell.masked() | {"use_cache": cell.cache}


def timm(cell: Cell) -> tuple[nn.Module, Inputs]:
    """A strip of patches and a class token."""
    try:
        from timm.models.vision_transformer import VisionTransformer
    except (ImportError, RuntimeError) as error:
        raise Missing(f"timm: {error}") from error
    size = (2, 2 * max(1, cell.length - 1))
    module = VisionTransformer(
        size, 2, num_classes=0, embed_dim=WIDTH, depth=LAYERS, num_heads=HEADS
    )
    return drawn(module), {"x": torch.randn(cell.batch, 3, *size)}


def encoder(cell: Cell) -> tuple[nn.Module, Inputs]:
    """`nn.TransformerEncoder`, whose layers are one opaque call in evaluation."""
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, WIDTH, dropout=0.0, batch_first=True)
    module = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
    padding = cell.padding()
    masked = {} if padding is None else {"src_key_padding_mask": padding == 0}
    return drawn(module), {"src": torch.randn(cell.batch, cell.length, WIDTH)} | masked


def multihead(cell: Cell) -> tuple[nn.Module, Inputs]:
    """`nn.MultiheadAttention` on itself."""
    x = torch.randn(cell.batch, cell.length, WIDTH)
    padding = cell.padding()
    masked = {} if padding is None else {"key_padding_mask": padding == 0}
    module = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
    return drawn(module), {"query": x, "key": x, "value": x, "need_weights": False} | masked


class ByHand(nn.Module):
    """Causal attention over grouped heads as somebody might write it, mask included."""

    def __init__(self) -> None:
        """Draw the projections."""
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 2 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend over `x` `[B, L, WIDTH]`; `mask` `[B, L]` is True for tokens."""
        dim = WIDTH // HEADS
        q, k, v = self.qkv(x).split((WIDTH, WIDTH // 2, WIDTH // 2), -1)
        q, k, v = (t.unflatten(-1, (-1, dim)).transpose(1, 2) for t in (q, k, v))
        seen = None if mask is None else mask[:, None, None, :] & causal(x.shape[1])
        o = F.scaled_dot_product_attention(q, k, v, seen, is_causal=mask is None, enable_gqa=True)
        out: Tensor = x + self.out(o.transpose(1, 2).flatten(2))
        return out


def causal(length: int) -> Tensor:
    """Bool `[length, length]`: keys no later than the query."""
    return torch.ones(length, length, dtype=torch.bool).tril()


def by_hand(cell: Cell) -> tuple[nn.Module, Inputs]:
    """A hand-written module."""
    padding = cell.padding()
    masked = {} if padding is None else {"mask": padding == 1}
    return drawn(ByHand()), {"x": torch.randn(cell.batch, cell.length, WIDTH)} | masked


GROUPED: Inputs = {"num_key_value_heads": 2, "head_dim": WIDTH // HEADS}
MIXED: Inputs = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": WINDOW}
DECODER, ENCODER, PLAIN = frozenset({"mask", "cache"}), frozenset({"mask"}), frozenset[str]()
ENTRIES: Mapping[str, Entry] = {
    "Llama": Entry(text("Llama", **GROUPED), 2, DECODER),
    "Llama, eager": Entry(text("Llama", "eager", **GROUPED), 2, DECODER),
    "Mistral": Entry(text("Mistral", sliding_window=WINDOW, **GROUPED), 2, DECODER),
    "Mixtral": Entry(text("Mixtral", num_local_experts=2, **GROUPED), 2, DECODER),
    "Qwen2": Entry(text("Qwen2", num_key_value_heads=2), 2, DECODER),
    "Qwen3": Entry(text("Qwen3", **GROUPED), 2, DECODER),
    "Gemma-3": Entry(text("Gemma3Text", **GROUPED, **MIXED), 2, DECODER),
    "Phi-3": Entry(text("Phi3", num_key_value_heads=2), 2, DECODER),
    "GPT-2": Entry(text("GPT2"), 2, DECODER),
    "GPT-2, eager": Entry(text("GPT2", "eager"), 2, DECODER),
    "GPT-NeoX": Entry(text("GPTNeoX"), 2, DECODER),
    "BERT": Entry(text("Bert"), 2, ENCODER),
    "BERT, eager": Entry(text("Bert", "eager"), 2, ENCODER),
    "RoBERTa": Entry(text("Roberta", max_position_embeddings=MOST + 2), 2, ENCODER),
    "T5": Entry(t5, 6, DECODER),
    "Whisper": Entry(whisper, 6, DECODER),
    "ViT": Entry(pixels("ViT", intermediate_size=WIDTH), 2, PLAIN),
    "DINOv2": Entry(pixels("Dinov2", square=True), 2, PLAIN),
    "CLIP": Entry(clip, 4, ENCODER),
    "timm ViT": Entry(timm, 2, PLAIN),
    "nn.TransformerEncoder": Entry(encoder, 2, ENCODER),
    "nn.MultiheadAttention": Entry(multihead, 1, ENCODER),
    "by hand": Entry(by_hand, 1, ENCODER),
}
