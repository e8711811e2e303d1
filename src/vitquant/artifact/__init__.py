"""The quantized model: runs, saves, explains itself."""

from vitquant.artifact.model import Provenance, QuantizedModel
from vitquant.artifact.store import load, read_config, save
from vitquant.recipe.ledger import Entry, Ledger

__all__ = ["Entry", "Ledger", "Provenance", "QuantizedModel", "load", "read_config", "save"]
