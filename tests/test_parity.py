"""Parity with the networks of Apple, timm and transformers: outputs, and conversion from and to each format."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import transformers
from torch import Tensor, nn

from mobilevit.images import Preprocessing
from mobilevit.models.deeplabv3 import LATER_HEAD, DeepLabHead, DeepLabV3
from mobilevit.models.mobilevit import ARCHITECTURES, MobileViT
from mobilevit.models.ssdlite import SSDLite, detect
from mobilevit.predict import load
from mobilevit.weights import FORMATS, Format, Weights, coco_class_names, read, voc_class_names, write
from small_networks import randomize

GOLDEN = Path(__file__).parent / "golden"
SIZES = [(256, 256), (224, 224), (160, 192), (200, 231)]
ENDINGS = {"mobilevit": "weights.safetensors", "apple": "weights.pt", "timm": "timm.safetensors", "transformers": "hf"}
# In standard deviations of the logits. float32 rounding causes about 2e-6; the documentation promises 1e-4.
TOLERANCE = 2e-5

SLOW = pytest.mark.slow


def assert_same(ours: Tensor, theirs: Tensor) -> None:
    assert (ours - theirs).abs().max() < TOLERANCE * theirs.std()


def apple_weights(keys: dict[str, list[int]]) -> dict[str, Tensor]:
    """The weights of the golden files: random tensors, each with a generator seeded by its name."""
    weights = {}
    for key, shape in keys.items():
        random = np.random.default_rng(zlib.crc32(key.encode()))
        if key.endswith("num_batches_tracked"):
            weights[key] = torch.tensor(0)
        elif key.endswith("running_var"):
            weights[key] = torch.from_numpy((0.5 + random.random(shape)).astype(np.float32))
        else:
            z = random.standard_normal(shape).astype(np.float32)
            if key.endswith(("running_mean", "bias")):
                z = 0.1 * z
            elif len(shape) == 1:
                z = 1 + 0.1 * z
            else:
                z = 1.3 * z / np.sqrt(np.prod(shape[1:]))
            weights[key] = torch.from_numpy(z.astype(np.float32))
    return weights


def apple_image(height: int, width: int) -> Tensor:
    y, x = np.meshgrid(np.arange(height) / height, np.arange(width) / width, indexing="ij")
    smooth = np.stack([np.sin(9 * x + 3 * y), np.cos(7 * x * y), x * y])
    noise = np.random.default_rng(10000 * height + width).random((3, height, width))
    return torch.from_numpy((0.8 * smooth + 0.2 * noise).astype(np.float32))[None]


@pytest.mark.parametrize("name", ["xxs", "s"])
def test_apple_golden(name: str, tmp_path: Path) -> None:
    stored = apple_weights(json.loads((GOLDEN / f"cls_{name}.keys.json").read_text()))
    torch.save(stored, tmp_path / "apple.pt")
    model = load(tmp_path / "apple.pt")
    golden = np.load(GOLDEN / f"cls_{name}.npz")
    assert len(golden) == 4
    for key in golden:
        height, width = map(int, key.removeprefix("logits_").split("x"))
        rgb = apple_image(height, width).flip(1)  # Apple's network, which made the golden file, expects BGR
        with torch.no_grad():
            assert_same(model(rgb), torch.from_numpy(golden[key]))
    assert_writes_the_same(read(tmp_path / "apple.pt"), stored, tmp_path / "again.pt")


def assert_writes_the_same(weights: Weights, stored: dict[str, Tensor], path: Path) -> None:
    """The keys and tensors written in Apple's format equal those that were read."""
    write(weights, path, "apple")
    again = torch.load(path, weights_only=True)
    assert again.keys() == stored.keys()
    assert all(torch.equal(again[key], stored[key]) for key in stored)


def test_apple_golden_detection(tmp_path: Path) -> None:
    stored = apple_weights(json.loads((GOLDEN / "det_xs.keys.json").read_text()))
    torch.save(stored, tmp_path / "apple.pt")
    weights = read(tmp_path / "apple.pt")
    assert (weights.task, weights.architecture) == ("detect", ARCHITECTURES["xs"])
    assert weights.preprocessing == Preprocessing(resize_px=(320, 320), crop_px=320)
    assert weights.class_names == coco_class_names()
    model = weights.build(SSDLite)
    golden = {key: torch.from_numpy(value) for key, value in np.load(GOLDEN / "det_xs.npz").items()}
    with torch.no_grad():
        class_logits, locations = model(apple_image(320, 320).flip(1))
    anchors = model.anchors(320, 320)
    assert_same(class_logits[:, ::7], golden["class_logits_320x320_every7"])
    assert_same(locations[:, ::7], golden["locations_320x320_every7"])
    assert torch.equal(anchors[None], golden["anchors_320x320"])

    (found,) = detect(class_logits, locations, anchors, score_threshold=0.01, max_per_image=80 * 200)
    labels = found.labels + 1  # the released code counts the background
    for label in golden["labels"].unique():
        ours, theirs = labels == label, golden["labels"] == label
        # Boxes of equal scores may be in another order: match each of theirs with one of ours.
        assert ours.sum() == theirs.sum() == 200
        scores, boxes = golden["scores"][theirs], golden["boxes"][theirs]
        apart = (boxes[:, None] - found.boxes[ours]).abs().amax(-1)
        apart = apart.maximum((found.scores[ours] / scores[:, None] - 1).abs())
        assert apart.amin(0).max() < 1e-4
        assert apart.amin(1).max() < 1e-4
        assert apart.argmin(1).unique().numel() == 200
    assert_writes_the_same(weights, stored, tmp_path / "again.pt")


def test_apple_golden_segmentation(tmp_path: Path) -> None:
    stored = apple_weights(json.loads((GOLDEN / "seg_xxs.keys.json").read_text()))
    torch.save(stored, tmp_path / "apple.pt")
    weights = read(tmp_path / "apple.pt")
    assert (weights.task, weights.architecture, weights.output_stride) == ("segment", ARCHITECTURES["xxs"], 16)
    assert weights.head == DeepLabHead()
    assert weights.preprocessing == Preprocessing(resize_px=(512, 512), crop_px=512)
    assert weights.class_names == voc_class_names()
    model = weights.build(DeepLabV3)
    golden = np.load(GOLDEN / "seg_xxs.npz")
    for height, width in [(256, 256), (320, 384)]:
        with torch.no_grad():
            logits = model(apple_image(height, width).flip(1))
        assert logits.shape == tuple(golden[f"shape_{height}x{width}"])
        assert_same(logits[:, :, ::8, ::8], torch.from_numpy(golden[f"logits_{height}x{width}_every8"]))
    assert_writes_the_same(weights, stored, tmp_path / "again.pt")


def transformers_config(name: str) -> transformers.MobileViTConfig:
    """As published with apple/mobilevit-{xx-small,x-small,small}, written down here independently of our code."""
    published = {
        "xxs": {
            "hidden_sizes": [64, 80, 96],
            "neck_hidden_sizes": [16, 16, 24, 48, 64, 80, 320],
            "expand_ratio": 2.0,
            "hidden_dropout_prob": 0.05,
        },
        "xs": {"hidden_sizes": [96, 120, 144], "neck_hidden_sizes": [16, 32, 48, 64, 80, 96, 384]},
        "s": {},
    }
    return transformers.MobileViTConfig(**{"num_labels": 17, **published[name]})


def timm_from(path: Path, name: str) -> nn.Module:
    return timm.create_model(f"mobilevit_{name}", checkpoint_path=str(path), num_classes=17).eval()


def transformers_from(path: Path) -> Callable[[Tensor], Tensor]:
    loaded: Any = transformers.MobileViTForImageClassification.from_pretrained(path, output_loading_info=True)
    model, report = loaded
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    model.eval()
    return lambda rgb: model(rgb.flip(1)).logits


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_others_load_what_we_save(name: str, tmp_path: Path) -> None:
    ours = randomize(MobileViT(name, num_classes=17))
    weights = Weights(ARCHITECTURES[name], ours.state_dict())
    write(weights, tmp_path / "timm.safetensors", "timm")
    write(weights, tmp_path / "hf", "transformers")
    others = timm_from(tmp_path / "timm.safetensors", name), transformers_from(tmp_path / "hf")
    for size in SIZES:
        x = torch.rand(2, 3, *size)
        with torch.no_grad():
            logits = ours(x)
            for other in others:
                assert_same(logits, other(x))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_we_load_what_others_save(name: str, tmp_path: Path) -> None:
    from_timm = randomize(timm.create_model(f"mobilevit_{name}", num_classes=17), seed=1)
    torch.save(from_timm.state_dict(), tmp_path / "timm.bin")
    hf = randomize(transformers.MobileViTForImageClassification(transformers_config(name)), seed=2)
    hf.save_pretrained(tmp_path / "hf")  # pyright: ignore[reportCallIssue]
    transformers.MobileViTImageProcessor(size={"shortest_edge": 300}, resample=2).save_pretrained(tmp_path / "hf")

    ours_of_timm, ours_of_hf = load(tmp_path / "timm.bin"), load(tmp_path / "hf")
    assert ours_of_timm.architecture == ours_of_hf.architecture == ARCHITECTURES[name]
    assert ours_of_hf.preprocessing == Preprocessing(resize_px=300, crop_px=256, interpolation="bilinear")
    assert ours_of_timm.preprocessing == Preprocessing(resize_px=284, crop_px=256, interpolation="bicubic")
    for size in SIZES:
        x = torch.rand(2, 3, *size)
        with torch.no_grad():
            assert_same(ours_of_timm(x), from_timm(x))
            assert_same(ours_of_hf(x), hf(x.flip(1)).logits)


@pytest.mark.parametrize("output_stride", [16, 8])
def test_output_stride_of_transformers(output_stride: int, tmp_path: Path) -> None:
    config = transformers_config("xxs")
    config.output_stride = output_stride
    randomize(transformers.MobileViTForImageClassification(config)).save_pretrained(tmp_path)  # pyright: ignore[reportCallIssue]
    ours, theirs = load(tmp_path), transformers_from(tmp_path)
    for size in [(256, 256), (150, 97)]:
        x = torch.rand(1, 3, *size)
        with torch.no_grad():
            assert_same(ours(x), theirs(x))


def test_another_structure_through_transformers(tmp_path: Path) -> None:
    config = transformers.MobileViTConfig(
        hidden_sizes=[24, 32, 40],
        neck_hidden_sizes=[16, 16, 24, 32, 40, 48, 64],
        expand_ratio=3.0,
        mlp_ratio=1.5,
        num_attention_heads=2,
        num_labels=5,  # pyright: ignore[reportCallIssue]  every configuration has it
    )
    randomize(transformers.MobileViTForImageClassification(config)).save_pretrained(tmp_path)  # pyright: ignore[reportCallIssue]
    ours, theirs = load(tmp_path), transformers_from(tmp_path)
    x = torch.rand(2, 3, 100, 130)
    with torch.no_grad():
        assert_same(ours(x), theirs(x))


def segmenter_from(path: Path) -> Callable[[Tensor], Tensor]:
    loaded: Any = transformers.MobileViTForSemanticSegmentation.from_pretrained(path, output_loading_info=True)
    model, report = loaded
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    model.eval()
    return lambda rgb: model(rgb.flip(1)).logits


@pytest.mark.parametrize(
    ("name", "output_stride"), [("xxs", 16), ("xs", 8), ("xxs", 32), pytest.param("s", 16, marks=SLOW)]
)
def test_segmentation_of_transformers(name: str, output_stride: int, tmp_path: Path) -> None:
    config = transformers_config(name)
    config.output_stride, config.aspp_out_channels, config.atrous_rates = output_stride, 72, [2, 3, 5]
    theirs = randomize(transformers.MobileViTForSemanticSegmentation(config))
    theirs.save_pretrained(tmp_path / "theirs")  # pyright: ignore[reportCallIssue]
    transformers.MobileViTImageProcessor(
        size={"shortest_edge": 544}, crop_size={"height": 512, "width": 512}, resample=2
    ).save_pretrained(tmp_path / "theirs")
    weights = read(tmp_path / "theirs")
    assert (weights.task, weights.architecture) == ("segment", ARCHITECTURES[name])
    assert weights.head == DeepLabHead(channels=72, rates=(2, 3, 5))
    assert weights.preprocessing == Preprocessing(resize_px=(512, 512), crop_px=512)
    ours = weights.build(DeepLabV3)

    write(weights, tmp_path / "ours", "transformers")
    again = segmenter_from(tmp_path / "ours")
    for size in [(256, 192), (131, 97)]:
        x = torch.rand(2, 3, *size)
        with torch.no_grad():
            logits = ours.coarse(x)
            assert_same(logits, theirs(x.flip(1)).logits)
            assert_same(logits, again(x))
            resized: list[Any] = transformers.MobileViTImageProcessor().post_process_semantic_segmentation(
                theirs(x.flip(1)), target_sizes=[size, size], return_segmentation_scores=True
            )
            assert_same(ours(x), torch.stack([image.segmentation_scores for image in resized]))


def test_preprocessing_of_segmentation_in_transformers(tmp_path: Path) -> None:
    preprocessing = Preprocessing(resize_px=(96, 96), crop_px=96)
    model = randomize(DeepLabV3("xxs", num_classes=3))
    weights = Weights(
        model.architecture,
        model.state_dict(),
        preprocessing,
        output_stride=16,
        task="segment",
        head=model.head,
    )
    write(weights, tmp_path / "hf", "transformers")
    assert read(tmp_path / "hf").preprocessing == preprocessing
    image = torch.randint(256, (3, 90, 120), dtype=torch.uint8)
    processor = transformers.MobileViTImageProcessor.from_pretrained(tmp_path / "hf")
    theirs = processor(image, return_tensors="pt")["pixel_values"].flip(1)
    ours = preprocessing(image.permute(1, 2, 0).numpy())
    assert (ours - theirs[0]).abs().max() < 2 / 255  # torchvision's resize rounds differently from Pillow's


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_round_trip_is_bit_identical(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {
        key: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for key, tensor in randomize(MobileViT(name, num_classes=10)).state_dict().items()
    }
    weights = Weights(ARCHITECTURES[name], tensors)
    for format in FORMATS:  # each reads the output of the previous one
        write(weights, tmp_path / ENDINGS[format], format)
        weights = read(tmp_path / ENDINGS[format])
        assert weights.architecture == ARCHITECTURES[name]
        assert weights.tensors.keys() == tensors.keys()
        for key, tensor in tensors.items():
            assert weights.tensors[key].dtype == tensor.dtype
            assert torch.equal(weights.tensors[key], tensor), f"{format}: {key}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", ["xxs", *(pytest.param(name, marks=SLOW) for name in ("xs", "s"))])
@pytest.mark.parametrize("kind", ["detect", "segment", "segment later"])
def test_round_trip_of_dense_networks(kind: str, name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    formats: tuple[Format, ...] = ("mobilevit", "apple", "mobilevit")
    options: dict[str, Any] = {"task": "detect", "preprocessing": Preprocessing((320, 320), 320)}
    if kind == "detect":
        model = SSDLite(name, num_classes=3)
    else:
        head, stride = (DeepLabHead(), 16) if kind == "segment" else (LATER_HEAD, 8)
        model = DeepLabV3(name, 4, stride, head)
        options = {"task": "segment", "head": head, "output_stride": stride}
        options["preprocessing"] = Preprocessing((512, 512), 512)
        if kind == "segment":
            formats = ("mobilevit", "transformers", "apple", "transformers", "mobilevit")
    tensors = {
        key: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for key, tensor in randomize(model).state_dict().items()
    }
    weights = Weights(ARCHITECTURES[name], tensors, **options)
    for i, format in enumerate(formats):  # each reads the output of the previous one
        path = tmp_path / f"{i}{ENDINGS[format]}"
        write(weights, path, format)
        again = read(path)
        for part in ("task", "head", "output_stride", "architecture", "preprocessing", "num_classes"):
            assert getattr(again, part) == getattr(weights, part), f"{format}: {part}"
        weights = again
        assert weights.tensors.keys() == tensors.keys()
        for key, tensor in tensors.items():
            assert weights.tensors[key].dtype == tensor.dtype
            assert torch.equal(weights.tensors[key], tensor), f"{format}: {key}"
