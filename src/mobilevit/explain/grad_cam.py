"""Class evidence: which positions of a feature map raise the logit of a class, by Grad-CAM and LayerCAM.

The classifier is a global average pool and a linear layer. Grad-CAM (Selvaraju et al. 2017) on the last feature map is
therefore exact: it splits the logit, except for its bias, among the positions of the map. LayerCAM (Jiang et al. 2021)
weights each position of an earlier, finer map by its own positive gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mobilevit.defaults import TOP_K
from mobilevit.explain.attention import capture_outputs
from mobilevit.messages import nearest
from mobilevit.models.mobilevit import MobileViT

MAX_LISTED_CLASSES = 20  # error messages list up to this many class names
MAX_PREDICTED = 20  # predicted classes of a multi-label classifier with evidence
LAYER_CAM_STAGE = "stage4"


@dataclass(frozen=True)
class ClassEvidence:
    """Evidence for one class with its `probability` (0 to 1), and whether it is the prediction, or one of several.

    `grad_cam` (h, w) is the contribution of each position of the last feature map to the logit, positive or negative;
    with the classifier's bias it sums to the logit. `layer_cam` (h, w) of stage 4 is non-negative and has no unit.
    """

    class_name: str
    class_index: int
    probability: float
    grad_cam: Tensor
    layer_cam: Tensor
    is_predicted: bool


def compute_class_evidence(
    model: MobileViT,
    image: Tensor,
    class_names: Sequence[str],
    class_index: int | None = None,
    temperature: float = 1.0,
    thresholds: Sequence[float] = (),
) -> tuple[ClassEvidence, ...]:
    """Evidence for `class_index`, if given, and for the most likely classes, in a preprocessed image (1, 3, H, W).

    Probabilities are softmax(logits / temperature); the evidence is that for the logits. With the `thresholds` of a
    multi-label classifier, probabilities are sigmoids, and the classes include up to 20 predicted ones.
    """
    with torch.enable_grad():
        modules = {"last": model.head, "fine": model.backbone.get_submodule(LAYER_CAM_STAGE)}
        logits, maps = capture_outputs(model, image.detach().clone().requires_grad_(), modules)
        last, fine = maps["last"], maps["fine"]
        logits_C = logits[0].detach().float()
        probabilities = logits_C.sigmoid() if thresholds else (logits_C / temperature).softmax(dim=0)
        is_predicted = (
            probabilities >= torch.tensor(thresholds, device=probabilities.device)
            if thresholds
            else torch.arange(len(probabilities), device=probabilities.device) == probabilities.argmax()
        )
        num_listed = max(TOP_K, min(MAX_PREDICTED, int(is_predicted.sum())))
        predicted_first = probabilities + is_predicted  # probabilities are at most 1
        most_likely = predicted_first.topk(min(num_listed, model.num_classes)).indices.tolist()
        result = []
        for index in most_likely if class_index is None else dict.fromkeys((class_index, *most_likely)):
            last_gradient, fine_gradient = torch.autograd.grad(logits[0, index], (last, fine), retain_graph=True)
            grad_cam = (last_gradient.mean(dim=(2, 3), keepdim=True) * last).sum(dim=1)[0]
            layer_cam = (fine_gradient.clamp(min=0) * fine).sum(dim=1)[0].clamp(min=0)
            result.append(
                ClassEvidence(
                    class_names[index] if class_names else f"class {index}",
                    index,
                    probabilities[index].item(),
                    grad_cam.detach().float().cpu(),
                    layer_cam.detach().float().cpu(),
                    bool(is_predicted[index]),
                )
            )
    return tuple(result)


def find_class(name: str, class_names: Sequence[str], num_classes: int) -> int:
    """The index of a class by its name, ignoring case; unnamed classes are called "class 0", "class 1", ...

    Raises:
        ValueError: no class has this name. The message lists all names, or the most similar ones of many.
    """
    names = tuple(class_names) or tuple(f"class {i}" for i in range(num_classes))
    folded = [one.casefold() for one in names]
    if name.casefold() in folded:
        return folded.index(name.casefold())
    if num_classes <= MAX_LISTED_CLASSES:
        hint = f"they are {', '.join(names)}"
    else:
        hint = nearest(name, names) or f"the first are {', '.join(names[:5])}"
    raise ValueError(
        f"class is {name!r}, which is not among the {num_classes} classes of these weights; {hint.strip()}"
    )
