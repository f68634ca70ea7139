"""What in the image speaks for a class, by Grad-CAM and LayerCAM.

Behind the last map of MobileViT stand a mean and a linear layer, and there Grad-CAM (Selvaraju et al. 2017) is exact:
it shares out the logit, but for its bias, among the places of the map. LayerCAM (Jiang et al. 2021) weighs every place
of an earlier, finer map by its own gradient, where that is positive.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mobilevit.explain.attention import record
from mobilevit.models.mobilevit import MobileViT
from mobilevit.names import nearest

TOP_K = 5
FEW_CLASSES = 20  # so many names are all listed for whoever asks for another
FINE_STAGE = "stage4"


@dataclass(frozen=True)
class Evidence:
    """What speaks for one class, which the network gives `probability` (0 to 1).

    `shares` (h, w) are of the last map: what each place adds to the logit, above 0 for the class and below 0 against
    it; with the classifier's bias they sum to the logit. `fine` (h, w), 0 and up, is of stage 4 and in no unit.
    """

    class_name: str
    class_index: int
    probability: float
    shares: Tensor
    fine: Tensor


def evidence_of(
    model: MobileViT, pixels: Tensor, class_names: Sequence[str], chosen: int | None = None
) -> tuple[Evidence, ...]:
    """What speaks for a class in one preprocessed image (1, 3, H, W): for the one chosen, then for the likeliest.

    Raises:
        ValueError: a network without a classifier.
    """
    if not model.num_classes:
        raise ValueError("this network has no classifier, so there is no class to show the evidence for; train one")
    with torch.enable_grad():
        modules = {"last": model.head, "fine": model.backbone.get_submodule(FINE_STAGE)}
        logits, maps = record(model, pixels.detach().clone().requires_grad_(), modules)
        last, fine = maps["last"], maps["fine"]
        probabilities = logits[0].detach().float().softmax(dim=0)
        likeliest = probabilities.topk(min(TOP_K, model.num_classes)).indices.tolist()
        found = []
        for index in likeliest if chosen is None else dict.fromkeys((chosen, *likeliest)):
            by_last, by_fine = torch.autograd.grad(logits[0, index], (last, fine), retain_graph=True)
            shares = (by_last.mean(dim=(2, 3), keepdim=True) * last).sum(dim=1)[0]
            layer_cam = (by_fine.clamp(min=0) * fine).sum(dim=1)[0].clamp(min=0)
            found.append(
                Evidence(
                    class_names[index] if class_names else f"class {index}",
                    index,
                    probabilities[index].item(),
                    shares.detach().float().cpu(),
                    layer_cam.detach().float().cpu(),
                )
            )
    return tuple(found)


def find_class(name: str, class_names: Sequence[str], num_classes: int) -> int:
    """The number of a class by its name, in any case of letters; "class 7" where nobody named the classes.

    Raises:
        ValueError: no such class; the message has the names there are, or of many those nearest to it.
    """
    names = [one.casefold() for one in class_names or (f"class {i}" for i in range(num_classes))]
    if name.casefold() in names:
        return names.index(name.casefold())
    shown = class_names or tuple(names)
    said = f"class is {name!r}, which none of the {num_classes} classes of these weights is called"
    if num_classes <= FEW_CLASSES:
        raise ValueError(f"{said}; they are {', '.join(shown)}")
    hint = nearest(name, shown) or f"the first are {', '.join(shown[:5])}"
    raise ValueError(f"{said}; {hint.strip()}")
