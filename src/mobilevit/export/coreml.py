"""CoreML, as an ML Program in an .mlpackage: converted anywhere, run by macOS and iOS alone."""

from __future__ import annotations

import contextlib
import io
import logging
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from mobilevit.export.rewrite import Formulation, fast
from mobilevit.pictures import first_line

if TYPE_CHECKING:
    from mobilevit.export import Operators, Run, Target


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what the converter says about itself and about versions of others."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


with _quiet():
    import coremltools as ct
    import coremltools.optimize.coreml as cto

PRECISIONS = ("fp32", "fp16", "int8")
DYNAMIC = ()
# A sum of squares may exceed what fp16 holds; the runtime's own layer norm sees to that.
FORMULATION = Formulation(attention="rank4", norm="layer")
MAX_RANK = 5
# What a converted network consists of. Another operator would be a sign that the converter has spelt something in a
# roundabout way, which nobody would notice where the program cannot be run.
KNOWN = {
    *("const", "constexpr_affine_dequantize", "cast"),
    *("conv", "linear", "matmul", "add", "mul", "silu", "softmax", "layer_norm", "reduce_mean"),
    *("reshape", "transpose", "concat", "stack", "slice_by_index", "upsample_bilinear"),
}


def write(
    network: nn.Module, target: Target, path: Path, metadata: Mapping[str, str], calibration: Sequence[Tensor]
) -> None:
    """See `Backend.write`. The program is for iOS 16, macOS 13 and later.

    Its input is a float32 multi-array "pictures"; with `Target.uint8` it is an image, RGB, whose scaling is part of the
    program. fp16 and int8 compute in fp16. In int8 the weights alone are 8-bit (symmetric, a scale a channel), the
    activations stay fp16, so that nothing is calibrated.

    Raises:
        ValueError: several images at once.
    """
    from mobilevit.export import Deployed

    assert isinstance(network, Deployed)
    shape = (target.batch_size, 3, target.height, target.width)
    if not target.uint8:
        model, pictures = fast(network, FORMULATION), ct.TensorType("pictures", shape, dtype=np.float32)
    elif target.batch_size > 1:
        raise ValueError(f"coreml takes images (uint8) one at a time, not {target.batch_size} of them")
    else:
        # An image type has one scale for all channels: what is left of theirs goes into the network.
        scale = network.scale
        rest = scale / scale[0]
        bias = [0.0] * 3 if network.shift is None else (-network.shift / rest).flatten().tolist()
        model = fast(network.network, FORMULATION)
        if not torch.equal(rest, torch.ones_like(rest)):
            model = nn.Sequential(_Scale(rest), model)
        color = ct.colorlayout.RGB
        pictures = ct.ImageType("pictures", shape, scale=scale[0].item(), bias=bias, color_layout=color)
    precision = ct.precision.FLOAT32 if target.precision == "fp32" else ct.precision.FLOAT16
    # The converter's progress bars go to stderr.
    with _quiet(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        program = torch.export.export(model, (torch.zeros(shape),)).run_decompositions({})
        converted: Any = ct.convert(
            program,
            convert_to="mlprogram",
            inputs=[pictures],
            outputs=[ct.TensorType("logits", dtype=np.float32)],
            minimum_deployment_target=ct.target.iOS16,
            compute_precision=precision,
            skip_model_load=True,
        )
        if target.precision == "int8":
            config = cto.OpLinearQuantizerConfig(mode="linear_symmetric", dtype="int8", granularity="per_channel")
            converted = cto.linear_quantize_weights(converted, cto.OptimizationConfig(global_config=config))
        converted.short_description = "MobileViT: RGB pictures to logits of classes"
        for key, value in metadata.items():
            converted.user_defined_metadata[key] = value
        converted.save(str(path))


def load(path: Path, num_threads: int) -> Run | None:
    """See `Backend.load`; None but on macOS. How many threads there are, CoreML decides."""
    if sys.platform != "darwin":
        return None
    model = ct.models.MLModel(str(path))
    takes_image = model.get_spec().description.input[0].type.HasField("imageType")

    def run(pictures: np.ndarray) -> np.ndarray:
        value = Image.fromarray(pictures[0]) if takes_image else pictures
        return np.asarray(model.predict({"pictures": value})["logits"])

    return run


def operators(path: Path) -> Operators:
    """See `Backend.operators`; since a program is seldom run where it is made, its structure is checked here."""
    from mobilevit.export import Operators

    spec = _read(path)
    found = [(x.name, x.type) for x in (*spec.description.input, *spec.description.output)]
    if [name for name, _ in found] != ["pictures", "logits"]:
        raise ValueError(f"{path}: has {', '.join(name for name, _ in found)}; wanted are pictures and logits")
    pictures, logits = (type for _, type in found)
    if pictures.HasField("imageType"):
        is_picture = pictures.imageType.colorSpace == pictures.imageType.RGB
    else:
        shape = tuple(pictures.multiArrayType.shape)
        is_picture = len(shape) == 4 and shape[1] == 3 and _is_float32(pictures)
    if not is_picture or len(logits.multiArrayType.shape) != 2 or not _is_float32(logits):
        kinds = " and ".join(" ".join(str(type).split()) for type in (pictures, logits))
        raise ValueError(f"{path}: takes and gives {kinds}; wanted are RGB pictures, float32 or an image, and logits")

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

    def forward(self, pictures: Tensor) -> Tensor:
        return pictures * self.scale


def _read(path: Path) -> Any:
    try:
        spec: Any = ct.utils.load_spec(str(path))
    except Exception as error:  # whatever the reader stumbles over
        raise ValueError(f"{path}: no CoreML package: {first_line(error)}") from None
    if spec.WhichOneof("Type") != "mlProgram":
        raise ValueError(f"{path}: is a {spec.WhichOneof('Type')}; expected an ML Program")
    return spec


def _is_float32(type: Any) -> bool:
    return type.multiArrayType.dataType == type.multiArrayType.FLOAT32
