"""Class names of published weights, whose files do not contain them. torchvision has the lists."""

from __future__ import annotations

from dataclasses import replace

from mobilevit.weights.record import Weights


def imagenet_class_names() -> tuple[str, ...]:
    """The 1,000 class names of ImageNet-1k."""
    from torchvision.models import ResNet18_Weights

    return tuple(ResNet18_Weights.IMAGENET1K_V1.meta["categories"])


def coco_class_names() -> tuple[str, ...]:
    """The 80 class names of COCO's boxes, without background."""
    return tuple(_coco_categories().values())


def coco_category_ids() -> tuple[int, ...]:
    """The ids, 1 to 90 with gaps, of the classes of `coco_class_names` in COCO's annotations."""
    return tuple(_coco_categories())


def _coco_categories() -> dict[int, str]:
    from torchvision.models.detection import SSD300_VGG16_Weights

    names = SSD300_VGG16_Weights.COCO_V1.meta["categories"]
    return {index: name for index, name in enumerate(names) if name not in ("__background__", "N/A")}


def voc_class_names() -> tuple[str, ...]:
    """ "background" and the 20 class names of PASCAL VOC."""
    from torchvision.models.segmentation import DeepLabV3_ResNet50_Weights

    return "background", *DeepLabV3_ResNet50_Weights.COCO_WITH_VOC_LABELS_V1.meta["categories"][1:]


def with_published_names(weights: Weights) -> Weights:
    """Add the class names of ImageNet, COCO or VOC, if the number of classes is that of the published weights."""
    match weights.task, weights.num_classes:
        case "classify", 1000:
            return replace(weights, class_names=imagenet_class_names())
        case "detect", 80:
            return replace(weights, class_names=coco_class_names(), category_ids=coco_category_ids())
        case "segment", 21:
            return replace(weights, class_names=voc_class_names())
    return weights
