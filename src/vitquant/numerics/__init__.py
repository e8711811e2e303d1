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
from vitquant.numerics.logarithmic import Log, LogScale
from vitquant.numerics.pack import pack, packed_size, unpack
from vitquant.numerics.quantizer import Affine, Params, Quantizer, round_ste
from vitquant.numerics.uniform import Uniform

FORMATS: Mapping[str, type[Quantizer]] = {c.__name__: c for c in (Uniform, Log)}
"""Every number format by the name that a saved model calls it."""

__all__ = [
    "FORMATS",
    "PER_CHANNEL",
    "PER_HEAD",
    "PER_OUTPUT",
    "PER_TENSOR",
    "PER_TOKEN",
    "Affine",
    "Granularity",
    "Log",
    "LogScale",
    "Params",
    "Quantizer",
    "Uniform",
    "pack",
    "packed_size",
    "per_group",
    "round_ste",
    "unpack",
]
