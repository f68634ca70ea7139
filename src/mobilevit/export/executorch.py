"""ExecuTorch, by its XNNPACK delegate: what phones with Android and small processors run without Python."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import executorch  # noqa: F401 - its parts are imported where they are used, as they talk even then
import numpy as np
import torch
from torch import Tensor, nn

from mobilevit.export.artifact import Deployed, in_half
from mobilevit.export.quiet import quiet
from mobilevit.export.rewrite import Formulation, fast
from mobilevit.export.verify import filled_batches

if TYPE_CHECKING:
    from mobilevit.export import Operators, Run, Target

PRECISIONS = ("fp32", "fp16", "int8")
# With a batch left open its reshapes fall out of the delegate, which breaks into more than twenty.
DYNAMIC = ()
ANSWERS = ("segment",)
# What the delegate takes as a whole: it knows products of rank 3 and no mean over the last axis.
FORMULATION = Formulation(attention="rank3", norm="linear", silu="sigmoid")


def write(
    network: nn.Module, target: Target, path: Path, metadata: Mapping[str, str], calibration: Sequence[Tensor]
) -> None:
    """See `Backend.write`. In fp16 input and output stay float32; int8 is static, with a scale per output channel."""
    with quiet():
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower

        # The delegate lays weights out itself and refuses those that lie channels-last already.
        model: nn.Module = fast(network, FORMULATION).to(memory_format=torch.contiguous_format)
        if target.precision == "fp16":
            model = in_half(model)
        example = (target.example(),)
        if target.precision == "int8":
            model = _quantized(model, example, filled_batches(calibration, target.batch_size))
        program = to_edge_transform_and_lower(
            torch.export.export(model, example),
            partitioner=[XnnpackPartitioner()],
            constant_methods={"metadata": json.dumps(dict(metadata), ensure_ascii=False)},
        ).to_executorch()
        with path.open("wb") as file:
            program.write_to_file(file)


def load(path: Path, num_threads: int) -> Run:
    """See `Backend.load`. The number of threads is that of the whole process.

    Change it only when nothing that was loaded with another one will run again: the runtime's threads are replaced.
    """
    with quiet():
        from executorch.extension.pybindings import portable_lib

        if portable_lib._threadpool_get_thread_count() != num_threads:
            portable_lib._unsafe_reset_threadpool(num_threads)  # whatever was loaded before must not run again
        forward = _method(path, "forward")

    def run(images: np.ndarray) -> tuple[np.ndarray, ...]:
        try:
            outputs = forward.execute([torch.from_numpy(np.ascontiguousarray(images))])
        except RuntimeError as error:
            raise ValueError(f"{path}: ExecuTorch cannot take {images.dtype} {images.shape} ({error})") from None
        return tuple(output.numpy().copy() for output in outputs)  # the next run writes to the same place

    return run


def operators(path: Path) -> Operators:
    """See `Backend.operators`. A delegate counts as one operator, whatever it holds."""
    from mobilevit.export import Operators

    with quiet():
        from executorch.exir._serialize import _deserialize_pte_binary
        from executorch.exir.schema import DelegateCall, KernelCall

        _method(path, "forward")  # delegates are only looked into when a method is loaded
        plans = _deserialize_pte_binary(path.read_bytes()).program.execution_plan
    (plan,) = (plan for plan in plans if plan.name == "forward")
    calls = [instruction.instr_args for chain in plan.chains for instruction in chain.instructions]
    outside = [plan.operators[call.op_index].name for call in calls if isinstance(call, KernelCall)]
    return Operators(sum(isinstance(call, DelegateCall | KernelCall) for call in calls), tuple(outside))


def read_metadata(path: Path) -> dict[str, str]:
    """What `write` was given to say about the artifact."""
    with quiet():
        (text,) = _method(path, "metadata").execute([])
    return json.loads(text)


def _method(path: Path, name: str) -> Any:
    from executorch.runtime import Runtime

    try:
        program = Runtime.get().load_program(path)
        method = program.load_method(name)
    except RuntimeError as error:
        raise ValueError(f"{path}: ExecuTorch cannot load it ({error})") from None
    assert method is not None
    return method


def _quantized(model: nn.Module, example: tuple[Tensor], calibration: Iterable[Tensor]) -> nn.Module:
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    finish = nn.Identity()
    if isinstance(model, Deployed):
        finish, model.finish = model.finish, nn.Identity()
    quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
    prepared = prepare_pt2e(torch.export.export(model, example).module(), quantizer)
    with torch.no_grad():
        for batch in calibration:
            prepared(batch)
    return nn.Sequential(convert_pt2e(prepared), finish)
