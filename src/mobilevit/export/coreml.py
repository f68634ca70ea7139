"""CoreML, as an ML Program in an .mlpackage: converted anywhere, run by macOS and iOS alone."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from mobilevit.export.artifact import Deployed
from mobilevit.export.quiet import quiet
from mobilevit.export.rewrite import Formulation, fast
from mobilevit.images import first_line

if TYPE_CHECKING:
    from mobilevit.export import Operators, Run, Target

with quiet():
    import coremltools as ct
    import coremltools.optimize.coreml as cto

PRECISIONS = ("fp32", "fp16", "int8")
DYNAMIC = ()
ANSWERS = ("segment",)
# A sum of squares may exceed what fp16 holds; the runtime's own layer norm sees to that.
FORMULATION = Formulation(attention="rank4", norm="layer")
MAX_RANK = 5
TYPES = {"classes": np.int32}  # of outputs that are not float32
AXES = {"logits": (2, 4), "boxes": (3,), "scores": (3,), "classes": (3,)}  # how many an output may have
# What a converted network consists of. Another operator would be a sign that the converter has spelt something in a
# roundabout way, which nobody would notice where the program cannot be run.
KNOWN = {
    *("const", "constexpr_affine_dequantize", "cast"),
    *("conv", "linear", "matmul", "add", "sub", "mul", "silu", "relu", "exp", "clip", "softmax", "layer_norm"),
    *("reduce_mean", "reduce_argmax"),
    *("reshape", "transpose", "concat", "stack", "slice_by_index", "upsample_bilinear"),
}


def write(
    network: nn.Module, target: Target, path: Path, metadata: Mapping[str, str], calibration: Sequence[Tensor]
) -> None:
    """See `Backend.write`. The program is for iOS 16, macOS 13 and later.

    Its input is a float32 multi-array "images"; with `Target.uint8` it is an image, RGB, whose scaling is part of the
    program. fp16 and int8 compute in fp16. In int8 the weights alone are 8-bit (symmetric, a scale a channel), the
    activations stay fp16, so that nothing is calibrated.

    Raises:
        ValueError: several images at once.
    """
    shape = (target.batch_size, 3, target.height, target.width)
    if not target.uint8:
        model = fast(network, FORMULATION)
        images = ct.TensorType("images", shape, dtype=np.float32)
    elif target.batch_size > 1:
        raise ValueError(f"coreml takes images (uint8) one at a time, not {target.batch_size} of them")
    else:
        assert isinstance(network, Deployed)
        # An image type has one scale for all channels: what is left of theirs goes into the network.
        scale = network.scale
        rest = scale / scale[0]
        bias = [0.0] * 3 if network.shift is None else (-network.shift / rest).flatten().tolist()
        before = () if torch.equal(rest, torch.ones_like(rest)) else (_Scale(rest),)
        model = nn.Sequential(*before, fast(network.network, FORMULATION), network.finish)
        color = ct.colorlayout.RGB
        images = ct.ImageType("images", shape, scale=scale[0].item(), bias=bias, color_layout=color)
    precision = ct.precision.FLOAT32 if target.precision == "fp32" else ct.precision.FLOAT16
    with quiet():
        program = torch.export.export(model, (torch.zeros(shape),)).run_decompositions({})
        converted: Any = ct.convert(
            program,
            convert_to="mlprogram",
            inputs=[images],
            outputs=[ct.TensorType(name, dtype=TYPES.get(name, np.float32)) for name in target.outputs],
            minimum_deployment_target=ct.target.iOS16,
            compute_precision=precision,
            skip_model_load=True,
        )
        if target.precision == "int8":
            config = cto.OpLinearQuantizerConfig(mode="linear_symmetric", dtype="int8", granularity="per_channel")
            # Not what boxes are computed with: 8 bits would move them by a hundredth of the image.
            left: Any = {"add": None, "mul": None}
            converted = cto.linear_quantize_weights(converted, cto.OptimizationConfig(config, op_type_configs=left))
        converted.short_description = f"MobileViT: RGB images to {', '.join(target.outputs)}"
        for key, value in metadata.items():
            converted.user_defined_metadata[key] = value
        converted.save(str(path))


def load(path: Path, num_threads: int) -> Run | None:
    """See `Backend.load`; None but on macOS. How many threads there are, CoreML decides."""
    if sys.platform != "darwin":
        return None
    model = ct.models.MLModel(str(path))
    description = model.get_spec().description
    takes_image = description.input[0].type.HasField("imageType")
    names = [output.name for output in description.output]

    def run(images: np.ndarray) -> tuple[np.ndarray, ...]:
        value = Image.fromarray(images[0]) if takes_image else images
        outputs = model.predict({"images": value})
        return tuple(np.asarray(outputs[name]) for name in names)

    return run


def operators(path: Path) -> Operators:
    """See `Backend.operators`; since a program is seldom run where it is made, its structure is checked here."""
    from mobilevit.export import Operators

    spec = _read(path)
    wanted = ["images", *read_metadata(path).get("outputs", "logits").split()]
    found = {x.name: x.type for x in (*spec.description.input, *spec.description.output)}
    if list(found) != wanted:
        raise ValueError(f"{path}: has {', '.join(found)}; wanted are {', '.join(wanted)}")
    images = found.pop("images")
    if images.HasField("imageType"):
        is_image = images.imageType.colorSpace == images.imageType.RGB
    else:
        shape = tuple(images.multiArrayType.shape)
        is_image = len(shape) == 4 and shape[1] == 3 and _is(np.float32, images)
    as_wanted = [
        len(type.multiArrayType.shape) in AXES[name] and _is(TYPES.get(name, np.float32), type)
        for name, type in found.items()
    ]
    if not is_image or not all(as_wanted):
        kinds = " and ".join(" ".join(str(type).split()) for type in (images, *found.values()))
        raise ValueError(f"{path}: takes and gives {kinds}; wanted are RGB images, float32 or an image, and outputs")

    operations = [
        x for block in spec.mlProgram.functions["main"].block_specializations.values() for x in block.operations
    ]
    unknown = sorted({x.type for x in operations} - KNOWN)
    if unknown:
        raise ValueError(f"{path}: has operators that no MobileViT needs: {', '.join(unknown)}")
    ranks = {output.name: output.type.tensorType.rank for x in operations for output in x.outputs}
    widest = max(ranks, key=lambda name: ranks[name])
    if ranks[widest] > MAX_RANK:
        raise ValueError(f"{path}: {widest} has {ranks[widest]} axes; CoreML knows {MAX_RANK} at most")
    return Operators(sum(not x.type.startswith("const") for x in operations), ())


def read_metadata(path: Path) -> dict[str, str]:
    """What `write` was given as metadata, and what the converter added."""
    return dict(_read(path).description.metadata.userDefined)


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
    except Exception as error:  # whatever the reader stumbles over
        raise ValueError(f"{path}: no CoreML package: {first_line(error)}") from None
    if spec.WhichOneof("Type") != "mlProgram":
        raise ValueError(f"{path}: is a {spec.WhichOneof('Type')}; expected an ML Program")
    return spec


def _is(kind: type, type: Any) -> bool:
    array = type.multiArrayType
    return array.dataType == (array.INT32 if kind is np.int32 else array.FLOAT32)
