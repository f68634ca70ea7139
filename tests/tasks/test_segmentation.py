"""Segmentation: loss against formulas, metrics against scikit-learn, initial weights, report."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn import metrics as sklearn_metrics
from sklearn.metrics import accuracy_score, jaccard_score
from torch import Tensor, nn

from mobilevit.data.loader import Batch, ImageDataset, load
from mobilevit.data.masks import MaskCoding, MaskFile
from mobilevit.data.sampler import Pick, eval_batches
from mobilevit.data.samples import Sample
from mobilevit.data.sources import default_split
from mobilevit.images import ImageError, Preprocessing
from mobilevit.models.deeplabv3 import LATER_HEAD, DeepLabHead, DeepLabV3
from mobilevit.models.mobilevit import MobileViT
from mobilevit.recipes import Data, Recipe
from mobilevit.report.results import sections
from mobilevit.tasks import segmentation
from mobilevit.tasks.segmentation import Segmentation, confusion_matrix, mask_iou, pixel_loss, predict_mask
from mobilevit.weights import Weights

TASK = Segmentation()
RECIPE = Recipe(
    task="segment", architecture="xxs", label_smoothing=0, data=Data(size_px=64, flip=False, val_fraction=0.5)
)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("size", [(8, 8), (5, 7)])
def test_loss_against_the_formula(smoothing: float, size: tuple[int, int]):
    logits, labels = 3 * torch.randn(2, 4, *size), torch.randint(4, (2, *size))
    labels[0, :2] = 255
    x = logits.double().numpy().transpose(0, 2, 3, 1)
    log_p = x - np.log(np.exp(x).sum(3, keepdims=True))
    counts = labels.numpy() != 255
    target = smoothing / 4 + (1 - smoothing) * np.eye(4)[np.where(counts, labels, 0)]
    loss = pixel_loss(logits, labels, smoothing)
    assert loss.item() == pytest.approx(-(target * log_p).sum(3)[counts].mean(), rel=1e-6)


def test_loss_if_every_pixel_is_ignored():
    logits = torch.randn(2, 4, 5, 7, requires_grad=True)
    loss = pixel_loss(logits, torch.full((2, 5, 7), 255))
    loss.backward()
    assert loss == 0
    assert logits.grad is not None
    assert not logits.grad.any()


@pytest.mark.parametrize("head", [DeepLabHead(channels=16), DeepLabHead(channels=16, auxiliary_channels=8)])
def test_loss_of_the_network_has_a_gradient_for_every_parameter(head: DeepLabHead):
    model = DeepLabV3("xxs", 3, head=replace(head, dropout=0)).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout | nn.Dropout2d):
            module.p = 0
    pixels, labels = torch.rand(2, 3, 64, 64), torch.randint(3, (2, 64, 64)).to(torch.uint8)
    loss = TASK.loss(RECIPE, model, Batch(pixels, labels))
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    outputs = model(pixels)
    assert isinstance(outputs, tuple) == (head.auxiliary_channels > 0)
    logits = outputs[0] if isinstance(outputs, tuple) else outputs
    expected = F.cross_entropy(logits, labels.long())
    if isinstance(outputs, tuple):
        expected = expected + 0.4 * F.cross_entropy(outputs[1], labels.long())
    # The transformers use attention dropout: the two forward passes differ.
    torch.testing.assert_close(loss, expected, rtol=0.2, atol=0)
    model.eval()
    for _ in range(2):
        assert torch.equal(model(pixels), model(pixels))
        assert model(pixels).shape == (2, 3, 64, 64)
    blank = TASK.blank_labels(2, 64)
    assert blank.shape == labels.shape
    assert blank.dtype == labels.dtype
    with torch.autocast("cpu", torch.bfloat16):
        assert TASK.loss(RECIPE, model, Batch(pixels, blank)).dtype == torch.float32


# ---------------------------------------------------------------------------------------------------------------------
# Metrics


@pytest.mark.parametrize(("height", "width", "num_classes"), [(30, 41, 3), (64, 64, 21)])
def test_masks_are_predicted_in_chunks_of_classes(
    height: int, width: int, num_classes: int, monkeypatch: pytest.MonkeyPatch
):
    logits = torch.randn(num_classes, 17, 16)
    expected = F.interpolate(logits[None], (height, width), mode="bilinear", align_corners=False)[0].argmax(0)
    for step in (1, 2, 5, 100):
        monkeypatch.setattr(segmentation, "MAX_RESIZED", step * height * width)
        assert torch.equal(predict_mask(logits, height, width), expected)


class Prepared(DeepLabV3):
    """Returns the prepared logits of the image whose index is its pixel value, 0 to 255."""

    def __init__(self, logits: Tensor):
        super().__init__("xxs", logits.shape[1], head=DeepLabHead(channels=8))
        self.prepared = logits

    def forward(self, images: Tensor) -> Tensor:
        assert images.dtype == torch.float32
        return self.prepared[(255 * images[:, 0, 0, 0]).round().long()]


def random_logits_and_masks(num: int, num_classes: int, seed: int = 0) -> tuple[Tensor, list[np.ndarray]]:
    """Logits (num, C, 16, 16) and similar masks of several sizes, with some ignored pixels."""
    generator = torch.Generator().manual_seed(seed)
    random = np.random.default_rng(seed)
    logits = F.interpolate(torch.randn(num, num_classes, 4, 4, generator=generator), (16, 16), mode="bicubic")
    masks = []
    for i in range(num):
        height, width = 20 + 3 * i, 50 - 2 * i
        mask = predict_mask(logits[i], height, width).numpy().astype(np.uint8)
        other = random.random(mask.shape) < 0.3
        mask[other] = random.integers(num_classes - 1, size=int(other.sum()))  # the last class is often missing
        mask[random.random(mask.shape) < 0.1] = 255
        masks.append(mask)
    return logits, masks


def batches(masks: Sequence[np.ndarray], *sizes: int) -> list[Batch]:
    indices = torch.arange(len(masks))
    pixels = (indices / 255)[:, None, None, None].expand(-1, 3, 16, 16)
    return [
        Batch(part, [masks[i] for i in these], tuple(these))
        for part, these in zip(pixels.split(sizes), (n.tolist() for n in indices.split(sizes)), strict=True)
    ]


@pytest.mark.parametrize("num_classes", [2, 5, 21])
def test_metrics_against_sklearn(num_classes: int):
    logits, masks = random_logits_and_masks(9, num_classes)
    results = TASK.evaluate(Prepared(logits).eval(), batches(masks, 5, 3, 1))
    truth, predicted = [], []
    for mask, of_image in zip(masks, logits, strict=True):
        enlarged = F.interpolate(of_image[None], mask.shape, mode="bilinear", align_corners=False)
        truth.append(mask[mask != 255])
        predicted.append(enlarged[0].argmax(0).numpy()[mask != 255])
    truth, predicted = np.concatenate(truth), np.concatenate(predicted)
    present = np.union1d(truth, predicted)
    metrics = results.metrics()
    assert metrics == {
        "miou": pytest.approx(100 * jaccard_score(truth, predicted, average="macro")),
        "pixel_accuracy": pytest.approx(100 * accuracy_score(truth, predicted)),
        "num_images": 9,
    }
    expected = sklearn_metrics.confusion_matrix(truth, predicted, labels=np.arange(num_classes))
    np.testing.assert_array_equal(results.confusion_matrix, expected)
    np.testing.assert_allclose(np.nanmean(mask_iou(expected)), jaccard_score(truth, predicted, average="macro"))
    rows = results.per_class([str(i) for i in range(num_classes)])
    assert [row.metrics["num_pixels"] for row in rows] == np.bincount(truth, minlength=num_classes).tolist()
    for i, row in enumerate(rows):
        if i in present:
            assert row.metrics["iou"] == pytest.approx(100 * jaccard_score(truth == i, predicted == i))
        else:
            assert row.metrics["iou"] is None


def test_confusion_matrix_excludes_ignored_pixels():
    truth = torch.tensor([[0, 1, 255], [2, 2, 0]], dtype=torch.uint8)
    prediction = torch.tensor([[0, 2, 1], [2, 0, 0]])
    assert confusion_matrix(truth, prediction, 3).tolist() == [[2, 0, 0], [0, 0, 1], [1, 0, 1]]


def test_results_do_not_depend_on_batches_and_processes():
    logits, masks = random_logits_and_masks(20, 4)
    model = Prepared(logits).eval()
    whole = TASK.evaluate(model, batches(masks, 20))
    ious = [example.iou for example in whole.worst]
    assert ious == sorted(ious)
    assert len(ious) == len(whole.best) == 6
    assert whole.best[0].iou > whole.best[-1].iou > ious[-1]
    empty = Batch(torch.empty(0, 3, 16, 16), [], (), ("unreadable.png",))
    in_turn = batches(masks, 3, 7, 1, 9)
    halves: list[Any] = []

    def note(value: Any) -> list[Any]:
        halves.append(value)
        return [value]

    TASK.evaluate(model, in_turn[1::2], note)
    for others in (
        TASK.evaluate(model, batches(masks, *[1] * 20)),
        TASK.evaluate(model, [*in_turn[::-1], empty]),
        TASK.evaluate(model, in_turn[::2], lambda mine: [mine, *halves]),
        TASK.evaluate(model, in_turn[::2], lambda mine: [(0, 0, [], []), *halves, mine]),  # one had no image
    ):
        assert others.metrics() == whole.metrics()
        np.testing.assert_array_equal(others.confusion_matrix, whole.confusion_matrix)
        for ours, theirs in ((whole.worst, others.worst), (whole.best, others.best)):
            for a, b in zip(ours, theirs, strict=True):
                assert (a.iou, a.index) == (b.iou, b.index)
                np.testing.assert_array_equal(a.prediction, b.prediction)
    with pytest.raises(ImageError, match="none of the images"):
        TASK.evaluate(model, [empty])
    with pytest.raises(ValueError, match="ignored"):
        TASK.evaluate(model, batches([np.full((5, 6), 255, np.uint8)], 1))


# ---------------------------------------------------------------------------------------------------------------------
# Data and weights

CLASS_NAMES = ("background", "red", "green")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Eight images with a red and a green shape each, their masks, and classes.txt."""
    random = np.random.default_rng(0)
    for i in range(8):
        width, height = 60 + 3 * i, 66 - 2 * i
        pixels = random.integers(0, 60, (height, width, 3), np.uint8)
        mask = np.zeros((height, width), np.uint8)
        y, x = np.mgrid[:height, :width]
        for number, (left, radius) in enumerate(((width // 4, 11 + i % 3), (3 * width // 4, 12)), start=1):
            where = np.hypot(x - left, y - height // 2) < radius
            pixels[where] = (250, 20, 20) if number == 1 else (20, 250, 20)
            mask[where] = number
        for name, array in (("images", pixels), ("masks", mask)):
            (tmp_path / name).mkdir(exist_ok=True)
            Image.fromarray(array).save(tmp_path / name / f"{i}.png")
    (tmp_path / "classes.txt").write_text("\n".join(CLASS_NAMES))
    return tmp_path


def weights(class_names: tuple[str, ...] = CLASS_NAMES, head: DeepLabHead | None = None) -> Weights:
    head = head or DeepLabHead(channels=16, rates=(1, 2, 3))
    model = DeepLabV3("xxs", len(class_names), 8, head)
    preprocessing = Preprocessing(resize_px=(64, 64), crop_px=64, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.25))
    return Weights(
        model.architecture, model.state_dict(), preprocessing, class_names, output_stride=8, task="segment", head=head
    )


def test_datasets_and_evaluation(folder: Path):
    train, val = TASK.datasets(RECIPE, folder)
    assert train.source.class_names == val.source.class_names == CLASS_NAMES
    assert len(train) + len(val) == 8
    assert default_split("segment", folder) == "all"
    dataset = TASK.evaluation_set(weights(), folder, Preprocessing(resize_px=72, crop_px=64), "all")
    (batch,) = load(dataset, eval_batches(8, batch_size=8, size_px=64), num_workers=0, device="cpu")
    assert batch.pixels.shape == (8, 3, 64, 64)
    assert [mask.shape for mask in batch.labels] == [(66 - 2 * i, 60 + 3 * i) for i in range(8)]
    with pytest.raises(ValueError, match="class names"):
        TASK.evaluation_set(replace(weights(), class_names=()), folder, weights().preprocessing, "all")
    out, mask = train.prepare(train.source[0], Pick(0, 0, 64))
    assert out.shape[:2] == mask.shape == (64, 64)


def same(built: Weights, before: Weights) -> set[str]:
    return {
        name
        for name in built.tensors
        if name in before.tensors and torch.equal(built.tensors[name], before.tensors[name])
    }


def test_build_with_random_weights(folder: Path):
    train, _ = TASK.datasets(RECIPE, folder)
    built = TASK.build(RECIPE, train, None)
    assert (built.task, built.architecture.name, built.num_classes) == ("segment", "xxs", 3)
    assert (built.output_stride, built.head, built.class_names) == (16, DeepLabHead(), CLASS_NAMES)
    assert built.preprocessing == Preprocessing(resize_px=(64, 64), crop_px=64)
    assert isinstance(built.build(), DeepLabV3)


@pytest.mark.parametrize("class_names", [CLASS_NAMES, CLASS_NAMES[::-1], ("a", "b"), ()])
@pytest.mark.parametrize("auxiliary_channels", [0, 8])
def test_build_from_segmentation_weights(folder: Path, class_names: tuple[str, ...], auxiliary_channels: int):
    head = replace(LATER_HEAD, channels=16, auxiliary_channels=auxiliary_channels)
    pretrained = replace(weights(class_names or ("x", "y"), head), class_names=class_names)
    train, _ = TASK.datasets(RECIPE, folder)
    built = TASK.build(replace(RECIPE, architecture="s"), train, pretrained)
    assert (built.architecture.name, built.num_classes, built.class_names) == ("xxs", 3, CLASS_NAMES)
    assert (built.output_stride, built.head) == (8, head)
    assert (built.preprocessing.mean, built.preprocessing.std) == ((0.5, 0.4, 0.3), (0.2, 0.3, 0.25))
    changed = set(built.tensors) - same(built, pretrained)
    if class_names == CLASS_NAMES:
        assert not changed
    else:
        assert all("classifier" in name for name in changed)
        assert {"classifier.weight"} | ({"auxiliary.classifier.weight"} if auxiliary_channels else set()) <= changed


def test_build_from_classification_weights(folder: Path):
    classifier = MobileViT("xs", num_classes=5)
    preprocessing = Preprocessing(resize_px=36, crop_px=32, mean=(0.5, 0.4, 0.3))
    pretrained = Weights(classifier.architecture, classifier.state_dict(), preprocessing)
    train, _ = TASK.datasets(RECIPE, folder)
    built = TASK.build(RECIPE, train, pretrained)
    assert (built.architecture.name, built.output_stride) == ("xs", 16)
    assert built.preprocessing == Preprocessing(resize_px=(64, 64), crop_px=64, mean=(0.5, 0.4, 0.3))
    assert {name for name in pretrained.tensors if name.startswith("backbone.")} <= same(built, pretrained)


def test_report_sections(tmp_path: Path):
    logits, masks = random_logits_and_masks(9, 4)

    class Source:
        class_names = ("background", "<b>a & b</b>", "c", "d")

        def __getitem__(self, index: int) -> Sample:
            Image.fromarray(masks[index]).save(tmp_path / f"{index}.png")
            file = MaskFile(tmp_path / f"{index}.png", MaskCoding(tuple(range(4))))
            return Sample(np.zeros((*masks[index].shape, 3), np.uint8), file, f"<i>{index}</i>.png")

    source: Any = Source()
    results = TASK.evaluate(Prepared(logits).eval(), batches(masks, 9))
    html = {section.title: section.html for section in sections(results, source)}
    assert list(html) == ["Classes", "Confusion matrix", "Worst images", "Best images"]
    assert "a & b" not in "".join(html.values())
    assert "<i>" not in "".join(html.values())
    assert html["Worst images"].count("<figure>") == 6
    assert html["Worst images"].count("<img") == 18


def test_overfits_eight_images(folder: Path):
    """From random weights, without augmentation, with a feature map of 12 x 12."""
    head = DeepLabHead(channels=64, rates=(1, 2, 3))
    recipe = replace(RECIPE, data=replace(RECIPE.data, size_px=96))
    initial = TASK.build(recipe, TASK.datasets(recipe, folder)[0], weights(head=head))
    all_of_it = TASK.evaluation_set(initial, folder, initial.preprocessing, "all")
    (batch,) = load(
        ImageDataset(all_of_it.source, all_of_it.prepare, list),
        eval_batches(8, batch_size=8, size_px=96),
        num_workers=0,
        device="cpu",
        preprocessing=initial.preprocessing,
    )
    labels = torch.from_numpy(
        np.stack(
            [np.asarray(Image.fromarray(mask).resize((96, 96), Image.Resampling.NEAREST)) for mask in batch.labels]
        )
    )
    model = initial.build().train()
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=60)
    for _ in range(60):
        loss = TASK.loss(recipe, model, Batch(batch.pixels, labels))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()
    for module in model.modules():  # after so few steps, running statistics differ from those of a batch
        if isinstance(module, nn.BatchNorm2d):
            module.train()
    assert TASK.evaluate(model, [batch]).metrics()["miou"] > 95
