"""How long will a device work on so many tokens and kept blocks? Learned online, never negative.

t = a·tokens + b·blocks + c, a, b, c ≥ 0, by least squares on errors relative to the time that was
expected. Tokens and blocks rise together, so plain least squares makes one of the coefficients
negative; hence non-negative least squares (Lawson & Hanson 1974, ch. 23) with a ridge towards the
last profile.
What was observed long ago counts less: every call of `observe` ages what is known by `memory`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.linalg import solve_triangular
from scipy.optimize import nnls

from afbs_compile.tuner.arrays import Bools, Floats

TERMS = 3  # tokens, blocks, one
FEWEST = 4  # observations before a prediction is believed
CLIP = 4.0  # an observation counts as at most so many times its prediction, or so small a part
SETTLED = 16  # observations after which `CLIP` holds
STATE = ("device", "ridge", "memory", "prior", "gram", "moment", "count", "refused")


@dataclass(slots=True)
class CostModel:
    """The cost of work on one kind of device.

    Attributes:
        device: Its name; a state of another device is refused.
        ridge: Pull towards `prior`, as a share of what the data weigh.
        memory: Weight of what was known after one more call of `observe`, in (0, 1].
        prior: The coefficients (a, b, c) that the ridge pulls to; None pulls to 0.
        gram: Aged sum of x·xᵀ over observations x = (tokens, blocks, 1)/t̂, t̂ the expected time.
        moment: Aged sum of x·t/t̂.
        count: Observations that were used.
        refused: Observations that were no positive numbers.
    """

    device: str = ""
    ridge: float = 1e-3
    memory: float = 0.98
    prior: Floats | None = None
    gram: Floats = field(default_factory=lambda: np.zeros((TERMS, TERMS)))
    moment: Floats = field(default_factory=lambda: np.zeros(TERMS))
    count: int = 0
    refused: int = 0
    fitted: Floats | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not (self.ridge > 0.0 and 0.0 < self.memory <= 1.0):
            raise ValueError(
                f"ridge is {self.ridge}, memory {self.memory}: need ridge > 0 and memory in (0, 1]"
            )

    @property
    def ready(self) -> bool:
        """Whether predictions can be believed: enough was seen, and work costs something."""
        return self.count >= FEWEST and bool(self.coefficients.sum() > 0.0)

    @property
    def coefficients(self) -> Floats:
        """(a, b, c): seconds a token, seconds a block, seconds at least."""
        if self.fitted is None:
            self.fitted = fit(self.gram, self.moment, self.ridge, self.prior)
        return self.fitted

    def predict(self, tokens: ArrayLike, blocks: ArrayLike) -> Floats:
        """Seconds for tokens [N] and kept blocks [N]."""
        a, b, c = self.coefficients
        return np.asarray(a * np.asarray(tokens, float) + b * np.asarray(blocks, float) + c)

    def observe(self, tokens: ArrayLike, blocks: ArrayLike, seconds: ArrayLike) -> int:
        """Learn from N measurements; what is missing (NaN) or not above 0 is left out.

        Returns:
            How many were used.
        """
        x, t = self._usable(tokens, blocks, seconds)
        if len(t):
            expected = t
            if self.count >= SETTLED:
                expected = np.maximum(x @ self.coefficients, np.finfo(float).tiny)
                t = np.clip(t, expected / CLIP, expected * CLIP)
            rows = x / expected[:, None]
            self.gram = self.memory * self.gram + rows.T @ rows
            self.moment = self.memory * self.moment + rows.T @ (t / expected)
            self.count += len(t)
            self.fitted = None
        return len(t)

    def profile(self, tokens: ArrayLike, blocks: ArrayLike, seconds: ArrayLike) -> None:
        """Begin with a profile of N ≥ 4 measurements: it is also what the ridge pulls to.

        Raises:
            ValueError: Fewer measurements can be used.
        """
        fresh = CostModel(self.device, self.ridge, self.memory)
        if fresh.observe(tokens, blocks, seconds) < FEWEST:
            raise ValueError(
                f"a profile needs {FEWEST} or more times above 0; measure more lengths"
            )
        self.gram, self.moment, self.count = fresh.gram, fresh.moment, fresh.count
        self.prior, self.fitted = fresh.coefficients, None

    def state_dict(self) -> dict[str, Any]:
        """Everything, as numbers, strings and lists."""
        values = {name: getattr(self, name) for name in STATE}
        return {n: v.tolist() if isinstance(v, np.ndarray) else v for n, v in values.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take a state over.

        Raises:
            ValueError: It is damaged, or of another device.
        """
        if missing := [name for name in STATE if name not in state]:
            raise ValueError(f"the state of a cost model lacks {', '.join(missing)}")
        if self.device and state["device"] and state["device"] != self.device:
            raise ValueError(
                f"the cost model was measured on {state['device']!r}, this is {self.device!r}: "
                "profile this device instead of loading that state"
            )
        prior = None if state["prior"] is None else _finite(state["prior"], (TERMS,), "prior")
        gram = _finite(state["gram"], (TERMS, TERMS), "gram")
        moment = _finite(state["moment"], (TERMS,), "moment")
        self.device = self.device or str(state["device"])
        self.ridge, self.memory = float(state["ridge"]), float(state["memory"])
        self.prior, self.gram, self.moment, self.fitted = prior, gram, moment, None
        self.count, self.refused = int(state["count"]), int(state["refused"])
        self.__post_init__()

    def _usable(
        self, tokens: ArrayLike, blocks: ArrayLike, seconds: ArrayLike
    ) -> tuple[Floats, Floats]:
        """The rows (tokens, blocks, 1) and times that are numbers; the others are counted."""
        t = np.atleast_1d(np.asarray(seconds, dtype=np.float64))
        columns = [np.broadcast_to(np.asarray(x, float), t.shape) for x in (tokens, blocks, 1.0)]
        x = np.stack(columns, axis=1)
        good: Bools = np.isfinite(x).all(axis=1) & np.isfinite(t) & (t > 0.0)
        self.refused += int((~good).sum())
        return x[good], t[good]


def fit(gram: Floats, moment: Floats, ridge: float, prior: Floats | None) -> Floats:
    """The θ ≥ 0 of least θᵀGθ − 2mᵀθ + ρ·Σ Gⱼⱼ(θⱼ − θ⁰ⱼ)²; columns are scaled to Gⱼⱼ = 1."""
    scale = np.sqrt(np.diag(gram))
    used = scale > 0.0
    result = np.zeros(len(moment))
    if not used.any():
        return result if prior is None else prior.copy()
    s = scale[used]
    start = np.zeros(len(s)) if prior is None else prior[used] * s
    chol = np.linalg.cholesky(gram[np.ix_(used, used)] / np.outer(s, s) + ridge * np.eye(len(s)))
    target = solve_triangular(chol, moment[used] / s + ridge * start, lower=True)
    result[used] = nnls(chol.T, target)[0] / s
    if prior is not None:
        result[~used] = prior[~used]
    return result


def _finite(value: Any, shape: tuple[int, ...], name: str) -> Floats:
    """An array of a state.

    Raises:
        ValueError: Its shape is another, or it holds what is no number.
    """
    array = np.asarray(value, dtype=np.float64)
    if array.shape != shape or not np.isfinite(array).all():
        raise ValueError(f"{name} of a cost model's state needs {shape} finite numbers")
    return array
