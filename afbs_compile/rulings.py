"""What does one site do at one length, outside a compiled graph? Thresholds, or why none.

A policy fits a call only if shapes and mask are those that it was made for.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from afbs_compile.checks import mean_known
from afbs_compile.kernels.data_mask import ELEMENTS
from afbs_compile.kernels.geometry import Mask
from afbs_compile.kernels.on_gpu import kernel_of
from afbs_compile.policy import Site as SitePolicy
from afbs_compile.policy_tensor import to_tensor
from afbs_compile.report import SiteReport
from afbs_compile.source import unpadded

Sites = dict[str, SitePolicy]


@dataclass(frozen=True, slots=True)
class Ruling:
    """What a site does at a length: its rows, or the reason why it stays SDPA."""

    site: SitePolicy | None
    rows: Tensor | None
    reason: str | None
    density: float | None = None
    error: float | None = None

    def fitting(self, q: Tensor, k: Tensor, mask: Mask, masked: bool = False) -> "Ruling":
        """This ruling, or a refusal if it was made for other calls than this one.

        Calls with and without key padding share a ruling (`source.fits`); `masked` ones have
        single elements hidden.
        """
        if self.site is None or self.rows is None:
            return self
        shape = len(self.site.heads), self.site.kv_heads, self.site.head_dim
        if shape != (q.shape[1], k.shape[1], q.shape[3]):
            came = f"{q.shape[1]} heads on {k.shape[1]}, head dim {q.shape[3]}"
            return replace(self, rows=None, reason=f"the policy is for other shapes than {came}")
        words = {f"{w} + {ELEMENTS}" if masked else w
                 for w in descriptions(mask, q.shape[2], k.shape[2])}  # fmt: skip
        if unpadded(self.site.mask) not in words:
            why = f"the policy is for a mask that is {self.site.mask!r}, the call's is another"
            return replace(self, rows=None, reason=why)
        return self


def ruling_of(sites: Sites | str | None, name: str, bucket: int, device: torch.device) -> Ruling:
    """What the policies of a bucket say of a site; `sites` may be a reason why there are none."""
    if sites is None or isinstance(sites, str):
        return Ruling(None, None, sites or f"not tuned yet for up to {bucket} tokens")
    site = sites.get(name)
    if site is None:
        return Ruling(None, None, "not in the policy")
    if site.decision == "dense":
        return Ruling(site, None, site.reason or "dense in the policy")
    errors = [head.error for head in site.heads if head.error is not None]
    density = mean_known([head.density for head in site.heads])
    return Ruling(site, to_tensor(site, device), None, density, max(errors, default=None))


def running(name: str, ruling: Ruling, q: Tensor) -> SiteReport:
    """The report of a call that runs sparse."""
    site = ruling.site
    assert site is not None
    times = site.seconds_dense, site.seconds_sparse
    return SiteReport(
        name, "sparse", None, site.mask, len(site.heads), site.kv_heads, site.head_dim,
        density=ruling.density, error=ruling.error,
        speedup=times[0] / times[1] if times[0] and times[1] else None,
        kernel=kernel_of(q.device, q.dtype, q.shape[3]),
    )  # fmt: skip


def descriptions(mask: Mask, length_q: int, length_k: int) -> set[str]:
    """The words that `calibrate.describe` may have for a mask at these lengths."""
    if not mask.causal:
        return {"full"}
    end = length_k - length_q
    offsets = {f", offset {mask.offset}" if mask.offset else ""}
    if mask.offset == end:
        offsets |= {", from the end"} if end else set()
    clipped = mask.window and length_q - 1 + mask.offset < mask.window  # it hides nothing here
    windows = {"", f", window {mask.window}"} if clipped else {
        f", window {mask.window}" if mask.window else ""}  # fmt: skip
    return {f"causal{offset}{window}" for offset in offsets for window in windows}
