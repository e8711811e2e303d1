"""ONNX: the traced graph with its markers replaced by what integer engines recognise."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from vitquant.errors import ExportError
from vitquant.export.lower import DOMAIN, Codes, Integers, Lowering, MarkedModel
from vitquant.trace import Site

OPSET = 21
"""The first with four-bit integers."""


def trace(model: MarkedModel, image: Tensor) -> onnx.ModelProto:
    """The graph with markers, batch dimension dynamic. image: (n, channels, height, width), n >= 2.

    Raises ExportError naming the site and the operator that ONNX has no counterpart for.
    """
    batch = ({0: torch.export.Dim("batch", min=1, max=64)},)
    with torch.no_grad():
        program = torch.export.export(model, (image,), dynamic_shapes=batch, strict=False)
        count = len(program.graph_signature.user_outputs)
        names = ["logits", *(f"output_{i}" for i in range(1, count))]
        try:
            written = torch.onnx.export(
                program,
                (image,),
                dynamo=True,
                opset_version=OPSET,
                verbose=False,
                input_names=["image"],
                output_names=names,
            )
        except torch.onnx.OnnxExporterError as error:
            raise ExportError(_unknown(program, model, str(error))) from error
    assert written is not None
    return written.model_proto


def _unknown(program: torch.export.ExportedProgram, model: MarkedModel, message: str) -> str:
    """Which operator of which site the exporter has no translation for."""
    found = re.search(r"OpOverload\(op='([^']+)'", message)
    if found is None:
        return "ONNX export failed: " + message.strip().splitlines()[0]
    name = found.group(1)
    for node in program.graph.nodes:
        # The exporter speaks of what it made of the operator: prims.x of aten.special_x, say.
        if node.op == "call_function" and str(node.target).split(".")[1].endswith(name.split(".")[1]):
            return f"{_place(node, model)}: ONNX has no operator for {name}"
    return f"ONNX has no operator for {name}"


def _place(node: torch.fx.Node, model: MarkedModel) -> str:
    """The site, or else the module, whose arithmetic a node of the traced graph belongs to."""
    scopes = [path for path, _ in node.meta.get("nn_module_stack", {}).values()]
    for scope in reversed(scopes):
        inside = re.match(r"places\.(\d+)", scope)
        if inside:
            return str(model.sites[int(inside.group(1))])
    return scopes[-1].removeprefix("model.") if scopes else "the model"


def realise(
    traced: onnx.ModelProto,
    lowered: Mapping[Site, Lowering],
    metadata: Mapping[str, str],
    taps: Callable[[Site], bool] | None = None,
) -> tuple[onnx.ModelProto, dict[str, str]]:
    """The graph for engines, and the outputs added for comparison: {name of a marker: name of its tensor}.

    taps: which markers to add to the outputs: quantized activations, decoded, and results of products.
    """
    model = onnx.ModelProto()
    model.CopyFrom(traced)
    graph = _Graph(model.graph, {str(site): low.form for site, low in lowered.items()})
    found = graph.replace_markers()
    if taps is not None:
        found = graph.add_taps({site: name for site, name in found.items() if taps(Site.parse(site))})
    graph.drop_unused()
    opsets = [o for o in model.opset_import if o.domain != DOMAIN]
    del model.opset_import[:]
    model.opset_import.extend(opsets)
    _strip(model)
    helper.set_model_props(model, dict(metadata))
    if taps is None:  # their shapes are left to the engine
        onnx.checker.check_model(model)
    return model, found


class _Graph:
    """The rewriting of one graph, in place."""

    def __init__(self, graph: onnx.GraphProto, forms: Mapping[str, Codes | Integers | None]) -> None:
        self.graph, self.forms = graph, forms
        self.nodes: list[onnx.NodeProto] = []
        self.renamed: dict[str, str] = {}
        self.quantized: dict[tuple[str, Codes], str] = {}
        self.readers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        self.skipped: set[str] = set()
        for node in graph.node:
            for name in node.input:
                self.readers[name].append(node)

    def replace_markers(self) -> dict[str, str]:
        found = {}
        for node in self.graph.node:
            if node.name in self.skipped:
                continue
            if node.domain != DOMAIN:
                for i, name in enumerate(node.input):
                    node.input[i] = self.renamed.get(name, name)
                self.nodes.append(node)
                continue
            site = node.attribute[0].s.decode()
            source = self.renamed.get(node.input[0], node.input[0])
            form = self.forms.get(site)
            if isinstance(form, Integers):
                self._weight(site, form, node.output[0])
            elif isinstance(form, Codes):
                self.renamed[node.output[0]] = found[site] = self._activation(site, form, source)
            else:
                self.renamed[node.output[0]] = found[site] = source
        del self.graph.node[:]
        self.graph.node.extend(self.nodes)
        for output in self.graph.output:
            self._keep_output(output)
        return found

    def _activation(self, site: str, form: Codes, source: str) -> str:
        """Clip, quantize, dequantize; operands that are the same tensor on the same grid share the nodes."""
        if (source, form) in self.quantized:
            return self.quantized[source, form]
        step = self._constant(f"{site}.scale", form.step, TensorProto.FLOAT)
        kind = TensorProto.INT8 if form.low < 0 else TensorProto.UINT8
        zero = self._constant(f"{site}.zero", form.zero, kind)
        x, codes, result = source, f"{site}.codes", f"{site}.decoded"
        if (form.low, form.high) not in ((0, 255), (-128, 127)) and form.rounds:
            low = self._constant(f"{site}.low", form.step * (form.low - form.zero), TensorProto.FLOAT)
            high = self._constant(f"{site}.high", form.step * (form.high - form.zero), TensorProto.FLOAT)
            x = self._node("Clip", [x, low, high], f"{site}.clipped")
        self._node("QuantizeLinear", [x, step, zero], codes)
        self._node("DequantizeLinear", [codes, step, zero], result)
        self.quantized[source, form] = result
        return result

    def _weight(self, site: str, form: Integers, output: str) -> None:
        """Stored integers → int8 → dequantize. A transposition behind it moves into what is stored."""
        readers = self.readers[output]
        turns = [list(helper.get_node_attr_value(n, "perm")) for n in readers if n.op_type == "Transpose"]
        if len(turns) == len(readers) > 0 and all(t == turns[0] for t in turns):
            form = form.moved(turns[0])
            self.skipped |= {n.name for n in readers}
            self.renamed |= {n.output[0]: f"{site}.decoded" for n in readers}
        else:
            self.renamed[output] = f"{site}.decoded"
        values, step = form.values.contiguous(), form.step
        name = f"{site}.codes"
        zero: list[str] = []
        if form.bits == 8 and form.shift is None:
            self._initializer(name, values, TensorProto.INT8)
        elif form.bits == 8 and form.computed and form.shift is not None:
            self._initializer(
                name, values.int() + form.shift.reshape(_along(form.axis, values.ndim)), TensorProto.UINT8
            )
            zero = [f"{site}.zero"]
            self._initializer(zero[0], form.shift.reshape(()) if form.axis is None else form.shift, TensorProto.UINT8)
        elif form.shift is None:
            self._initializer(name, values, TensorProto.INT4)
            name = self._node("Cast", [name], f"{site}.int8", to=TensorProto.INT8)
        else:
            shift = form.shift.reshape(_along(form.axis, values.ndim))
            kind = TensorProto.UINT4 if form.bits == 4 else TensorProto.UINT8
            self._initializer(name, values.int() + shift, kind)
            narrow = int(shift.min()) >= 0 and int(shift.max()) <= 255
            self._initializer(f"{site}.shift", shift, TensorProto.UINT8 if narrow else TensorProto.INT32)
            by = self._node("Cast", [f"{site}.shift"], f"{site}.by", to=TensorProto.INT32)
            wide = self._node("Cast", [name], f"{site}.int32", to=TensorProto.INT32)
            wide = self._node("Sub", [wide, by], f"{site}.shifted")
            fits = TensorProto.INT8 if form.bits == 4 else TensorProto.INT16
            name = self._node("Cast", [wide], f"{site}.int8", to=fits)
        scalar = form.axis is None
        if not scalar and not form.computed:
            step = step.reshape(_along(form.axis, values.ndim))
        self._initializer(f"{site}.scale", step.reshape(()) if scalar else step, TensorProto.FLOAT)
        if form.computed:
            axis = {} if scalar else {"axis": form.axis}
            self._node("DequantizeLinear", [name, f"{site}.scale", *zero], f"{site}.decoded", **axis)
        else:  # no DequantizeLinear, which would invite the engine to quantize the other operand
            self._node("Cast", [name], f"{site}.float", to=TensorProto.FLOAT)
            self._node("Mul", [f"{site}.float", f"{site}.scale"], f"{site}.decoded")

    def _node(self, kind: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(kind, inputs, [output], name=f"{output}/{kind}", **attributes))
        return output

    def _constant(self, name: str, value: float, kind: int) -> str:
        self.graph.initializer.append(helper.make_tensor(name, kind, [], [value]))
        return name

    def _initializer(self, name: str, values: Tensor, kind: int) -> None:
        array = values.cpu().numpy().astype(helper.tensor_dtype_to_np_dtype(kind))
        self.graph.initializer.append(numpy_helper.from_array(array, name))

    def _keep_output(self, output: onnx.ValueInfoProto) -> None:
        """An output of the model keeps its name if a marker stood right before it."""
        source = self.renamed.get(output.name)
        if source is not None:
            self.graph.node.append(
                helper.make_node("Identity", [source], [output.name], name=f"{output.name}/Identity")
            )

    def add_taps(self, found: Mapping[str, str]) -> dict[str, str]:
        """Outputs that show inner tensors: the larger of each and the least of floats. A plain output would let
        engines compute in place over it (OpenVINO does) or fold it away, a factor join those of the integers before
        it (OpenVINO 2026.4 then loses one of them)."""
        least = float(torch.finfo(torch.float32).min)
        self.graph.initializer.append(helper.make_tensor("tap.least", TensorProto.FLOAT, [], [least]))
        for name in dict.fromkeys(found.values()):
            node = helper.make_node("Max", [name, "tap.least"], [f"{name}.tap"], name=f"{name}.tap")
            self.graph.node.append(node)
            self.graph.output.append(helper.make_tensor_value_info(f"{name}.tap", TensorProto.FLOAT, None))
        return {site: f"{name}.tap" for site, name in found.items()}

    def drop_unused(self) -> None:
        """Initializers that nothing reads (the decoded weights), and shapes of tensors that are gone."""
        read = {name for node in self.graph.node for name in node.input} | {o.name for o in self.graph.output}
        kept = [i for i in self.graph.initializer if i.name in read]
        del self.graph.initializer[:]
        self.graph.initializer.extend(kept)
        del self.graph.value_info[:]


def _along(axis: int | None, ndim: int) -> list[int]:
    """The shape in which a flat tensor lies along one axis."""
    return [-1 if a == axis else 1 for a in range(ndim)]


def _strip(model: onnx.ModelProto) -> None:
    """Keep of the exporter's notes only the module that a node belongs to: the rest names files of this machine."""
    for node in model.graph.node:
        scopes = [p.value for p in node.metadata_props if p.key == "pkg.torch.onnx.name_scopes"]
        del node.metadata_props[:]
        node.doc_string = ""
        if scopes:
            node.metadata_props.add(key="scope", value=_module(scopes[0]))
    for value in (*model.graph.input, *model.graph.output, *model.graph.initializer):
        del value.metadata_props[:]
        value.doc_string = ""
    del model.graph.metadata_props[:]


def _module(scopes: str) -> str:
    """The module's path in the exporter's list of nested scopes, the last of which is the node itself."""
    paths = re.findall(r"'([^']*)'", scopes)
    inside = [p.removeprefix("model.") for p in paths[:-1] if p.startswith("model.")]
    return inside[-1] if inside else ""
