"""What can go wrong, in the user's words.

VitquantError                 everything below; its message is one line that names what and where
├── UsageError                an argument is off: an unknown model or method, bits out of range
├── DataError                 images: an empty folder, unreadable files, too few
├── TraceError                the model could not be understood
│   ├── UnknownContraction    a product of tensors runs in a function that is not known here
│   └── UnsupportedComposite  a fused function is called in a variant that is not known here
├── PlanError                 a recipe does not fit the model
├── CalibrationError          numbers could not be gathered
│   ├── NoData                no calibration image came
│   └── NonFinite             NaN or infinity at a site
├── FloatDrift                an exact rewrite changed the float function: a defect of the rewrite
├── IncompleteRun             a planned site was not visited, or an unplanned one was
├── AccumulatorOverflow       an integer needs more bits than its carrier has
├── ArtifactError             a saved model is truncated, edited, foreign, or of another version
└── ExportError               an engine lacks an operator, fails, or computes something else
"""

from __future__ import annotations


class VitquantError(Exception):
    """Base of every error this package raises on purpose."""


class UsageError(VitquantError):
    """An argument is off; the message lists what would be accepted."""


class DataError(VitquantError):
    """The images cannot be used."""


class TraceError(VitquantError):
    """The model's computation could not be understood."""


class UnknownContraction(TraceError):
    """A product of tensors runs inside a function that this package cannot intercept."""


class UnsupportedComposite(TraceError):
    """A fused function is called in a variant that this package cannot take apart."""


class PlanError(VitquantError):
    """A recipe and a model do not fit together."""


class CalibrationError(VitquantError):
    """Calibration could not gather its numbers."""


class NoData(CalibrationError):
    """No calibration image came."""


class NonFinite(CalibrationError):
    """A tensor holds NaN or infinity."""


class FloatDrift(VitquantError):
    """A rewrite that must be exact changed the float function."""


class IncompleteRun(VitquantError):
    """The sites visited by a run are not the sites planned for it."""


class AccumulatorOverflow(VitquantError):
    """An integer needs more bits than the accumulator that was chosen for it has."""


class ArtifactError(VitquantError):
    """A saved model cannot be read back."""


class ExportError(VitquantError):
    """An engine cannot run the model, or runs it with other results."""
