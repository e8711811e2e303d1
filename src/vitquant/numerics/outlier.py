"""Per-token grids for the bulk of a tensor, its few large elements kept exactly."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vitquant.errors import UsageError
from vitquant.numerics.granularity import PER_TOKEN, Granularity
from vitquant.numerics.quantizer import Affine, Quantizer, checked_range, round_ste, runs_in_place
from vitquant.numerics.uniform import Uniform

VALUE_BITS, INDEX_BITS = 32, 16
"""What one outlier costs beside its code: its value, and its column in a compressed sparse row."""


class OutlierGrid(NamedTuple):
    """Parameters, flat, one for each group (token).

    scale, zero: the inliers' affine grid. threshold: the largest inlier, in the tensor's units, the same for all
    groups. fraction: of the elements that were outliers on the calibration images; 1 where only a range beyond the
    threshold is known.
    """

    scale: Tensor
    zero: Tensor
    threshold: Tensor
    fraction: Tensor


class Settled(NamedTuple):
    """What one tensor is encoded with. outliers: its large elements, 0 elsewhere, in its shape."""

    scale: Tensor
    zero: Tensor
    outliers: Tensor


@dataclass(frozen=True)
class OutlierAware(Quantizer):
    """Per-patch outlier-aware grid: x̂ = x where |x| > threshold, else scale_n · (code - zero_n) for token n.

    The inliers' grid is uniform and holds 0, so that with outliers set to 0 a product splits exactly into
    GEMM(inliers) + SpMM(outliers), see `vitquant.integer.linears.OutlierLinear`. Static: one (scale, zero) for each
    token position, so the number of tokens is fixed. `dynamic`: the range of every token of every image, found at run
    time on the inliers of the last axis; serves any number of tokens (detection, windows), and then the parameters'
    scale and zero serve nothing.

    An outlier costs its 32-bit value and a 16-bit column beside the code: `mean_bits` = b + 48 · fraction.
    x: (..., tokens, channels), in the tensor's units. Raises UsageError where the number of tokens is not the
    calibrated one.

    ADFQ-ViT (arXiv:2407.02763), per-patch outlier-aware quantizer; the paper's equations could not be read, this
    follows the released code. Deviations: 0 lies on every inlier grid; the dynamic variant is our own.
    """

    granularity: Granularity = PER_TOKEN
    threshold: float = 5.0
    dynamic: bool = False

    parameters: ClassVar[type] = OutlierGrid
    static: ClassVar[bool] = False

    @property
    def grid(self) -> Uniform:
        """The inliers' format."""
        return Uniform(self.bits, self.granularity)

    def fit(self, low: Tensor, high: Tensor) -> OutlierGrid:
        low, high = checked_range(low, high)
        fraction = (torch.maximum(-low, high) > self.threshold).float()
        inliers = self.grid.fit(low.clamp(min=-self.threshold), high.clamp(max=self.threshold))
        return OutlierGrid(*inliers, torch.full_like(fraction, self.threshold), fraction)

    def resolve(self, x: Tensor, p: OutlierGrid) -> Settled:
        self._check_tokens(x, p)
        outliers = self._outliers(x, p)
        if not self.dynamic:
            spread = self.granularity.spread
            return Settled(spread(p.scale, x), spread(p.zero, x), outliers)
        inliers = x.detach() - outliers.detach()
        return Settled(*self.grid.fit(inliers.amin(-1, keepdim=True), inliers.amax(-1, keepdim=True)), outliers)

    def _outliers(self, x: Tensor, p: OutlierGrid) -> Tensor:
        """x where |x| > threshold, else 0."""
        if runs_in_place(x):
            return F.hardshrink(x, float(p.threshold[0]))
        threshold = self.granularity.spread(p.threshold, x)
        return x.detach().abs().gt_(threshold).mul_(x)  # a factor of 1 or 0: booleans are slow on CPUs

    def _check_tokens(self, x: Tensor, p: OutlierGrid) -> None:
        groups = prod(x.shape[a] for a in self.granularity.axes) // self.granularity.group
        if len(p.threshold) != groups:
            raise UsageError(
                f"a grid for {len(p.threshold)} tokens met a tensor {tuple(x.shape)} of {groups}; "
                "where the number of tokens changes, quantize with dynamic=True"
            )

    def encode_resolved(self, x: Tensor, p: Settled) -> Tensor:
        low, high = self.code_range
        if torch.is_grad_enabled():
            return (round_ste((x - p.outliers) / p.scale) + p.zero).clamp(low, high)
        return (x - p.outliers).div_(p.scale).round_().add_(p.zero).clamp_(low, high)

    def decode_resolved(self, codes: Tensor, p: Settled) -> Tensor:
        return (codes - p.zero) * p.scale + p.outliers  # an outlier's code is that of 0

    def round_trip(self, x: Tensor, p: Settled, out: Tensor) -> Tensor:
        torch.sub(x, p.outliers, out=out)
        return self.grid.round_trip(out, Affine(p.scale, p.zero), out).add_(p.outliers)

    def mean_bits(self, p: OutlierGrid) -> float:
        return self.bits + float(p.fraction.mean()) * (VALUE_BITS + INDEX_BITS)

    def extra_bops(self, shape: tuple[int, ...], macs: int = 0) -> int:
        """One comparison an element with the threshold, and two for the range at run time; 32 each."""
        return 32 * (3 if self.dynamic else 1) * prod(shape)
