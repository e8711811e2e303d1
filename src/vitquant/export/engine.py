"""Run a file on an engine, in a process of its own: engines crash on legal graphs.

Run by path, and imports the engine and nothing else (this package only to build its models). Called as `engine.py
ENGINE OPTIONS MODEL`, it answers one JSON request a line: {"outputs": FILE, "images": FILE, "batch": n} writes every
output by name, batches joined; {"time": n, "images": FILE, "batch": n} runs one batch n times and gives the seconds
of each; {"peak": true} gives the process's largest resident memory so far in bytes. Files are .npz, images in the
array `image`.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from collections.abc import Callable, Mapping
from time import perf_counter
from typing import Any

import numpy as np

TAPPED = "tapped.onnx"
"""Ends the name of a file that has its inner tensors among the outputs."""

Run = Callable[[np.ndarray], dict[str, np.ndarray]]


def onnxruntime(path: str, threads: int = 0, optimise: bool = True) -> Run:
    """optimise=False keeps the graph as it is written."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    if not optimise:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    # It would round a product's result before showing it: the next layer's rounding, moved across a reshape.
    skipped = ["QDQPropagationTransformer"] if path.endswith(TAPPED) else []
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"], disabled_optimizers=skipped)
    name, names = session.get_inputs()[0].name, [o.name for o in session.get_outputs()]
    return lambda x: dict(zip(names, session.run(names, {name: x}), strict=True))


def openvino(path: str, threads: int = 0, precision: str = "f32") -> Run:
    """precision: "f32" or "bf16" for what stays in floating point; its own default is bf16 where that is fast."""
    import openvino as ov

    config: dict[str, Any] = {
        "INFERENCE_PRECISION_HINT": precision,
        "PERFORMANCE_HINT": "LATENCY",
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,  # else it quantizes activations that the model leaves in floating point
    }
    if threads:
        config["INFERENCE_NUM_THREADS"] = threads
    compiled = ov.Core().compile_model(path, "CPU", config)
    request = compiled.create_infer_request()
    names = [sorted(output.get_names()) for output in compiled.outputs]  # one tensor may have several

    def run(x: np.ndarray) -> dict[str, np.ndarray]:
        results = request.infer([x], share_inputs=True)
        return {name: np.array(results[i]) for i, aliases in enumerate(names) for name in aliases}

    return run


def torch(path: str, threads: int = 0) -> Run:
    """A program that `torch.export.save` wrote."""
    import torch

    return _torch(torch.export.load(path).module(), threads)


def eager(path: str, threads: int = 0, compile: bool = False, bf16: bool = False, int8: bool = False) -> Run:
    """A model by its source (`vitquant.models.Source` as JSON). int8: torchao's dynamic activations, int8 weights."""
    import torch

    from vitquant import models

    with open(path) as file:
        module = models.load(models.Source.from_json(json.load(file))).model
    if int8:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

        quantize_(module, Int8DynamicActivationInt8WeightConfig())
    return _torch(torch.compile(module) if compile else module, threads, bf16)


def integer(path: str, threads: int = 0, compile: bool = False) -> Run:
    """An artifact's directory, on this package's own runtime."""
    import vitquant
    from vitquant.export.runtime import IntegerModel, compiled

    model = vitquant.load(path)
    return _torch(compiled(model) if compile else IntegerModel(model), threads)


def _torch(module: Callable[..., Any], threads: int, bf16: bool = False) -> Run:
    import torch

    if threads:
        torch.set_num_threads(threads)

    def run(x: np.ndarray) -> dict[str, np.ndarray]:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            found = module(torch.from_numpy(x))
        found = found.to_tuple() if hasattr(found, "to_tuple") else found
        tensors = [found] if isinstance(found, torch.Tensor) else [y for y in found if isinstance(y, torch.Tensor)]
        return {"logits" if i == 0 else f"output_{i}": y.float().numpy() for i, y in enumerate(tensors)}

    return run


ENGINES: Mapping[str, Callable[..., Run]] = {f.__name__: f for f in (onnxruntime, openvino, torch, eager, integer)}


def answer(run: Run, request: Mapping[str, Any]) -> dict[str, Any]:
    if "peak" in request:
        return {"bytes": peak()}
    size = request["batch"]
    images = np.load(request["images"])["image"]
    if "time" in request:
        batch = np.ascontiguousarray(np.resize(images, (size, *images.shape[1:])))
        seconds = []
        for _ in range(request["time"]):
            begin = perf_counter()
            run(batch)
            seconds.append(perf_counter() - begin)
        return {"seconds": seconds}
    parts = [run(np.ascontiguousarray(images[i : i + size])) for i in range(0, len(images), size)]
    names = list(parts[0])
    arrays = {str(i): np.concatenate([part[name] for part in parts]) for i, name in enumerate(names)}
    np.savez(request["outputs"], names=np.array(names), **arrays)  # type: ignore[arg-type]
    return {}


def peak() -> int:
    """Bytes of this program alone: what `getrusage` says begins, on Linux, with the size of its parent."""
    try:
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main(engine: str, options: str, model: str) -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not look like a reply
    run = ENGINES[engine](model, **json.loads(options))
    for line in sys.stdin:
        print(json.dumps(answer(run, json.loads(line))), file=replies, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
