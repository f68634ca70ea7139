"""ONNX, run by ONNX Runtime: standard operators alone, so that every other reader of ONNX takes it too."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnx.compose
import onnx.parser
import onnxruntime
import onnxscript  # noqa: F401 - torch.onnx wants it, and would say so late
import torch
from google.protobuf.message import DecodeError
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from torch import Tensor, nn

from mobilevit.export.artifact import (
    IOU_THRESHOLD,
    MAX_PER_IMAGE,
    NOTHING,
    OUTPUTS,
    SCORE_THRESHOLD,
    before_nms,
    in_half,
)
from mobilevit.export.quiet import quiet
from mobilevit.export.rewrite import Formulation, fast
from mobilevit.export.verify import filled_batches

if TYPE_CHECKING:
    from mobilevit.export import Operators, Run, Target

PRECISIONS = ("fp32", "fp16", "int8")
DYNAMIC = ("batch", "size")
ANSWERS = ("detect", "segment")
FORMULATION = Formulation(attention="onnx", norm="layer")
OPSET = 23  # the first that has attention as an operator
CALIBRATION_BATCH = 16
QUANTIZED = ("Conv", "Gemm", "MatMul")  # the rest costs accuracy and, between float neighbours, time
# What NMS leaves of every class, put where its score was among zeros, then the best of all. So any number of images
# goes through at once, and what comes out has always the same shape: a score of 0 and a label of -1 are no box.
NMS = f"""
<ir_version: IR_VERSION, opset_import: ["": {OPSET}]>
nms (float[B, A, 4] all_boxes, float[B, A, K] all_scores)
    => (float[B, {MAX_PER_IMAGE}, 4] boxes, float[B, {MAX_PER_IMAGE}] scores, int32[B, {MAX_PER_IMAGE}] labels)
<int64[1] nms_number = {{{MAX_PER_IMAGE}}}, float[1] nms_iou = {{{IOU_THRESHOLD}}},
 float[1] nms_threshold = {{{SCORE_THRESHOLD}}}, float nms_zero = {{0}}, int32 nms_nothing = {{{NOTHING}}},
 int64[4] nms_pads = {{0, 0, 0, {MAX_PER_IMAGE}}}, int64[1] nms_last = {{-1}}>
{{
    nms_by_class = Transpose <perm = [0, 2, 1]> (all_scores)
    nms_kept = NonMaxSuppression (all_boxes, nms_by_class, nms_number, nms_iou, nms_threshold)
    nms_shape = Shape (nms_by_class)
    nms_zeros = ConstantOfShape (nms_shape)
    nms_values = GatherND (nms_by_class, nms_kept)
    nms_scores = ScatterND (nms_zeros, nms_kept, nms_values)
    nms_row = Flatten <axis = 1> (nms_scores)
    nms_long_row = Pad (nms_row, nms_pads)
    scores, nms_places = TopK <axis = 1> (nms_long_row, nms_number)
    nms_anchors = Shape <start = 2> (nms_by_class)
    nms_classes = Div (nms_places, nms_anchors)
    nms_labels = Cast <to = 6> (nms_classes)
    nms_is_box = Greater (scores, nms_zero)
    labels = Where (nms_is_box, nms_labels, nms_nothing)
    nms_of_anchors = Mod (nms_places, nms_anchors)
    nms_indices = Unsqueeze (nms_of_anchors, nms_last)
    nms_boxes = GatherND <batch_dims = 1> (all_boxes, nms_indices)
    nms_are_boxes = Unsqueeze (nms_is_box, nms_last)
    boxes = Where (nms_are_boxes, nms_boxes, nms_zero)
}}
"""


def write(
    network: nn.Module, target: Target, path: Path, metadata: Mapping[str, str], calibration: Sequence[Tensor]
) -> None:
    """See `Backend.write`. In fp16 input and output stay float32; int8 is static, QDQ, a scale per output channel."""
    model, nms = before_nms(fast(network, FORMULATION))
    if target.precision == "fp16":
        model = in_half(model)
    with quiet():
        program = torch.onnx.export(
            model,
            (target.example(),),
            dynamo=True,
            opset_version=OPSET,
            input_names=["images"],
            output_names=[f"all_{name}" for name in OUTPUTS["detect"]] if nms else target.outputs,
            dynamic_shapes=target.dynamic_shapes(),
            verbose=False,
        )
    assert program is not None
    proto = program.model_proto
    if target.precision == "int8":
        proto = _quantized(proto, calibration)
    if nms:
        proto = _with_nms(proto)
    # What the tools leave of themselves: notes on every node, where in the source it came from, and unused domains.
    for node in proto.graph.node:
        del node.metadata_props[:]
    del proto.metadata_props[:], proto.opset_import[:]
    proto.opset_import.add(domain="", version=OPSET)
    for key, value in metadata.items():
        proto.metadata_props.add(key=key, value=value)
    onnx.checker.check_model(proto, full_check=True)
    onnx.save(proto, path)


def load(path: Path, num_threads: int) -> Run:
    """See `Backend.load`."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads
    options.log_severity_level = 3
    # Threads that wait by spinning steal the processor from whatever runs next in this process.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def run(images: np.ndarray) -> tuple[np.ndarray, ...]:
        return tuple(np.asarray(output) for output in session.run(None, {name: images}))

    return run


def operators(path: Path) -> Operators:
    """See `Backend.operators`; outside are those of no standard domain."""
    from mobilevit.export import Operators

    nodes = onnx.load(path, load_external_data=False).graph.node
    return Operators(len(nodes), tuple(node.op_type for node in nodes if node.domain not in ("", "ai.onnx")))


def read_metadata(path: Path) -> dict[str, str]:
    """What `write` was given to say about the artifact."""
    try:
        model = onnx.load(path, load_external_data=False)
    except DecodeError:
        raise ValueError(f"{path}: not an ONNX model, or damaged; export it again") from None
    return {prop.key: prop.value for prop in model.metadata_props}


class _Calibration(CalibrationDataReader):
    """Images in batches, as the quantizer asks for them."""

    def __init__(self, batches: Iterator[Tensor]):
        self._batches = batches

    def get_next(self) -> dict[str, np.ndarray] | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The next batch, None after the last."""
        batch = next(self._batches, None)
        return None if batch is None else {"images": batch.numpy()}


def _quantized(proto: onnx.ModelProto, calibration: Sequence[Tensor]) -> onnx.ModelProto:
    (shape,) = (value.type.tensor_type.shape.dim for value in proto.graph.input)
    size = shape[0].dim_value or CALIBRATION_BATCH  # 0 where the batch is dynamic
    batches = filled_batches(calibration, size)
    with tempfile.TemporaryDirectory() as folder, quiet():
        source, target = Path(folder) / "float.onnx", Path(folder) / "int8.onnx"
        onnx.save(proto, source)
        quantize_static(
            source,
            target,
            _Calibration(batches),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=list(QUANTIZED),
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
        quantized = onnx.load(target)
    _shorten_names(quantized.graph)
    return quantized


def _with_nms(proto: onnx.ModelProto) -> onnx.ModelProto:
    nms = onnx.parser.parse_model(NMS.replace("IR_VERSION", str(proto.ir_version)))
    del proto.opset_import[:]
    proto.opset_import.add(domain="", version=OPSET)
    names = [f"all_{name}" for name in OUTPUTS["detect"]]
    return onnx.compose.merge_models(proto, nms, [(name, name) for name in names])


def _shorten_names(graph: onnx.GraphProto) -> None:
    """Number what the quantizer has named: of a small network in int8 the names are a tenth."""
    kept = {value.name for value in (*graph.input, *graph.output)} | {""}  # "" is an input left out
    numbers: dict[str, str] = {}

    def short(name: str) -> str:
        return name if name in kept else numbers.setdefault(name, f"{len(numbers):x}")

    del graph.value_info[:]  # shapes, which follow from the input's
    for tensor in graph.initializer:
        tensor.name = short(tensor.name)
    for node in graph.node:
        node.name = ""
        node.input[:] = [short(name) for name in node.input]
        node.output[:] = [short(name) for name in node.output]
