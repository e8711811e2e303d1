"""How numbers are gathered: streamed statistics and the searches that turn them into parameters."""

from vitquant.calibrate.bench import Batches, Bench, Progress, Reached, silent
from vitquant.calibrate.cluster import RangeClusters
from vitquant.calibrate.inliers import Inliers
from vitquant.calibrate.observers import Fixed, MovingAverage, PowerOfTwoMse
from vitquant.calibrate.scale_zero import ScaleZero
from vitquant.calibrate.search import MinMax, MseGrid, Percentile, Search, least_error, mean_errors
from vitquant.calibrate.statistic import Collector, Reservoir, Sample, quantiles

__all__ = [
    "Batches",
    "Bench",
    "Collector",
    "Fixed",
    "Inliers",
    "MinMax",
    "MovingAverage",
    "MseGrid",
    "Percentile",
    "PowerOfTwoMse",
    "Progress",
    "RangeClusters",
    "Reached",
    "Reservoir",
    "Sample",
    "ScaleZero",
    "Search",
    "least_error",
    "mean_errors",
    "quantiles",
    "silent",
]
