"""Input and output shapes read from artifacts."""

import contextlib
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mobilevit.export import read_signature
from mobilevit.export.backend import Signature


@pytest.mark.parametrize("uint8", [False, True])
def test_onnx(tmp_path: Path, uint8: bool):
    onnx = pytest.importorskip("onnx")
    kind = onnx.TensorProto.UINT8 if uint8 else onnx.TensorProto.FLOAT
    shape = ["batch", 8, 9, 3] if uint8 else ["batch", 3, 8, 9]
    input_ = onnx.helper.make_tensor_value_info("images", kind, shape)
    output = onnx.helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, ["batch", 7])
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([], "g", [input_], [output])), tmp_path / "a.onnx")
    expected = (None, 8, 9, 3) if uint8 else (None, 3, 8, 9)
    assert read_signature(tmp_path / "a.onnx") == Signature(expected, uint8, 7)


@pytest.mark.parametrize("uint8", [False, True])
def test_executorch(tmp_path: Path, uint8: bool):
    pytest.importorskip("executorch")

    class Mean(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.to(torch.float32).mean((1, 2) if uint8 else (2, 3))

    shape, kind = ((2, 8, 9, 3), torch.uint8) if uint8 else ((2, 3, 8, 9), torch.float32)
    with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from executorch.exir import to_edge

        program = to_edge(torch.export.export(Mean(), (torch.zeros(shape, dtype=kind),))).to_executorch()
    (tmp_path / "a.pte").write_bytes(program.buffer)
    assert read_signature(tmp_path / "a.pte") == Signature(shape, uint8, 3)


@pytest.mark.parametrize("uint8", [False, True])
def test_openvino(tmp_path: Path, uint8: bool):
    openvino = pytest.importorskip("openvino")
    shape = [-1, 8, 9, 3] if uint8 else [-1, 3, 8, 9]
    input_ = openvino.opset13.parameter(shape, openvino.Type.u8 if uint8 else openvino.Type.f32)
    axes = openvino.opset13.constant([1, 2] if uint8 else [2, 3])
    mean = openvino.opset13.reduce_mean(openvino.opset13.convert(input_, "f32"), axes)
    openvino.save_model(openvino.Model([mean], [input_]), tmp_path / "a.xml")
    expected = (None, 8, 9, 3) if uint8 else (None, 3, 8, 9)
    assert read_signature(tmp_path / "a.xml") == Signature(expected, uint8, 3)
