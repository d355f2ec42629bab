"""How do the ops take a mask that depends on data? Its parts as trailing arguments, and back."""

from collections.abc import Sequence

from torch import Tensor

from afbs_compile.kernels.data_mask import DataMask, gathered

SCHEMA = (
    "Tensor? keys=None, Tensor? q_segments=None, Tensor? k_segments=None, Tensor? elements=None, "
    "str blind='zero', Tensor? bias=None"
)
BLIND = 4  # the place of the answer for blind rows among them
Given = Sequence[Tensor | str | None]


def mask_of(given: Given, lengths: tuple[int, int]) -> DataMask | None:
    """The mask that comes with a call; None without any part.

    Args:
        given: Arguments by `SCHEMA`: parts as `data_mask.gathered` takes them, and what a blind
            row is before the last of them. The dispatcher leaves trailing ones out that are
            defaults.
        lengths: Lq and Lk.
    """
    masks = [*given[:BLIND], *(None,) * (BLIND - len(given)), *given[BLIND + 1 :]]
    parts = [x for x in masks if not isinstance(x, str)]
    return gathered(parts, lengths, str(given[BLIND]) if len(given) > BLIND else "zero")
