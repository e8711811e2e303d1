"""The quantized model: runs, saves, explains itself."""

from vitquant.artifact.ledger import Entry, Ledger
from vitquant.artifact.model import Provenance, QuantizedModel
from vitquant.artifact.store import load, read_config, save

__all__ = ["Entry", "Ledger", "Provenance", "QuantizedModel", "load", "read_config", "save"]
