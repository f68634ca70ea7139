"""ONNX, run by ONNX Runtime. Artifacts use standard operators only, so that other runtimes read them too."""

from __future__ import annotations

import ast
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx.compose
import onnx.parser
import onnxruntime
import onnxscript  # noqa: F401 - torch.onnx requires it
import torch
from google.protobuf.message import DecodeError
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from torch import Tensor, nn

from mobilevit.export.artifact import (
    IOU_THRESHOLD,
    MAX_PER_IMAGE,
    NO_LABEL,
    RAW_OUTPUTS,
    SCORE_THRESHOLD,
    ArtifactSpec,
    fill_batches,
    remove_nms,
    to_half,
)
from mobilevit.export.backend import InferenceFn, Operators, Signature
from mobilevit.export.quantization import find_group
from mobilevit.export.quiet import quiet
from mobilevit.export.rewrite import Formulation, optimize_for_inference

PRECISIONS = ("fp32", "fp16", "int8")
DYNAMIC = ("batch", "size")
POSTPROCESS_TASKS = ("detect", "segment")
FORMULATION = Formulation(attention="onnx", norm="layer")
OPSET = 23  # the first with an attention operator
CALIBRATION_BATCH = 16
# Operators in int8. Sigmoid and Mul are the two halves of SiLU: in float, each convolution would be dequantized for it.
# Other operators cost accuracy and time.
QUANTIZED = ("Conv", "Gemm", "MatMul", "Sigmoid", "Mul")
# NMS per class, then the top scores over all classes. The selected scores are scattered into zeros, so that any batch
# size works and the output shape is fixed: padding has score 0 and label -1.
NMS = f"""
<ir_version: IR_VERSION, opset_import: ["": {OPSET}]>
nms (float[B, A, 4] all_boxes, float[B, A, K] all_scores)
    => (float[B, {MAX_PER_IMAGE}, 4] boxes, float[B, {MAX_PER_IMAGE}] scores, int32[B, {MAX_PER_IMAGE}] labels)
<int64[1] nms_number = {{{MAX_PER_IMAGE}}}, float[1] nms_iou = {{{IOU_THRESHOLD}}},
 float[1] nms_threshold = {{{SCORE_THRESHOLD}}}, float nms_zero = {{0}}, int32 nms_no_label = {{{NO_LABEL}}},
 int64[4] nms_pads = {{0, 0, 0, {MAX_PER_IMAGE}}}, int64[1] nms_last = {{-1}}>
{{
    nms_by_class = Transpose <perm = [0, 2, 1]> (all_scores)
    nms_selected = NonMaxSuppression (all_boxes, nms_by_class, nms_number, nms_iou, nms_threshold)
    nms_shape = Shape (nms_by_class)
    nms_zeros = ConstantOfShape (nms_shape)
    nms_values = GatherND (nms_by_class, nms_selected)
    nms_scores = ScatterND (nms_zeros, nms_selected, nms_values)
    nms_row = Flatten <axis = 1> (nms_scores)
    nms_long_row = Pad (nms_row, nms_pads)
    scores, nms_flat_indices = TopK <axis = 1> (nms_long_row, nms_number)
    nms_anchors = Shape <start = 2> (nms_by_class)
    nms_classes = Div (nms_flat_indices, nms_anchors)
    nms_labels = Cast <to = 6> (nms_classes)
    nms_is_box = Greater (scores, nms_zero)
    labels = Where (nms_is_box, nms_labels, nms_no_label)
    nms_of_anchors = Mod (nms_flat_indices, nms_anchors)
    nms_indices = Unsqueeze (nms_of_anchors, nms_last)
    nms_boxes = GatherND <batch_dims = 1> (all_boxes, nms_indices)
    nms_are_boxes = Unsqueeze (nms_is_box, nms_last)
    boxes = Where (nms_are_boxes, nms_boxes, nms_zero)
}}
"""


def write(
    network: nn.Module, spec: ArtifactSpec, path: Path, metadata: Mapping[str, str], calibration: Sequence[Tensor]
) -> None:
    """Write an artifact; int8 is static, in QDQ format, with one scale per output channel."""
    model = optimize_for_inference(network, FORMULATION)
    has_nms = remove_nms(model)
    if spec.precision == "fp16":
        model = to_half(model)
    with quiet():
        program = torch.onnx.export(
            model,
            (spec.example(),),
            dynamo=True,
            opset_version=OPSET,
            input_names=["images"],
            output_names=[f"all_{name}" for name in RAW_OUTPUTS["detect"]] if has_nms else spec.outputs,
            dynamic_shapes=spec.dynamic_shapes(),
            verbose=False,
        )
    assert program is not None
    proto = program.model_proto
    if spec.precision == "int8":
        floats = _not_silu(proto.graph) + _nodes_of(proto.graph, spec.float_groups)
        proto = _quantized(proto, calibration, floats + (_depthwise(proto.graph) if spec.browser else []))
    if has_nms:
        proto = _with_nms(proto)
    # Remove the exporter's notes on each node and unused operator domains.
    for node in proto.graph.node:
        del node.metadata_props[:]
    del proto.metadata_props[:], proto.opset_import[:]
    proto.opset_import.add(domain="", version=OPSET)
    for key, value in metadata.items():
        proto.metadata_props.add(key=key, value=value)
    onnx.checker.check_model(proto, full_check=True)
    onnx.save(proto, path)


def load(path: Path, num_threads: int) -> InferenceFn:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads
    options.log_severity_level = 3
    # Otherwise idle threads spin and slow down the code that runs next in this process.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def infer(images: np.ndarray) -> tuple[np.ndarray, ...]:
        return tuple(np.asarray(output) for output in session.run(None, {name: images}))

    return infer


def operators(path: Path) -> Operators:
    nodes = _read(path).graph.node
    return Operators(len(nodes), tuple(node.op_type for node in nodes if node.domain not in ("", "ai.onnx")))


def read_metadata(path: Path) -> dict[str, str]:
    return {prop.key: prop.value for prop in _read(path).metadata_props}


def signature(path: Path) -> Signature:
    graph = _read(path).graph
    images, output = graph.input[0].type.tensor_type, graph.output[0].type.tensor_type
    shape = tuple(axis.dim_value if axis.HasField("dim_value") else None for axis in images.shape.dim)
    return Signature(shape, images.elem_type == onnx.TensorProto.UINT8, output.shape.dim[-1].dim_value)


def _read(path: Path) -> onnx.ModelProto:
    try:
        return onnx.load(path, load_external_data=False)
    except DecodeError:
        raise ValueError(f"{path}: not an ONNX model, or damaged; export it again") from None


class _Calibration(CalibrationDataReader):
    """Batches in the format of the quantizer."""

    def __init__(self, batches: Iterator[Tensor]):
        self._batches = batches

    def get_next(self) -> dict[str, np.ndarray] | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        batch = next(self._batches, None)
        return None if batch is None else {"images": batch.numpy()}


def _quantized(proto: onnx.ModelProto, calibration: Sequence[Tensor], floats: Sequence[str]) -> onnx.ModelProto:
    """Quantize all operators of the types in `QUANTIZED`, except those with the names `floats`."""
    (shape,) = (value.type.tensor_type.shape.dim for value in proto.graph.input)
    size = shape[0].dim_value or CALIBRATION_BATCH  # 0 where the batch is dynamic
    batches = fill_batches(calibration, size)
    with tempfile.TemporaryDirectory() as folder, quiet():
        float_path, int8_path = Path(folder) / "float.onnx", Path(folder) / "int8.onnx"
        onnx.save(proto, float_path)
        quantize_static(
            float_path,
            int8_path,
            _Calibration(batches),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=list(QUANTIZED),
            nodes_to_exclude=list(floats),
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
        quantized = onnx.load(int8_path)
    _shorten_names(quantized.graph)
    return quantized


def _nodes_of(graph: onnx.GraphProto, groups: Sequence[str]) -> list[str]:
    """Names of the operators in these groups of layers."""
    names = []
    for node in graph.node:
        notes = {note.key: note.value for note in node.metadata_props}
        # The modules that contain the operator, outermost first, and the operator.
        scopes = ast.literal_eval(notes.get("pkg.torch.onnx.name_scopes", "[]"))
        if len(scopes) > 1 and find_group(scopes[-2]) in groups:
            names.append(node.name)
    return names


def _not_silu(graph: onnx.GraphProto) -> list[str]:
    """Names of the Sigmoid and Mul operators outside of SiLU, such as those that compute scores and boxes."""
    sigmoids = {node.output[0]: node for node in graph.node if node.op_type == "Sigmoid"}
    products = [node for node in graph.node if node.op_type == "Mul"]
    names = {node.name for node in (*sigmoids.values(), *products)}
    for product in products:
        for x, factor in (product.input, reversed(product.input)):
            if factor in sigmoids and list(sigmoids[factor].input) == [x]:
                names -= {product.name, sigmoids[factor].name}
    return sorted(names)


def _depthwise(graph: onnx.GraphProto) -> list[str]:
    """Names of the depthwise convolutions and of the SiLU after each; alone, ONNX Runtime would quantize them anyway.

    In WebAssembly, int8 takes six times the time of float for them.
    """
    convolutions = [node for node in graph.node if node.op_type == "Conv"]
    depthwise = [node for node in convolutions if any(x.name == "group" and x.i > 1 for x in node.attribute)]
    outputs = {node.output[0] for node in depthwise}
    activations = [node for node in graph.node if node.op_type in ("Sigmoid", "Mul") and outputs & set(node.input)]
    return [node.name for node in (*depthwise, *activations)]


def _with_nms(proto: onnx.ModelProto) -> onnx.ModelProto:
    nms = onnx.parser.parse_model(NMS.replace("IR_VERSION", str(proto.ir_version)))
    del proto.opset_import[:]
    proto.opset_import.add(domain="", version=OPSET)
    names = [f"all_{name}" for name in RAW_OUTPUTS["detect"]]
    return onnx.compose.merge_models(proto, nms, [(name, name) for name in names])


def _shorten_names(graph: onnx.GraphProto) -> None:
    """Replace the quantizer's names by numbers: they are a tenth of a small int8 file."""
    fixed = {value.name for value in (*graph.input, *graph.output)} | {""}  # "" is an omitted input
    numbers: dict[str, str] = {}

    def short(name: str) -> str:
        return name if name in fixed else numbers.setdefault(name, f"{len(numbers):x}")

    del graph.value_info[:]  # inferred shapes
    for tensor in graph.initializer:
        tensor.name = short(tensor.name)
    for node in graph.node:
        node.name = ""
        node.input[:] = [short(name) for name in node.input]
        node.output[:] = [short(name) for name in node.output]
