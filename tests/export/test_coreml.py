"""CoreML programs compute what torch does: read back from their files and evaluated, operator by operator, by torch."""

from __future__ import annotations

import contextlib
import io
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from conftest import SMALL, randomise
from dense_networks import dense_weights
from mobilevit.export import Artifact, Precision, Target, export
from mobilevit.export.artifact import deployed
from mobilevit.export.coreml import KNOWN, ct, operators, read_metadata
from mobilevit.export.verify import synthetic_images
from mobilevit.images import Preprocessing
from mobilevit.models.mobilevit import Architecture, MobileViT
from mobilevit.weights import TaskName, Weights

PREPROCESSING = Preprocessing(70, 64, mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3))


def weights_of(architecture: Architecture | str, preprocessing: Preprocessing = PREPROCESSING) -> Weights:
    model = MobileViT(architecture, num_classes=7)
    return Weights(model.architecture, randomise(model).state_dict(), preprocessing, ("é", '"', "<", *"abcd"))


def difference(path: Path, weights: Weights, target: Target) -> float:
    """The largest of a number, in standard deviations of its output; of classes the share of other ones."""
    size = (target.height, target.width)
    images = torch.from_numpy(np.stack(synthetic_images(target.batch_size, size)))
    x = images if target.uint8 else weights.preprocessing.scale(images.permute(0, 3, 1, 2))
    found = evaluate(path, images.permute(0, 3, 1, 2).float() if target.uint8 else x)
    with torch.no_grad():
        outputs = deployed(weights, target)(x)
    outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
    differences = []
    for name, expected in zip(target.outputs, outputs, strict=True):
        assert found[name].shape == expected.shape
        assert expected.float().std() > 0
        if name == "classes":  # which are no numbers
            differences.append(float((found[name] != expected).float().mean()))
        else:
            differences.append(float((found[name] - expected).abs().max() / expected.std()))
    return max(differences)


def evaluate(path: Path, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """The outputs of a program in float32, whatever it says it is computed in."""
    from coremltools.converters.mil.frontend.milproto.load import load as load_program

    model = ct.models.MLModel(str(path), skip_model_load=True)
    assert model.weights_dir is not None
    program: Any = load_program(model.get_spec(), ct.target.iOS16.value, model.weights_dir)
    function = program.functions["main"]
    values = {"images": images}
    for operation in function.operations:
        if operation.op_type in ("const", "constexpr_affine_dequantize"):
            continue
        arguments = {}
        for name, var in operation.inputs.items():
            arguments[name] = tuple(map(_value(values), var)) if isinstance(var, list | tuple) else _value(values)(var)
        [output] = operation.outputs
        values[output.name] = OPERATORS[operation.op_type](**arguments)
        assert tuple(values[output.name].shape) == tuple(output.shape), f"{operation.op_type} {output.name}"
    return values


def _value(values: dict[str, torch.Tensor]) -> Callable[[Any], Any]:
    def value(var: Any) -> Any:
        if var.name in values:
            return values[var.name]
        constant = var.val if var.val is not None else var.op.materialized_val_inference()
        if isinstance(constant, np.ndarray) and constant.dtype.kind == "f":
            return torch.from_numpy(constant.astype(np.float32))
        return constant.tolist() if isinstance(constant, np.ndarray | np.generic) else constant

    return value


def _conv(x, weight, strides, pad_type, pad, dilations, groups, bias=None):
    assert pad_type in ("custom", "valid")
    pad = [pad[2], pad[3], pad[0], pad[1]] if pad_type == "custom" else [0] * 4
    return F.conv2d(F.pad(x, pad), weight, bias, tuple(strides), 0, tuple(dilations), groups)


def _slice(x, begin, end, stride=None, begin_mask=None, end_mask=None, squeeze_mask=None):
    nothing = [False] * x.ndim
    assert not any(squeeze_mask or nothing)
    axes = zip(
        begin, end, stride or [1] * x.ndim, begin_mask or nothing, end_mask or nothing, strict=True
    )  # a masked bound is the end of the axis
    return x[tuple(slice(None if no_b else b, None if no_e else e, s) for b, e, s, no_b, no_e in axes)]


def _upsample(x, scale_factor_height, scale_factor_width, align_corners):
    scale = (scale_factor_height, scale_factor_width)
    return F.interpolate(x, scale_factor=scale, mode="bilinear", align_corners=align_corners)


OPERATORS: dict[str, Callable[..., torch.Tensor]] = {
    "cast": lambda x, dtype: x,
    "conv": _conv,
    "linear": lambda x, weight, bias=None: F.linear(x, weight, bias),
    "matmul": lambda x, y, transpose_x=False, transpose_y=False: (
        (x.mT if transpose_x else x) @ (y.mT if transpose_y else y)
    ),
    "add": lambda x, y: x + y,
    "mul": lambda x, y: x * y,
    "sub": lambda x, y: x - y,
    "silu": lambda x: F.silu(x),
    "relu": lambda x: F.relu(x),
    "exp": lambda x: x.exp(),
    "clip": lambda x, alpha, beta: x.clamp(alpha, beta),
    "reduce_argmax": lambda x, axis, keep_dims: x.argmax(axis, keepdim=keep_dims),
    "softmax": lambda x, axis: x.softmax(axis),
    "layer_norm": lambda x, axes, epsilon, gamma=None, beta=None: F.layer_norm(
        x, [x.shape[axis] for axis in axes], gamma, beta, epsilon
    ),
    "reduce_mean": lambda x, axes, keep_dims: x.mean(axes, keepdim=keep_dims),
    "reshape": lambda x, shape: x.reshape(shape),
    "transpose": lambda x, perm: x.permute(perm),
    "concat": lambda values, axis, interleave: torch.cat(values, axis),
    "stack": lambda values, axis: torch.stack(values, axis),
    "slice_by_index": _slice,
    "upsample_bilinear": _upsample,
}


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    folder = tmp_path_factory.mktemp("artifacts")
    weights = weights_of(SMALL)
    precisions: tuple[Precision, ...] = ("fp32", "fp16", "int8")
    black = [np.zeros((9, 9, 3), np.uint8)]  # int8 must be given images
    return {
        precision: export(weights, ["coreml"], folder, precision=precision, source="here", images=black)[0]
        for precision in precisions
    }


@pytest.mark.parametrize(("precision", "most"), [("fp32", 1e-4), ("fp16", 0.05), ("int8", 1)])
def test_precisions(artifacts: dict[str, Artifact], precision: str, most: float):
    artifact = artifacts[precision]
    assert artifact.path.name == f"mobilevit_small_64x64_{precision}.mlpackage"
    assert artifact.agreement is None  # here nothing can be run but by the evaluator above
    assert 50 < artifact.operators.num_operators < 80
    assert difference(artifact.path, weights_of(SMALL), artifact.target) < most
    share = {"fp32": 1.01, "fp16": 0.6, "int8": 0.4}[precision]
    assert artifact.num_bytes < share * artifacts["fp32"].num_bytes


def test_what_the_artifact_says_of_itself(artifacts: dict[str, Artifact]):
    for artifact in artifacts.values():
        metadata = read_metadata(artifact.path)
        assert json.loads(metadata["class_names"]) == ["é", '"', "<", *"abcd"]
        assert metadata["source"] == "here"
        assert metadata["precision"] == artifact.target.precision
        assert metadata["input"] == "float32 (batch, 3, height, width), RGB"


def test_odd_size_and_batch(tmp_path: Path):
    weights = weights_of(SMALL)
    [artifact] = export(weights, ["coreml"], tmp_path, size=(75, 130), batch_size=2)
    assert difference(artifact.path, weights, artifact.target) < 1e-4


@pytest.mark.parametrize(
    ("mean", "std"), [((0.0,) * 3, (1.0,) * 3), ((0.5, 0.4, 0.3), (0.2, 0.25, 0.3)), ((0.5,) * 3, (0.5,) * 3)]
)
def test_an_image_is_scaled_inside(mean: tuple, std: tuple, tmp_path: Path):
    weights = weights_of(SMALL, Preprocessing(70, 64, mean=mean, std=std))
    [artifact] = export(weights, ["coreml"], tmp_path, uint8=True)
    spec: Any = ct.utils.load_spec(str(artifact.path))
    images = spec.description.input[0]
    assert images.name == "images"
    assert (images.type.imageType.height, images.type.imageType.width) == (64, 64)
    assert difference(artifact.path, weights, artifact.target) < 1e-4


def test_several_images_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="one at a time"):
        export(weights_of(SMALL), ["coreml"], tmp_path, uint8=True, batch_size=2)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("task", ["detect", pytest.param("segment", marks=pytest.mark.slow)])
def test_dense(task: TaskName, tmp_path: Path):
    dense = dense_weights(task)
    [artifact] = export(dense, ["coreml"], tmp_path, size=(75, 130), answers=task == "segment")
    assert difference(artifact.path, dense, artifact.target) < 1e-3
    metadata = read_metadata(artifact.path)
    assert (metadata["task"], metadata["outputs"].split()) == (task, list(artifact.target.outputs))
    black = [np.zeros((9, 9, 3), np.uint8)]
    [artifact] = export(dense, ["coreml"], tmp_path, size=(64, 64), precision="int8", images=black, uint8=True)
    # Were the anchors in 8 bits, boxes would be out of place by more than a hundredth of the image.
    found = evaluate(artifact.path, torch.zeros(1, 3, 64, 64))
    assert set(artifact.target.outputs) <= set(found)
    assert difference(artifact.path, dense, artifact.target) < 1.5
    if task == "detect":
        with pytest.raises(ValueError, match="coreml has no NMS; leave out --answers"):
            export(dense, ["coreml"], tmp_path, answers=True)


class Wrong(torch.nn.Module):
    """A network with an axis, an operator or an answer too many."""

    def __init__(self, fault: str):
        super().__init__()
        self.fault = fault

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if self.fault == "operator":
            images = images.cumsum(3)
        images = images.reshape(1, -1)
        return images[0] if self.fault == "shape" else images


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("rank", "has 6 axes"),
        ("operator", "no MobileViT needs: cumsum"),
        ("shape", "wanted are"),
        ("name", "has images, other"),
    ],
)
def test_a_wrong_program_is_refused(fault: str, message: str, tmp_path: Path):
    program = torch.export.export(Wrong(fault), (torch.zeros(1, 3, 8, 8),)).run_decompositions({})
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")  # of the converter, about itself
        model: Any = ct.convert(
            program,
            inputs=[ct.TensorType("images", (1, 3, 8, 8), dtype=np.float32)],
            outputs=[ct.TensorType("other" if fault == "name" else "logits", dtype=np.float32)],
            minimum_deployment_target=ct.target.iOS16,
            compute_precision=ct.precision.FLOAT32,
            skip_model_load=True,
        )
        model.save(str(tmp_path / "wrong.mlpackage"))
    if fault == "rank":  # the converter refuses to write such a thing
        [file] = tmp_path.rglob("*.mlmodel")
        spec = model.get_spec()
        [block] = spec.mlProgram.functions["main"].block_specializations.values()
        block.operations[-1].outputs[0].type.tensorType.rank = 6
        file.write_bytes(spec.SerializeToString())
    with pytest.raises(ValueError, match=message):
        operators(tmp_path / "wrong.mlpackage")


def test_what_is_no_package(tmp_path: Path):
    with pytest.raises(ValueError, match="no CoreML package"):
        operators(tmp_path)


def test_the_evaluator_knows_what_is_known():
    assert set(OPERATORS) == {name for name in KNOWN if not name.startswith("const")}
