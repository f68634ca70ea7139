"""Artifacts run by their own runtimes, and the outputs of torch to compare with, without `mobilevit.export`."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mobilevit.models.ssdlite import decode
from mobilevit.weights import Weights


def run_artifact(path: Path, inputs: np.ndarray) -> list[np.ndarray]:
    """Outputs of an artifact in float32 arithmetic (bf16 for OpenVINO's bf16 artifacts), on one thread."""
    return {".onnx": _run_onnx, ".xml": _run_openvino, ".pte": _run_executorch, ".tflite": _run_litert}[path.suffix](
        path, inputs
    )


def _run_onnx(path: Path, inputs: np.ndarray) -> list[np.ndarray]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return [np.asarray(output) for output in session.run(None, {"images": inputs})]


def _run_openvino(path: Path, inputs: np.ndarray) -> list[np.ndarray]:
    import openvino

    precision = "bf16" if "bf16" in path.stem else "f32"
    model = openvino.compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": precision})
    return [output.copy() for output in model(inputs).to_tuple()]


def _run_executorch(path: Path, inputs: np.ndarray) -> list[np.ndarray]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the runtime's functions are marked as experimental
        from executorch.runtime import Runtime

        method = Runtime.get().load_program(path).load_method("forward")
        assert method is not None
        return [output.numpy().copy() for output in method.execute([torch.from_numpy(inputs)])]


def _run_litert(path: Path, inputs: np.ndarray) -> list[np.ndarray]:
    from ai_edge_litert.interpreter import Interpreter  # pyright: ignore[reportMissingImports]

    interpreter = Interpreter(str(path), num_threads=1)
    interpreter.allocate_tensors()
    interpreter.set_tensor(interpreter.get_input_details()[0]["index"], inputs)
    interpreter.invoke()
    return [interpreter.get_tensor(output["index"]).copy() for output in interpreter.get_output_details()]


def normalized(weights: Weights, images: Sequence[np.ndarray]) -> torch.Tensor:
    """Images (H, W, 3) as the input (B, 3, H, W) of the network."""
    return weights.preprocessing.scale(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)).contiguous()


def torch_outputs(weights: Weights, images: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Logits, or boxes and scores of all anchors."""
    network: Any = weights.build()
    x = normalized(weights, images)
    with torch.no_grad():
        outputs = network(x)
        if weights.task != "detect":
            return [outputs.numpy()]
        logits, locations = outputs
        return [decode(locations, network.anchors(*x.shape[2:])).numpy(), logits.softmax(-1)[..., 1:].numpy()]


def difference(actual: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> float:
    """The largest difference of a value, in standard deviations of the expected output."""
    assert [x.shape for x in actual] == [x.shape for x in expected]
    return max(float(np.abs(x.astype(np.float32) - y).max() / y.std()) for x, y in zip(actual, expected, strict=True))


def assert_metadata(metadata: dict[str, str], weights: Weights, outputs: str) -> None:
    """Every backend stores what is necessary to run the artifact."""
    assert json.loads(metadata["class_names"]) == list(weights.class_names)
    preprocessing = json.loads(metadata["preprocessing"])
    assert preprocessing["crop_px"] == weights.preprocessing.crop_px
    assert preprocessing["mean"] == list(weights.preprocessing.mean)
    assert (metadata["task"], metadata["outputs"], metadata["source"]) == (weights.task, outputs, "here")
    assert tuple(json.loads(metadata.get("category_ids", "[]"))) == weights.category_ids
