"""Arithmetic on integers alone: LayerNorm, softmax, dyadic rounding, and a whole model's execution on them."""

from vitquant.integer.carriers import Carrier, Floats, Integers
from vitquant.integer.dyadic import Dyadic, dyadic, isqrt
from vitquant.integer.layer_norm import integer_epsilon, integer_layer_norm, token_scale
from vitquant.integer.run import Arithmetic, Grid, IntegerRun, Target
from vitquant.integer.softmax import ibert_exp, integer_exp, log_int_softmax, log_quotient
from vitquant.integer.widths import fitting, norm_bounds, product_bound, width

__all__ = [
    "Arithmetic",
    "Carrier",
    "Dyadic",
    "Floats",
    "Grid",
    "IntegerRun",
    "Integers",
    "Target",
    "dyadic",
    "fitting",
    "ibert_exp",
    "integer_epsilon",
    "integer_exp",
    "integer_layer_norm",
    "isqrt",
    "log_int_softmax",
    "log_quotient",
    "norm_bounds",
    "product_bound",
    "token_scale",
    "width",
]
