"""Is a float mask that is added to the scores nothing but a boolean mask?

A value of 0 leaves a score as it is. A very negative one makes its probability exactly 0: softmax
takes exp(s − max), which is 0 in fp32 below −104, and scores lie thousands away from `NEVER`.
That holds only if the row has a visible key: in a row without one softmax sees equal scores, or
nothing but −inf, and gives a uniform row or NaN where SDPA with a boolean mask gives 0.
"""

from torch import Tensor

NEVER = -1e4  # the mildest value that models use for "masked"
ABSORBING = -1e30  # a score that is added to it is lost in the rounding
FLOAT = "additive float mask: it holds more than 0 and very negative values"
BLIND = "the mask has rows that see nothing; what they give differs between softmax and SDPA"


def boolean(mask: Tensor, *, every_row: bool) -> Tensor | str:
    """The boolean mask that a mask stands for, or a reason why there is none.

    Args:
        mask: `[..., Lq, Lk]`, boolean or added to the scores.
        every_row: Whether every row must see a key even in a boolean mask.
    """
    if mask.is_floating_point():
        visible = mask == 0
        if not bool((visible | (mask <= NEVER)).all()):
            return FLOAT
        mask, every_row = visible, True
    return BLIND if every_row and not bool(mask.any(-1).all()) else mask
