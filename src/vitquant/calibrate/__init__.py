"""How numbers are gathered: streamed statistics and the searches that turn them into parameters."""

from vitquant.calibrate.bench import Batches, Bench, Progress, silent
from vitquant.calibrate.search import MinMax, MseGrid, Percentile, Search, least_error, mean_errors
from vitquant.calibrate.statistic import Collector, Reservoir, Sample, quantiles

__all__ = [
    "Batches",
    "Bench",
    "Collector",
    "MinMax",
    "MseGrid",
    "Percentile",
    "Progress",
    "Reservoir",
    "Sample",
    "Search",
    "least_error",
    "mean_errors",
    "quantiles",
    "silent",
]
