"""Which model is this? A key from parameter names, shapes, dtypes and their full content.

A tensor's bytes are read as 32-bit words w. Every tile of 2^15 words gives two sums
S_f = Σ_j m_f[j]·w[j] mod 2^64, f = 0, 1, with fixed random odd multipliers m_f (multilinear
hashing, Lemire & Kaser 2014, "Strongly universal string hashing is fast"); SHA-256 joins the
tiles, in order, with name, shape and dtype. An odd multiplier is invertible mod 2^64, so a change
inside one word always shows; any other accidental change is missed with a chance near 2^-64.
The sums are exact on every device, so the same bytes give the same key on CPU and GPU.
This finds changed weights; it is no defence against weights forged to collide.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

TILE = 1 << 15  # words; input, temporaries and multipliers of a tile fit a 1 MB L2 cache
GPU_TILES = 128  # tiles a launch: temporaries of 32 MB
WORD_BYTES = 4
KEY_DIGITS = 32

TOKEN = re.compile(r"""\[\s*'([^']*)'\s*\]|\[\s*"([^"]*)"\s*\]|\[(-?\d+)\]|(\w+)""")
GETATTR = re.compile(r"""getattr\(((?:[^()]|\(\))*), ('[^']*'|"[^"]*")\)""")
CONTAINERS = frozenset({"_modules", "_parameters", "_buffers", "__dict__"})
Row = list[Any]


def model_key(named: Iterable[tuple[str, Tensor]], extra: str = "") -> str:
    """32 hexadecimal digits that name a model; the order of `named` does not matter.

    Args:
        named: (name, tensor) of every parameter and buffer.
        extra: Anything else that should tell models apart.

    Raises:
        TypeError: A tensor without readable bytes (meta, fake, sparse layout).
    """
    return key_of(rows_of(named), extra)


@torch.no_grad()
def rows_of(named: Iterable[tuple[str, Tensor]]) -> list[Row]:
    """Name, shape, dtype and digest of every plain tensor; raises as `model_key`."""
    plain = [part for name, tensor in named for part in strided(name, tensor)]
    headers = [[name, list(t.shape), str(t.dtype)] for name, t in plain]
    digests = [hashlib.sha256(sums).hexdigest() for sums in on_host([t for _, t in plain])]
    return [[*header, digest] for header, digest in zip(headers, digests, strict=True)]


def key_of(rows: Iterable[Row], extra: str = "") -> str:
    """The key of tensors that are described by `rows_of`."""
    text = json.dumps([extra, sorted(rows)])
    return hashlib.sha256(text.encode()).hexdigest()[:KEY_DIGITS]


def strided(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The plain tensors that hold the content of `tensor`: itself, or a wrapper's parts."""
    if isinstance(tensor, FakeTensor) or tensor.is_meta:
        raise TypeError(f"{name!r} is a fake or meta tensor without content; pass real weights")
    if flatten := getattr(tensor, "__tensor_flatten__", None):
        for part in flatten()[0]:
            yield from strided(f"{name}.{part}", getattr(tensor, part))
    elif tensor.layout is not torch.strided:
        raise TypeError(f"{name!r} has layout {tensor.layout}; make it dense (`.to_dense()`)")
    elif tensor.is_quantized:
        yield from zip((f"{name}.bits", f"{name}.scale"), quantised(tensor), strict=True)
    else:
        yield name, tensor


def quantised(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """The integers of a quantised tensor, and its scales and zero points in float64."""
    if tensor.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
        scale = torch.tensor([tensor.q_scale(), tensor.q_zero_point()], dtype=torch.float64)
        return tensor.int_repr(), scale
    scales, zeros = tensor.q_per_channel_scales(), tensor.q_per_channel_zero_points()
    return tensor.int_repr(), torch.stack([scales.double(), zeros.double()])


def on_host(tensors: list[Tensor]) -> list[bytes]:
    """The tile sums of each tensor as bytes, with one transfer for every device."""
    sums = [tile_sums(words(t)) for t in tensors]
    host: list[bytes] = [b""] * len(sums)
    for device in {s.device for s in sums}:
        at = [i for i, s in enumerate(sums) if s.device == device]
        together = torch.cat([sums[i].reshape(-1) for i in at]).cpu()
        pieces = torch.split(together, [sums[i].numel() for i in at])
        for i, piece in zip(at, pieces, strict=True):
            host[i] = piece.numpy().tobytes()
    return host


def words(tensor: Tensor) -> Tensor:
    """The content in row-major order as int32 [n], padded with zero bytes to whole words."""
    dense = tensor.detach().resolve_conj().resolve_neg().contiguous()
    octets = dense.as_strided((dense.numel(),), (1,)).view(torch.uint8)
    if padding := -octets.numel() % WORD_BYTES:
        octets = torch.nn.functional.pad(octets, (0, padding))
    if octets.storage_offset() % WORD_BYTES:
        octets = octets.clone()
    return octets.view(torch.int32)


def tile_sums(content: Tensor) -> Tensor:
    """S_f of every tile: int64 [tiles, 2] on the tensor's device, from int32 [n]."""
    multipliers = multipliers_on(content.device)
    whole = content.numel() // TILE * TILE
    at_once = torch.get_num_threads() if content.device.type == "cpu" else GPU_TILES
    chunks = torch.split(content[:whole].view(-1, TILE), at_once) if whole else ()
    sums = [weighted(chunk, multipliers) for chunk in chunks]
    rest = content[whole:]
    if rest.numel() or not sums:
        sums.append(weighted(rest[None], multipliers[:, : rest.numel()]))
    return torch.cat(sums)


def weighted(tiles: Tensor, multipliers: Tensor) -> Tensor:
    """Σ_j multipliers[f, j] · tiles[t, j] mod 2^64 as int64 [t, f]."""
    wide = tiles.long()
    first = (wide * multipliers[0]).sum(1)
    return torch.stack([first, wide.mul_(multipliers[1]).sum(1)], dim=1)


@lru_cache
def multipliers_on(device: torch.device) -> Tensor:
    """The fixed odd multipliers, int64 [2, TILE] (SplitMix64, Steele et al. 2014)."""
    z = np.arange(1, 2 * TILE + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    odd = (z ^ (z >> np.uint64(31))) | np.uint64(1)
    return torch.from_numpy(odd.view(np.int64)).view(2, TILE).to(device)


def normalise(source: str) -> str:
    """The dotted module path in a Dynamo source name, without its root.

    `L['self']._modules['layers']._modules['0']`, `L['self'].layers.0` and
    `L['m'].__dict__['_modules']['layers'].0` all give `layers.0`; a dotted path stays as it is.
    """
    while (flat := GETATTR.sub(r"\1[\2]", source)) != source:
        source = flat
    tokens = [next(filter(None, found), "") for found in TOKEN.findall(source)]
    if re.match(r"[LG]\[", source):
        tokens = tokens[2:]
    return ".".join(token for token in tokens if token not in CONTAINERS)
