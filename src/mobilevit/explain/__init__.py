"""Why a network answers as it does: where it attends, how far it sees, and what in the image speaks for a class."""

from __future__ import annotations

import os
from pathlib import Path

from mobilevit.explain.attention import attention_of
from mobilevit.explain.draw import draw_figure
from mobilevit.explain.evidence import evidence_of, find_class
from mobilevit.explain.explanation import Explanation
from mobilevit.explain.page import page_of
from mobilevit.explain.receptive import fields_of
from mobilevit.explain.view import view_of
from mobilevit.files import write_whole
from mobilevit.images import ImageInput, read_image
from mobilevit.models.mobilevit import MobileViT
from mobilevit.weights import Weights, read

ENDINGS = (".html", ".png")


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
    """What the network attends to, how far it sees and, of a classifier, what speaks for the classes.

    Args:
        weights: of any task, or where they are, see `mobilevit.load`.
        image: a path, a PIL image or a uint8 array (H, W, 3).
        at: the place to ask about, a pixel (x, y) of the upright image; the middle of it unless given.
        class_name: the class to show the evidence for; unless given, the likeliest.
        size_px: side of what the network is given; unless given, what the weights were made for. A larger one has
            finer maps.
        out: a .html or .png file to write; one that exists is replaced.
        device: where to compute, as for `torch.device`.

    Raises:
        ImageError: an image that cannot be read.
        ValueError: a place that the network does not see, an unknown class, a class where there are none, a size below
            32 px, another ending of `out`, or the image itself.

    >>> mobilevit.explain_image("runs/pets/model.safetensors", "cat.jpg", at=(320, 200), out="cat.html")
    """
    path = None if out is None else Path(out)
    if path and path.suffix.lower() not in ENDINGS:
        raise ValueError(f"{path}: ends in {path.suffix or 'nothing'}; write a {' or a '.join(ENDINGS)} file")
    if path and isinstance(image, str | os.PathLike) and path.resolve() == Path(image).resolve():
        raise ValueError(f"{path}: is the image itself; name another file to write")
    if not isinstance(weights, Weights):
        weights = read(weights)
    preprocessing = weights.preprocessing
    if size_px is not None:
        if size_px < 32:
            raise ValueError(f"size is {size_px}; it must be 32 px or more")
        preprocessing = preprocessing.at_size(size_px)
    classifies = weights.task == "classify" and weights.num_classes > 0
    if class_name is not None and not classifies:
        has_none = "these have none" if weights.task == "classify" else f"these are weights to {weights.task}"
        raise ValueError(f"class is {class_name!r}; evidence is shown for the classes of classifiers, and {has_none}")
    chosen = None if class_name is None else find_class(class_name, weights.class_names, weights.num_classes)
    upright = read_image(image)
    view = view_of(preprocessing, *upright.size)
    at = at or (upright.width // 2, upright.height // 2)
    place = view.share(*at)
    model = weights.build().to(device)
    model.requires_grad_(False)
    pixels = preprocessing(upright)[None].to(device)
    explanation = Explanation(
        network=weights.name,
        task=weights.task,
        image=upright,
        view=view,
        at=at,
        place=place,
        size_px=preprocessing.crop_px,
        blocks=attention_of(model.backbone, pixels),
        fields=fields_of(model.backbone, pixels, *place),
        evidence=evidence_of(model, pixels, weights.class_names, chosen)
        if classifies and isinstance(model, MobileViT)
        else (),
    )
    if path and path.suffix.lower() == ".png":
        figure = draw_figure(explanation)
        write_whole(path, lambda target: figure.save(target, "PNG"))
    elif path:
        page = page_of(explanation)
        write_whole(path, lambda target: target.write_text(page, encoding="utf-8"))
    return explanation
