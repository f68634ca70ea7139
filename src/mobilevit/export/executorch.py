"""ExecuTorch with the XNNPACK delegate, for phones and embedded processors."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import executorch  # noqa: F401 - its modules print while they are imported: see `quiet` below
import numpy as np
import torch
from torch import Tensor, nn

from mobilevit.export.artifact import ArtifactSpec, fill_batches, remove_postprocess, to_half
from mobilevit.export.backend import InferenceFn, Operators, Signature
from mobilevit.export.quantization import group_of_node
from mobilevit.export.quiet import quiet
from mobilevit.export.rewrite import Formulation, optimize_for_inference

PRECISIONS = ("fp32", "fp16", "int8")
# With a dynamic batch size, reshapes run outside the delegate, which splits it into more than twenty.
DYNAMIC = ()
POSTPROCESS_TASKS = ("segment",)
# One delegate for the whole network: XNNPACK supports products of rank 3, but no mean over the last axis.
FORMULATION = Formulation(attention="rank3", norm="linear", silu="sigmoid")


def write(
    network: nn.Module, spec: ArtifactSpec, path: Path, metadata: Mapping[str, str], calibration: Sequence[Tensor]
) -> None:
    """Write an artifact; int8 is static, with one scale per output channel."""
    with quiet():
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower

        # The delegate rejects weights in channels-last layout.
        model: nn.Module = optimize_for_inference(network, FORMULATION).to(memory_format=torch.contiguous_format)
        if spec.precision == "fp16":
            model = to_half(model)
        example = (spec.example(),)
        if spec.precision == "int8":
            model = _quantized(model, example, fill_batches(calibration, spec.batch_size), spec.float_groups)
        program = to_edge_transform_and_lower(
            torch.export.export(model, example),
            partitioner=[XnnpackPartitioner()],
            constant_methods={"metadata": json.dumps(dict(metadata), ensure_ascii=False)},
        ).to_executorch()
        with path.open("wb") as file:
            program.write_to_file(file)


def load(path: Path, num_threads: int) -> InferenceFn:
    """Load an artifact. The number of threads is global.

    Changing it replaces the runtime's threads: artifacts loaded before must not be run again.
    """
    with quiet():
        from executorch.extension.pybindings import portable_lib

        if portable_lib._threadpool_get_thread_count() != num_threads:
            portable_lib._unsafe_reset_threadpool(num_threads)
        forward = _method(path, "forward")

    def infer(images: np.ndarray) -> tuple[np.ndarray, ...]:
        try:
            outputs = forward.execute([torch.from_numpy(np.ascontiguousarray(images))])
        except RuntimeError as error:
            raise ValueError(f"{path}: ExecuTorch rejects an input {images.dtype} {images.shape} ({error})") from None
        return tuple(output.numpy().copy() for output in outputs)  # the next call reuses the buffer

    return infer


def operators(path: Path) -> Operators:
    """Count the operators; a delegate counts as one."""
    with quiet():
        from executorch.exir._serialize import _deserialize_pte_binary
        from executorch.exir.schema import DelegateCall, KernelCall

        _method(path, "forward")  # loading the method initializes the delegates
        plans = _deserialize_pte_binary(path.read_bytes()).program.execution_plan
    (plan,) = (plan for plan in plans if plan.name == "forward")
    calls = [instruction.instr_args for chain in plan.chains for instruction in chain.instructions]
    fallback = [plan.operators[call.op_index].name for call in calls if isinstance(call, KernelCall)]
    return Operators(sum(isinstance(call, DelegateCall | KernelCall) for call in calls), tuple(fallback))


def read_metadata(path: Path) -> dict[str, str]:
    with quiet():
        (text,) = _method(path, "metadata").execute([])
    return json.loads(text)


def signature(path: Path) -> Signature:
    with quiet():
        from executorch.runtime import Runtime

        method = Runtime.get().load_program(path).metadata("forward")
    images = method.input_tensor_meta(0)
    uint8 = images.dtype() == 0  # torch's number of uint8
    return Signature(tuple(images.sizes()), uint8, method.output_tensor_meta(0).sizes()[-1])


def _method(path: Path, name: str) -> Any:
    from executorch.runtime import Runtime

    try:
        program = Runtime.get().load_program(path)
        method = program.load_method(name)
    except RuntimeError as error:
        raise ValueError(f"{path}: ExecuTorch cannot load it ({error})") from None
    assert method is not None
    return method


def _quantized(
    model: nn.Module, example: tuple[Tensor], calibration: Iterable[Tensor], float_groups: Sequence[str]
) -> nn.Module:
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    postprocess = remove_postprocess(model)
    quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
    quantizer.set_filter_function(lambda node: group_of_node(node) not in float_groups)
    prepared = prepare_pt2e(torch.export.export(model, example).module(), quantizer)
    with torch.no_grad():
        for batch in calibration:
            prepared(batch)
    return nn.Sequential(convert_pt2e(prepared), postprocess)
