"""Measuring a model: accuracy, agreement with its reference, paired tests, noise at every site."""

from vitquant.evaluate.fidelity import sqnr, worst
from vitquant.evaluate.metrics import Report, mcnemar, measure

__all__ = ["Report", "mcnemar", "measure", "sqnr", "worst"]
