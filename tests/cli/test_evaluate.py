"""`mobilevit evaluate`."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import f1_score, recall_score, roc_auc_score

from command_line import check_refused, refused, run
from mobilevit.data.corruptions import Corruption
from mobilevit.images import Preprocessing
from mobilevit.predict import Classifier, load, save
from mobilevit.tasks import evaluation

EVALUATE = "evaluate xyz.safetensors --data classes --num-workers 0"


def test_evaluate(capsys: pytest.CaptureFixture[str], here: Path):
    model = load("xyz.safetensors")
    num_correct, loss = 0, 0.0
    labels, predicted = [], []
    bins = [0.0] * 15  # the difference of the number of correct predictions and the sum of their probabilities
    for file in sorted((here / "classes").rglob("*.png")):
        probabilities = {p.class_name: p.probability for p in model.predict(file)}
        labels.append(file.parent.name)
        predicted.append(max(probabilities, key=lambda name: probabilities[name]))
        num_correct += predicted[-1] == labels[-1]
        loss -= float(np.log(probabilities[file.parent.name])) / 6
        highest = max(probabilities.values())
        is_correct = probabilities[file.parent.name] == highest
        bins[int(15 * highest)] += is_correct - highest
    assert run(f"{EVALUATE} --batch-size 4 --json") == 0
    line = json.loads(capsys.readouterr().out)
    assert (line.pop("weights"), line.pop("size_px"), line.pop("split")) == ("xyz.safetensors", 32, "all")
    balanced = 100 * recall_score(labels, predicted, labels=sorted({*labels}), average="macro")
    macro_f1 = 100 * f1_score(labels, predicted, average="macro")
    metrics = {"top1": 100 * num_correct / 6, "top5": 100.0, "balanced_accuracy": balanced, "macro_f1": macro_f1}
    ece = 100 * sum(map(abs, bins)) / 6
    expected = {**metrics, "loss": loss, "ece": ece, "num_images": 6}
    assert line == pytest.approx(expected, rel=1e-4)
    assert run(f"{EVALUATE} --batch-size 4") == 0
    heading, row, note = (line for line in capsys.readouterr().out.splitlines() if line.strip(" ─"))
    names = ["top-1", "%", "top-5", "%", "balanced", "accuracy", "%", "macro", "F1", "%"]
    assert heading.split() == ["weights", "split", "px", *names, "loss", "ECE", "%", "images"]
    values = [f"{value:.2f}" for value in metrics.values()]
    assert row.split() == ["xyz.safetensors", "all", "32", *values, f"{loss:.4f}", f"{ece:.2f}", "6"]
    assert "all of classes, 6 images" in note


def test_several_weights_at_several_sizes(capsys: pytest.CaptureFixture[str], here: Path):
    model = load("xyz.safetensors")
    predictions: dict[tuple[str, int], list[tuple[str, str]]] = {}  # (label, predicted class) of each image
    for file in ("a.safetensors", "b.safetensors"):
        model.class_names = ("x", "y", "[z]")
        save(model, here / file)
        for size_px in (64, 32):
            model.preprocessing = Preprocessing(resize_px=round(36 * size_px / 32), crop_px=size_px)
            images = sorted((here / "classes").rglob("*.png"))
            predictions[file, size_px] = [(image.parent.name, model.predict(image)[0].class_name) for image in images]
        model.preprocessing = Preprocessing(resize_px=36, crop_px=32)
        with torch.no_grad():
            model.get_parameter("classifier.bias").add_(torch.tensor([1.0, 0.0, -1.0]))  # of b.safetensors
    evaluate = "evaluate a.safetensors b.safetensors --data classes --size 64 32 --num-workers 0 --per-class"

    assert run(f"{evaluate} --json") == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["weights"], line["size_px"]) for line in lines] == list(predictions)
    for line in lines:
        pairs = predictions[line["weights"], line["size_px"]]
        assert line["top1"] == pytest.approx(100 * np.mean([label == predicted for label, predicted in pairs]))
        for name, one in zip(("x", "y", "[z]"), line["classes"], strict=True):
            num_labels, num_predicted = (sum(pair[i] == name for pair in pairs) for i in (0, 1))
            num_correct = pairs.count((name, name))
            assert one == {
                "class": name,
                "num_images": num_labels,
                "recall": 100 * num_correct / num_labels if num_labels else None,
                "precision": 100 * num_correct / num_predicted if num_predicted else None,
            }
    assert len({json.dumps(line["classes"]) for line in lines}) > 1  # or the order would not matter

    assert run(evaluate) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip(" ─")]
    assert [row[:4] for row in rows[1:5]] == [
        [file, "all", str(px), f"{line['top1']:.2f}"] for (file, px), line in zip(predictions, lines, strict=True)
    ]
    for i, line in enumerate(lines):
        title, _, *classes = rows[5 + 5 * i : 10 + 5 * i]
        assert title == [line["weights"], "at", str(line["size_px"]), "px"]
        assert classes == [
            [one["class"], str(one["num_images"])]
            + ["-" if one[name] is None else f"{one[name]:.2f}" for name in ("recall", "precision")]
            for one in line["classes"]
        ]


def test_a_run_folder(capsys: pytest.CaptureFixture[str], here: Path):
    (here / "run").mkdir()
    (here / "run/run.json").write_text("{}")
    evaluate = "evaluate run --data classes --num-workers 0 --json"
    for command in (evaluate, "predict run photos", "export run", "info run", "demo run"):
        check_refused(capsys, command, "run weights epoch")
    for name in ("model", "raw", "best"):
        (here / f"run/{name}.safetensors").hardlink_to("xyz.safetensors")
    assert run(evaluate) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["weights"] for line in lines] == ["run/model.safetensors", "run/raw.safetensors"]


def test_the_validation_split_of_a_run(capsys: pytest.CaptureFixture[str], here: Path):
    options = "--size 32 --num-workers 0 --val-fraction 0.4 --batch-size 2"
    with Image.open(here / "classes/x/1.png") as image:
        image.convert("RGBA").save(here / "classes/x/1.png")
    assert run(f"train tiny --data classes --out run --epochs 1 {options}") == 0
    validation = json.loads((here / "run/metrics.jsonl").read_text())
    assert "transparen" in capsys.readouterr().err
    evaluate = "evaluate run/model.safetensors --data classes --num-workers 0"
    for args, split, num_images in (("", "val", 2), ("--split train", "train", 4), ("--split all", "all", 6)):
        assert run(f"{evaluate} {args} --json") == 0
        line = json.loads(capsys.readouterr().out)
        assert (line["split"], line["num_images"]) == (split, num_images)
        if split == "val":
            assert line["loss"] == pytest.approx(validation["val_loss"], rel=1e-5)
        assert run(f"{evaluate} {args}") == 0
        assert f"{split}{' split' * (split != 'all')} of classes, {num_images} images\n" in capsys.readouterr().out
    check_refused(capsys, f"{evaluate} --split test", "'test'")
    assert run("convert run/model.safetensors again.safetensors") == 0
    assert "transparent" in capsys.readouterr().err


def test_images_of_another_source(capsys: pytest.CaptureFixture[str], here: Path):
    """The AUROC of the energy against scikit-learn; a flat folder, idx files, and what cannot be used."""
    (here / "photos/c.png").unlink()  # damaged
    random = np.random.default_rng(0)
    for i in range(4):
        Image.new("RGB", (40, 40), tuple(random.integers(0, 256, 3).tolist())).save(here / f"photos/plain{i}.png")
    pixels = random.integers(0, 256, (5, 28, 28), dtype=np.uint8)
    (here / "idx").mkdir()
    (here / "idx/train-images-idx3-ubyte").write_bytes(bytes([0, 0, 8, 3, 0, 0, 0, 5, 0, 0, 0, 28, 0, 0, 0, 28]))
    with (here / "idx/train-images-idx3-ubyte").open("ab") as file:
        file.write(pixels.tobytes())
    (here / "idx/train-labels-idx1-ubyte").write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 5, 0, 1, 0, 1, 2]))
    model = load("xyz.safetensors")

    def energies(images: list[Any]) -> list[float]:
        return Classifier.energy(model.logits(model.preprocess(images))).tolist()

    inside = energies(sorted((here / "classes").rglob("*.png")))
    for name, images in (
        ("photos", [p for p in sorted((here / "photos").rglob("*")) if p.is_file()]),
        ("idx", [Image.fromarray(one) for one in pixels]),
    ):
        outside = energies(images)
        expected = roc_auc_score([0] * len(inside) + [1] * len(outside), inside + outside)
        assert run(f"{EVALUATE} --json --ood {name}") == 0
        line = json.loads(capsys.readouterr().out)
        assert line["ood_auroc"] == pytest.approx(100 * expected)
        assert line["num_ood_images"] == len(outside)
        assert line["num_images"] == 6
        assert run(f"{EVALUATE} --ood {name}") == 0
        assert f"{100 * expected:.2f}" in capsys.readouterr().out
    (here / "empty").mkdir()
    (here / "damaged").mkdir()
    (here / "damaged/a.png").write_bytes(b"nothing")
    check_refused(capsys, f"{EVALUATE} --ood missing", "missing: no such folder")
    check_refused(capsys, f"{EVALUATE} --ood empty", "empty: no class folders with images")
    check_refused(capsys, f"{EVALUATE} --ood damaged", "damaged/a.png: not an image --max-unreadable")
    check_refused(capsys, f"{EVALUATE} --ood damaged --max-unreadable 1", "none of the images other source")
    check_refused(capsys, f"{EVALUATE} --ood photos --knn", "--ood photos --knn leave one out")
    evaluate = EVALUATE.replace("xyz", "segmenter")
    check_refused(capsys, f"{evaluate} --ood photos", "photos 'segment' classifier")


def test_a_damaged_image(capsys: pytest.CaptureFixture[str], here: Path):
    model = Classifier("xxs", num_classes=2)
    model.class_names, model.preprocessing = ("x", "y"), Preprocessing(36, 32)
    save(model, here / "xy.safetensors")
    (here / "classes/y/1.png").write_bytes((here / "photos/c.png").read_bytes())
    evaluate = "evaluate xy.safetensors --data classes --num-workers 0"
    check_refused(capsys, evaluate, "classes/y/1.png damaged --max-unreadable")
    assert run(f"{evaluate} --max-unreadable 1") == 0
    out, err = capsys.readouterr()
    assert "5 images" in out
    assert "classes/y/1.png" in err


def test_a_dataset_of_the_hub(capsys: pytest.CaptureFixture[str], here: Path, monkeypatch: pytest.MonkeyPatch):
    calls: list[Any] = []

    def evaluate(weights: object, data: object, **options: Any) -> None:
        calls.append(data)
        raise ValueError("stop here")

    monkeypatch.setattr(evaluation, "evaluate", evaluate)
    assert "stop here" in refused(capsys, "evaluate xyz.safetensors --data hf:owner/flowers --split test")
    assert calls == ["hf:owner/flowers"]


MISTAKES = {
    "": "weights",
    "xyz.safetensors missing.pt": "missing.pt: no such file",
    "xyz.safetensors --size 32 31": "--size 31; 32 px",
    "classifier.safetensors": "'x' 3 classes",
    "xyz.safetensors detector.safetensors": "classify detect",
    "xyz.safetensors --batch-size 0": "--batch-size 0",
    "xyz.safetensors --num-threads 0": "--num-threads 0",
    "xyz.safetensors --num-workers -2": "--num-workers -2 0 or more",
    "xyz.safetensors --max-unreadable -1": "--max-unreadable -1 0 or more",
    "xyz.safetensors --max-megapixels 0": "--max-megapixels 0.0 above 0",
    "xyz.safetensors --split dev": "--split 'dev' 'train' 'val' 'test' 'all'",
}


@pytest.mark.parametrize(("args", "facts"), MISTAKES.items())
def test_mistakes(capsys: pytest.CaptureFixture[str], here: Path, args: str, facts: str):
    check_refused(capsys, f"evaluate {args} --data classes --json", facts)
    assert "None" not in refused(capsys, f"evaluate {args} --data classes --json")  # it is not a choice
    check_refused(capsys, "evaluate xyz.safetensors --data missing", "missing: no such folder")


@pytest.mark.filterwarnings("default::DeprecationWarning", "default::FutureWarning", "default::UserWarning")
def test_corrupted_images(capsys: pytest.CaptureFixture[str], here: Path):
    pytest.importorskip("imagecorruptions")
    command = f"{EVALUATE} --corrupt brightness gaussian_noise"
    assert run(f"{command} --json") == 0
    line = json.loads(capsys.readouterr().out)
    robustness = line["robustness"]
    assert (robustness["metric"], robustness["clean"]) == ("top1", line["top1"])
    assert list(robustness["corruptions"]) == ["brightness", "gaussian_noise"]
    for name, values in robustness["corruptions"].items():
        corruption = Corruption(name, 3)
        assert len(values) == 5
        result = evaluation.evaluate("xyz.safetensors", "classes", corruption=corruption)
        assert values[2] == result.metrics["top1"]
    every = [value for values in robustness["corruptions"].values() for value in values]
    assert robustness["mean"] == pytest.approx(np.mean(every))
    assert robustness["package"].startswith("imagecorruptions-imaug 1.")

    assert run(command) == 0
    out = capsys.readouterr().out
    row = next(line.split() for line in out.splitlines() if "gaussian noise" in line)
    values = robustness["corruptions"]["gaussian_noise"]
    assert row[2:] == [f"{value:.2f}" for value in (*values, np.mean(values))]
    assert "2 of the 15 common corruptions" in " ".join(out.split())


def test_unknown_and_missing_corruptions(
    capsys: pytest.CaptureFixture[str], here: Path, monkeypatch: pytest.MonkeyPatch
):
    check_refused(capsys, f"{EVALUATE} --corrupt rain", "--corrupt rain fog")
    check_refused(capsys, f"{EVALUATE} --corrupt fog --knn", "--corrupt --knn")
    monkeypatch.setitem(sys.modules, "imagecorruptions", None)
    check_refused(capsys, f"{EVALUATE} --corrupt", "imagecorruptions mobilevit[corruptions]")


def test_knn(capsys: pytest.CaptureFixture[str], here: Path):
    model = load("xyz.safetensors")
    model.reset_classifier(0)
    save(model, here / "none.safetensors")
    knn = "evaluate none.safetensors xyz.safetensors --data classes --num-workers 0 --knn"
    assert run(f"{knn} --k 2 --json --per-class") == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line.pop("weights"), line["num_images"], line["split"]) for line in lines] == [
        ("none.safetensors", 2, "val"),
        ("xyz.safetensors", 2, "val"),
    ]
    assert lines[0] == lines[1]  # the classifier is not used
    assert lines[0]["knn_top1"] in (0, 50, 100)
    assert [one["class"] for one in lines[0]["classes"]] == ["x", "y"]
    assert run(f"{knn} --k 1") == 0
    out = capsys.readouterr().out
    assert "k-NN top-1 %" in out
    assert "the val split of classes, 2 images" in out
    check_refused(capsys, f"{knn} --k 5", "k 5 classes 4")
    check_refused(capsys, f"{knn} --k 0", "--k 0 1")
    check_refused(capsys, f"{knn} --split all --k 1", "all val test")
    check_refused(capsys, "evaluate detector.safetensors --data classes --knn --k 1", "detect classifier")
