"""LiteRT, formerly TensorFlow Lite: one .tflite file, run by XNNPACK on the CPU.

Its converter requires an older torch than the rest of the package, so it needs a separate environment.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import flatbuffers  # pyright: ignore[reportMissingImports]
import numpy as np
import torch
from ai_edge_litert import schema_py_generated as schema  # pyright: ignore[reportMissingImports]
from ai_edge_litert.interpreter import Interpreter  # pyright: ignore[reportMissingImports]
from ai_edge_litert.tools import flatbuffer_utils  # pyright: ignore[reportMissingImports]
from torch import Tensor, nn
from torch.torch_version import TorchVersion

from mobilevit.export.artifact import ArtifactSpec, evenly_spaced, fill_batches
from mobilevit.export.backend import LITERT_ENVIRONMENT, InferenceFn, Operators, Signature
from mobilevit.export.quantization import find_group
from mobilevit.export.quiet import quiet
from mobilevit.export.rewrite import Formulation, optimize_for_inference
from mobilevit.messages import first_line

PRECISIONS = ("fp32", "fp16", "int8")
DYNAMIC = ()
POSTPROCESS_TASKS = ("segment",)
FORMULATION = Formulation(attention="rank3", norm="linear", silu="sigmoid")
FIRST_TORCH_TOO_NEW = "2.15"
METADATA = "mobilevit"  # name of the buffer
# More images hardly change the ranges, and calibration keeps every tensor of every image in memory.
CALIBRATION_IMAGES = 128


def write(
    network: nn.Module, spec: ArtifactSpec, path: Path, metadata: Mapping[str, str], calibration: Sequence[Tensor]
) -> None:
    """Write an artifact.

    fp16 halves the weights; processors without fp16 compute in float32. int8 is static, with one scale per output
    channel. Norms and sums stay in float, because int8 makes them inaccurate, and attention, because XNNPACK has no
    int8 operators for it.

    Raises:
        ValueError: the converter is not installed, or torch is too new for it.
    """
    _check_converter()
    with quiet():
        import litert_torch  # pyright: ignore[reportMissingImports]

        model = litert_torch.convert(optimize_for_inference(network, FORMULATION), (spec.example(),)).model_content()
        if spec.precision != "fp32":
            model = _quantized(model, spec, calibration)
    path.write_bytes(_finished(model, spec.outputs, metadata))


def load(path: Path, num_threads: int) -> InferenceFn:
    interpreter = _interpreter(path, num_threads)
    (source,), outputs = interpreter.get_input_details(), interpreter.get_output_details()

    def infer(images: np.ndarray) -> tuple[np.ndarray, ...]:
        interpreter.set_tensor(source["index"], images)
        interpreter.invoke()
        return tuple(interpreter.get_tensor(output["index"]) for output in outputs)

    return infer


def operators(path: Path) -> Operators:
    """Count the operators; the fallback is LiteRT's own kernels, outside XNNPACK."""
    nodes = _interpreter(path, num_threads=1)._get_ops_details()
    # Delegated nodes stay in the list; the delegate is another node, with the inputs and outputs of the delegated part.
    delegates = [node for node in nodes if node["op_name"] == "DELEGATE"]
    nodes = [node for node in nodes if node["op_name"] != "DELEGATE"]
    source = {tensor: i for i, node in enumerate(nodes) for tensor in node["outputs"]}
    delegated: set[int] = set()
    for delegate in delegates:
        visited, tensors = set(delegate["inputs"]), list(delegate["outputs"])
        while tensors:
            tensor = tensors.pop()
            if tensor in visited:
                continue
            visited.add(tensor)
            if tensor in source:
                delegated.add(source[tensor])
                tensors.extend(nodes[source[tensor]]["inputs"])
    return Operators(len(nodes), tuple(node["op_name"] for i, node in enumerate(nodes) if i not in delegated))


def read_metadata(path: Path) -> dict[str, str]:
    model = schema.Model.GetRootAs(path.read_bytes(), 0)
    for i in range(model.MetadataLength()):
        entry = model.Metadata(i)
        if entry.Name() == METADATA.encode():
            return json.loads(model.Buffers(entry.Buffer()).DataAsNumpy().tobytes())
    return {}


def signature(path: Path) -> Signature:
    interpreter = _interpreter(path, num_threads=1)
    images, output = interpreter.get_input_details()[0], interpreter.get_output_details()[0]
    shape = tuple(int(side) for side in images["shape"])
    return Signature(shape, images["dtype"] == np.uint8, int(output["shape"][-1]))


def _check_converter() -> None:
    if TorchVersion(torch.__version__) >= TorchVersion(FIRST_TORCH_TOO_NEW):
        problem = f"torch is {torch.__version__}"
    elif importlib.util.find_spec("litert_torch") is None:
        problem = "litert_torch is not installed"
    else:
        return
    raise ValueError(
        f"export to litert requires litert_torch and torch below {FIRST_TORCH_TOO_NEW}, and {problem}; create a "
        f"separate environment and export from there: {LITERT_ENVIRONMENT}"
    )


def _interpreter(path: Path, num_threads: int) -> Any:
    try:
        with quiet():
            # From memory: some systems cannot move or replace a memory-mapped file.
            interpreter = Interpreter(model_content=path.read_bytes(), num_threads=num_threads)
            interpreter.allocate_tensors()
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{path}: LiteRT cannot load it ({first_line(error)})") from None
    return interpreter


def _quantized(model: bytes, spec: ArtifactSpec, calibration: Sequence[Tensor]) -> bytes:
    from ai_edge_quantizer import qtyping, quantizer  # pyright: ignore[reportMissingImports]
    from ai_edge_quantizer.algorithm_manager import AlgorithmName  # pyright: ignore[reportMissingImports]

    operation = qtyping.TFLOperationName
    convolutions, linears = (operation.CONV_2D, operation.DEPTHWISE_CONV_2D), (operation.FULLY_CONNECTED,)
    recipe = quantizer.Quantizer(model)
    if spec.precision == "fp16":
        half = qtyping.TensorQuantizationConfig(num_bits=16, dtype=qtyping.TensorDataType.FLOAT)
        config = qtyping.OpQuantizationConfig(
            weight_tensor_config=half, compute_precision=qtyping.ComputePrecision.FLOAT, explicit_dequantize=True
        )
        for name in (*convolutions, *linears):
            recipe.update_quantization_recipe(".*", name, config, AlgorithmName.FLOAT_CASTING)
        return bytes(recipe.quantize(enable_progress_report=False).quantized_model)
    silu = (operation.LOGISTIC, operation.MUL)
    moves = (operation.RESHAPE, operation.TRANSPOSE, operation.PAD, operation.CONCATENATION)
    # Names of tensors contain those of the modules that compute them; `_tensors_of` describes them.
    for modules, names in ((".*", (*convolutions, *linears)), (".*SigmoidSiLU_", silu), (".*Backbone_", moves)):
        for name in names:
            recipe.add_static_config(modules, name, activation_num_bits=8, weight_num_bits=8)
    for name in (r"[^;]*RMSNorm_", *map(re.escape, _tensors_of(model, spec.float_groups))):
        recipe.update_quantization_recipe(name, operation.ALL_SUPPORTED, algorithm_key=AlgorithmName.NO_QUANTIZE)
    ((signature, names),) = Interpreter(model_content=model).get_signature_list().items()
    (name,) = names["inputs"]
    batches = fill_batches(evenly_spaced(calibration, CALIBRATION_IMAGES), spec.batch_size)
    ranges = recipe.calibrate({signature: [{name: batch.numpy()} for batch in batches]})
    return bytes(recipe.quantize(ranges, enable_progress_report=False).quantized_model)


def _tensors_of(model: bytes, groups: Sequence[str]) -> list[str]:
    """Names of the tensors that the layers of these groups compute.

    The converter names a tensor after the modules that contain its operator, each as "package.Class_name", without
    lists of modules. The logits of a classifier have the name of the output instead.
    """
    (graph,) = flatbuffer_utils.read_model_from_bytearray(bytearray(model)).subgraphs
    names = [_text(graph.tensors[tensor].name) for operator in graph.operators for tensor in operator.outputs]
    paths = [name.split(";")[0].replace("FlatLayer_", "FlatLayer_layers.").split("/") for name in names]
    modules = [".".join(part.split("_", 1)[-1] for part in path) for path in paths]
    modules = ["classifier" if module.startswith("default_output") else module for module in modules]
    return [name for name, module in zip(names, modules, strict=True) if find_group(module) in groups]


def _text(name: str | bytes) -> str:
    return name.decode() if isinstance(name, bytes) else name


class _Buffer:
    """Writes data with the alignment that the schema requires; the schema's own class does not."""

    def __init__(self, data: np.ndarray | None):
        self.data = None if data is None else np.asarray(data, dtype=np.uint8)

    def Pack(self, builder: Any) -> int:  # noqa: N802 - the schema's name
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


class _Builder(flatbuffers.Builder):
    """Stores equal vectors once: the zero points of channels would be a twentieth of a small int8 file."""

    def __init__(self, size: int):
        super().__init__(size)
        self._vectors: dict[tuple[str, bytes], int] = {}

    def CreateNumpyVector(self, x: np.ndarray) -> int:  # noqa: N802 - the name in flatbuffers
        key = (x.dtype.str, x.tobytes())
        if key not in self._vectors:
            self._vectors[key] = super().CreateNumpyVector(x)
        return self._vectors[key]


def _finished(model: bytes, outputs: Sequence[str], metadata: Mapping[str, str]) -> bytes:
    """Add `metadata`, name the input and outputs, and remove the names of other tensors."""
    tree = flatbuffer_utils.read_model_from_bytearray(bytearray(model))
    (graph,), (signature,) = tree.subgraphs, tree.signatureDefs
    # The converter's tensor names are an eighth of an int8 file.
    for tensor in graph.tensors:
        tensor.name = None
    # The order of outputs in the signature varies; the converter's names number them in the network's order.
    signature.outputs.sort(key=lambda output: int(re.sub(r"\D", "", _text(output.name)) or 0))
    graph.outputs = [output.tensorIndex for output in signature.outputs]
    for tensors, values, names in (
        (graph.inputs, signature.inputs, ("images",)),
        (graph.outputs, signature.outputs, outputs),
    ):
        for tensor, value, name in zip(tensors, values, names, strict=True):
            graph.tensors[tensor].name = value.name = name
    encoded = json.dumps(dict(metadata), ensure_ascii=False).encode()
    tree.metadata = [*(tree.metadata or []), schema.MetadataT(name=METADATA, buffer=len(tree.buffers))]
    tree.buffers = [*(_Buffer(buffer.data) for buffer in tree.buffers), _Buffer(np.frombuffer(encoded, np.uint8))]
    builder = _Builder(len(model) + len(encoded))
    builder.Finish(tree.Pack(builder), file_identifier=b"TFL3")
    return bytes(builder.Output())
