"""Block-sparse attention that tunes itself: `torch.compile(model, backend="afbs")`."""

__version__ = "0.1.0"
