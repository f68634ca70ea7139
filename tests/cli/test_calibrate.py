"""`mobilevit calibrate`: temperatures against scipy, and errors."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

from command_line import check_refused, files_in, run
from mobilevit.predict import Classifier, load, save
from mobilevit.weights import read

NUM_IMAGES = 150
CALIBRATE = "calibrate bold.safetensors --data labeled --num-workers 0"


@pytest.fixture
def labels(here: Path) -> dict[Path, int]:
    """Labeled images in labeled/x, y and z, for bold.safetensors: a network whose logits are 3 times too large."""
    random = np.random.default_rng(0)
    model = load("xyz.safetensors")
    images = [
        Image.fromarray(random.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize((36, 36), Image.Resampling.NEAREST)
        for _ in range(NUM_IMAGES)
    ]
    logits = model.logits(model.preprocess(images))
    with torch.no_grad():
        # Normalize, so that the classes are about equally frequent and their probabilities vary.
        scale, shift = 1.5 / logits.std(0), logits.mean(0)
        bias = model.get_parameter("classifier.bias")
        bias.copy_((bias - shift) * scale)
        model.get_parameter("classifier.weight").mul_(scale[:, None])
        probabilities = model.logits(model.preprocess(images)).softmax(1).numpy()
        for name in ("weight", "bias"):
            model.get_parameter(f"classifier.{name}").mul_(3)
    save(model, here / "bold.safetensors")
    labels: dict[Path, int] = {}
    for i, image in enumerate(images):
        label = int(random.choice(3, p=probabilities[i] / probabilities[i].sum()))
        file = here / f"labeled/{'xyz'[label]}/{i:03}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        image.save(file)
        labels[file] = label
    return labels


def logits_of(model: Classifier, labels: dict[Path, int]) -> np.ndarray:
    return model.logits(model.preprocess(list(labels))).double().numpy()


def test_calibrate(capsys: pytest.CaptureFixture[str], here: Path, labels: dict[Path, int]):
    logits, classes = logits_of(load("bold.safetensors"), labels), np.array(list(labels.values()))

    def loss(t: float) -> float:
        return -float(log_softmax(logits / t, axis=1)[np.arange(NUM_IMAGES), classes].mean())

    optimum = minimize_scalar(loss, bounds=(0.2, 10), method="bounded").x  # pyright: ignore[reportAttributeAccessIssue]
    assert 2 < optimum < 4.5
    before = files_in(here)
    assert run(f"{CALIBRATE} --out new/a.safetensors --json") == 0
    assert files_in(here) - before == {"new/a.safetensors"}
    line = json.loads(capsys.readouterr().out)
    assert (line["weights"], line["split"], line["num_images"]) == ("new/a.safetensors", "all", NUM_IMAGES)
    assert line["temperature"] == pytest.approx(optimum, rel=0.0126)
    assert line["loss_before"] == pytest.approx(loss(1), rel=1e-4)
    assert line["loss_after"] == pytest.approx(loss(optimum), rel=0.06)
    assert line["ece_after"] < line["ece_before"] / 2
    original, calibrated = read("bold.safetensors"), read("new/a.safetensors")
    assert calibrated.calibration.temperature == line["temperature"]
    assert calibrated.class_names == original.class_names
    assert all(calibrated.tensors[key].equal(tensor) for key, tensor in original.tensors.items())

    assert run("evaluate new/a.safetensors --data labeled --num-workers 0 --json") == 0
    metrics = json.loads(capsys.readouterr().out)
    assert metrics["ece_uncalibrated"] == pytest.approx(line["ece_before"])
    assert metrics["loss"] == pytest.approx(line["loss_before"])
    assert metrics["ece"] < metrics["ece_uncalibrated"] / 2

    assert run(f"{CALIBRATE} --out b.safetensors") == 0
    out = capsys.readouterr().out
    assert f"{line['ece_before']:.2f}" in out
    assert f"{line['ece_after']:.2f}" in out
    assert f"temperature: {line['temperature']:.3f}, fitted on 150 images" in out
    assert "all of labeled, 150 images" in out
    assert "does not differ" not in out


def test_calibrated_weights_can_be_calibrated_again(
    capsys: pytest.CaptureFixture[str], here: Path, labels: dict[Path, int]
):
    assert run(f"{CALIBRATE} --out a.safetensors --json") == 0
    first = json.loads(capsys.readouterr().out)
    again = CALIBRATE.replace("bold", "a")
    check_refused(capsys, f"{again} --out a.safetensors", "a.safetensors exists --overwrite")
    assert run(f"{again} --out a.safetensors --overwrite --json") == 0
    assert json.loads(capsys.readouterr().out) == first


def test_fine_tuning_starts_uncalibrated(capsys: pytest.CaptureFixture[str], here: Path, labels: dict[Path, int]):
    assert run(f"{CALIBRATE} --out a.safetensors") == 0
    options = "--size 32 --num-workers 0 --epochs 1 --batch-size 50"
    assert run(f"train tiny --data labeled --out run --weights a.safetensors {options}") == 0
    assert read("run/model.safetensors").calibration.temperature == 1
    assert "Calibration" in (here / "run/report.html").read_text()


def test_a_threshold(capsys: pytest.CaptureFixture[str], here: Path, labels: dict[Path, int]):
    """`predict` rejects what `calibrate` does not count as accepted; `evaluate` counts the same."""
    assert run(f"{CALIBRATE} --min-precision 0.7 --out a.safetensors --json") == 0
    line = json.loads(capsys.readouterr().out)
    model = load("a.safetensors")
    assert model.calibration.min_probability == line["min_probability"]
    assert model.calibration.min_precision == line["min_precision"] == 0.7
    predictions = [one[0] for one in model.predict(list(labels))]
    accepted = [(p, label) for p, label in zip(predictions, labels.values(), strict=True) if not p.rejected]
    assert 0.1 < line["coverage"] < 1
    assert len(accepted) / NUM_IMAGES == pytest.approx(line["coverage"])
    precision = np.mean([p.class_index == label for p, label in accepted])
    assert precision == pytest.approx(line["precision"])
    assert precision > line["lower_bound"] >= 0.7
    assert run("evaluate a.safetensors --data labeled --num-workers 0 --json") == 0
    metrics = json.loads(capsys.readouterr().out)
    assert metrics["coverage"] == pytest.approx(100 * line["coverage"])
    assert metrics["accepted_top1"] == pytest.approx(100 * precision)
    assert run("info a.safetensors") == 0
    assert f"below {100 * line['min_probability']:.1f} % are rejected" in capsys.readouterr().out
    assert run(f"{CALIBRATE} --min-precision 0.7 --out b.safetensors") == 0
    assert f"below {100 * line['min_probability']:.1f} %" in capsys.readouterr().out
    command = f"{CALIBRATE} --out c.safetensors --min-precision"
    check_refused(capsys, f"{command} 0.999", "0.999 150 images highest lower bound 0. more images")
    check_refused(capsys, f"{command} 95", "--min-precision 95 between 0 and 1 0.95")
    assert not (here / "c.safetensors").exists()


def test_calibrated_probabilities_need_no_calibration(
    capsys: pytest.CaptureFixture[str], here: Path, labels: dict[Path, int]
):
    model = load("bold.safetensors")
    with torch.no_grad():
        for name in ("weight", "bias"):
            model.get_parameter(f"classifier.{name}").div_(3)
    save(model, here / "calm.safetensors")
    assert run("calibrate calm.safetensors --data labeled --num-workers 0 --out a.safetensors") == 0
    assert "does not differ from 1" in capsys.readouterr().err


MISTAKES = {
    "--out a.pt": "a.pt .safetensors",
    "--out xyz.safetensors": "xyz.safetensors exists --overwrite",
    "--out a.safetensors --split val": "'val' --split all",
    "--out a.safetensors --batch-size 0": "batch size 0 1 or more",
    "--out a.safetensors --num-workers -1": "--num-workers -1 0 or more",
    "--out a.safetensors --data photos": "photos",
    "": "--out",
}


@pytest.mark.parametrize(("args", "facts"), MISTAKES.items())
def test_mistakes(capsys: pytest.CaptureFixture[str], here: Path, args: str, facts: str):
    before = files_in(here)
    check_refused(capsys, f"calibrate xyz.safetensors --data classes --num-workers 0 {args}", facts)
    assert files_in(here) == before


def test_what_cannot_be_calibrated(capsys: pytest.CaptureFixture[str], here: Path, labels: dict[Path, int]):
    before = files_in(here)
    options = "--data labeled --num-workers 0 --out a.safetensors"
    check_refused(capsys, f"calibrate segmenter.safetensors {options}", "segmenter.safetensors 'segment' classifier")
    check_refused(capsys, f"calibrate missing.safetensors {options}", "missing.safetensors no such file")
    for file, label in labels.items():  # only the images that are classified correctly
        if load("bold.safetensors").predict(file)[0].class_index != label:
            file.unlink()
    check_refused(capsys, f"calibrate bold.safetensors {options}", "images temperature correct more images")
    assert files_in(here) < before
