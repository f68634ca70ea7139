"""Metadata of weights files: our own in .safetensors files, and the JSON files of timm and transformers."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from mobilevit.images import FILTERS, Preprocessing
from mobilevit.messages import first_line
from mobilevit.models.deeplabv3 import LATER_HEAD, PAPER_HEAD, DeepLabHead
from mobilevit.models.mobilevit import ARCHITECTURES, Architecture, Stage, Transformer
from mobilevit.weights.keys import FORMAT_NAMES, is_bgr
from mobilevit.weights.record import (
    PREPROCESSING,
    TASK_FORMATS,
    TIMM_PREPROCESSING,
    UNCALIBRATED,
    Calibration,
    Format,
    TaskName,
    Weights,
    WeightsError,
)

METADATA = "mobilevit"  # key in the metadata of a .safetensors file: the description
CALIBRATION = "calibration"  # key in the description; files without it are not calibrated
OTHER = "mobilevit.other"  # the same for a network that is not MobileViT
MULTILABEL_PROBLEM = "multi_label_classification"  # transformers' problem_type
PUBLISHED_STRIDES = {PAPER_HEAD: 16, LATER_HEAD: 8}  # output strides of Apple's two segmentation networks


@dataclass(frozen=True)
class Description:
    """The metadata of a weights file, from the file itself or from the JSON files next to it."""

    preprocessing: Preprocessing
    bgr: bool
    source: str | None  # where the metadata is from; None if there is none and published values are assumed
    architecture: Architecture | None = None
    class_names: tuple[str, ...] | None = None  # None: the format has no place for them
    output_stride: int = 32
    training: Mapping[str, Any] = field(default_factory=dict)
    head: DeepLabHead | None = None
    category_ids: tuple[int, ...] = ()
    task: TaskName | None = None  # None: that of the tensors
    thresholds: tuple[float, ...] = ()
    calibration: Calibration = UNCALIBRATED


def describe(
    path: Path, format: Format, task: TaskName, stored: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> Description:
    """The description of the file at `path`. If it has no metadata, the published values are assumed.

    Raises:
        WeightsError: a description that is damaged, or of something that this package does not implement.
    """
    if METADATA in metadata:
        return _describe_own(path, format, task, parse_json(path, metadata[METADATA]))
    config_path = path.with_name("config.json")
    in_hub_layout = path.name in ("model.safetensors", "pytorch_model.bin") and config_path.is_file()
    if in_hub_layout and format == "transformers":
        return _describe_transformers(config_path, task)
    if in_hub_layout and format == "timm":
        config = _read_json(config_path)
        with _reported(config_path, "config"):
            names = config.get("label_names") or config.get("pretrained_cfg", {}).get("label_names")
            return Description(
                bgr=False,
                preprocessing=_preprocessing_from_timm(config.get("pretrained_cfg", {})),
                class_names=tuple(names) if names else None,
                source="config.json",
            )
    assumed = TIMM_PREPROCESSING if format == "timm" else PREPROCESSING[task]
    if task != "segment":
        return Description(assumed, bgr=is_bgr(format, None), source=None)
    # Tensors do not contain the dilations and the output stride. Assume those of the two published networks.
    is_later = any(key.startswith(("auxiliary.", "seg_head.aux_head.", "seg_head.classifier.block.")) for key in stored)
    head = LATER_HEAD if is_later else PAPER_HEAD
    return Description(assumed, bgr=is_bgr(format, head), source=None, head=head, output_stride=PUBLISHED_STRIDES[head])


# ---------------------------------------------------------------------------------------------------------------------
# This package


def metadata_of(weights: Weights) -> dict[str, Any]:
    """The description that `write` stores."""
    return {
        "architecture": asdict(weights.architecture),
        "output_stride": weights.output_stride,
        "preprocessing": weights.preprocessing.to_dict(),
        "class_names": weights.class_names,
        "training": dict(weights.training),
        "task": weights.task,
        "head": asdict(weights.head) if weights.head else None,
        "category_ids": weights.category_ids,
        **({"thresholds": weights.thresholds} if weights.thresholds else {}),
        **_calibration_of(weights),
    }


def _calibration_of(weights: Weights) -> dict[str, Any]:
    return {} if weights.calibration == UNCALIBRATED else {CALIBRATION: asdict(weights.calibration)}


def _describe_own(path: Path, format: Format, task: TaskName, values: Mapping[str, Any]) -> Description:
    with _reported(path, "metadata"):
        described_task = values.get("task", "classify")  # files of the first release, all classifiers, have no task
        # A multi-label classifier has the tensors of a classifier.
        if described_task != task and (described_task, task) != ("multilabel", "classify"):
            raise ValueError(f"task is {described_task!r}, but the keys are those of {task!r}")
        head = DeepLabHead(**{**values["head"], "rates": tuple(values["head"]["rates"])}) if task == "segment" else None
        category_ids = tuple(values.get("category_ids", ()))  # older files have none
        if category_ids and len(category_ids) != len(values["class_names"]):
            raise ValueError(f"{len(category_ids)} category_ids for {len(values['class_names'])} class_names")
        thresholds = tuple(map(float, values.get("thresholds", ())))  # of multi-label classifiers
        if thresholds and len(thresholds) != len(values["class_names"]):
            raise ValueError(f"{len(thresholds)} thresholds for {len(values['class_names'])} class_names")
        stages = tuple(
            Stage(**{**stage, "transformer": Transformer(**stage["transformer"]) if stage["transformer"] else None})
            for stage in values["architecture"]["stages"]
        )
        return Description(
            source="metadata",
            bgr=is_bgr(format, head),
            architecture=Architecture(**{**values["architecture"], "stages": stages}),
            preprocessing=Preprocessing.from_dict(values["preprocessing"]),
            class_names=tuple(values["class_names"]),
            output_stride=values["output_stride"],
            training=values["training"],
            head=head,
            category_ids=category_ids,
            task=described_task,
            thresholds=thresholds,
            calibration=Calibration(**values.get(CALIBRATION, {})),
        )


# ---------------------------------------------------------------------------------------------------------------------
# transformers


def _describe_transformers(config_path: Path, task: TaskName) -> Description:
    config = _read_json(config_path)
    head = None
    with _reported(config_path, "config"):
        architecture = _architecture_from_transformers(config)
        labels = {int(index): name for index, name in config.get("id2label", {}).items()}
        if sorted(labels) != list(range(len(labels))):
            raise ValueError(f"id2label has the indices {sorted(labels)[:6]}...; expected 0 to {len(labels) - 1}")
        class_names = tuple(labels[index] for index in range(len(labels)))
        if class_names == tuple(f"LABEL_{index}" for index in labels):  # transformers' placeholders
            class_names = ()
        output_stride = config.get("output_stride", 32)
        is_multilabel = task == "classify" and config.get("problem_type") == MULTILABEL_PROBLEM
        thresholds = tuple(map(float, config.get("thresholds", ()))) if is_multilabel else ()
        if thresholds and len(thresholds) != len(labels):
            raise ValueError(f"{len(thresholds)} thresholds for {len(labels)} entries of id2label")
        calibration = Calibration(**config.get(f"mobilevit_{CALIBRATION}", {}))
        if task == "segment":
            head = DeepLabHead(
                channels=config.get("aspp_out_channels", 256),
                rates=tuple(config.get("atrous_rates", (6, 12, 18))),
                dropout=config.get("aspp_dropout_prob", 0.1),
            )
    preprocessing, bgr = PREPROCESSING[task], True
    processor_path = config_path.with_name("preprocessor_config.json")
    if processor_path.is_file():
        values = _read_json(processor_path)
        with _reported(processor_path, "preprocessing"):
            preprocessing = _preprocessing_from_transformers(values)
            if task == "segment" and isinstance(preprocessing.resize_px, int):
                # A center crop would leave the borders of the image without a prediction.
                preprocessing = replace(preprocessing, resize_px=(preprocessing.crop_px,) * 2)
            # False for a network that was retrained on RGB. The older key do_flip_channels has no effect.
            bgr = values.get("do_flip_channel_order", True)
    return Description(
        preprocessing=preprocessing,
        source="config.json",
        architecture=architecture,
        class_names=class_names,
        output_stride=output_stride,
        bgr=bgr,
        head=head,
        task="multilabel" if is_multilabel else task,
        thresholds=thresholds,
        calibration=calibration,
    )


def _architecture_from_transformers(config: Mapping[str, Any]) -> Architecture:
    _check_fixed(
        config,
        model_type="mobilevit",
        num_channels=3,
        conv_kernel_size=3,
        hidden_act="silu",
        layer_norm_eps=1e-5,
        qkv_bias=True,
    )
    dims, channels = config["hidden_sizes"], config["neck_hidden_sizes"]
    if len(dims) != 3 or len(channels) != 7:
        raise ValueError(
            f"hidden_sizes and neck_hidden_sizes have {len(dims)} and {len(channels)} entries; expected 3 and 7"
        )
    transformers = [
        Transformer(
            dim=dim,
            num_layers=num_layers,
            ffn_dim=int(dim * config.get("mlp_ratio", 2.0)),
            num_heads=config.get("num_attention_heads", 4),
            patch_px=config.get("patch_size", 2),
        )
        for dim, num_layers in zip(dims, (2, 4, 3), strict=True)
    ]
    architecture = Architecture(
        name="custom",
        stem_channels=channels[0],
        stages=(
            Stage(channels[1], num_residuals=1, stride=1),
            Stage(channels[2], num_residuals=3, stride=2),
            *(
                Stage(width, num_residuals=1, stride=2, transformer=transformer)
                for width, transformer in zip(channels[3:6], transformers, strict=True)
            ),
        ),
        head_channels=channels[6],
        expansion=config.get("expand_ratio", 4.0),
        transformer_dropout=config.get("hidden_dropout_prob", 0.1),
        classifier_dropout=config.get("classifier_dropout_prob", 0.1),
    )
    for name, published in ARCHITECTURES.items():
        if _without_dropout(published) == _without_dropout(architecture):
            return replace(architecture, name=name)
    return architecture


def transformers_config(weights: Weights) -> dict[str, Any]:
    """The content of config.json.

    Raises:
        WeightsError: the format cannot express the architecture or the head.
    """
    a = weights.architecture
    transformers = [stage.transformer for stage in a.stages if stage.transformer]
    names = weights.class_names or tuple(f"LABEL_{index}" for index in range(weights.num_classes))
    kind = "MobileViTForImageClassification" if weights.head is None else "MobileViTForSemanticSegmentation"
    config = {
        "architectures": [kind],
        "model_type": "mobilevit",
        "num_channels": 3,
        "image_size": weights.preprocessing.crop_px,
        "patch_size": transformers[0].patch_px,
        "hidden_sizes": [t.dim for t in transformers],
        "neck_hidden_sizes": [a.stem_channels, *(stage.channels for stage in a.stages), a.head_channels],
        "num_attention_heads": transformers[0].num_heads,
        "mlp_ratio": transformers[0].ffn_dim / transformers[0].dim,
        "expand_ratio": float(a.expansion),
        "hidden_act": "silu",
        "conv_kernel_size": 3,
        "output_stride": weights.output_stride,
        "hidden_dropout_prob": a.transformer_dropout,
        "attention_probs_dropout_prob": 0.0,
        "classifier_dropout_prob": a.classifier_dropout,
        "layer_norm_eps": 1e-5,
        "qkv_bias": True,
        "id2label": {str(index): name for index, name in enumerate(names)},
        "label2id": {name: index for index, name in enumerate(names)},
        # Unknown to transformers, which keeps it.
        **{f"mobilevit_{name}": values for name, values in _calibration_of(weights).items()},
    }
    if weights.task == "multilabel":
        # transformers ignores the thresholds, which are ours.
        config |= {"problem_type": MULTILABEL_PROBLEM, "thresholds": list(weights.thresholds)}
    if (head := weights.head) is not None:
        if head.auxiliary_channels or head.align_corners:
            raise WeightsError(f"transformers' format cannot express {head}; write mobilevit's")
        config |= {
            "aspp_out_channels": head.channels,
            "atrous_rates": list(head.rates),
            "aspp_dropout_prob": head.dropout,
            "semantic_loss_ignore_index": 255,
        }
    # The format has one patch size, one number of heads and one ffn ratio for all stages.
    if replace(_architecture_from_transformers(config), name=a.name) != a:
        raise WeightsError(f"transformers' format cannot express the architecture {a.name!r}; write mobilevit's")
    return config


def _preprocessing_from_transformers(values: Mapping[str, Any]) -> Preprocessing:
    _check_fixed(values, do_resize=True, do_center_crop=True, do_rescale=True)
    if not math.isclose(values.get("rescale_factor", 1 / 255), 1 / 255, rel_tol=1e-6):
        raise ValueError(f"rescale_factor is {values['rescale_factor']}; expected 1/255")
    size, crop = values.get("size", 288), values.get("crop_size", 256)
    if isinstance(size, Mapping):
        size = size["shortest_edge"] if "shortest_edge" in size else (size["height"], size["width"])
    if isinstance(crop, Mapping):
        if crop["height"] != crop["width"]:
            raise ValueError(f"crop_size is {crop['height']} x {crop['width']}; expected a square")
        crop = crop["height"]
    filters = {int(number): name for name, number in FILTERS.items()}  # transformers has Pillow's numbers
    return Preprocessing(resize_px=size, crop_px=crop, interpolation=filters[values.get("resample", 2)])


def transformers_processor(weights: Weights) -> dict[str, Any]:
    """The content of preprocessor_config.json.

    Raises:
        WeightsError: the format cannot express the normalization of pixels.
    """
    p = weights.preprocessing
    if p.mean != (0.0, 0.0, 0.0) or p.std != (1.0, 1.0, 1.0):
        raise WeightsError(
            f"transformers' MobileViT does not normalize, but these weights need mean {p.mean} and std {p.std}; "
            "write mobilevit's format"
        )
    size = (
        {"shortest_edge": p.resize_px}
        if isinstance(p.resize_px, int)
        else dict(zip(("height", "width"), p.resize_px, strict=True))
    )
    return {
        "image_processor_type": "MobileViTImageProcessor",
        "do_resize": True,
        "size": size,
        "resample": int(FILTERS[p.interpolation]),
        "do_center_crop": True,
        "crop_size": {"height": p.crop_px, "width": p.crop_px},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_flip_channel_order": True,
    }


# ---------------------------------------------------------------------------------------------------------------------
# timm and Apple


def _preprocessing_from_timm(config: Mapping[str, Any]) -> Preprocessing:
    _check_fixed(config, crop_mode="center")
    _, height, width = config.get("input_size", (3, 256, 256))
    if height != width:
        raise ValueError(f"input_size is {height} x {width}; expected a square")
    return Preprocessing(
        resize_px=math.floor(height / config.get("crop_pct", 0.9)),
        crop_px=height,
        interpolation=config.get("interpolation", "bicubic"),
        mean=tuple(config.get("mean", (0.0, 0.0, 0.0))),
        std=tuple(config.get("std", (1.0, 1.0, 1.0))),
    )


def check_published(weights: Weights, format: Format) -> None:
    """Check that the network is a published one. Files of Apple and timm contain only tensors, so readers assume that.

    Raises:
        WeightsError: another network.
    """
    other = "mobilevit's or transformers'" if "transformers" in TASK_FORMATS[weights.task] else "mobilevit's"
    published = ARCHITECTURES.get(weights.architecture.name)
    stride = 32 if weights.head is None else PUBLISHED_STRIDES.get(replace(weights.head, dropout=PAPER_HEAD.dropout))
    if published is None or _without_dropout(weights.architecture) != _without_dropout(published):
        reason = f"only the published architectures, not {weights.architecture.name!r} as modified here"
    elif stride is None:
        reason = f"only the published heads, not {weights.head}"
    elif weights.output_stride != stride:
        reason = f"no output stride, and its readers assume {stride}; here output_stride is {weights.output_stride}"
    else:
        return
    raise WeightsError(f"{FORMAT_NAMES[format]} format can express {reason}; write {other}")


def _without_dropout(architecture: Architecture) -> Architecture:
    """For comparisons: without the name and the dropout rates."""
    return replace(architecture, name="", transformer_dropout=0.0, classifier_dropout=0.0)


# ---------------------------------------------------------------------------------------------------------------------
# JSON


def _check_fixed(values: Mapping[str, Any], **fixed: Any) -> None:
    """Check options of another library for which this package supports only one value."""
    for key, expected in fixed.items():
        if values.get(key, expected) != expected:
            raise ValueError(f"{key} is {values[key]!r}; expected {expected!r}")


@contextlib.contextmanager
def _reported(path: Path, part: str) -> Iterator[None]:
    """Convert errors of the block to a WeightsError that names the file."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        reason = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else first_line(error)
        raise WeightsError(f"{path}: its {part} cannot be used: {reason}") from None


def _read_json(path: Path) -> dict[str, Any]:
    return parse_json(path, path.read_text(encoding="utf-8"))


def parse_json(path: Path, text: str) -> dict[str, Any]:
    """Parse a JSON object, from the file `path`.

    Raises:
        WeightsError: not a JSON object.
    """
    try:
        values = json.loads(text)
    except ValueError as error:
        raise WeightsError(f"{path}: not valid JSON ({error}); download or copy it again") from None
    if not isinstance(values, dict):
        raise WeightsError(f"{path}: found a JSON {type(values).__name__}, expected an object")
    return values
