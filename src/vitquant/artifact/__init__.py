"""The quantized model: runs, saves, explains itself."""

from vitquant.artifact.model import QuantizedModel
from vitquant.artifact.operands import Provenance
from vitquant.artifact.store import read_config
from vitquant.recipe.ledger import Entry, Ledger

__all__ = ["Entry", "Ledger", "Provenance", "QuantizedModel", "read_config"]
