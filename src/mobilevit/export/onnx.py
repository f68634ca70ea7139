"""ONNX, run by ONNX Runtime: standard operators alone, so that every other reader of ONNX takes it too."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnxruntime
import onnxscript  # noqa: F401 - torch.onnx wants it, and would say so late
import torch
from torch import Tensor, nn

from mobilevit.export.rewrite import Formulation, fast

if TYPE_CHECKING:
    from mobilevit.export import Operators, Run, Target

PRECISIONS = ("fp32",)
DYNAMIC = ("batch", "size")
FORMULATION = Formulation(attention="rank4", norm="mean", joint_qkv=False)
OPSET = 20


def write(
    network: nn.Module, target: Target, path: Path, metadata: Mapping[str, str], calibration: Sequence[Tensor]
) -> None:
    """See `Backend.write`."""
    model = fast(network, FORMULATION)
    dynamic: dict[int, torch.export.Dim | object] = {}
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
