"""Sparse attention in a diffusers pipeline, without `torch.compile`: `enable(pipe)`.

diffusers' own list of attention backends is closed, and chosen for the whole process; so this
takes SDPA's calls of the pipeline's denoisers (`afbs_compile.sparse`), whether they come through
its dispatcher or from a processor of their own. Text encoders and the VAE are left alone.
"""

from contextlib import ExitStack
from typing import Any

from diffusers import DiffusionPipeline, ModelMixin
from diffusers.models import attention_dispatch
from torch import nn

from afbs_compile.intercept import Sparse, sparse
from afbs_compile.logs import warn

DENOISERS = ("transformer", "transformer_2", "unet", "controlnet")
OURS = ("native", "_native_cudnn", "_native_efficient", "_native_flash", "_native_math")


def enable(pipe: DiffusionPipeline | ModelMixin, **options: Any) -> ExitStack:
    """Run the denoisers of a pipeline, or one model, sparse.

    The second call at a size tunes at the latest; to tune on several steps, call
    `afbs_compile.tune(pipe.transformer, inputs)` before.

    Args:
        pipe: A pipeline, or one of its models.
        **options: As in `torch.compile(options=…)`.

    Returns:
        A context manager; without `with` it holds until its `close()`.

    Raises:
        ValueError: A wrong option, or a pipeline without a denoiser.
    """
    models = denoisers(pipe)
    if not models:
        raise ValueError(
            f"{type(pipe).__name__} has none of {', '.join(DENOISERS)}; give the model itself"
        )
    running = ExitStack()
    for name, model in models.items():
        if (other := backend_of(model)) is not None:
            warn(
                f"{name} uses diffusers' attention backend {other!r}, whose calls are not seen; "
                "call its reset_attention_backend(), and unset DIFFUSERS_ATTN_BACKEND"
            )
        watched: Sparse = sparse(model, **options)
        running.enter_context(watched)
    return running


def denoisers(pipe: Any) -> dict[str, nn.Module]:
    """The models of a pipeline that attend over an image or video."""
    if isinstance(pipe, nn.Module):
        return {type(pipe).__name__: pipe}
    found = {name: getattr(pipe, name, None) for name in DENOISERS}
    return {name: model for name, model in found.items() if isinstance(model, nn.Module)}


def backend_of(model: nn.Module) -> str | None:
    """The attention backend of a model if it is another than SDPA's."""
    registry: Any = attention_dispatch._AttentionBackendRegistry
    active = registry.get_active_backend()[0]
    own = (getattr(m, "processor", None) for m in model.modules())
    for chosen in [*(getattr(p, "_attention_backend", None) for p in own), active]:
        name = getattr(chosen, "value", chosen)
        if name is not None and name not in OURS:
            return str(name)
    return None
