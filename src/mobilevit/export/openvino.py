"""OpenVINO: intermediate representation (.xml, weights in a .bin file beside it), run on the CPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nncf
import numpy as np
import openvino
import torch
from openvino import opset13 as ops
from openvino.frontend.pytorch.fx_decoder import TorchFXPythonDecoder
from openvino.passes import ConstantFolding, Manager
from torch import Tensor, nn

from mobilevit.export.artifact import (
    IOU_THRESHOLD,
    MAX_PER_IMAGE,
    NO_LABEL,
    SCORE_THRESHOLD,
    ArtifactSpec,
    fill_batches,
    remove_nms,
    remove_postprocess,
)
from mobilevit.export.backend import InferenceFn, Operators, Signature
from mobilevit.export.quantization import group_of_node
from mobilevit.export.quiet import quiet
from mobilevit.export.rewrite import Formulation, optimize_for_inference
from mobilevit.messages import first_line

PRECISIONS = ("fp32", "fp16", "bf16", "int8")
DYNAMIC = ("batch", "size")
POSTPROCESS_TASKS = ("detect", "segment")
# The fused attention is incorrect for fixed shapes (2026.4: errors of a standard deviation).
FORMULATION = Formulation(attention="rank4", norm="mean")
# Inference precision of float operators. By default OpenVINO computes in bf16 if the processor supports it.
DEFAULT_PRECISION = "default"
INFERENCE_PRECISION = {"fp32": "f32", "fp16": "f32", "bf16": "bf16", "int8": DEFAULT_PRECISION}
METADATA = "mobilevit"  # section of the rt_info
# Operators that only move data. Their reference implementation is not slower, so they do not count as fallback.
DATA_MOVEMENT = (
    *("Concatenation", "Split", "StridedSlice", "Reshape", "Transpose", "Broadcast", "Gather", "GatherND", "Pad"),
    *("ShapeOf", "Reorder"),
)


def write(
    network: nn.Module, spec: ArtifactSpec, path: Path, metadata: Mapping[str, str], calibration: Sequence[Tensor]
) -> None:
    """Write an artifact; the weights go to `path` with the suffix .bin."""
    shape: list[int | openvino.Dimension] = list(spec.example().shape)
    for axis, (_, minimum) in spec.dynamic_axes.items():
        shape[axis] = openvino.Dimension(minimum, -1)
    module = optimize_for_inference(network, FORMULATION)
    has_nms = remove_nms(module)
    postprocess = remove_postprocess(module) if spec.precision == "int8" else nn.Identity()
    with quiet():
        program = torch.export.export(module, (spec.example(),), dynamic_shapes=spec.dynamic_shapes())
        decoder = TorchFXPythonDecoder.from_exported_program(program)
        model = openvino.convert_model(decoder)
        model.reshape(openvino.PartialShape(shape))  # the converter makes fixed axes dynamic
        passes = Manager()
        passes.register_pass(ConstantFolding())
        passes.run_passes(model)
        if spec.precision == "int8":
            nodes = {node.name for node in decoder.pt_module.graph.nodes if group_of_node(node) in spec.float_groups}
            # The names of operators are those of their nodes, followed by a slash.
            names = [op.get_friendly_name() for op in model.get_ops() if op.get_friendly_name().split("/")[0] in nodes]
            model = _quantized(model, spec.batch_size, calibration, names)
        if not isinstance(postprocess, nn.Identity):
            with torch.no_grad():
                outputs = module(spec.example())
            model = _concatenated(model, _convert_after(model, postprocess, outputs))
        if has_nms:
            model = _with_nms(model)
    model.inputs[0].tensor.set_names({"images"})
    for output, name in zip(model.outputs, spec.outputs, strict=True):
        output.tensor.set_names({name})
    for key, value in (*metadata.items(), ("computed_in", INFERENCE_PRECISION[spec.precision])):
        model.set_rt_info(value, [METADATA, key])
    # In int8, fp16 storage of the remaining float weights (biases mostly) is accurate enough.
    openvino.save_model(model, path, compress_to_fp16=spec.precision in ("fp16", "int8"))


def load(path: Path, num_threads: int) -> InferenceFn:
    compiled = _compile(path, num_threads)
    request = compiled.create_infer_request()

    def infer(images: np.ndarray) -> tuple[np.ndarray, ...]:
        return tuple(output.copy() for output in request.infer([images]).to_tuple())

    return infer


def operators(path: Path) -> Operators:
    """Count the operators that are executed; the fallback is OpenVINO's reference implementation."""
    nodes = [node.get_rt_info() for node in _compile(path, 1).get_runtime_model().get_ops()]
    layers = [(_text(info["layerType"]), _text(info["primitiveType"])) for info in nodes]
    layers = [(kind, primitive) for kind, primitive in layers if kind not in ("Const", "Input", "Output")]
    fallback = [kind for kind, primitive in layers if primitive.startswith("ref") and kind not in DATA_MOVEMENT]
    return Operators(len(layers), tuple(fallback))


def read_metadata(path: Path) -> dict[str, str]:
    """Return the metadata given to `write`, and the inference precision as `computed_in`."""
    return _metadata(path, _read(path))


def signature(path: Path) -> Signature:
    model = _read(path)
    shape = tuple(None if axis.is_dynamic else axis.get_length() for axis in model.input(0).get_partial_shape())
    last = model.output(0).get_partial_shape()[-1]
    uint8 = model.input(0).get_element_type() == openvino.Type.u8
    return Signature(shape, uint8, 0 if last.is_dynamic else last.get_length())


def _quantized(
    model: openvino.Model, batch_size: int, calibration: Sequence[Tensor], float_operators: Sequence[str]
) -> openvino.Model:
    if not calibration:
        raise ValueError("int8 requires calibration inputs, and there are none")
    batches = [batch.numpy() for batch in fill_batches(calibration, batch_size)]
    # MIXED: asymmetric activations, for SiLU. TRANSFORMER: norms stay float.
    return nncf.quantize(
        model,
        nncf.Dataset(batches),
        preset=nncf.QuantizationPreset.MIXED,
        model_type=nncf.ModelType.TRANSFORMER,
        subset_size=len(batches),
        ignored_scope=nncf.IgnoredScope(names=list(float_operators), validate=False),
    )


def _concatenated(first: openvino.Model, second: openvino.Model) -> openvino.Model:
    """One model that feeds the outputs of `first` to `second`."""
    for result, parameter in zip(first.get_results(), second.get_parameters(), strict=True):
        parameter.output(0).replace(result.input_value(0))
    return _model(second.get_results(), first.get_parameters())


def _model(results: Sequence[Any], parameters: Sequence[Any]) -> openvino.Model:
    return openvino.Model(list(results), list(parameters))  # pyright: ignore[reportGeneralTypeIssues]


def _with_nms(model: openvino.Model) -> openvino.Model:
    """Append the operators of `NMS` in onnx.py to a model with the outputs boxes and scores."""
    boxes, scores = (result.input_value(0) for result in model.get_results())
    number = ops.constant(MAX_PER_IMAGE, np.int64)
    by_class = ops.transpose(scores, [0, 2, 1])
    limits = (number, ops.constant(IOU_THRESHOLD, np.float32), ops.constant(SCORE_THRESHOLD, np.float32))
    selected = ops.non_max_suppression(
        boxes, by_class, *limits, sort_result_descending=False, output_type="i64"
    ).output(0)
    zeros = ops.broadcast(ops.constant(0, np.float32), ops.shape_of(by_class))
    selected_scores = ops.scatter_nd_update(zeros, selected, ops.gather_nd(by_class, selected))
    row = ops.reshape(selected_scores, [0, -1], special_zero=True)
    long_row = ops.pad(row, [0, 0], [0, MAX_PER_IMAGE], "constant", ops.constant(0, np.float32))
    best = ops.topk(long_row, number, axis=1, mode="max", sort="value", index_element_type="i64")
    num_anchors = ops.gather(ops.shape_of(by_class), [2], 0)
    is_box = ops.greater(best.output(0), ops.constant(0, np.float32))
    labels = ops.convert(ops.divide(best.output(1), num_anchors), "i32")
    indices = ops.unsqueeze(ops.mod(best.output(1), num_anchors), -1)
    best_boxes = ops.gather_nd(boxes, indices, batch_dims=1)
    outputs = [
        ops.select(ops.unsqueeze(is_box, -1), best_boxes, ops.constant(0, np.float32)).output(0),
        best.output(0),
        ops.select(is_box, labels, ops.constant(NO_LABEL, np.int32)).output(0),
    ]
    return _model([ops.result(output) for output in outputs], model.get_parameters())


def _convert_after(model: openvino.Model, module: nn.Module, outputs: Any) -> openvino.Model:
    """Convert `module` for the outputs of `model`; `outputs` are examples of them."""
    converted = openvino.convert_model(torch.export.export(module, (outputs,)))
    for parameter, output in zip(converted.get_parameters(), model.outputs, strict=True):
        parameter.set_partial_shape(output.get_partial_shape())
    converted.validate_nodes_and_infer_types()
    return converted


def _read(path: Path) -> openvino.Model:
    try:
        return openvino.Core().read_model(path)
    except RuntimeError as error:
        raise ValueError(f"{path}: OpenVINO cannot read it: {first_line(error)}") from None


def _compile(path: Path, num_threads: int) -> openvino.CompiledModel:
    model = _read(path)
    computed_in = _metadata(path, model)["computed_in"]
    options: dict[str, str | int] = {"INFERENCE_NUM_THREADS": num_threads}
    if computed_in != DEFAULT_PRECISION:
        options["INFERENCE_PRECISION_HINT"] = computed_in
    return openvino.Core().compile_model(model, "CPU", options)


def _metadata(path: Path, model: openvino.Model) -> dict[str, str]:
    if not model.has_rt_info([METADATA]):
        raise ValueError(f"{path}: not written by mobilevit: the metadata is missing")
    return {key: _text(value) for key, value in model.rt_info[METADATA].items()}


def _text(value: openvino.OVAny) -> str:
    return value.astype(str)
