"""Input and output shapes, read from artifacts."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np

from mobilevit.export import BACKENDS
from mobilevit.images import first_line


@dataclass(frozen=True)
class Signature:
    """Input shape of an artifact, None for a dynamic axis, and the last dimension of its first output."""

    shape: tuple[int | None, ...]
    uint8: bool
    num_classes: int


def runtime_of(path: Path) -> str | None:
    return next((name for name, ending in BACKENDS.items() if path.suffix == ending), None)


def signature(path: Path) -> Signature:
    """The input and output of an artifact, from its file.

    Raises:
        ValueError: a file that its runtime cannot read, or whose input is no batch of images.
    """
    runtime = cast(str, runtime_of(path))
    try:
        shape, uint8, num_classes = _SIGNATURES[runtime](path)
    except (OSError, ValueError):
        raise
    except Exception as error:  # each runtime has its own for a damaged file
        raise ValueError(f"{path}: {runtime} cannot read it ({first_line(error)}); copy or export it again") from None
    if len(shape) != 4:
        raise ValueError(f"{path}: its input is {tuple(shape)}; that of images is (batch, 3, height, width)")
    return Signature(tuple(shape), uint8, num_classes)


def _of_onnx(path: Path) -> tuple[Sequence[int | None], bool, int]:
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    given, answer = graph.input[0].type.tensor_type, graph.output[0].type.tensor_type
    shape = [axis.dim_value if axis.HasField("dim_value") else None for axis in given.shape.dim]
    return shape, given.elem_type == onnx.TensorProto.UINT8, answer.shape.dim[-1].dim_value


def _of_executorch(path: Path) -> tuple[Sequence[int | None], bool, int]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the runtime calls every function of its own an experiment
        from executorch.runtime import Runtime

        method = Runtime.get().load_program(path).metadata("forward")
        given, answer = method.input_tensor_meta(0), method.output_tensor_meta(0)
        uint8 = given.dtype() == 0  # the number of uint8 among torch's types
        return tuple(given.sizes()), uint8, answer.sizes()[-1]


def _of_openvino(path: Path) -> tuple[Sequence[int | None], bool, int]:
    import openvino

    model = openvino.Core().read_model(path)
    given, answer = model.input(0), model.output(0)
    shape = [None if axis.is_dynamic else axis.get_length() for axis in given.get_partial_shape()]
    uint8 = given.get_element_type() == openvino.Type.u8
    last = answer.get_partial_shape()[-1]
    return shape, uint8, 0 if last.is_dynamic else last.get_length()


def _of_litert(path: Path) -> tuple[Sequence[int | None], bool, int]:
    from ai_edge_litert.interpreter import Interpreter  # pyright: ignore[reportMissingImports]

    interpreter = Interpreter(str(path))
    given, answer = interpreter.get_input_details()[0], interpreter.get_output_details()[0]
    return [int(side) for side in given["shape"]], given["dtype"] == np.uint8, int(answer["shape"][-1])


_SIGNATURES = {"onnx": _of_onnx, "executorch": _of_executorch, "openvino": _of_openvino, "litert": _of_litert}
