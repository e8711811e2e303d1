"""vitquant: low-bit Vision Transformers.

model = vitquant.quantize(model, images, method="repq-vit", bits="w4a4")
model(image); model.save("out"); print(model.table()); vitquant.load("out")
"""

from vitquant.api import load, observe, quantize
from vitquant.artifact import QuantizedModel
from vitquant.errors import VitquantError
from vitquant.methods import METHODS
from vitquant.recipe import FLOAT, Bits, Recipe, Rule, State
from vitquant.trace import CONTRACTION_ROLES, Role, Site, Trace

__all__ = [
    "CONTRACTION_ROLES",
    "FLOAT",
    "METHODS",
    "Bits",
    "QuantizedModel",
    "Recipe",
    "Role",
    "Rule",
    "Site",
    "State",
    "Trace",
    "VitquantError",
    "load",
    "observe",
    "quantize",
]
