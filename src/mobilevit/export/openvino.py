"""OpenVINO: the intermediate representation, an .xml with its weights in a .bin beside it, on the processor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nncf
import numpy as np
import openvino
import torch
from openvino import opset13 as ops
from openvino.passes import ConstantFolding, Manager
from torch import Tensor, nn

from mobilevit.export.artifact import (
    IOU_THRESHOLD,
    MAX_PER_IMAGE,
    NOTHING,
    SCORE_THRESHOLD,
    Deployed,
    before_nms,
)
from mobilevit.export.quiet import quiet
from mobilevit.export.rewrite import Formulation, fast
from mobilevit.export.verify import filled_batches
from mobilevit.images import first_line

if TYPE_CHECKING:
    from mobilevit.export import Operators, Run, Target

PRECISIONS = ("fp32", "fp16", "bf16", "int8")
DYNAMIC = ("batch", "size")
ANSWERS = ("detect", "segment")
# Of fixed shapes, the fused attention is computed wrongly (2026.4: a logit is off by its standard deviation).
FORMULATION = Formulation(attention="rank4", norm="mean")
# What is computed in. Left to itself, OpenVINO takes bf16 wherever the processor has it.
COMPUTED_IN = {"fp32": "f32", "fp16": "f32", "bf16": "bf16", "int8": "f32"}
METADATA = "mobilevit"  # the section of the file's rt_info
# What moves data needs no more than the plain code that it has.
MOVES = (
    *("Concatenation", "Split", "StridedSlice", "Reshape", "Transpose", "Broadcast", "Gather", "GatherND", "Pad"),
    *("ShapeOf", "Reorder"),
)


def write(
    network: nn.Module, target: Target, path: Path, metadata: Mapping[str, str], calibration: Sequence[Tensor]
) -> None:
    """See `Backend.write`. The weights go to `path` with the ending .bin."""
    shape: list[int | openvino.Dimension] = list(target.example().shape)
    for axis, (_, least) in target.open_axes.items():
        shape[axis] = openvino.Dimension(least, -1)
    module, nms = before_nms(fast(network, FORMULATION))
    finish = None
    if target.precision == "int8" and isinstance(module, Deployed) and not isinstance(module.finish, nn.Identity):
        finish, module.finish = module.finish, nn.Identity()
    with quiet():
        program = torch.export.export(module, (target.example(),), dynamic_shapes=target.dynamic_shapes())
        model = openvino.convert_model(program)
        model.reshape(openvino.PartialShape(shape))  # the converter leaves axes open that are not
        passes = Manager()
        passes.register_pass(ConstantFolding())
        passes.run_passes(model)
        if target.precision == "int8":
            model = _quantized(model, target.batch_size, calibration)
        if finish is not None:
            with torch.no_grad():
                outputs = module(target.example())
            model = _joined(model, _behind(finish, outputs, model))
        if nms:
            model = _with_nms(model)
    model.inputs[0].tensor.set_names({"images"})
    for output, name in zip(model.outputs, target.outputs, strict=True):
        output.tensor.set_names({name})
    for key, value in (*metadata.items(), ("computed_in", COMPUTED_IN[target.precision])):
        model.set_rt_info(value, [METADATA, key])
    # What int8 leaves as it is, biases for the most part, does not mind being stored as fp16.
    openvino.save_model(model, path, compress_to_fp16=target.precision in ("fp16", "int8"))


def load(path: Path, num_threads: int) -> Run:
    """See `Backend.load`."""
    compiled = _compile(path, num_threads)
    request = compiled.create_infer_request()

    def run(images: np.ndarray) -> tuple[np.ndarray, ...]:
        return tuple(output.copy() for output in request.infer([images]).to_tuple())

    return run


def operators(path: Path) -> Operators:
    """See `Backend.operators`; counted as they are run, constants aside. Outside are those without optimised code."""
    from mobilevit.export import Operators

    nodes = [node.get_rt_info() for node in _compile(path, 1).get_runtime_model().get_ops()]
    run = [(_text(info["layerType"]), _text(info["primitiveType"])) for info in nodes]
    run = [(kind, code) for kind, code in run if kind not in ("Const", "Input", "Output")]
    outside = [kind for kind, code in run if code.startswith("ref") and kind not in MOVES]
    return Operators(len(run), tuple(outside))


def read_metadata(path: Path) -> dict[str, str]:
    """What `write` was given as metadata, and in which numbers it is computed."""
    return _metadata(path, _read(path))


def _quantized(model: openvino.Model, batch_size: int, calibration: Sequence[Tensor]) -> openvino.Model:
    if not calibration:
        raise ValueError("int8 is calibrated on real inputs, and there are none")
    batches = [batch.numpy() for batch in filled_batches(calibration, batch_size)]
    # SiLU is not symmetric about 0, which "mixed" heeds. The norms stay float, as `ModelType.TRANSFORMER` has it.
    return nncf.quantize(
        model,
        nncf.Dataset(batches),
        preset=nncf.QuantizationPreset.MIXED,
        model_type=nncf.ModelType.TRANSFORMER,
        subset_size=len(batches),
    )


def _joined(first: openvino.Model, second: openvino.Model) -> openvino.Model:
    """One model of two, of which the second takes what the first gives."""
    for result, parameter in zip(first.get_results(), second.get_parameters(), strict=True):
        parameter.output(0).replace(result.input_value(0))
    return _model(second.get_results(), first.get_parameters())


def _model(results: Sequence[Any], parameters: Sequence[Any]) -> openvino.Model:
    return openvino.Model(list(results), list(parameters))  # pyright: ignore[reportGeneralTypeIssues]


def _with_nms(model: openvino.Model) -> openvino.Model:
    """`model`, which gives boxes and scores, with what `onnx.NMS` does behind it, operator by operator."""
    boxes, scores = (result.input_value(0) for result in model.get_results())
    number = ops.constant(MAX_PER_IMAGE, np.int64)
    by_class = ops.transpose(scores, [0, 2, 1])
    limits = (number, ops.constant(IOU_THRESHOLD, np.float32), ops.constant(SCORE_THRESHOLD, np.float32))
    kept = ops.non_max_suppression(boxes, by_class, *limits, sort_result_descending=False, output_type="i64").output(0)
    zeros = ops.broadcast(ops.constant(0, np.float32), ops.shape_of(by_class))
    kept_scores = ops.scatter_nd_update(zeros, kept, ops.gather_nd(by_class, kept))
    row = ops.reshape(kept_scores, [0, -1], special_zero=True)
    long_row = ops.pad(row, [0, 0], [0, MAX_PER_IMAGE], "constant", ops.constant(0, np.float32))
    best = ops.topk(long_row, number, axis=1, mode="max", sort="value", index_element_type="i64")
    num_anchors = ops.gather(ops.shape_of(by_class), [2], 0)
    is_box = ops.greater(best.output(0), ops.constant(0, np.float32))
    labels = ops.convert(ops.divide(best.output(1), num_anchors), "i32")
    indices = ops.unsqueeze(ops.mod(best.output(1), num_anchors), -1)
    of_best = ops.gather_nd(boxes, indices, batch_dims=1)
    outputs = [
        ops.select(ops.unsqueeze(is_box, -1), of_best, ops.constant(0, np.float32)).output(0),
        best.output(0),
        ops.select(is_box, labels, ops.constant(NOTHING, np.int32)).output(0),
    ]
    return _model([ops.result(output) for output in outputs], model.get_parameters())


def _behind(finish: nn.Module, outputs: Any, before: openvino.Model) -> openvino.Model:
    """What int8 leaves alone, as a model for the outputs of `before`, which are like `outputs`."""
    converted = openvino.convert_model(torch.export.export(finish, (outputs,)))
    for parameter, output in zip(converted.get_parameters(), before.outputs, strict=True):
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
    options = {"INFERENCE_PRECISION_HINT": computed_in, "INFERENCE_NUM_THREADS": num_threads}
    return openvino.Core().compile_model(model, "CPU", options)


def _metadata(path: Path, model: openvino.Model) -> dict[str, str]:
    if not model.has_rt_info([METADATA]):
        raise ValueError(f"{path}: not written by mobilevit, it has no metadata of ours")
    return {key: _text(value) for key, value in model.rt_info[METADATA].items()}


def _text(value: openvino.OVAny) -> str:
    return value.astype(str)
