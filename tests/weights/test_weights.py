"""Metadata, errors and the hub. test_parity.py compares the tensors."""

from __future__ import annotations

import argparse
import errno
import hashlib
import http.server
import json
import os
import pickle
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
import safetensors.torch
import timm
import torch
import transformers
from torch import Tensor

from mobilevit.images import Preprocessing
from mobilevit.models.deeplabv3 import LATER_HEAD, PAPER_HEAD, DeepLabHead, DeepLabV3
from mobilevit.models.mobilevit import ARCHITECTURES, XXS, Backbone, MobileViT, S
from mobilevit.models.ssdlite import SSDLite
from mobilevit.weights import (
    FORMATS,
    Calibration,
    Format,
    Weights,
    WeightsError,
    backbone_tensors,
    coco_class_names,
    imagenet_class_names,
    read,
    voc_class_names,
    write,
)
from mobilevit.weights.keys import Layout, key_names
from small_networks import randomize

NAMES = tuple(f"thing {i}" for i in range(6))
ENDINGS: dict[Format, str] = {
    "mobilevit": "w.safetensors",
    "apple": "w.pt",
    "timm": "t.safetensors",
    "transformers": "hf",
}


@pytest.fixture(scope="module")
def weights() -> Weights:
    return Weights(
        XXS,
        randomize(MobileViT("xxs", num_classes=6)).state_dict(),
        Preprocessing(resize_px=100, crop_px=96, interpolation="bicubic"),
        NAMES,
        training={"note": "by hand"},
    )


def stored_in(weights: Weights, format: Format, folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """Write `weights` in `format`; the file that contains the tensors, and the tensors."""
    write(weights, folder / ENDINGS[format], format)
    path = folder / ENDINGS[format]
    path = path / "model.safetensors" if path.is_dir() else path
    loaded = torch.load(path) if path.suffix == ".pt" else safetensors.torch.load_file(path)
    return path, loaded


def store(path: Path, tensors: dict[str, Tensor]) -> None:
    if path.suffix == ".pt":
        torch.save(tensors, path)
    else:
        safetensors.torch.save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)


def refused(path: Path | str, *parts: str) -> None:
    """Check that `read` fails with a one-line message that contains all `parts`."""
    with pytest.raises(WeightsError) as raised:
        read(path)
    message = str(raised.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


# --- Metadata --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["mobilevit", "timm", "transformers"])
def test_preprocessing_and_class_names(weights: Weights, format: Format, tmp_path: Path) -> None:
    write(weights, tmp_path / ENDINGS[format], format)
    found = read(tmp_path / ENDINGS[format])
    assert (found.preprocessing, found.class_names) == (weights.preprocessing, NAMES)
    if format != "transformers":
        assert found.training == {"note": "by hand"}


@pytest.mark.parametrize("format", ["mobilevit", "timm", "transformers"])
def test_bytes_are_deterministic(weights: Weights, format: Format, tmp_path: Path) -> None:
    """The library's order of the metadata is random."""
    contents = set()
    for i in range(8):
        path = tmp_path / str(i) / ENDINGS[format]
        path.parent.mkdir()
        write(weights, path, format)
        contents.add((path / "model.safetensors" if path.is_dir() else path).read_bytes())
    (content,) = contents
    header_size = int.from_bytes(content[:8], "little")
    assert header_size % 8 == 0  # as the format requires


def test_any_architecture_and_stride_in_our_format(tmp_path: Path) -> None:
    stages = tuple(
        replace(stage, transformer=stage.transformer and replace(stage.transformer, patch_px=p, num_heads=2))
        for stage, p in zip(XXS.stages, (1, 1, 8, 4, 2), strict=True)
    )
    architecture = replace(XXS, name="mine", stages=stages)
    model = randomize(MobileViT(architecture, num_classes=3, output_stride=16))
    write(Weights(architecture, model.state_dict(), output_stride=16), tmp_path / "w.safetensors")
    again = read(tmp_path / "w.safetensors")
    assert (again.architecture, again.output_stride) == (architecture, 16)
    x = torch.rand(1, 3, 96, 96)
    with torch.no_grad():
        assert torch.equal(again.build()(x), model(x))
    for format in ("apple", "timm", "transformers"):
        with pytest.raises(WeightsError, match="mine"):
            write(again, tmp_path / ENDINGS[format], format)
        assert not (tmp_path / ENDINGS[format]).exists() or format == "mobilevit"


@pytest.mark.parametrize("format", ["apple", "timm"])
def test_formats_without_output_stride(weights: Weights, format: Format, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="output_stride is 8"):
        write(replace(weights, output_stride=8), tmp_path / ENDINGS[format], format)


def test_transformers_cannot_normalize(weights: Weights, tmp_path: Path) -> None:
    normalizing = replace(weights, preprocessing=Preprocessing(mean=(0.5, 0.5, 0.5)))
    with pytest.raises(WeightsError, match="mean"):
        write(normalizing, tmp_path / "hf", "transformers")
    assert not (tmp_path / "hf").exists()


def test_timm_hub_layout(tmp_path: Path) -> None:
    model = randomize(timm.create_model("mobilevit_xs", num_classes=6))
    timm.models.save_for_hf(
        model,
        str(tmp_path),
        model_config={"label_names": list(NAMES), "pretrained_cfg": {"input_size": (3, 224, 224), "crop_pct": 1.0}},
    )
    found = read(tmp_path)
    assert found.architecture == ARCHITECTURES["xs"]
    assert found.class_names == NAMES


def test_imagenet_names_are_assumed_only_without_description(weights: Weights, tmp_path: Path) -> None:
    thousand = Weights(XXS, randomize(MobileViT("xxs", num_classes=1000)).state_dict())
    for format in FORMATS:
        write(thousand, tmp_path / ENDINGS[format], format)
    assert read(tmp_path / "w.pt").class_names == imagenet_class_names()
    assert read(tmp_path / "w.pt").class_names[281] == "tabby"
    assert read(tmp_path / "w.safetensors").class_names == ()


def test_transformers_weights_for_rgb_are_not_flipped(weights: Weights, tmp_path: Path) -> None:
    path, stored = stored_in(weights, "transformers", tmp_path)
    processor = path.with_name("preprocessor_config.json")
    key = "mobilevit.conv_stem.convolution.weight"
    ours = "backbone.stem.conv.weight"
    assert torch.equal(read(path).tensors[ours], stored[key].flip(1))
    processor.write_text(json.dumps(json.loads(processor.read_text()) | {"do_flip_channel_order": False}))
    assert torch.equal(read(path).tensors[ours], stored[key])
    # The key of the first release has no effect: the weights are BGR.
    values = {k: v for k, v in json.loads(processor.read_text()).items() if k != "do_flip_channel_order"}
    processor.write_text(json.dumps(values | {"do_flip_channels": False}))
    assert torch.equal(read(path).tensors[ours], stored[key].flip(1))


def test_backbone_without_classifier(weights: Weights, tmp_path: Path) -> None:
    headless = {key: tensor for key, tensor in weights.tensors.items() if not key.startswith("classifier.")}
    for format in FORMATS:
        write(replace(weights, tensors=headless, class_names=()), tmp_path / ENDINGS[format], format)
        assert read(tmp_path / ENDINGS[format]).num_classes == 0


def test_containers_and_prefixes_of_training_scripts(weights: Weights, tmp_path: Path) -> None:
    _, stored = stored_in(weights, "apple", tmp_path)
    torch.save({"epoch": 3, "model_state_dict": {f"module.{k}": v for k, v in stored.items()}}, tmp_path / "run.pt")
    found = read(tmp_path / "run.pt")
    assert all(torch.equal(found.tensors[key], weights.tensors[key]) for key in weights.tensors)


# --- Detection and segmentation --------------------------------------------------------------------------------------

SMALL_HEAD = DeepLabHead(channels=24, rates=(2, 3, 5), auxiliary_channels=16, dropout=0.2, align_corners=True)


@pytest.fixture(scope="module")
def detector() -> Weights:
    model = randomize(SSDLite("xxs", num_classes=6))
    ids = (1, 2, 5, 40, 80, 90)
    return Weights(XXS, model.state_dict(), Preprocessing((96, 64), 64), NAMES, task="detect", category_ids=ids)


@pytest.fixture(scope="module")
def segmenter() -> Weights:
    model = randomize(DeepLabV3("xxs", num_classes=6))
    preprocessing = Preprocessing((96, 96), 96)
    return Weights(XXS, model.state_dict(), preprocessing, NAMES, 16, task="segment", head=PAPER_HEAD)


def test_any_head_in_our_format(detector: Weights, tmp_path: Path) -> None:
    model = randomize(DeepLabV3("xxs", 6, 8, SMALL_HEAD))
    segmenter = Weights(XXS, model.state_dict(), class_names=NAMES, output_stride=8, task="segment", head=SMALL_HEAD)
    for weights in (detector, segmenter):
        write(weights, tmp_path / "w.safetensors")
        again = read(tmp_path / "w.safetensors", num_classes=6)
        for part in ("task", "head", "output_stride", "preprocessing", "class_names", "num_classes", "category_ids"):
            assert getattr(again, part) == getattr(weights, part)
    x = torch.rand(1, 3, 97, 64)
    with torch.no_grad():
        assert torch.equal(again.build()(x), model(x))
    refusals: dict[Format, str] = {
        "apple": "published heads",
        "transformers": "cannot express",
        "timm": "segment",
    }
    for format, part in refusals.items():
        with pytest.raises(WeightsError, match=part):
            write(segmenter, tmp_path / "new" / ENDINGS[format], format)
    assert not (tmp_path / "new").exists()


def test_class_names_of_published_dense_networks(tmp_path: Path) -> None:
    found = Weights(XXS, randomize(SSDLite("xxs")).state_dict(), task="detect")
    segmented = Weights(XXS, DeepLabV3("xxs").state_dict(), output_stride=16, task="segment", head=PAPER_HEAD)
    for weights, names in ((found, coco_class_names()), (segmented, voc_class_names())):
        write(weights, tmp_path / "w.pt", "apple")
        assert read(tmp_path / "w.pt").class_names == names
        write(weights, tmp_path / "w.safetensors")
        assert read(tmp_path / "w.safetensors").class_names == ()
        # In COCO's annotation files toothbrush, the 80th class, has id 90, and tv, the 63rd, has id 72.
        ids = read(tmp_path / "w.pt").category_ids
        assert [ids[i] for i in (0, 11, 62, 79)] == [1, 13, 72, 90] if weights is found else ids == ()
    assert len(coco_class_names()) == len(set(coco_class_names())) == 80
    assert [coco_class_names()[i] for i in (0, 11, 62, 79)] == ["person", "stop sign", "tv", "toothbrush"]
    assert len(voc_class_names()) == 21
    assert [voc_class_names()[i] for i in (0, 1, 15, 20)] == ["background", "aeroplane", "person", "tvmonitor"]


def test_later_release_of_apple(tmp_path: Path) -> None:
    """Names, structure and channel order as in the code and the configuration of that release."""
    model = randomize(DeepLabV3("s", 21, 8, LATER_HEAD))
    weights = Weights(S, model.state_dict(), output_stride=8, task="segment", head=LATER_HEAD)
    write(weights, tmp_path / "w.pt", "apple")
    stored = torch.load(tmp_path / "w.pt")
    shapes = {
        "encoder.conv_1.block.conv.weight": (16, 3, 3, 3),
        "seg_head.aux_head.0.block.conv.weight": (128, 128, 3, 3),
        "seg_head.aux_head.0.block.norm.running_var": (128,),
        "seg_head.aux_head.2.block.conv.weight": (21, 128, 1, 1),
        "seg_head.aux_head.2.block.conv.bias": (21,),
        "seg_head.aspp.aspp_layer.convs.3.block.conv.weight": (512, 160, 3, 3),
        "seg_head.aspp.aspp_layer.convs.4.aspp_pool.conv_1x1.block.norm.bias": (512,),
        "seg_head.aspp.aspp_layer.project.block.conv.weight": (512, 2560, 1, 1),
        "seg_head.classifier.block.conv.weight": (21, 512, 1, 1),
        "seg_head.classifier.block.conv.bias": (21,),
    }
    assert {key: tuple(stored[key].shape) for key in shapes} == shapes
    assert torch.equal(stored["encoder.conv_1.block.conv.weight"], weights.tensors["backbone.stem.conv.weight"])
    found = read(tmp_path / "w.pt")
    assert (found.head, found.output_stride, found.architecture) == (LATER_HEAD, 8, S)
    assert LATER_HEAD.rates == (12, 24, 36)
    assert found.preprocessing == Preprocessing((512, 512), 512)
    with pytest.raises(WeightsError, match="output_stride is 16"):
        write(replace(weights, output_stride=16), tmp_path / "w.pt", "apple")


def test_state_dict_without_metadata(detector: Weights, segmenter: Weights, tmp_path: Path) -> None:
    """The state_dict of one of our networks, saved by torch.save: the published structure is assumed."""
    for weights in (detector, segmenter):
        torch.save(dict(weights.tensors), tmp_path / "w.pt")
        found = read(tmp_path / "w.pt")
        assert (found.task, found.head, found.has_description) == (weights.task, weights.head, False)
        assert found.output_stride == weights.output_stride
        assert all(torch.equal(found.tensors[key], weights.tensors[key]) for key in weights.tensors)


def test_files_of_the_first_release_are_classifiers(weights: Weights, tmp_path: Path) -> None:
    path, stored = stored_in(weights, "mobilevit", tmp_path)
    with safetensors.safe_open(path, framework="pt") as file:
        description = json.loads(file.metadata()["mobilevit"])
    assert description.pop("task") == "classify"
    assert description.pop("head") is None
    safetensors.torch.save_file(stored, path, {"mobilevit": json.dumps(description)})
    assert (read(path).task, read(path).head, read(path).class_names) == ("classify", None, NAMES)
    safetensors.torch.save_file(stored, path, {"mobilevit": json.dumps(description | {"task": "detect"})})
    refused(path, str(path), "'detect'", "'classify'")


def test_backbone_weights_load_into_networks_of_any_task(
    weights: Weights, detector: Weights, segmenter: Weights
) -> None:
    x = torch.rand(1, 3, 64, 96)
    for pretrained in (weights, detector, segmenter):
        tensors = backbone_tensors(pretrained)
        assert tensors.keys() == Backbone("xxs").state_dict().keys()
        for network in (MobileViT("xxs"), SSDLite("xxs"), DeepLabV3("xxs", head=SMALL_HEAD)):
            network.backbone.load_state_dict(tensors)
            network.eval()
            with torch.no_grad():
                seen, expected = network.backbone(x)["stage5"], pretrained.build().backbone(x)["stage5"]
            if network.backbone.output_stride == pretrained.output_stride:
                assert torch.equal(seen, expected)


def test_networks_of_another_task(weights: Weights, detector: Weights, segmenter: Weights) -> None:
    for one, network in ((weights, MobileViT), (detector, SSDLite), (segmenter, DeepLabV3)):
        assert type(one.build()) is network
        for other in {MobileViT, SSDLite, DeepLabV3} - {network}:
            with pytest.raises(WeightsError, match=f"{network.__name__}, not a {other.__name__}"):
                one.build(other)


def test_invalid_records(weights: Weights) -> None:
    for changed, part in (
        ({"class_names": NAMES[:5]}, "5 class names for 6 classes"),
        ({"task": "caption"}, "task is 'caption'"),
        ({"head": PAPER_HEAD}, "head is"),
        ({"task": "segment"}, "head is None"),
        ({"task": "detect", "output_stride": 16}, "output_stride is 16"),
        ({"task": "detect", "category_ids": (1, 2)}, "category_ids are 2 for 6 class names"),
        ({"category_ids": (1, 2, 3, 4, 5, 6)}, "category_ids are 6 for 6 class names and the task 'classify'"),
        ({"task": "detect", "calibration": Calibration(1.5)}, "calibration is .*1.5.* task is 'detect'"),
    ):
        with pytest.raises(ValueError, match=part):
            replace(weights, **changed)
    for values, part in (
        ({"temperature": 0.0}, "temperature is 0.0; it must be from 0.2 to 11"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"min_probability": 1.5}, "min_probability is 1.5; it must be from 0 to 1"),
        ({"min_precision": -0.1}, "min_precision is -0.1"),
    ):
        with pytest.raises(ValueError, match=part):
            Calibration(**values)


@pytest.mark.parametrize("format", ["mobilevit", "timm", "transformers"])
def test_calibration(weights: Weights, format: Format, tmp_path: Path) -> None:
    path = tmp_path / ENDINGS[format]
    write(weights, path, format)
    content = {file.name: file.read_bytes() for file in (path.iterdir() if path.is_dir() else [path])}
    assert not any(b"calibration" in part for part in content.values())  # as files of earlier versions
    assert read(path).calibration == Calibration()
    calibrated = replace(weights, calibration=Calibration(1.375, min_probability=0.83, min_precision=0.95))
    write(calibrated, path, format)
    assert read(path).calibration == calibrated.calibration
    if format == "transformers":
        config = transformers.AutoConfig.from_pretrained(path)
        config.save_pretrained(path)
        assert read(path).calibration == calibrated.calibration
        wrong = json.loads((path / "config.json").read_text())
        wrong["mobilevit_calibration"]["temperature"] = -1
        (path / "config.json").write_text(json.dumps(wrong))
        refused(path, "config.json", "temperature is -1")


def test_formats_without_the_task(detector: Weights, segmenter: Weights, tmp_path: Path) -> None:
    pairs: list[tuple[Weights, Format]] = [(detector, "timm"), (detector, "transformers"), (segmenter, "timm")]
    for one, format in pairs:
        with pytest.raises(WeightsError, match=one.task) as raised:
            write(one, tmp_path / ENDINGS[format], format)
        assert "\n" not in str(raised.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("task", "format"),
    [
        ("detect", "mobilevit"),
        ("detect", "apple"),
        ("segment", "mobilevit"),
        ("segment", "apple"),
        ("segment", "transformers"),
    ],
)
def test_keys_and_shapes_of_dense_networks(
    detector: Weights, segmenter: Weights, task: str, format: Format, tmp_path: Path
) -> None:
    weights = detector if task == "detect" else segmenter
    path, stored = stored_in(weights, format, tmp_path)
    names = key_names(Layout(format, XXS, weights.task, weights.head))
    classifier = names["heads.5.out.weight" if task == "detect" else "classifier.weight"][0]
    bias = classifier.replace("weight", "bias")
    inner = names["heads.1.depthwise.conv.weight" if task == "detect" else "pyramid.convs.2.norm.weight"][0]
    for key in (classifier, bias, inner):
        store(path, {k: v for k, v in stored.items() if k != key})
        refused(path, str(path), f"key {key} is missing", "with SSDLite" if task == "detect" else "with DeepLabv3")
        store(path, stored | {key: torch.zeros(7)})
        refused(path, str(path), key)
        store(path, stored | {key: torch.full_like(stored[key], float("inf"))})
        refused(path, str(path), key, "infinity")
    store(path, stored | {classifier: torch.tensor(1.0)})
    refused(path, str(path), classifier, "shape ()")
    store(path, stored | {"extra.weight": torch.zeros(1)})
    refused(path, str(path), "surplus key extra.weight")
    store(path, stored)
    with pytest.raises(WeightsError, match=r"6 classes, expected 10; .*reset_classes\(10\)"):
        read(path, num_classes=10)


def test_segmentation_configuration_of_transformers(segmenter: Weights, tmp_path: Path) -> None:
    path, _ = stored_in(segmenter, "transformers", tmp_path)
    config = path.with_name("config.json")
    values = json.loads(config.read_text())
    config.write_text(json.dumps(values | {"atrous_rates": [1, 2]}))
    refused(path, str(config), "rates is (1, 2)")
    config.write_text(json.dumps(values | {"aspp_out_channels": 32}))
    refused(path, str(path), "segmentation_head.aspp")


# --- Errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
def test_keys_and_shapes(weights: Weights, format: Format, tmp_path: Path) -> None:
    path, stored = stored_in(weights, format, tmp_path)
    key = key_names(Layout(format, XXS))["backbone.stage4.1.layers.2.ffn_in.weight"][0]

    store(path, {k: v for k, v in stored.items() if k != key})
    refused(path, str(path), f"key {key} is missing", "MobileViT-XXS")
    store(path, stored | {"extra.weight": torch.zeros(1)})
    refused(path, str(path), "surplus key extra.weight")
    store(path, stored | {key: torch.zeros(160, 81)})
    refused(path, str(path), key, "(160, 81)", "(160, 80)")
    store(path, stored | {key: torch.full((160, 80), float("nan"))})
    refused(path, str(path), key, "NaN")
    store(path, stored | {key: torch.zeros(160, 80, dtype=torch.int8)})
    refused(path, str(path), key, "int8")

    bias = key_names(Layout(format, XXS))["classifier.bias"][0]
    store(path, stored | {bias: torch.zeros(5)})
    refused(path, str(path), bias, "(5,)", "(6,)")


def test_class_counts(weights: Weights, tmp_path: Path) -> None:
    path, _ = stored_in(weights, "transformers", tmp_path)
    with pytest.raises(WeightsError, match=r"classifier.weight has 6 classes, expected 10; .*reset_classifier\(10\)"):
        read(path, num_classes=10)
    config = path.with_name("config.json")
    values = json.loads(config.read_text())
    config.write_text(json.dumps(values | {"id2label": {"0": "a", "1": "b"}}))
    refused(path, "6 classes", "2 class names", "config.json")
    config.write_text(json.dumps(values | {"id2label": {"0": "a", "2": "b"}}))
    refused(path, "id2label")


@pytest.mark.parametrize(
    ("changed", "part"),
    [
        ({"model_type": "mobilevitv2"}, "model_type is 'mobilevitv2'"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ({"hidden_sizes": [64, 80]}, "hidden_sizes"),
        ({"neck_hidden_sizes": None}, "config"),
    ],
)
def test_transformers_configuration(weights: Weights, changed: dict[str, object], part: str, tmp_path: Path) -> None:
    path, _ = stored_in(weights, "transformers", tmp_path)
    config = path.with_name("config.json")
    config.write_text(json.dumps(json.loads(config.read_text()) | changed))
    refused(path, str(config), part)
    config.write_text("{")
    refused(path, str(config), "not valid JSON")


@pytest.mark.parametrize(
    "changed", [{"do_resize": False}, {"rescale_factor": 1.0}, {"crop_size": {"height": 2, "width": 3}}]
)
def test_transformers_preprocessing(weights: Weights, changed: dict[str, object], tmp_path: Path) -> None:
    path, _ = stored_in(weights, "transformers", tmp_path)
    processor = path.with_name("preprocessor_config.json")
    processor.write_text(json.dumps(json.loads(processor.read_text()) | changed))
    refused(path, str(processor), next(iter(changed)))


def test_other_networks(tmp_path: Path) -> None:
    for name in ("mobilenetv2_035", "mobilevitv2_050"):
        torch.save(timm.create_model(name).state_dict(), tmp_path / "other.pt")
        refused(tmp_path / "other.pt", "not MobileViT", "XXS, XS or S")
    torch.save({"encoder.conv_1.block.conv.weight": torch.zeros(1)}, tmp_path / "ssd.pt")
    refused(tmp_path / "ssd.pt", "detection or segmentation")


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("fraction", [0.0, 0.001, 0.3, 0.999])
def test_truncated(weights: Weights, format: Format, fraction: float, tmp_path: Path) -> None:
    path, _ = stored_in(weights, format, tmp_path)
    content = path.read_bytes()
    path.write_bytes(content[: int(fraction * len(content))])
    refused(path, str(path))


def test_old_pickle_truncated(weights: Weights, tmp_path: Path) -> None:
    torch.save(dict(weights.tensors), tmp_path / "w.pt", _use_new_zipfile_serialization=False)
    assert read(tmp_path / "w.pt").num_classes == 6
    content = (tmp_path / "w.pt").read_bytes()
    for fraction in (0.001, 0.5, 0.99):
        (tmp_path / "w.pt").write_bytes(content[: int(fraction * len(content))])
        refused(tmp_path / "w.pt", "truncated or damaged")


class Attack:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_is_not_run(weights: Weights, zipped: bool, tmp_path: Path) -> None:
    marker = tmp_path / "was run"
    attack = dict(weights.tensors) | {"attack": Attack(marker)}
    torch.save(attack, tmp_path / "w.pt", _use_new_zipfile_serialization=zipped)
    refused(tmp_path / "w.pt", str(tmp_path / "w.pt"), "run code", ".mkdir")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Attack(marker)))
    refused(tmp_path / "plain.pt", "plain.pt")
    assert not marker.exists()
    torch.save({"model": dict(weights.tensors), "args": argparse.Namespace(lr=1)}, tmp_path / "run.pt")
    refused(tmp_path / "run.pt", "argparse.Namespace")


def test_not_weights(tmp_path: Path) -> None:
    (tmp_path / "page.pt").write_text("<!doctype html><title>Sign in</title>")
    refused(tmp_path / "page.pt", "neither a .safetensors file nor one of torch.save")
    torch.save([torch.zeros(3)], tmp_path / "list.pt")
    refused(tmp_path / "list.pt", "found list", "expected a state_dict")
    torch.save({"epoch": 4, "best": 0.5}, tmp_path / "dict.pt")
    refused(tmp_path / "dict.pt", "'epoch': int", "expected a state_dict")
    refused(tmp_path, "give one of them")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "found neither")
    refused(tmp_path / "missing.pt", "no such file")
    refused("missing", "no such file")


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ({0: torch.zeros(1)}, "1 of 1 entries of another kind, first 0: Tensor"),
        ({"a": torch.zeros(1), ("a", 1): torch.zeros(1)}, "1 of 2 entries of another kind, first ('a', 1): Tensor"),
        ({"state_dict": {"a": {"b": torch.zeros(1)}}}, "first 'a': dict"),
        ({"a": torch.zeros(1, device="meta")}, "first 'a': Tensor"),
        ({}, "an empty dict"),
        (True, "bool"),
    ],
    ids=["integer key", "tuple key", "nested", "meta", "empty", "bool"],
)
def test_no_state_dict(tmp_path: Path, value: object, found: str) -> None:
    torch.save(value, tmp_path / "w.pt")
    refused(tmp_path / "w.pt", "w.pt: found ", found, "expected a state_dict")


@pytest.mark.parametrize("dtype", [torch.bool, torch.int8, torch.float8_e4m3fn, torch.complex64])
def test_other_dtypes(weights: Weights, tmp_path: Path, dtype: torch.dtype) -> None:
    key = "backbone.stem.conv.weight"
    torch.save({**weights.tensors, key: weights.tensors[key].to(dtype)}, tmp_path / "w.pt")
    refused(tmp_path / "w.pt", key, str(dtype), "expected floating point")


@pytest.mark.parametrize("format", FORMATS)
def test_wrong_ending(weights: Weights, format: Format, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"folder|end in"):
        write(weights, tmp_path / ("w.pt" if format != "apple" else "w.safetensors"), format)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_preserves_the_old_file(
    weights: Weights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "w.safetensors"
    write(weights, path)
    before = path.read_bytes()

    def full(target: Path, data: bytes) -> None:
        with target.open("wb") as file:
            file.write(data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device", str(target))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space") as caught:
        write(weights, path)
    assert caught.value.filename == str(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


# --- The hub, simulated by a local server --------------------------------------------------------------------------


class Hub:
    """One repository, "someone/mobilevit", served like the hub does; `cut` truncates large responses to half."""

    def __init__(self, folder: Path):
        self.folder, self.cut, self.requests = folder, False, 0
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.answer(body=True)

            def do_HEAD(self) -> None:
                self.answer(body=False)

            def answer(self, *, body: bool) -> None:
                hub.requests += 1
                repository, _, rest = self.path.lstrip("/").partition("/resolve/main/")
                file = hub.folder / rest
                known = repository == "someone/mobilevit"
                if not known or not file.is_file():
                    self.send_response(404)
                    self.send_header("X-Error-Code", "EntryNotFound" if known else "RepoNotFound")
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                content = file.read_bytes()
                self.send_response(200)
                self.send_header("X-Repo-Commit", "0123456789abcdef0123456789abcdef01234567")
                self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if body:
                    self.wfile.write(content[: len(content) // 2] if hub.cut and len(content) > 100_000 else content)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def hub(weights: Weights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    write(weights, tmp_path / "served", "transformers")
    hub = Hub(tmp_path / "served")
    url = hub.address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.address)
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", url)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the retries of huggingface_hub
    yield hub
    hub.server.shutdown()
    hub.server.server_close()


def test_no_download_by_default(hub: Hub) -> None:
    refused("someone/mobilevit", "someone/mobilevit", "--download", "download=True")
    assert hub.requests == 0


def test_downloads_are_cached(hub: Hub, weights: Weights, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "mobilevit")
    found = read("someone/mobilevit", download=True)
    assert all(torch.equal(found.tensors[key], weights.tensors[key]) for key in weights.tensors)
    assert (found.preprocessing, found.class_names) == (weights.preprocessing, NAMES)
    assert caplog.text.count("license") == 1
    hub.server.shutdown()
    assert read("someone/mobilevit").class_names == NAMES
    assert read("someone/mobilevit", download=True).class_names == NAMES
    assert caplog.text.count("license") == 1


def test_repository_with_only_a_bin(hub: Hub, weights: Weights) -> None:
    tensors = safetensors.torch.load_file(hub.folder / "model.safetensors")
    (hub.folder / "model.safetensors").unlink()
    torch.save(tensors, hub.folder / "pytorch_model.bin")
    assert read("someone/mobilevit", download=True).class_names == NAMES
    assert read("someone/mobilevit").class_names == NAMES


def test_interrupted_download_leaves_no_file(hub: Hub) -> None:
    hub.cut = True
    with pytest.raises(WeightsError, match="could not be downloaded"):
        read("someone/mobilevit", download=True)
    refused("someone/mobilevit", "not in the local cache")
    hub.cut = False
    assert read("someone/mobilevit", download=True).class_names == NAMES


def test_unknown_repository_and_unreachable_hub(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(WeightsError, match="no such model"):
        read("someone/else", download=True)
    shutil.rmtree(hub.folder)
    hub.folder.mkdir()
    with pytest.raises(WeightsError, match=r"neither model.safetensors nor pytorch_model.bin"):
        read("someone/mobilevit", download=True)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(
        huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:9/{repo_id}/{revision}/{filename}"
    )
    waits: list[float] = []
    monkeypatch.setattr("time.sleep", waits.append)
    with pytest.raises(
        WeightsError, match=r"someone/mobilevit: .* cannot be reached \(http://127.0.0.1:9: .*connection"
    ):
        read("someone/mobilevit", download=True)
    assert not waits  # no retries
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(WeightsError, match=r"cannot be reached \(HF_HUB_OFFLINE is set\)"):
        read("someone/mobilevit", download=True)
