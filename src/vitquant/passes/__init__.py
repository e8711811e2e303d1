"""Reusable steps of methods."""

from vitquant.passes.fit import Fit
from vitquant.passes.reparam import ScaleReparam

__all__ = ["Fit", "ScaleReparam"]
