"""Explain a prediction: attention, receptive fields and class evidence (Grad-CAM) for one image."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from mobilevit.defaults import MIN_SIZE_PX
from mobilevit.explain.attention import compute_attention
from mobilevit.explain.explanation import Explanation
from mobilevit.explain.figure import draw_figure
from mobilevit.explain.grad_cam import compute_class_evidence, find_class
from mobilevit.explain.input_region import InputRegion
from mobilevit.explain.page import render_page
from mobilevit.explain.receptive_field import compute_receptive_fields
from mobilevit.export import thresholds_of
from mobilevit.files import write_atomic
from mobilevit.images import ImageInput, read_image
from mobilevit.models.mobilevit import MobileViT
from mobilevit.weights import Weights, read

logger = logging.getLogger(__name__)

SUFFIXES = (".html", ".png")


def explain_image(
    weights: Weights | str | os.PathLike[str],
    image: ImageInput,
    *,
    at: tuple[float, float] | None = None,
    class_name: str | None = None,
    size_px: int | None = None,
    out: str | os.PathLike[str] | None = None,
    device: str = "cpu",
) -> Explanation:
    """Compute attention, receptive fields and, for classifiers, class evidence for one image.

    Args:
        weights: weights of any task, or their location; see `mobilevit.load`.
        image: a path, a PIL image or a uint8 array (H, W, 3).
        at: the query point of attention and receptive fields, as a pixel (x, y) of the upright image. Default: the
            center.
        class_name: the class to show the evidence for. Default: the most likely class. Evidence for the other likely
            classes, and for all labels of a multi-label classifier, is on the page as well.
        size_px: side of the network's input. Default: the size that the weights were trained for. A larger input gives
            finer maps.
        out: a .html or .png file to write. An existing file is overwritten.
        device: as for `torch.device`.

    Raises:
        ImageError: the image cannot be read.
        ValueError: `at` is outside the network's input, the class is unknown or the network has none, the size is
            below 32 px, `out` has another suffix, or `out` is the image itself.

    Examples:
        >>> mobilevit.explain_image("runs/pets/model.safetensors", "cat.jpg", at=(320, 200), out="cat.html")
    """
    path = None if out is None else _output_path(Path(out), image)
    if not isinstance(weights, Weights):
        weights = read(weights)
    if size_px is not None and size_px < MIN_SIZE_PX:
        raise ValueError(f"size is {size_px}; it must be {MIN_SIZE_PX} px or more")
    preprocessing = weights.preprocessing if size_px is None else weights.preprocessing.at_size(size_px)
    has_classes = weights.task in ("classify", "multilabel") and weights.num_classes > 0
    if class_name is not None and not has_classes:
        reason = "these weights have no classifier" if not weights.num_classes else f"the task is {weights.task!r}"
        raise ValueError(f"class is {class_name!r}, but {reason}; class evidence requires a classifier")
    class_index = None if class_name is None else find_class(class_name, weights.class_names, weights.num_classes)
    upright = read_image(image)
    region = InputRegion(*upright.size, preprocessing.input_box(*upright.size))
    at = at or (upright.width // 2, upright.height // 2)
    point = region.to_relative(*at)
    model = weights.build().to(device).requires_grad_(False)
    tensor = preprocessing(upright)[None].to(device)
    explanation = Explanation(
        network=weights.name,
        task=weights.task,
        image=upright,
        region=region,
        at=at,
        point=point,
        size_px=preprocessing.crop_px,
        attention=compute_attention(model.backbone, tensor),
        receptive_fields=compute_receptive_fields(model.backbone, tensor, *point),
        class_evidence=compute_class_evidence(
            model, tensor, weights.class_names, class_index, weights.calibration.temperature, thresholds_of(weights)
        )
        if has_classes and isinstance(model, MobileViT)
        else (),
    )
    if any(one.grad_cam.numel() == 1 for one in explanation.class_evidence):
        logger.warning(
            "at %d px the last feature map has one position, so the Grad-CAM heat map is uniform; use a larger size",
            explanation.size_px,
        )
    if path and path.suffix.lower() == ".png":
        figure = draw_figure(explanation)
        write_atomic(path, lambda temporary: figure.save(temporary, "PNG"))
    elif path:
        write_atomic(path, render_page(explanation))
    return explanation


def _output_path(path: Path, image: ImageInput) -> Path:
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"{path}: unknown suffix {path.suffix!r}; use {' or '.join(SUFFIXES)}")
    if isinstance(image, str | os.PathLike) and path.resolve() == Path(image).resolve():
        raise ValueError(f"{path}: is the input image; choose another output file")
    return path
