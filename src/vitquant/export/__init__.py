"""A quantized model as a file that engines run, with a certificate that they compute the same."""

from vitquant.export.export import FORMATS, ExportReport, export
from vitquant.export.lower import Kind, Verdict, lower
from vitquant.export.parity import Certificate, Layer

__all__ = ["FORMATS", "Certificate", "ExportReport", "Kind", "Layer", "Verdict", "export", "lower"]
