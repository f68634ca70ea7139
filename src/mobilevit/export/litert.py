"""LiteRT, formerly TensorFlow Lite: one .tflite file, computed by XNNPACK where there is no accelerator.

Its converter wants a torch older than the rest of the package and so an environment of its own; the runtime does not.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import flatbuffers  # pyright: ignore[reportMissingImports]
import numpy as np
import torch
from ai_edge_litert import schema_py_generated as schema  # pyright: ignore[reportMissingImports]
from ai_edge_litert.interpreter import Interpreter  # pyright: ignore[reportMissingImports]
from ai_edge_litert.tools import flatbuffer_utils  # pyright: ignore[reportMissingImports]
from torch import Tensor, nn
from torch.torch_version import TorchVersion

from mobilevit.export.quiet import quiet
from mobilevit.export.rewrite import Formulation, fast
from mobilevit.export.verify import filled_batches

if TYPE_CHECKING:
    from mobilevit.export import Operators, Run, Target

PRECISIONS = ("fp32", "fp16", "int8")
DYNAMIC = ()
ANSWERS = ("segment",)
FORMULATION = Formulation(attention="rank3", norm="linear", silu="sigmoid")
FIRST_TORCH_TOO_NEW = "2.15"
METADATA = "mobilevit"  # the name of the buffer
# More change neither the ranges nor the answers by much, and the calibration keeps every tensor of every image.
CALIBRATION_IMAGES = 128


def write(
    network: nn.Module, target: Target, path: Path, metadata: Mapping[str, str], calibration: Sequence[Tensor]
) -> None:
    """See `Backend.write`.

    fp16 halves the weights, and computes in float32 where the processor has no fp16. In int8 the convolutions are
    static, with a scale for every output channel; linears take their inputs' range at run time.

    Raises:
        ValueError: the converter is not installed, or torch is too new for it.
    """
    _check_converter()
    with quiet():
        import litert_torch  # pyright: ignore[reportMissingImports]

        model = litert_torch.convert(fast(network, FORMULATION), (target.example(),)).model_content()
        if target.precision != "fp32":
            model = _quantized(model, target, calibration)
    path.write_bytes(_finished(model, target.outputs, metadata))


def load(path: Path, num_threads: int) -> Run:
    """See `Backend.load`."""
    interpreter = _interpreter(path, num_threads)
    (source,), sinks = interpreter.get_input_details(), interpreter.get_output_details()

    def run(images: np.ndarray) -> tuple[np.ndarray, ...]:
        interpreter.set_tensor(source["index"], images)
        interpreter.invoke()
        return tuple(interpreter.get_tensor(sink["index"]) for sink in sinks)

    return run


def operators(path: Path) -> Operators:
    """See `Backend.operators`; outside are those that XNNPACK leaves to LiteRT's own kernels."""
    from mobilevit.export import Operators

    nodes = _interpreter(path, num_threads=1)._get_ops_details()
    # The nodes stay listed when a delegate takes them over; it is one more node, with what goes in and what comes out.
    delegates = [node for node in nodes if node["op_name"] == "DELEGATE"]
    nodes = [node for node in nodes if node["op_name"] != "DELEGATE"]
    source = {tensor: i for i, node in enumerate(nodes) for tensor in node["outputs"]}
    inside: set[int] = set()
    for delegate in delegates:
        known, wanted = set(delegate["inputs"]), list(delegate["outputs"])
        while wanted:
            tensor = wanted.pop()
            if tensor in known:
                continue
            known.add(tensor)
            if tensor in source:
                inside.add(source[tensor])
                wanted.extend(nodes[source[tensor]]["inputs"])
    return Operators(len(nodes), tuple(node["op_name"] for i, node in enumerate(nodes) if i not in inside))


def read_metadata(path: Path) -> dict[str, str]:
    """What `write` was given to say about the artifact."""
    model = schema.Model.GetRootAs(path.read_bytes(), 0)
    for i in range(model.MetadataLength()):
        entry = model.Metadata(i)
        if entry.Name() == METADATA.encode():
            return json.loads(model.Buffers(entry.Buffer()).DataAsNumpy().tobytes())
    return {}


def _check_converter() -> None:
    from mobilevit.export import LITERT_ENVIRONMENT

    if TorchVersion(torch.__version__) >= TorchVersion(FIRST_TORCH_TOO_NEW):
        found = f"this is {torch.__version__}"
    elif importlib.util.find_spec("litert_torch") is None:
        found = "litert_torch is not installed"
    else:
        return
    raise ValueError(
        f"litert is converted by litert_torch, with torch below {FIRST_TORCH_TOO_NEW}, and {found}; "
        f"make it an environment of its own and export from there: {LITERT_ENVIRONMENT}"
    )


def _interpreter(path: Path, num_threads: int) -> Any:
    try:
        with quiet():
            # By its content: a file that is mapped into memory cannot be moved or replaced everywhere.
            interpreter = Interpreter(model_content=path.read_bytes(), num_threads=num_threads)
            interpreter.allocate_tensors()
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{path}: LiteRT does not take it ({str(error).strip().splitlines()[0]})") from None
    return interpreter


def _quantized(model: bytes, target: Target, calibration: Sequence[Tensor]) -> bytes:
    from ai_edge_quantizer import qtyping, quantizer  # pyright: ignore[reportMissingImports]
    from ai_edge_quantizer.algorithm_manager import AlgorithmName  # pyright: ignore[reportMissingImports]

    operation = qtyping.TFLOperationName
    convolutions, linears = (operation.CONV_2D, operation.DEPTHWISE_CONV_2D), (operation.FULLY_CONNECTED,)
    recipe = quantizer.Quantizer(model)
    if target.precision == "fp16":
        half = qtyping.TensorQuantizationConfig(num_bits=16, dtype=qtyping.TensorDataType.FLOAT)
        config = qtyping.OpQuantizationConfig(
            weight_tensor_config=half, compute_precision=qtyping.ComputePrecision.FLOAT, explicit_dequantize=True
        )
        for name in (*convolutions, *linears):
            recipe.update_quantization_recipe(".*", name, config, AlgorithmName.FLOAT_CASTING)
        return bytes(recipe.quantize(enable_progress_report=False).quantized_model)
    # XNNPACK takes no depthwise convolution whose input is quantized at run time, and what lies between the linears,
    # norms and softmax, is better left in float.
    for name in convolutions:
        recipe.add_static_config(".*", name, activation_num_bits=8, weight_num_bits=8)
    for name in linears:
        recipe.add_dynamic_config(".*", name, num_bits=8)
    ((signature, names),) = Interpreter(model_content=model).get_signature_list().items()
    (name,) = names["inputs"]
    number = min(CALIBRATION_IMAGES, len(calibration))
    chosen = [calibration[i * len(calibration) // number] for i in range(number)]
    batches = filled_batches(chosen, target.batch_size)
    ranges = recipe.calibrate({signature: [{name: batch.numpy()} for batch in batches]})
    return bytes(recipe.quantize(ranges, enable_progress_report=False).quantized_model)


def _text(name: str | bytes) -> str:
    return name.decode() if isinstance(name, bytes) else name


class _Buffer:
    """Data aligned as the schema demands; the writer that comes with the schema forgets that."""

    def __init__(self, data: np.ndarray | None):
        self.data = None if data is None else np.asarray(data, dtype=np.uint8)

    def Pack(self, builder: Any) -> int:  # noqa: N802 - as the schema's classes call it
        """Write it and tell where."""
        vector = None
        if self.data is not None:
            builder.StartVector(1, len(self.data), 16)
            builder.head -= len(self.data)
            builder.Bytes[builder.head : builder.head + len(self.data)] = self.data.tobytes()
            vector = builder.EndVector()
        schema.BufferStart(builder)
        if vector is not None:
            schema.BufferAddData(builder, vector)
        return schema.BufferEnd(builder)


def _finished(model: bytes, outputs: Sequence[str], metadata: Mapping[str, str]) -> bytes:
    """`model` with `metadata`, names for input and outputs, and none for the tensors between."""
    tree = flatbuffer_utils.read_model_from_bytearray(bytearray(model))
    (graph,), (signature,) = tree.subgraphs, tree.signatureDefs
    # The converter makes up long names from where in the program an operator came from: an eighth of an int8 file.
    for tensor in graph.tensors:
        tensor.name = None
    # In the signature the outputs may stand in another order; the converter has numbered them in the network's.
    signature.outputs.sort(key=lambda output: int(re.sub(r"\D", "", _text(output.name)) or 0))
    graph.outputs = [output.tensorIndex for output in signature.outputs]
    for tensors, values, names in (
        (graph.inputs, signature.inputs, ("images",)),
        (graph.outputs, signature.outputs, outputs),
    ):
        for tensor, value, name in zip(tensors, values, names, strict=True):
            graph.tensors[tensor].name = value.name = name
    said = json.dumps(dict(metadata), ensure_ascii=False).encode()
    tree.metadata = [*(tree.metadata or []), schema.MetadataT(name=METADATA, buffer=len(tree.buffers))]
    tree.buffers = [*(_Buffer(buffer.data) for buffer in tree.buffers), _Buffer(np.frombuffer(said, np.uint8))]
    builder = flatbuffers.Builder(len(model) + len(said))
    builder.Finish(tree.Pack(builder), file_identifier=b"TFL3")
    return bytes(builder.Output())
