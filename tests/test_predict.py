"""Predictions against a softmax computed by hand; boxes and masks of synthetic images; save and load."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import mobilevit
from mobilevit import predict
from mobilevit.images import ImageError, Preprocessing
from mobilevit.models.deeplabv3 import LATER_HEAD, PAPER_HEAD, DeepLabHead, DeepLabV3
from mobilevit.models.mobilevit import XXS, MobileViT
from mobilevit.models.ssdlite import MapHead, SSDLite
from mobilevit.predict import (
    Classifier,
    Detector,
    Prediction,
    Segmenter,
    load,
    load_backbone,
    load_detector,
    load_segmenter,
    predict_images,
    save,
)
from mobilevit.weights import FORMATS, PAPER_PREPROCESSING, UNCALIBRATED, Calibration, Format, WeightsError, read
from mobilevit.weights import PREPROCESSING as ASSUMED
from small_networks import randomize

NAMES = ("ant", "bee", "cat", "dog", "eel", "fox", "gnu")
PREPROCESSING = Preprocessing(resize_px=40, crop_px=37, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))


@pytest.fixture(scope="module")
def model() -> Classifier:
    model = Classifier("xxs", num_classes=len(NAMES))
    randomize(model)
    model.preprocessing, model.class_names = PREPROCESSING, NAMES
    return model


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Seven images of noise at the size after resizing; the fourth is truncated."""
    folder = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    files = [folder / f"{i}.png" for i in range(7)]
    for i, file in enumerate(files):
        Image.fromarray(random.integers(0, 40 + 30 * i, (40, 40, 3), dtype=np.uint8)).save(file)
    files[3].write_bytes(files[3].read_bytes()[:1000])
    return files


def by_hand(model: MobileViT, file: Path) -> np.ndarray:
    """The probabilities of an image of 40 x 40 px under `PREPROCESSING`."""
    rgb = np.asarray(Image.open(file), np.float64)[1:38, 1:38] / 255
    rgb = (rgb - [0.1, 0.2, 0.3]) / [0.5, 0.6, 0.7]
    with torch.no_grad():
        logits = model(torch.tensor(rgb.transpose(2, 0, 1)[None], dtype=torch.float32))[0].double().numpy()
    return np.exp(logits) / np.exp(logits).sum()


def is_close(predictions: list[Prediction], probabilities: np.ndarray) -> bool:
    order = np.argsort(-probabilities)[: len(predictions)]
    assert [p.class_index for p in predictions] == order.tolist()
    return np.allclose([p.probability for p in predictions], probabilities[order], rtol=1e-4)


@pytest.mark.parametrize(("top_k", "num"), [(1, 1), (5, 5), (1000, 7)])
def test_softmax_by_hand(model: Classifier, images: list[Path], top_k: int, num: int):
    for file in (images[0], images[6]):
        predictions = model.predict(file, top_k)
        assert len(predictions) == num
        assert is_close(predictions, by_hand(model, file))
        assert [p.class_name for p in predictions] == [NAMES[p.class_index] for p in predictions]


def test_kinds_of_input(model: Classifier, images: list[Path]):
    image = Image.open(images[0])
    expected = model.preprocess(images[0])
    assert expected.shape == (1, 3, 37, 37)
    for source in (str(images[0]), image, np.asarray(image)):
        assert model.preprocess(source).equal(expected)
        assert model.preprocess([images[1], source])[1:].equal(expected)


def test_one_image_or_several(model: Classifier, images: list[Path]):
    whole = [image for image in images if image.name != "3.png"]
    one_by_one = [model.predict(image, top_k=2) for image in whole]
    for several in (whole, tuple(whole)):
        together = model.predict(several, top_k=2)
        assert [[p.class_name for p in row] for row in together] == [[p.class_name for p in row] for row in one_by_one]
    for wrong in (torch.rand(3, 64, 64), b"bytes", 7):
        with pytest.raises(TypeError, match=type(wrong).__name__):
            model.predict(wrong)  # pyright: ignore[reportCallIssue, reportArgumentType]


def test_pixels_have_the_dtype_of_the_network(model: Classifier, images: list[Path]):
    half = Classifier("xxs", num_classes=7).bfloat16()
    assert half.preprocess(images[0]).dtype == torch.bfloat16
    assert sum(p.probability for p in half.eval().predict(images[0], top_k=7)) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_batch_size_does_not_change_predictions(model: Classifier, images: list[Path], batch_size: int):
    shuffled = [images[i] for i in (5, 0, 3, 6, 2, 1, 4, 5)]
    results = list(
        predict_images(
            model, shuffled, lambda pixels, sizes: model.predict_pixels(pixels, sizes, 3), batch_size=batch_size
        )
    )
    assert [one.path for one in results] == shuffled
    for one in results:
        if one.path == images[3]:
            assert one.image is None
            with pytest.raises(ImageError, match=f"{one.path}: damaged"):
                one.value()
        else:
            assert len(one.value()) == 3
            assert is_close(one.value(), by_hand(model, one.path))
            assert one.decoded().tobytes() == Image.open(one.path).tobytes()


def test_no_readable_image(model: Classifier, images: list[Path], tmp_path: Path):
    missing = tmp_path / "missing.png"
    results = list(predict_images(model, [images[3], missing, tmp_path], model.predict_pixels, batch_size=2))
    assert [one.path for one in results] == [images[3], missing, tmp_path]
    assert all(isinstance(one.result, ImageError) for one in results)
    assert list(predict_images(model, [], model.predict_pixels)) == []


def test_large_images_are_not_stored(model: Classifier, images: list[Path], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(predict, "MAX_DECODED_MEGAPIXELS", 2 * 40 * 40 / 1e6)
    for batch_size, is_stored in ((2, True), (3, False)):
        for one in predict_images(model, images[:3], model.predict_pixels, batch_size=batch_size):
            assert (one.image is not None) == is_stored
            assert one.decoded().tobytes() == Image.open(one.path).tobytes()


def test_errors(model: Classifier, images: list[Path]):
    with pytest.raises(ValueError, match="no images"):
        model.preprocess([])
    with pytest.raises(ValueError, match="top_k is 0"):
        model.predict(images[0], top_k=0)
    with pytest.raises(ValueError, match="batch size is 0"):
        list(predict_images(model, images, model.predict_pixels, batch_size=0))
    with pytest.raises(ImageError, match=r"3\.png"):
        model.predict(images[3])
    with pytest.raises(ValueError, match="no classifier"):
        Classifier("xxs", num_classes=0).eval().predict(images[0])
    with pytest.raises(RuntimeError, match=r"model\.eval\(\)"):
        Classifier("xxs", num_classes=7).train().predict(images[0])
    for predictor in (model, Detector("xxs", num_classes=7), Segmenter("xxs", num_classes=7)):
        with pytest.raises(ValueError, match="class_names has 2 names for 7 classes"):
            predictor.class_names = ("ant", "bee")


# ---------------------------------------------------------------------------------------------------------------------
# Detect and segment

WARP = Preprocessing(resize_px=(96, 96), crop_px=96)
# Sides of the first two anchors of the last map, squares at the center of the image (SSD, section 2.2).
SIDE = 0.1 + 0.95 * 5 / 6
SIDES = (SIDE, (SIDE * 1.05) ** 0.5)


def write_rotated(path: Path, pixels: np.ndarray) -> Path:
    """Write an image whose EXIF orientation rotates it by 90 degrees; `pixels` are upright."""
    exif = Image.Exif()
    exif[0x112] = 6
    Image.fromarray(np.rot90(pixels)).save(path, exif=exif)
    return path


def location(x1: float, y1: float, x2: float, y2: float, side: float = SIDE) -> list[float]:
    """The location of a box, in relative coordinates, for a square anchor (SSD, equation 2)."""
    shifts = [((x1 + x2) / 2 - 0.5) / side / 0.1, ((y1 + y2) / 2 - 0.5) / side / 0.1]
    return [*shifts, float(np.log((x2 - x1) / side)) / 0.2, float(np.log((y2 - y1) / side)) / 0.2]


def constant_detector(*detections: tuple[tuple[float, float, float, float], int, float]) -> Detector:
    """A detector with up to two constant detections: (box in relative coordinates, class, score)."""
    model = Detector("xxs", num_classes=3).eval()
    model.preprocessing, model.class_names = WARP, ("ant", "bee", "cat")
    for head in model.heads:
        assert isinstance(head, MapHead)
        assert head.out.bias is not None
        head.out.weight.data.zero_()
        rows = head.out.bias.data.zero_().unflatten(0, (-1, 8))
        rows[:, 4] = 30.0  # background
        if head is model.heads[-1]:
            for row, side, (box, label, score) in zip(rows, SIDES, detections, strict=False):
                row[:4] = torch.tensor(location(*box, side))
                row[4:] = torch.tensor([(1 - score) / 3] * 4).log()
                row[5 + label] = float(np.log(score))
    return model


def test_boxes_in_pixels_of_the_image():
    model = constant_detector(((0.25, 0.5, 0.5, 0.75), 2, 0.6), ((0.0, 0.1, 0.9, 1.0), 0, 0.7))
    first, second = model.predict(np.zeros((61, 200, 3), np.uint8))
    assert (first.class_name, first.class_index, second.class_name, second.class_index) == ("ant", 0, "cat", 2)
    assert first.box == pytest.approx((0, 6.1, 180, 61), abs=1e-3)
    assert second.box == pytest.approx((50, 30.5, 100, 45.75), abs=1e-3)
    assert (first.score, second.score) == pytest.approx((0.7, 0.6), abs=1e-6)
    portrait, landscape = model.predict([np.zeros((80, 40), np.uint8), np.zeros((40, 80), np.uint8)])
    assert portrait[1].box == pytest.approx((10, 40, 20, 60), abs=1e-3)
    assert landscape[1].box == pytest.approx((20, 20, 40, 30), abs=1e-3)


def test_boxes_are_clipped_to_the_image():
    model = constant_detector(((-0.5, 0.5, 0.5, 1.5), 1, 0.9), ((1.1, 0.1, 1.4, 0.9), 1, 0.8))
    (one,) = model.predict(np.zeros((50, 30, 3), np.uint8))  # the other is outside the image
    assert one.box[0] == 0.0
    assert one.box[3] == 50.0
    assert one.box[1:3] == pytest.approx((25, 15), abs=1e-3)


def test_options_of_detection():
    model = constant_detector(((0.1, 0.1, 0.3, 0.3), 1, 0.9), ((0.6, 0.6, 0.9, 0.9), 0, 0.31))
    image = np.zeros((50, 30, 3), np.uint8)
    assert [d.class_name for d in model.predict(image)] == ["bee", "ant"]
    assert [d.class_name for d in model.predict(image, score_threshold=0.32)] == ["bee"]
    assert [d.class_name for d in model.predict(image, max_per_image=1)] == ["bee"]
    assert model.predict(image, score_threshold=0.95) == []
    for wrong in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="score_threshold is"):
            model.predict(image, score_threshold=wrong)
    with pytest.raises(ValueError, match="max_per_image is 0"):
        model.predict(image, max_per_image=0)


class WhiteDetector(Detector):
    """Detects the white region of its input."""

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        A = len(self.anchors(*images.shape[-2:]))
        logits, locations = torch.zeros(len(images), A, 4), torch.zeros(len(images), A, 4)
        logits[..., 0] = 30
        for i, image in enumerate(images):
            rows, columns = (image.amax(0) > 0.5).nonzero(as_tuple=True)
            S = image.shape[-1]
            sides = [int(columns.min()) / S, int(rows.min()) / S, int(columns.max() + 1) / S, int(rows.max() + 1) / S]
            locations[i, -4] = torch.tensor(location(*sides))
            logits[i, -4, 1] = 60
        return logits, locations


def test_boxes_are_of_the_upright_image(tmp_path: Path):
    pixels = np.zeros((72, 240, 3), np.uint8)
    pixels[18:48, 30:75] = 255
    model = WhiteDetector("xxs", num_classes=3).eval()
    model.preprocessing = WARP
    path = write_rotated(tmp_path / "white.png", pixels)
    (one,) = model.predict(path)
    assert one.box == pytest.approx((30, 18, 75, 48), abs=1.5)
    assert one.class_name == "class 0"
    (result,) = predict_images(model, [path], model.predict_pixels)
    assert result.value() == [one]


class ColorSegmenter(Segmenter):
    """Red, green and blue are classes 0, 1 and 2."""

    def coarse(self, images: Tensor) -> Tensor:
        return F.avg_pool2d(images, 8)


def test_masks_are_of_the_upright_image(tmp_path: Path):
    truth = np.zeros((67, 205), np.uint8)
    truth[:40, 90:] = 1
    truth[40:, 60:150] = 2
    model = ColorSegmenter("xxs", num_classes=3).eval()
    model.preprocessing = WARP
    path = write_rotated(tmp_path / "colors.png", np.eye(3, dtype=np.uint8)[truth] * 255)
    mask = model.predict(path)
    assert mask.dtype == np.uint8
    assert mask.shape == truth.shape
    # Borders are accurate to half a coarse pixel, which has 17 x 6 px.
    near = np.zeros_like(truth, dtype=bool)
    near[34:46] = near[:, 81:99] = near[:, 51:69] = near[:, 141:159] = True
    assert np.array_equal(mask[~near], truth[~near])
    (result,) = predict_images(model, [path], model.predict_pixels)
    assert np.array_equal(result.value(), mask)


@pytest.mark.parametrize("head", [PAPER_HEAD, LATER_HEAD], ids=["paper", "later"])
def test_masks_are_the_argmax_of_the_logits(head: DeepLabHead):
    model = randomize(Segmenter("xxs", num_classes=9, head=replace(head, channels=16)))
    model.preprocessing = WARP
    random = np.random.default_rng(0)
    images = [random.integers(0, 256, (h, w, 3), dtype=np.uint8) for h, w in ((150, 101), (33, 32), (96, 96), (7, 300))]
    masks = model.predict(images)
    with torch.no_grad():
        logits = model(model.preprocess(images))
    for image, mask, one in zip(images, masks, logits, strict=True):
        assert mask.shape == image.shape[:2]
        enlarged = F.interpolate(one[None].double(), image.shape[:2], mode="bilinear")[0]
        # Logits that are equal up to rounding are both correct.
        chosen = enlarged.gather(0, torch.from_numpy(mask)[None].long())[0]
        assert (enlarged.amax(0) - chosen).max() < 1e-5
        assert len(np.unique(mask)) > 1


def test_many_images_of_dense_tasks(images: list[Path]):
    detector = constant_detector(((0.25, 0.5, 0.5, 0.75), 2, 0.6))
    segmenter = randomize(Segmenter("xxs", num_classes=4, head=DeepLabHead(channels=16)))
    segmenter.preprocessing = WARP
    boxes = list(predict_images(detector, images, detector.predict_pixels, batch_size=3))
    masks = list(predict_images(segmenter, images, segmenter.predict_pixels, batch_size=3))
    for detections, mask in zip(boxes, masks, strict=True):
        if mask.path == images[3]:
            assert isinstance(detections.result, ImageError)
            assert isinstance(mask.result, ImageError)
        else:
            assert detections.value() == detector.predict(detections.path)
            # Rounding depends on the batch size.
            assert (mask.value() != segmenter.predict(mask.path)).mean() < 0.01


def test_errors_of_dense_tasks(images: list[Path]):
    crops = Preprocessing(resize_px=288, crop_px=256)
    for model in (Detector("xxs", num_classes=3), Segmenter("xxs", num_classes=3)):
        with pytest.raises(RuntimeError, match=r"model\.eval\(\)"):
            model.train().predict(images[0])
        model.eval().preprocessing = crops
        with pytest.raises(ValueError, match=r"288.*256.*resize_px=\(256, 256\)"):
            model.predict(images[0])
    with pytest.raises(ValueError, match=r"257 classes.*256"):
        Segmenter("xxs", num_classes=257, head=DeepLabHead(channels=16)).eval().predict(images[0])


def test_new_classes_of_dense_tasks_have_no_old_names():
    for model in (constant_detector(), Segmenter("xxs", num_classes=3)):
        model.class_names = ("ant", "bee", "cat")
        model.reset_classes(2)
        assert model.class_names == ()
        assert model.class_name(1) == "class 1"


# ---------------------------------------------------------------------------------------------------------------------
# Save and load


FILES: dict[Format, str] = {"mobilevit": "a.safetensors", "apple": "a.pt", "timm": "a.safetensors", "transformers": "a"}


@pytest.mark.parametrize("format", FORMATS)
def test_save_and_load(model: Classifier, images: list[Path], tmp_path: Path, format: Format):
    other = Classifier("xxs", num_classes=7).eval()
    other.load_state_dict(model.state_dict())
    other.class_names, other.preprocessing = NAMES, PREPROCESSING
    if format == "transformers":  # which does not normalize
        other.preprocessing = replace(PREPROCESSING, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    save(other, tmp_path / FILES[format], format)
    loaded = load(tmp_path / FILES[format])
    assert not loaded.training
    pixels = torch.rand(2, 3, 64, 57)
    assert loaded(pixels).equal(other(pixels))
    if format == "apple":  # which has no place for names and preprocessing
        assert loaded.preprocessing == PAPER_PREPROCESSING
        assert loaded.predict(images[0], top_k=1)[0].class_name.startswith("class ")
    else:
        assert loaded.preprocessing == other.preprocessing
        assert loaded.predict(images[0]) == other.predict(images[0])


def test_invalid_file_names_and_formats(tmp_path: Path):
    stride_8 = Classifier("xxs", num_classes=3, output_stride=8)
    wrong: dict[Format, tuple[str, str]] = {
        "mobilevit": ("a.pt", "end in"),
        "apple": ("a.pt", "output_stride is 8"),
        "timm": ("a.safetensors", "output_stride is 8"),
        "transformers": ("a.bin", "is a folder"),
    }
    for format, (name, reason) in wrong.items():
        with pytest.raises(WeightsError, match=reason):
            save(stride_8, tmp_path / name, format)
    assert list(tmp_path.iterdir()) == []


def test_plain_network(tmp_path: Path, images: list[Path]):
    save(MobileViT(XXS, num_classes=3).eval(), tmp_path / "plain.safetensors")
    loaded = load(tmp_path / "plain.safetensors")
    assert {p.class_name for p in loaded.predict(images[0])} == {"class 0", "class 1", "class 2"}
    with pytest.raises(WeightsError, match=r"3 classes, expected 5.*reset_classifier\(5\)"):
        load(tmp_path / "plain.safetensors", num_classes=5)


def test_network_without_classifier(tmp_path: Path):
    save(Classifier("xxs", num_classes=0), tmp_path / "features.safetensors")
    loaded = load(tmp_path / "features.safetensors")
    assert loaded.num_classes == 0
    assert loaded(torch.rand(1, 3, 33, 32)).shape == (1, 320)


def test_calibration(model: Classifier, images: list[Path], tmp_path: Path):
    """The temperature scales the logits; predictions below the threshold are rejected; a new classifier has neither."""
    save(model, tmp_path / "plain.safetensors")
    assert load(tmp_path / "plain.safetensors").calibration == UNCALIBRATED
    calibrated = load(tmp_path / "plain.safetensors")
    calibrated.calibration = Calibration(1.7)
    save(calibrated, tmp_path / "calibrated.safetensors")
    calibrated = load(tmp_path / "calibrated.safetensors")
    assert calibrated.calibration == Calibration(1.7)
    pixels = torch.rand(2, 3, 37, 37)
    assert calibrated(pixels).equal(model(pixels))
    powers = by_hand(model, images[0]) ** (1 / 1.7)
    predictions = calibrated.predict(images[0])
    assert is_close(predictions, powers / powers.sum())
    assert not any(p.rejected for p in predictions)
    between = (predictions[0].probability + predictions[1].probability) / 2
    calibrated.calibration = Calibration(1.7, min_probability=between)
    assert [p.rejected for p in calibrated.predict(images[0])] == [False, True, True, True, True]
    calibrated.reset_classifier(2)
    assert calibrated.calibration == UNCALIBRATED


def test_a_new_classifier_has_no_old_names(model: Classifier, images: list[Path], tmp_path: Path):
    save(model, tmp_path / "seven.safetensors")
    other = load(tmp_path / "seven.safetensors")
    other.reset_classifier(2)
    assert {p.class_name for p in other.predict(images[0])} == {"class 0", "class 1"}
    save(other, tmp_path / "two.safetensors")
    assert load(tmp_path / "two.safetensors").class_names == ()


def test_pretrained_backbone(model: Classifier, tmp_path: Path):
    save(model, tmp_path / "whole.safetensors")
    backbone = load_backbone(tmp_path / "whole.safetensors", out_stages="stage3")
    assert not hasattr(backbone, "stage4")
    seen = []
    model.backbone.stage3.register_forward_hook(lambda module, inputs, output: seen.append(output))  # pyright: ignore
    x = torch.rand(1, 3, 70, 64)
    with torch.no_grad():
        model(x)
        assert torch.equal(backbone(x)["stage3"], seen[0])
    at_8 = load_backbone(tmp_path / "whole.safetensors", output_stride=8)
    assert (
        at_8.strides["stage5"] == load(tmp_path / "whole.safetensors", output_stride=8).backbone.strides["stage5"] == 8
    )


def test_save_and_load_of_dense_tasks(images: list[Path], tmp_path: Path):
    detector = randomize(Detector("xxs", num_classes=3))
    segmenter = randomize(Segmenter("xxs", num_classes=3, output_stride=8, head=DeepLabHead(channels=16)))
    detector.category_ids = (1, 17, 90)
    for model, load_again in ((detector, load_detector), (segmenter, load_segmenter)):
        model.preprocessing, model.class_names = WARP, ("ant", "bee", "cat")
        save(model, tmp_path / "a.safetensors")
        again = load_again(tmp_path / "a.safetensors", num_classes=3)
        assert type(again) is type(model)
        assert not again.training
        assert (again.preprocessing, again.class_names) == (WARP, model.class_names)
        assert all(again.state_dict()[key].equal(value) for key, value in model.state_dict().items())
        with pytest.raises(WeightsError, match="3 classes, expected 5"):
            load_again(tmp_path / "a.safetensors", num_classes=5)
        if isinstance(again, Detector):
            assert again.category_ids == (1, 17, 90)
            again.reset_classes(3)
            assert again.category_ids == ()
    assert load_segmenter(tmp_path / "a.safetensors").backbone.output_stride == 8
    assert load_segmenter(tmp_path / "a.safetensors", output_stride=16).backbone.output_stride == 16


def test_plain_networks_of_dense_tasks(tmp_path: Path):
    for task, model in (("detect", SSDLite("xxs", 2)), ("segment", DeepLabV3("xxs", 2, head=DeepLabHead(channels=16)))):
        save(model, tmp_path / "plain.safetensors")
        weights = read(tmp_path / "plain.safetensors")
        assert (weights.task, weights.num_classes, weights.class_names) == (task, 2, ())
        assert weights.preprocessing == ASSUMED[weights.task]


def test_the_function_for_the_task(model: Classifier, tmp_path: Path):
    files = {name: str(tmp_path / f"{name}.safetensors") for name in ("load", "load_detector", "load_segmenter")}
    save(model, files["load"])
    save(SSDLite("xxs", 2), files["load_detector"])
    save(DeepLabV3("xxs", 2, head=DeepLabHead(channels=16)), files["load_segmenter"])
    for right, file in files.items():
        for name in files:
            if name == right:
                assert getattr(mobilevit, name)(file).num_classes in (7, 2)
                continue
            with pytest.raises(WeightsError) as caught:
                getattr(mobilevit, name)(file)
            assert file in str(caught.value)
            assert str(caught.value).endswith(f"mobilevit.{right}")
    with pytest.raises(WeightsError, match="SSDLite"):
        Classifier.from_weights(read(files["load_detector"]))


def test_backbones_of_all_tasks(tmp_path: Path):
    x = torch.rand(1, 3, 70, 64)
    for model in (SSDLite("xxs", 2), DeepLabV3("xxs", 2, head=replace(LATER_HEAD, channels=16))):
        randomize(model)
        save(model, tmp_path / "whole.safetensors")
        backbone = load_backbone(tmp_path / "whole.safetensors", out_stages="stage5")
        assert backbone.output_stride == model.backbone.output_stride
        with torch.no_grad():
            assert backbone(x)["stage5"].equal(model.backbone(x)["stage5"])
