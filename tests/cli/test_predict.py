"""`mobilevit predict`."""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from command_line import CLASS_NAMES, check_refused, files_in, run
from mobilevit import logs
from mobilevit.predict import Classifier, Detector, load, load_detector, load_segmenter, save
from mobilevit.weights import Calibration


def test_imports_only_what_it_needs(here: Path):
    """`predict` does not import torch's compiler, torchvision or the export modules, which would slow its start."""
    program = """
import sys
from mobilevit.cli import main
def run(image):
    try:
        main(["predict", "classifier.safetensors", image])
    except SystemExit as stop:
        return stop.code
assert run("missing.png") == 2
assert "torch" not in sys.modules
assert run("photos/a.png") == 0
heavy = ("torchvision", "torch._dynamo", "sympy", "mobilevit.tasks", "mobilevit.data", "mobilevit.export")
assert not (found := [name for name in heavy if name in sys.modules]), found
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_table(capsys: pytest.CaptureFixture[str], here: Path):
    assert run("predict classifier.safetensors photos --top-k 2") == 1
    out, err = capsys.readouterr()
    assert re.fullmatch(r"mobilevit: photos/c\.png: .+\n", err)
    model = load("classifier.safetensors")
    expected = []
    for name in ("photos/[old]/b.png", "photos/a.png", "photos/d.jpg"):
        first, second = model.predict(here / name, top_k=2)
        expected.append([name, *first.class_name.split(), f"{100 * first.probability:.1f}", "%"])
        expected.append([*second.class_name.split(), f"{100 * second.probability:.1f}", "%"])
    assert [line.split() for line in out.splitlines() if "%" in line] == expected


def test_rejected_images(capsys: pytest.CaptureFixture[str], here: Path):
    model = load("classifier.safetensors")
    files = ["photos/[old]/b.png", "photos/a.png"]
    first, second = (model.predict(here / file, top_k=1)[0].probability for file in files)
    threshold = (first + second) / 2
    model.calibration = Calibration(min_probability=threshold, min_precision=0.95)
    save(model, here / "strict.safetensors")
    command = "predict strict.safetensors photos/a.png 'photos/*/b.png'"
    assert run(f"{command} --json") == 0
    lines = {line["image"]: line for line in map(json.loads, capsys.readouterr().out.splitlines())}
    for file, probability in zip(files, (first, second), strict=True):
        assert lines[file]["rejected"] == (probability < threshold)
    assert run(f"{command} --top-k 1") == 0
    *rows, note = [line for line in capsys.readouterr().out.splitlines() if "%" in line]
    assert sorted(["(rejected)" in row for row in rows]) == [False, True]
    assert f"1 with a probability below {100 * threshold:.1f} %" in note
    assert "precision of 95 %" in note


def test_json(capsys: pytest.CaptureFixture[str], here: Path):
    assert run("predict classifier.safetensors photos/d.jpg photos/c.png 'photos/*/b.png' --json --batch-size 2") == 1
    out, err = capsys.readouterr()
    good, bad, other = map(json.loads, out.splitlines())
    assert bad == {"image": "photos/c.png", "error": err.removeprefix("mobilevit: ").rstrip()}
    model = load("classifier.safetensors")
    assert (good["rejected"], other["rejected"]) == (False, False)
    for line in (good, other):
        with torch.no_grad():
            (logits,) = model(model.preprocess(line["image"])).double().numpy()
        assert line["energy"] == pytest.approx(-np.log(np.exp(logits).sum()), rel=1e-4)
        predictions = model.predict(line["image"])
        assert [p["index"] for p in line["predictions"]] == [p.class_index for p in predictions]
        assert [p["class"] for p in line["predictions"]] == [p.class_name for p in predictions]
        assert [p["probability"] for p in line["predictions"]] == pytest.approx([p.probability for p in predictions])
    assert (good["image"], other["image"]) == ("photos/d.jpg", "photos/[old]/b.png")
    assert run("predict classifier.safetensors photos/a.png --device cpu") == 0
    assert capsys.readouterr().err == ""


def test_the_progress_bar_does_not_change_the_output(
    capsys: pytest.CaptureFixture[str], here: Path, monkeypatch: pytest.MonkeyPatch
):
    for i in range(40):
        (here / f"many{i}.png").write_bytes((here / "photos/a.png").read_bytes())
    monkeypatch.setenv("FORCE_COLOR", "1")  # stderr is a terminal, stdout a pipe
    monkeypatch.setattr(logs.CONSOLE, "is_interactive", True)
    assert run("predict classifier.safetensors 'many*.png' photos/c.png --json") == 1
    out, err = capsys.readouterr()
    assert len([json.loads(line) for line in out.splitlines()]) == 41
    assert "predicting" in err


def test_detection(capsys: pytest.CaptureFixture[str], here: Path):
    (here / "photos/d.jpg").rename(here / "photos/0012.jpg")
    before = files_in(here)
    assert run("predict detector.safetensors photos --score-threshold 0.6") == 1
    out, err = capsys.readouterr()
    assert re.fullmatch(r"mobilevit: photos/c\.png: .+\n", err)
    assert "predictions: detections.json" in out
    drawings = {f"predictions/{stem}_boxes.jpg" for stem in ("a", "b", "0012")}
    assert files_in(here) - before == drawings | {"predictions/detections.json"}
    model = load_detector("detector.safetensors")
    rows, results = [], []
    for name, image_id in (("photos/0012.jpg", 12), ("photos/[old]/b.png", "b"), ("photos/a.png", "a")):
        detections = model.predict(here / name, score_threshold=0.6)
        for i, d in enumerate(detections):
            x1, y1, x2, y2 = d.box
            box = ", ".join(f"{value:.0f}" for value in d.box)
            rows.append([*([] if i else [name]), *d.class_name.split(), f"{d.score:.2f}", *box.split()])
            category = (3, 44, 90)[d.class_index]
            results.append((image_id, category, d.class_name, Path(name).name, (x1, y1, x2 - x1, y2 - y1)))
        rows += [] if detections else [[name, "nothing", "found"]]
    assert len(results) > 3
    assert [line.split() for line in out.splitlines()[3:-2]] == rows
    written = json.loads((here / "predictions/detections.json").read_text())
    keys = ("image_id", "category_id", "category_name", "file_name")
    assert [tuple(one[key] for key in keys) for one in written] == [result[:4] for result in results]
    assert [value for one in written for value in one["bbox"]] == pytest.approx(
        [value for result in results for value in result[4]], abs=1e-2
    )
    for name in drawings:
        with Image.open(here / name) as image:
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (33, 40))


def test_detection_in_json(capsys: pytest.CaptureFixture[str], here: Path):
    assert run("predict detector.safetensors photos/c.png photos/a.png --json --out new/boxes") == 1
    out, err = capsys.readouterr()
    bad, good = map(json.loads, out.splitlines())
    assert bad == {"image": "photos/c.png", "error": err.removeprefix("mobilevit: ").rstrip()}
    assert (good["image"], good["drawing"]) == ("photos/a.png", "new/boxes/a_boxes.jpg")
    detections = load_detector("detector.safetensors").predict("photos/a.png")
    assert len(detections) > 3
    assert [(d["class"], d["index"]) for d in good["detections"]] == [(d.class_name, d.class_index) for d in detections]
    assert [d["score"] for d in good["detections"]] == pytest.approx([d.score for d in detections], abs=1e-4)
    assert good["detections"][0]["box"] == pytest.approx(detections[0].box, abs=1e-2)
    assert files_in(here / "new") == {"boxes/a_boxes.jpg", "boxes/detections.json"}


def test_detections_are_coco_results(capsys: pytest.CaptureFixture[str], here: Path):
    coco = pytest.importorskip("pycocotools.coco").COCO()
    (here / "photos/d.jpg").rename(here / "photos/000000000139.jpg")
    assert run("predict detector.safetensors 'photos/*.jpg' photos/a.png") == 0
    coco.dataset = {
        "images": [{"id": 139, "width": 33, "height": 40}, {"id": "a", "width": 33, "height": 40}],
        "categories": [{"id": i, "name": name} for i, name in zip((3, 44, 90), CLASS_NAMES, strict=True)],
        "annotations": [],
    }
    coco.createIndex()
    results = coco.loadRes("predictions/detections.json")
    detections = load_detector("detector.safetensors").predict([here / "photos/000000000139.jpg", "photos/a.png"])
    assert [len(results.getAnnIds(imgIds=[image])) for image in (139, "a")] == [len(one) for one in detections]
    for annotation in results.dataset["annotations"]:
        x, y, width, height = annotation["bbox"]
        assert min(x, y, width, height) >= 0
        assert x + width <= 33 + 1e-4
        assert y + height <= 40 + 1e-4
        assert coco.cats[annotation["category_id"]]["name"] == annotation["category_name"]


def test_detections_without_category_ids(capsys: pytest.CaptureFixture[str], here: Path):
    model = load_detector("detector.safetensors")
    model.category_ids = ()
    save(model, here / "unknown.safetensors")
    assert run("predict unknown.safetensors photos/a.png photos/d.jpg") == 0
    assert re.fullmatch(r"mobilevit: unknown\.safetensors: .* category ids.*\n", capsys.readouterr().err)
    written = json.loads((here / "predictions/detections.json").read_text())
    assert {(one["category_id"], one["category_name"]) for one in written} <= set(enumerate(CLASS_NAMES, 1))
    assert len(written) > 3


def test_segmentation(capsys: pytest.CaptureFixture[str], here: Path):
    before = files_in(here)
    assert run("predict segmenter.safetensors photos --out masks") == 1
    out, err = capsys.readouterr()
    assert re.fullmatch(r"mobilevit: photos/c\.png: .+\n", err)
    assert files_in(here) - before == {f"masks/{stem}{end}" for stem in "abd" for end in (".png", "_overlay.jpg")}
    model = load_segmenter("segmenter.safetensors")
    percentages: list[float] = []
    for stem, name in (("b", "photos/[old]/b.png"), ("a", "photos/a.png"), ("d", "photos/d.jpg")):
        with Image.open(here / f"masks/{stem}.png") as image:
            assert (image.mode, image.size) == ("P", (33, 40))
            mask = np.asarray(image)
            assert np.asarray(image.convert("RGB"))[mask == 1].tolist() == [[128, 0, 0]] * int((mask == 1).sum())
        assert (mask == model.predict(here / name)).mean() > 0.98  # folded batch norms round differently
        with Image.open(here / f"masks/{stem}_overlay.jpg") as image:
            assert image.width == 33
            assert image.height > 40  # there is a legend
        percentages += [100 * (mask == c).mean() for c in np.unique(mask)]
    printed = [float(line.split()[-2]) for line in out.splitlines() if line.rstrip().endswith("%")]
    assert sorted(printed) == pytest.approx(sorted(percentages), abs=0.051)


def test_segmentation_in_json(capsys: pytest.CaptureFixture[str], here: Path):
    assert run("predict segmenter.safetensors photos/d.jpg --json") == 0
    out, err = capsys.readouterr()
    assert err == ""
    line = json.loads(out)
    assert (line["image"], line["mask"]) == ("photos/d.jpg", "predictions/d.png")
    assert line["overlay"] == "predictions/d_overlay.jpg"
    mask = np.asarray(Image.open(here / line["mask"]))
    indices, counts = np.unique(mask, return_counts=True)
    fractions = [one["fraction"] for one in line["classes"]]
    assert {one["index"]: one["fraction"] for one in line["classes"]} == dict(
        zip(indices.tolist(), (counts / mask.size).tolist(), strict=True)
    )
    assert fractions == sorted(fractions, reverse=True)
    assert all(one["class"] == ("background", *CLASS_NAMES)[one["index"]] for one in line["classes"])


def test_an_image_is_read_once(capsys: pytest.CaptureFixture[str], here: Path, monkeypatch: pytest.MonkeyPatch):
    predict = Detector.predict_pixels

    def delete_image(*args: Any) -> Any:
        (here / "photos/a.png").unlink()
        return predict(*args)

    monkeypatch.setattr(Detector, "predict_pixels", delete_image)
    assert run("predict detector.safetensors photos/a.png photos/d.jpg") == 0
    assert capsys.readouterr().err.count("photos/a.png") == 0
    assert files_in(here / "predictions") == {"a_boxes.jpg", "d_boxes.jpg", "detections.json"}


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interruption_preserves_the_results(
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
    code: int,
):
    predict, calls = Detector.predict_pixels, []

    def interrupt(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == stop_at:
            signal.raise_signal(number)
        return predict(*args)

    monkeypatch.setattr(Detector, "predict_pixels", interrupt)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell ignores it
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    command = "predict detector.safetensors photos/d.jpg photos/a.png 'photos/[[]old]/b.png' --batch-size 1"
    stop_at = 1
    assert run(command) == code
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert not (here / "predictions").exists()
    stop_at, calls = 3, []
    assert run(command) == code
    out, err = capsys.readouterr()
    assert "photos/d.jpg" in out
    assert "b.png" not in out
    assert re.fullmatch(r"mobilevit: .*2 of 3 images.*photos/\[old\]/b\.png.*\n", err)
    assert files_in(here / "predictions") == {"d_boxes.jpg", "a_boxes.jpg", "detections.json"}
    written = json.loads((here / "predictions/detections.json").read_text())
    detections = load_detector("detector.safetensors").predict(["photos/d.jpg", "photos/a.png"])
    assert len(written) == sum(map(len, detections))


CONFLICTS = {
    "detector.safetensors photos": "photos/a.jpg photos/a.png --out",
    "segmenter.safetensors photos": "photos/a.jpg photos/a.png --out",
    "segmenter.safetensors classes": "classes/x/0.png classes/y/0.png",
    "detector.safetensors 'classes/*.png'": "classes/007.png classes/7.png",
    "segmenter.safetensors photos/d.jpg --out photos": "photos/d.jpg photos --out",
    "detector.safetensors photos/d.jpg --out other": "photos/d.jpg other --out",
    "detector.safetensors photos/d.jpg --out photos/a.png": "photos/a.png file",
    "detector.safetensors photos/d.jpg --out photos/a.png/new": "photos/a.png",
    "classifier.safetensors photos --out new": "--out detect segment classifier.safetensors",
    "classifier.safetensors photos --score-threshold 0.5": "--score-threshold detect",
    "segmenter.safetensors photos --score-threshold 0.5": "--score-threshold detect",
    "detector.safetensors photos --top-k 3": "--top-k classify",
    "detector.safetensors photos/d.jpg --score-threshold 30": "--score-threshold 30.0 from 0 to 1",
    "detector.safetensors photos/d.jpg --batch-size 0": "--batch-size 0",
}


@pytest.mark.parametrize(("args", "facts"), CONFLICTS.items())
def test_refuses_to_overwrite_images_and_results(capsys: pytest.CaptureFixture[str], here: Path, args: str, facts: str):
    for name in ("photos/a.jpg", "classes/7.png", "classes/007.png"):
        (here / name).write_bytes((here / "photos/d.jpg").read_bytes())
    (here / "other").symlink_to("photos")
    before = files_in(here)
    check_refused(capsys, f"predict {args}", facts)
    assert files_in(here) == before


MISTAKES = {
    "classifier.safetensors": "image files, folders patterns",
    "classifier.safetensors missing.jpg": "missing.jpg",
    "classifier.safetensors empty": "empty no images",
    "classifier.safetensors photos --top-k 0": "--top-k 0",
    "classifier.safetensors photos --batch-size -1": "--batch-size -1",
    "classifier.safetensors photos --device toaster": "'toaster'",
    "classifier.safetensors photos --num-threads -1": "--num-threads -1",
    "headless.safetensors photos": "classifier",
    "missing.safetensors photos": "missing.safetensors: no such file",
    "photos/a.png photos": "photos/a.png weights",
    "empty photos": "empty folder weights",
}


@pytest.mark.parametrize(("args", "facts"), MISTAKES.items())
def test_mistakes(capsys: pytest.CaptureFixture[str], here: Path, args: str, facts: str):
    (here / "empty").mkdir()
    if args.startswith("headless"):
        save(Classifier("xxs", num_classes=0), here / "headless.safetensors")
    check_refused(capsys, f"predict {args}", facts)


def test_an_image_over_the_size_limit(capsys: pytest.CaptureFixture[str], here: Path):
    assert run("predict classifier.safetensors photos/a.png --max-megapixels 1e-4") == 1
    assert re.search(r"photos/a.png: .* px.*--max-megapixels", capsys.readouterr().err)
