"""Measuring a model: accuracy, agreement with its reference, paired tests."""

from vitquant.evaluate.metrics import Report, mcnemar, measure

__all__ = ["Report", "mcnemar", "measure"]
