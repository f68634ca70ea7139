"""ONNX, run by ONNX Runtime: standard operators alone, so that every other reader of ONNX takes it too."""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnxruntime
import onnxscript  # noqa: F401 - torch.onnx wants it, and would say so late
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from torch import Tensor, nn

from mobilevit.export.rewrite import Formulation, Half, fast

if TYPE_CHECKING:
    from mobilevit.export import Operators, Run, Target

PRECISIONS = ("fp32", "fp16", "int8")
DYNAMIC = ("batch", "size")
FORMULATION = Formulation(attention="onnx", norm="layer")
OPSET = 23  # the first that has attention as an operator
CALIBRATION_BATCH = 16
QUANTIZED = ("Conv", "Gemm", "MatMul")  # the rest costs accuracy and, between float neighbours, time


def write(
    network: nn.Module, target: Target, path: Path, metadata: Mapping[str, str], calibration: Sequence[Tensor]
) -> None:
    """See `Backend.write`. In fp16 input and output stay float32; int8 is static, QDQ, a scale per output channel."""
    model: nn.Module = fast(network, FORMULATION)
    if target.precision == "fp16":
        model = Half(model)
    dynamic: dict[int, object] = {}
    if target.dynamic_batch:
        dynamic[0] = torch.export.Dim("batch", min=1)
    if target.dynamic_size:
        first = 1 if target.uint8 else 2
        dynamic |= {first: torch.export.Dim("height", min=65), first + 1: torch.export.Dim("width", min=65)}
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter, about itself
        program = torch.onnx.export(
            model,
            (target.example(),),
            dynamo=True,
            opset_version=OPSET,
            input_names=["pictures"],
            output_names=["logits"],
            dynamic_shapes=(dynamic,) if dynamic else None,
            verbose=False,
        )
    assert program is not None
    proto = program.model_proto
    if target.precision == "int8":
        proto = _quantized(proto, calibration)
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

    def run(pictures: np.ndarray) -> np.ndarray:
        (logits,) = session.run(None, {name: pictures})
        assert isinstance(logits, np.ndarray)
        return logits

    return run


def operators(path: Path) -> Operators:
    """See `Backend.operators`; outside are those of no standard domain."""
    from mobilevit.export import Operators

    nodes = onnx.load(path, load_external_data=False).graph.node
    return Operators(len(nodes), tuple(node.op_type for node in nodes if node.domain not in ("", "ai.onnx")))


def read_metadata(path: Path) -> dict[str, str]:
    """What `write` was given to say about the artifact."""
    return {prop.key: prop.value for prop in onnx.load(path, load_external_data=False).metadata_props}


class _Calibration(CalibrationDataReader):
    """Pictures in batches, as the quantizer asks for them."""

    def __init__(self, batches: Iterator[Tensor]):
        self._batches = batches

    def get_next(self) -> dict[str, np.ndarray] | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The next batch, None after the last."""
        batch = next(self._batches, None)
        return None if batch is None else {"pictures": batch.numpy()}


def _quantized(proto: onnx.ModelProto, calibration: Sequence[Tensor]) -> onnx.ModelProto:
    (shape,) = (value.type.tensor_type.shape.dim for value in proto.graph.input)
    size = shape[0].dim_value or CALIBRATION_BATCH  # 0 where the batch is dynamic
    batches = (
        torch.cat([*calibration[i : i + size], *calibration[: max(0, i + size - len(calibration))]])
        for i in range(0, len(calibration), size)
    )
    with tempfile.TemporaryDirectory() as folder, _quiet():
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


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the quantizer's advice on models of any kind to itself."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(disabled)
