"""CoreML: an ML Program in an .mlpackage. Conversion works everywhere; the runtime exists on Apple systems only."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from mobilevit.export.artifact import ArtifactSpec, ExportModel
from mobilevit.export.backend import InferenceFn, Operators, Signature
from mobilevit.export.quiet import quiet
from mobilevit.export.rewrite import Formulation, optimize_for_inference
from mobilevit.messages import first_line

with quiet():
    import coremltools as ct
    import coremltools.optimize.coreml as cto

PRECISIONS = ("fp32", "fp16", "int8")
DYNAMIC = ()
POSTPROCESS_TASKS = ("segment",)
# A sum of squares can overflow fp16; the runtime's layer norm handles that.
FORMULATION = Formulation(attention="rank4", norm="layer")
MAX_RANK = 5
TYPES = {"classes": np.int32}  # of outputs other than float32
AXES = {"logits": (2, 4), "boxes": (3,), "scores": (3,), "classes": (3,)}  # allowed ranks of the outputs
# Operators of a converted network. Any other operator indicates an inefficient conversion, which would otherwise go
# unnoticed on systems that cannot run the program.
EXPECTED_OPERATORS = {
    *("const", "constexpr_affine_dequantize", "cast"),
    *("conv", "linear", "matmul", "add", "sub", "mul", "silu", "relu", "exp", "clip", "softmax", "layer_norm"),
    *("reduce_mean", "reduce_argmax"),
    *("reshape", "transpose", "concat", "stack", "slice_by_index", "upsample_bilinear"),
}


def write(
    network: nn.Module, spec: ArtifactSpec, path: Path, metadata: Mapping[str, str], calibration: Sequence[Tensor]
) -> None:
    """Write a program for iOS 16, macOS 13 and later.

    The input "images" is a float32 multi-array; with `ArtifactSpec.uint8` it is an RGB image, normalized inside. fp16
    and int8 compute in fp16. In int8 only the weights are 8-bit (symmetric, one scale per channel), without
    calibration.

    Raises:
        ValueError: uint8 with a batch size above 1.
    """
    shape = (spec.batch_size, 3, spec.height, spec.width)
    if not spec.uint8:
        model = optimize_for_inference(network, FORMULATION)
        images = ct.TensorType("images", shape, dtype=np.float32)
    elif spec.batch_size > 1:
        raise ValueError(f"batch size is {spec.batch_size}; coreml supports 1 only with uint8 input")
    else:
        assert isinstance(network, ExportModel)
        # An image type has one scale for all channels, so the network multiplies by the remaining factors.
        scale = network.scale
        rest = scale / scale[0]
        bias = [0.0] * 3 if network.shift is None else (-network.shift / rest).flatten().tolist()
        before = () if torch.equal(rest, torch.ones_like(rest)) else (_Scale(rest),)
        model = nn.Sequential(*before, optimize_for_inference(network.network, FORMULATION), network.postprocess)
        color = ct.colorlayout.RGB
        images = ct.ImageType("images", shape, scale=scale[0].item(), bias=bias, color_layout=color)
    precision = ct.precision.FLOAT32 if spec.precision == "fp32" else ct.precision.FLOAT16
    with quiet():
        program = torch.export.export(model, (torch.zeros(shape),)).run_decompositions({})
        converted: Any = ct.convert(
            program,
            convert_to="mlprogram",
            inputs=[images],
            outputs=[ct.TensorType(name, dtype=TYPES.get(name, np.float32)) for name in spec.outputs],
            minimum_deployment_target=ct.target.iOS16,
            compute_precision=precision,
            skip_model_load=True,
        )
        if spec.precision == "int8":
            config = cto.OpLinearQuantizerConfig(mode="linear_symmetric", dtype="int8", granularity="per_channel")
            # These decode boxes: in 8 bits, boxes would be off by a hundredth of the image.
            excluded: Any = {"add": None, "mul": None}
            converted = cto.linear_quantize_weights(converted, cto.OptimizationConfig(config, op_type_configs=excluded))
        converted.short_description = f"MobileViT: RGB images to {', '.join(spec.outputs)}"
        for key, value in metadata.items():
            converted.user_defined_metadata[key] = value
        converted.save(str(path))


def load(path: Path, num_threads: int) -> InferenceFn | None:
    """Load an artifact on macOS; CoreML chooses the number of threads."""
    if sys.platform != "darwin":
        return None
    model = ct.models.MLModel(str(path))
    description = model.get_spec().description
    takes_image = description.input[0].type.HasField("imageType")
    names = [output.name for output in description.output]

    def infer(images: np.ndarray) -> tuple[np.ndarray, ...]:
        value = Image.fromarray(images[0]) if takes_image else images
        outputs = model.predict({"images": value})
        return tuple(np.asarray(outputs[name]) for name in names)

    return infer


def operators(path: Path) -> Operators:
    """Check the structure of a program, which may not run on this system, and count its operators."""
    spec = _read(path)
    expected = ["images", *read_metadata(path).get("outputs", "logits").split()]
    features = {x.name: x.type for x in (*spec.description.input, *spec.description.output)}
    if list(features) != expected:
        raise ValueError(f"{path}: has {', '.join(features)}; expected {', '.join(expected)}")
    images = features.pop("images")
    if images.HasField("imageType"):
        is_image = images.imageType.colorSpace == images.imageType.RGB
    else:
        shape = tuple(images.multiArrayType.shape)
        is_image = len(shape) == 4 and shape[1] == 3 and _is(np.float32, images)
    are_outputs = [
        len(type.multiArrayType.shape) in AXES[name] and _is(TYPES.get(name, np.float32), type)
        for name, type in features.items()
    ]
    if not is_image or not all(are_outputs):
        kinds = " and ".join(" ".join(str(type).split()) for type in (images, *features.values()))
        raise ValueError(f"{path}: has {kinds}; expected RGB images (float32 or an image type) and the outputs")

    operations = [
        x for block in spec.mlProgram.functions["main"].block_specializations.values() for x in block.operations
    ]
    unknown = sorted({x.type for x in operations} - EXPECTED_OPERATORS)
    if unknown:
        raise ValueError(f"{path}: has unexpected operators: {', '.join(unknown)}")
    ranks = {output.name: output.type.tensorType.rank for x in operations for output in x.outputs}
    widest = max(ranks, key=lambda name: ranks[name])
    if ranks[widest] > MAX_RANK:
        raise ValueError(f"{path}: {widest} has {ranks[widest]} axes; CoreML supports {MAX_RANK}")
    return Operators(sum(not x.type.startswith("const") for x in operations), ())


def read_metadata(path: Path) -> dict[str, str]:
    """Return the metadata given to `write`, and entries that the converter added."""
    return dict(_read(path).description.metadata.userDefined)


def signature(path: Path) -> Signature:
    description = _read(path).description
    images, output = description.input[0].type, description.output[0].type.multiArrayType
    num_classes = output.shape[-1] if output.shape else 0
    if images.HasField("imageType"):
        return Signature((1, images.imageType.height, images.imageType.width, 3), True, num_classes)
    return Signature(tuple(images.multiArrayType.shape), False, num_classes)


class _Scale(nn.Module):
    scale: Tensor

    def __init__(self, scale: Tensor):
        super().__init__()
        self.register_buffer("scale", scale)

    def forward(self, images: Tensor) -> Tensor:
        return images * self.scale


def _read(path: Path) -> Any:
    try:
        spec: Any = ct.utils.load_spec(str(path))
    except Exception as error:  # the reader raises various types
        raise ValueError(f"{path}: not a CoreML package: {first_line(error)}") from None
    if spec.WhichOneof("Type") != "mlProgram":
        raise ValueError(f"{path}: is a {spec.WhichOneof('Type')}; expected an ML Program")
    return spec


def _is(kind: type, type: Any) -> bool:
    array = type.multiArrayType
    return array.dataType == (array.INT32 if kind is np.int32 else array.FLOAT32)
