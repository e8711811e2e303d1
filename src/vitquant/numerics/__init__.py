"""Number formats. Knows tensors only: no model, no file."""

from collections.abc import Mapping

from vitquant.numerics.granularity import (
    PER_CHANNEL,
    PER_HEAD,
    PER_OUTPUT,
    PER_TENSOR,
    PER_TOKEN,
    Granularity,
    per_group,
)
from vitquant.numerics.instance_groups import PER_ROW, Bank, InstanceGroups
from vitquant.numerics.logarithmic import Log, LogScale, ShiftLog, ShiftLogScale, fold_minimum
from vitquant.numerics.outlier import OutlierAware, OutlierGrid
from vitquant.numerics.pack import pack, packed_size, unpack
from vitquant.numerics.power_of_two import PowerOfTwo, PowerOfTwoScale
from vitquant.numerics.quantizer import Affine, Params, Quantizer, Workspace, round_ste
from vitquant.numerics.uniform import Uniform

FORMATS: Mapping[str, type[Quantizer]] = {
    c.__name__: c for c in (Uniform, Log, ShiftLog, OutlierAware, InstanceGroups, PowerOfTwo)
}
"""Every number format by the name that a saved model calls it."""

__all__ = [
    "FORMATS",
    "PER_CHANNEL",
    "PER_HEAD",
    "PER_OUTPUT",
    "PER_ROW",
    "PER_TENSOR",
    "PER_TOKEN",
    "Affine",
    "Bank",
    "Granularity",
    "InstanceGroups",
    "Log",
    "LogScale",
    "OutlierAware",
    "OutlierGrid",
    "Params",
    "PowerOfTwo",
    "PowerOfTwoScale",
    "Quantizer",
    "ShiftLog",
    "ShiftLogScale",
    "Uniform",
    "Workspace",
    "fold_minimum",
    "pack",
    "packed_size",
    "per_group",
    "round_ste",
    "unpack",
]
