"""Groups of layers that stay in float: in the artifacts of each backend, and as few as `max_loss` needs."""

from __future__ import annotations

import json
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from command_line import check_refused, run
from labeled_data import labeled, photos
from mobilevit.export import ExportOptions, export, read_metadata
from mobilevit.export.accuracy import Measured, shortest_prefix
from mobilevit.export.verify import synthetic_images
from mobilevit.weights import Weights, write
from reference_runtimes import difference, normalized, run_artifact, torch_outputs

slow = partial(pytest.param, marks=pytest.mark.slow)
FLOAT = ("stage1 convolutions", "stage2 attention", "stage2 ffn")


def float_layers(path: Path) -> Counter[str]:
    """The number of convolutions and of products with weights in float, by the runtime's own description."""
    if path.suffix == ".onnx":
        import onnx

        graph = onnx.load(path).graph
        floats = {x.name for x in graph.initializer if x.data_type == onnx.TensorProto.FLOAT}
        nodes = [node for node in graph.node if len(node.input) > 1 and node.input[1] in floats]
        kinds = {"Conv": "convolution", "Gemm": "product", "MatMul": "product"}
        return Counter(kinds[node.op_type] for node in nodes if node.op_type in kinds)
    if path.suffix == ".xml":
        import openvino

        kinds = {"Convolution": "convolution", "GroupConvolution": "convolution", "MatMul": "product"}
        found = Counter()
        for op in openvino.Core().read_model(path).get_ops():
            # The weights of an int8 layer are multiplied by their scales.
            source = op.input_value(1).get_node() if op.get_type_name() in kinds else None
            while source is not None and source.get_type_name() in ("Convert", "Reshape"):
                source = source.input_value(0).get_node()
            if source is not None and source.get_type_name() == "Constant":
                found[kinds[op.get_type_name()]] += source.get_element_type() != openvino.Type.i8
        return found
    if path.suffix == ".tflite":
        from ai_edge_litert.interpreter import Interpreter  # pyright: ignore[reportMissingImports]

        interpreter = Interpreter(str(path))
        types = {tensor["index"]: tensor["dtype"] for tensor in interpreter.get_tensor_details()}
        kinds = {"CONV_2D": "convolution", "DEPTHWISE_CONV_2D": "convolution", "FULLY_CONNECTED": "product"}
        nodes = [node for node in interpreter._get_ops_details() if node["op_name"] in kinds]
        return Counter(kinds[node["op_name"]] for node in nodes if types[node["inputs"][1]] == np.float32)
    raise AssertionError(path)


@pytest.mark.parametrize("backend", ["onnx", "openvino", slow("litert")])
def test_groups_stay_in_float(weights: Weights, backend: str, tmp_path: Path):
    """Stage 1 has 6 convolutions; attention has 4 linear layers, the feed-forward network 2."""
    counts = {}
    for groups in ((), FLOAT[:1], FLOAT):
        path = _written(weights, backend, tmp_path, groups)
        counts[groups] = float_layers(path)
    by_default = counts[()]
    assert counts[FLOAT[:1]] - by_default == Counter(convolution=6)
    assert counts[FLOAT] - by_default == Counter(convolution=6, product=6)


@pytest.mark.parametrize("backend", ["onnx", slow("openvino"), slow("executorch")])
def test_float_layers_are_accurate(weights: Weights, backend: str, tmp_path: Path):
    """All groups but the first one in float: the error falls, but not to 0."""
    images = synthetic_images(3, (64, 64))
    expected = torch_outputs(weights, images)
    groups = (*FLOAT, "stage2 convolutions", "head", "classifier")
    errors = []
    for float_groups in ((), groups):
        path = _written(weights, backend, tmp_path, float_groups)
        each = [run_artifact(path, normalized(weights, [image]).numpy())[0] for image in images]
        errors.append(difference([np.concatenate(each)], expected))
    assert 1e-4 < errors[1] < 0.7 * errors[0]


def test_float_groups_of_executorch(weights: Weights, tmp_path: Path):
    """Float weights take four bytes: the size of the file shows which layers stay float."""
    sizes = [_written(weights, "executorch", tmp_path, groups).stat().st_size for groups in ((), FLOAT[1:])]
    num_weights = sum(
        tensor.numel()
        for name, tensor in weights.tensors.items()
        if ".layers." in name and name.endswith("weight") and tensor.ndim == 2
    )
    assert sizes[1] - sizes[0] == pytest.approx(3 * num_weights, rel=0.1)


def _written(weights: Weights, backend: str, folder: Path, groups: tuple[str, ...]) -> Path:
    from mobilevit.export.artifact import ArtifactSpec, artifact_input, build_export_model, metadata_of
    from mobilevit.export.backend import load_backend
    from mobilevit.export_options import ARTIFACT_SUFFIXES

    pytest.importorskip({"litert": "litert_torch"}.get(backend, "torch"))
    spec = ArtifactSpec("int8", 64, 64, float_groups=groups)
    inputs = [artifact_input(image, weights.preprocessing, spec) for image in synthetic_images(4, (64, 64))]
    path = folder / f"{len(groups)}{ARTIFACT_SUFFIXES[backend]}"
    metadata = metadata_of(weights, spec, "here")
    load_backend(backend).write(build_export_model(weights, spec), spec, path, metadata, inputs)
    return path


@pytest.mark.parametrize("num", range(1, 15))
def test_shortest_prefix(num: int):
    names = [f"group {i}" for i in range(14)]
    trials: list[tuple[str, ...]] = []

    def is_accurate(groups: tuple[str, ...]) -> bool:
        trials.append(groups)
        return len(groups) >= num

    assert shortest_prefix(names, is_accurate) == (tuple(names[:num]) if num < 14 else None)
    assert len(trials) == len(set(trials)) <= 8
    assert all(len(groups) < 14 for groups in trials)


def test_max_loss(
    weights: Weights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Two groups are enough; the figures are in the metadata and the JSON; an unreachable limit writes nothing."""
    monkeypatch.chdir(tmp_path)
    photos(tmp_path / "data")
    write(weights, tmp_path / "w.safetensors")
    losses = {0: 4.0, 1: 2.0, 2: 0.25}
    written: list[int] = []

    def measure(_: Any, path: Path) -> Measured:
        metadata = read_metadata(path)
        assert metadata["precision"] in ("fp32", "int8")
        num_float = written[-1]
        return Measured("top1", 90.0 if num_float < 0 else 90 - losses.get(num_float, 0.25), 11, "val")

    from mobilevit.export import onnx as backend

    write_artifact = backend.write

    def recorded(network: Any, spec: Any, *args: Any) -> None:
        written.append(len(spec.float_groups) if spec.precision == "int8" else -1)
        write_artifact(network, spec, *args)

    monkeypatch.setattr(backend, "write", recorded)
    monkeypatch.setattr("mobilevit.export.accuracy.LabeledData.measure", measure)
    command = "export w.safetensors --precision int8 --data data --num-threads 1 --overwrite"
    assert run(f"{command} --max-loss 0.3 --json") == 0
    assert written[:4] == [-1, 0, 1, 2]
    line = json.loads(capsys.readouterr().out)
    expected = {"metric": "top1", "fp32": 90.0, "int8": 89.75, "num_images": 11, "split": "val"}
    assert line["accuracy"] == expected
    groups = line["spec"]["float_groups"]
    assert len(groups) == 2
    metadata = read_metadata(line["path"])
    assert json.loads(metadata["accuracy"]) == expected | {"max_loss": 0.3}
    assert json.loads(metadata["float_groups"]) == groups
    assert run(f"{command} --max-loss 3") == 0
    out = capsys.readouterr().out
    assert "top-1 90.00 % in fp32, 88.00 % in int8" in out
    before = Path(line["path"]).read_bytes()
    losses.update(dict.fromkeys(range(20), 4.0))
    check_refused(capsys, f"{command} --max-loss 0.3", "--max-loss 0.3 onnx 4.00 90.00 86.00 fp16 nothing")
    assert Path(line["path"]).read_bytes() == before
    assert {file.name for file in Path("exports").iterdir()} == {Path(line["path"]).name}


def test_agreement_without_labels(weights: Weights, tmp_path: Path):
    """A limit of 0 for the agreement on images that do not calibrate."""
    images = synthetic_images(300, (64, 64))
    options = ExportOptions("int8", num_threads=1, max_loss=0.0)
    [artifact] = export(weights, ["onnx"], tmp_path, options, images=images)
    assert artifact.accuracy is not None
    assert (artifact.accuracy.metric, artifact.accuracy.num_images, artifact.accuracy.split) == ("agreement", 44, "")
    assert artifact.accuracy.int8 >= artifact.accuracy.fp32 == 100
    unseen = [image for i, image in enumerate(images) if i not in {j * 300 // 256 for j in range(256)}]
    logits = [run_artifact(artifact.path, normalized(weights, [image]).numpy())[0] for image in unseen]
    expected = torch_outputs(weights, unseen)[0]
    assert (np.concatenate(logits).argmax(1) == expected.argmax(1)).all()


@pytest.mark.slow
@pytest.mark.parametrize("task", ["detect", "segment"])
def test_labels_of_other_tasks(
    all_weights: dict[str, Weights], task: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("mobilevit.export.MIN_PREDICTION_AGREEMENT", 0.5)  # random weights
    data = labeled(task, tmp_path / "data")
    options = ExportOptions("int8", num_threads=1, max_loss=99)
    [artifact] = export(all_weights[task], ["onnx"], tmp_path, options, data=data)
    assert artifact.accuracy is not None
    assert artifact.accuracy.metric == {"detect": "ap", "segment": "miou"}[task]
    assert (artifact.accuracy.num_images, artifact.accuracy.split) == (6, "val")


def test_mistakes(
    weights: Weights, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    photos(tmp_path / "data")
    write(weights, tmp_path / "w.safetensors")
    for args, facts in {
        "--max-loss 1": "--max-loss 1 fp32 --precision int8",
        "--precision int8 --data data --max-loss -1": "--max-loss -1 0 to 100",
        "--precision int8 --data data --max-loss nan": "--max-loss nan 0 to 100",
        "--precision int8 --max-loss 1": "--images --data",
        "--precision int8 --data nothere": "nothere no such folder",
        "--precision int8 --data data --size 64 96": "--size (64, 96) one number",
        "--precision int8 --data data/labels.csv": "labels.csv",
    }.items():
        check_refused(capsys, f"export w.safetensors {args}", facts)
    assert not Path("exports").exists()
