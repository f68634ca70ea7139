"""OpenVINO: the intermediate representation, an .xml with its weights in a .bin beside it, on the processor."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import nncf
import numpy as np
import openvino
import torch
from openvino.passes import ConstantFolding, Manager
from torch import Tensor, nn

from mobilevit.export.rewrite import Formulation, fast
from mobilevit.pictures import first_line

if TYPE_CHECKING:
    from mobilevit.export import Operators, Run, Target

PRECISIONS = ("fp32", "fp16", "bf16", "int8")
DYNAMIC = ("batch", "size")
# Of fixed shapes, the fused attention is computed wrongly (2026.4: a logit is off by its standard deviation).
FORMULATION = Formulation(attention="rank4", norm="mean")
# What is computed in. Left to itself, OpenVINO takes bf16 wherever the processor has it.
COMPUTED_IN = {"fp32": "f32", "fp16": "f32", "bf16": "bf16", "int8": "f32"}
METADATA = "mobilevit"  # the section of the file's rt_info
# What moves data needs no more than the plain code that it has.
MOVES = ("Concatenation", "StridedSlice", "Reshape", "Transpose", "Broadcast", "Gather", "ShapeOf", "Reorder")


def write(
    network: nn.Module, target: Target, path: Path, metadata: Mapping[str, str], calibration: Sequence[Tensor]
) -> None:
    """See `Backend.write`. The weights go to `path` with the ending .bin."""
    dynamic: dict[int, torch.export.Dim | object] = {}
    shape: list[int | openvino.Dimension] = list(target.example().shape)
    if target.dynamic_batch:
        dynamic[0] = torch.export.Dim("batch", min=1)
        shape[0] = openvino.Dimension(1, -1)
    if target.dynamic_size:
        first = 1 if target.uint8 else 2
        dynamic |= {first: torch.export.Dim("height", min=65), first + 1: torch.export.Dim("width", min=65)}
        shape[first : first + 2] = [openvino.Dimension(65, -1)] * 2
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the converters, about themselves
        program = torch.export.export(
            fast(network, FORMULATION), (target.example(),), dynamic_shapes=(dynamic,) if dynamic else None
        )
        model = openvino.convert_model(program)
        model.reshape(openvino.PartialShape(shape))  # the converter leaves axes open that are not
        passes = Manager()
        passes.register_pass(ConstantFolding())
        passes.run_passes(model)
        if target.precision == "int8":
            model = _quantized(model, target.batch_size, calibration)
    model.inputs[0].tensor.set_names({"pictures"})
    model.outputs[0].tensor.set_names({"logits"})
    for key, value in (*metadata.items(), ("computed_in", COMPUTED_IN[target.precision])):
        model.set_rt_info(value, [METADATA, key])
    # What int8 leaves as it is, biases for the most part, does not mind being stored as fp16.
    openvino.save_model(model, path, compress_to_fp16=target.precision in ("fp16", "int8"))


def load(path: Path, num_threads: int) -> Run:
    """See `Backend.load`."""
    compiled = _compile(path, num_threads)
    request = compiled.create_infer_request()

    def run(pictures: np.ndarray) -> np.ndarray:
        return request.infer([pictures])[0].copy()

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
    num_batches = -(-len(calibration) // batch_size)
    filled = [calibration[i % len(calibration)].numpy() for i in range(num_batches * batch_size)]
    batches = [np.concatenate(filled[i : i + batch_size]) for i in range(0, len(filled), batch_size)]
    # SiLU is not symmetric about 0, which "mixed" heeds. The norms stay float, as `ModelType.TRANSFORMER` has it.
    return nncf.quantize(
        model,
        nncf.Dataset(batches),
        preset=nncf.QuantizationPreset.MIXED,
        model_type=nncf.ModelType.TRANSFORMER,
        subset_size=num_batches,
    )


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
