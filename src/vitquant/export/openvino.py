"""OpenVINO: its own converter, fed with the ONNX graph."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import openvino

from vitquant.errors import ExportError


def convert(onnx_file: Path, path: Path, metadata: Mapping[str, str]) -> Path:
    """Write `path` (.xml, with a .bin beside it). Raises ExportError with the operator that is not known.

    The ONNX frontend alone reads the graph: `openvino.convert_model` would unpack 4-bit integers on the way.
    """
    try:
        model = openvino.Core().read_model(onnx_file)
    except Exception as error:  # the frontends' errors share no base
        raise ExportError(f"OpenVINO cannot convert the model: {' '.join(str(error).split())[:300]}") from error
    for name, value in metadata.items():
        model.set_rt_info(value, ["vitquant", name])
    openvino.save_model(model, path, compress_to_fp16=False)
    return path
