"""Measured speed, memory, size and accuracy of a quantized model on every engine, beside its peers."""

from vitquant.benchmark.contenders import Contender, Missing
from vitquant.benchmark.run import benchmark
from vitquant.benchmark.table import Row, Table, Timing

__all__ = ["Contender", "Missing", "Row", "Table", "Timing", "benchmark"]
