"""Reusable steps of methods."""

from vitquant.passes.allocate import AllocateGroups, Budget
from vitquant.passes.fit import Fit
from vitquant.passes.instances import Instances
from vitquant.passes.reparam import ScaleReparam
from vitquant.passes.share import FitShared, OnIntegers

__all__ = ["AllocateGroups", "Budget", "Fit", "FitShared", "Instances", "OnIntegers", "ScaleReparam"]
