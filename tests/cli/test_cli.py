"""The command line as a user meets it: what it prints, what it leaves, its exit codes, and its mistakes in one line."""

import errno
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import mobilevit
from conftest import randomise
from mobilevit.cli import main
from mobilevit.images import Preprocessing
from mobilevit.models.deeplabv3 import DeepLabHead
from mobilevit.predict import Classifier, Detector, Segmenter, load, load_detector, load_segmenter, save
from mobilevit.recipes import RECIPES, describe
from mobilevit.report.training import Origin
from mobilevit.training import loop
from mobilevit.weights import read

COMMANDS = ["predict", "train", "evaluate", "info", "convert", "export", "benchmark", "demo", "explain", "compare"]
# Names that look like the markup of a terminal library.
NAMES = ("[bold]ant[/bold]", ":bee:", "cat [/]")
PROGRAM = Path(sys.executable).with_name("mobilevit")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    model = Classifier("xxs", num_classes=3)
    randomise(model)
    model.class_names, model.preprocessing = NAMES, Preprocessing(resize_px=36, crop_px=32)
    path = tmp_path_factory.mktemp("weights") / "three.safetensors"
    save(model, path)
    return str(path)


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Weights that find much of each class in every image, at scores between 0.3 and 0.9."""
    model = randomise(Detector("xxs", num_classes=3))
    model.class_names, model.category_ids = NAMES, (3, 44, 90)
    model.preprocessing = Preprocessing(resize_px=(64, 64), crop_px=64)
    path = tmp_path_factory.mktemp("weights") / "detector.safetensors"
    save(model, path)
    return str(path)


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory: pytest.TempPathFactory) -> str:
    model = randomise(Segmenter("xxs", num_classes=4, head=DeepLabHead(channels=16)))
    model.class_names = ("background", *NAMES)
    model.preprocessing = Preprocessing(resize_px=(64, 64), crop_px=64)
    path = tmp_path_factory.mktemp("weights") / "segmenter.safetensors"
    save(model, path)
    return str(path)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder: photos/ with three good images and a bad one, classes/ with two classes of three."""
    random = np.random.default_rng(0)
    photos = ["photos/a.png", "photos/[old]/b.png", "photos/d.jpg"]
    for name in [*photos, *(f"classes/{label}/{i}.png" for label in "xy" for i in range(3))]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (40, 33, 3), dtype=np.uint8)).save(tmp_path / name)
    (tmp_path / "photos/c.png").write_bytes((tmp_path / "photos/a.png").read_bytes()[:500])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*args: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(list(args))
    assert isinstance(stop.value.code, int)
    return stop.value.code


def mistake(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """What the one line says with which `args` are refused."""
    capsys.readouterr()
    assert run(*args) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"mobilevit: \S.*\n", err), err
    return err


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


# ---------------------------------------------------------------------------------------------------------------------
# Help


def test_help(capsys: pytest.CaptureFixture[str]):
    for args in ([], ["-h"], ["--help"]):
        assert run(*args) == 0
        out, err = capsys.readouterr()
        assert err == ""
        assert re.findall(r"[•*] (\w+)  +[A-Z]", out) == COMMANDS
    assert run("--version") == 0
    assert capsys.readouterr().out == f"{mobilevit.__version__}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command(capsys: pytest.CaptureFixture[str], command: str):
    assert run(command, "--help") == 0
    assert capsys.readouterr().out.startswith(f"usage: mobilevit {command}")


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_the_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str, columns: int
):
    monkeypatch.setenv("COLUMNS", str(columns))
    assert run(command, "--help") == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= columns
    assert not re.search(r"default: (None|True|False)?\)|\{None", out)
    text = " ".join(line.strip(" │") for line in out.splitlines())
    for option in {"demo": ("--no-open",), "compare": ("--no-flip", "--no-time")}.get(command, ()):
        assert re.search(rf"{option} +(With --data: d|D)o not ", text)


def test_help_waits_for_no_torch():
    program = """
import sys
from mobilevit.cli import main
for args in (["--help"], ["--version"], ["trian"], ["train", "--help"], ["predict", "--top-k", "x"]):
    try:
        main(args)
    except SystemExit:
        assert "torch" not in sys.modules, args
"""
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)


def test_predict_imports_what_it_needs(weights: str, here: Path):
    """Most of the time of a prediction is `import torch`: no compiler, no torchvision, nothing of export."""
    program = f"""
import sys
from mobilevit.cli import main
def run(image):
    try:
        main(["predict", {weights!r}, image])
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


# A new option is a decision: write it here as well, and remember that none has ever been removed from a program in use.
TRAIN_OPTIONS = {
    "--data",
    "--out",
    "--weights",
    "--backbone",  # the same
    "--download",
    "--device",
    "--num-threads",
    "--checkpoint-minutes",
    "--tensorboard",
    "--task",
    "--architecture",
    "--epochs",
    "--batch-size",
    "--label-smoothing",
    "--ema-decay",
    "--seed",
    "--data.size-px",
    "--size",  # the same; so are the other short names
    "--data.eval-resize",
    "--data.min-scale",
    "--data.policy",
    "--data.flip",
    "--flip",
    "--data.val-fraction",
    "--val-fraction",
    "--data.num-workers",
    "--num-workers",
    "--data.max-unreadable",
    "--data.max-megapixels",
    "--max-megapixels",
    "--max-unreadable",
    "--sampler.variant",
    "--sampler.sizes-px",
    "--optimizer.start-lr",
    "--optimizer.lr",
    "--lr",
    "--optimizer.end-lr",
    "--optimizer.warmup-steps",
    "--optimizer.cosine",
    "--optimizer.weight-decay",
    "--optimizer.decay-all",
    "--optimizer.clip-norm",
    "--clip-norm",
    "--optimizer.freeze",
    "--freeze",
    "--optimizer.backbone-lr-scale",
    "--compute.precision",
    "--precision",
    "--compute.compile",
    "--compile",
    "--compute.sync-batch-norm",
    "--compute.micro-batch-size",
}


@pytest.mark.parametrize("recipe", ["plain", "tiny"])
def test_options_of_train(capsys: pytest.CaptureFixture[str], recipe: str):
    assert run("train", recipe, "--help") == 0
    options = set(re.findall(r" (--[a-z][a-z.-]*[a-z])", capsys.readouterr().out)) - {"--help"}
    assert {re.sub(r"(--|\.)no-", r"\1", option) for option in options} == TRAIN_OPTIONS
    assert len(TRAIN_OPTIONS) <= 55


@pytest.mark.parametrize("recipe", RECIPES)
def test_help_of_a_recipe_prints_what_it_says(capsys: pytest.CaptureFixture[str], recipe: str):
    assert run("train", recipe, "--help") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"RECIPE {recipe}: {' '.join(describe(recipe).split())}" in said
    assert all(describe(name).splitlines()[0] in said for name in RECIPES)


# ---------------------------------------------------------------------------------------------------------------------
# Predict


def test_predict_in_a_table(capsys: pytest.CaptureFixture[str], here: Path, weights: str):
    assert run("predict", weights, "photos", "--top-k", "2") == 1
    out, err = capsys.readouterr()
    assert re.fullmatch(r"mobilevit: photos/c\.png: damaged image .+\n", err)
    model = load(weights)
    expected = []
    for name in ("photos/[old]/b.png", "photos/a.png", "photos/d.jpg"):
        first, second = model.predict(here / name, top_k=2)
        expected.append([name, *first.class_name.split(), f"{100 * first.probability:.1f}", "%"])
        expected.append([*second.class_name.split(), f"{100 * second.probability:.1f}", "%"])
    assert [line.split() for line in out.splitlines() if "%" in line] == expected


def test_predict_in_json(capsys: pytest.CaptureFixture[str], here: Path, weights: str):
    assert run("predict", weights, "photos/d.jpg", "photos/c.png", "photos/*/b.png", "--json", "--batch-size", "2") == 1
    out, err = capsys.readouterr()
    good, bad, other = map(json.loads, out.splitlines())
    assert bad == {"image": "photos/c.png", "error": err.removeprefix("mobilevit: ").rstrip()}
    model = load(weights)
    for line in (good, other):
        predictions = model.predict(line["image"])
        assert [p["index"] for p in line["predictions"]] == [p.class_index for p in predictions]
        assert [p["class"] for p in line["predictions"]] == [p.class_name for p in predictions]
        assert [p["probability"] for p in line["predictions"]] == pytest.approx([p.probability for p in predictions])
    assert (good["image"], other["image"]) == ("photos/d.jpg", "photos/[old]/b.png")


def test_predict_all_is_well(capsys: pytest.CaptureFixture[str], here: Path, weights: str):
    assert run("predict", weights, "photos/a.png", "--device", "cpu") == 0
    assert capsys.readouterr().err == ""


def test_the_bar_takes_nothing_from_the_output(
    capsys: pytest.CaptureFixture[str], here: Path, weights: str, monkeypatch: pytest.MonkeyPatch
):
    for i in range(40):
        (here / f"many{i}.png").write_bytes((here / "photos/a.png").read_bytes())
    monkeypatch.setenv("FORCE_COLOR", "1")  # stderr is a terminal, stdout a pipe
    assert run("predict", weights, "many*.png", "photos/c.png", "--json") == 1
    out, err = capsys.readouterr()
    assert len([json.loads(line) for line in out.splitlines()]) == 41
    assert "predicting" in err


def test_detect(capsys: pytest.CaptureFixture[str], here: Path, detector: str):
    (here / "photos/d.jpg").rename(here / "photos/0012.jpg")
    before = names(here)
    assert run("predict", detector, "photos", "--score-threshold", "0.6") == 1
    out, err = capsys.readouterr()
    assert re.fullmatch(r"mobilevit: photos/c\.png: damaged image .+\n", err)
    assert out.endswith("\npredictions: detections.json, and the images with their boxes\n")
    drawn = {f"predictions/{stem}_boxes.jpg" for stem in ("a", "b", "0012")}
    assert names(here) - before == drawn | {"predictions/detections.json"}
    model = load_detector(detector)
    rows, results = [], []
    for name, image_id in (("photos/0012.jpg", 12), ("photos/[old]/b.png", "b"), ("photos/a.png", "a")):
        found = model.predict(here / name, score_threshold=0.6)
        for i, d in enumerate(found):
            x1, y1, x2, y2 = d.box
            box = ", ".join(f"{side:.0f}" for side in d.box)
            rows.append([*([] if i else [name]), *d.class_name.split(), f"{d.score:.2f}", *box.split()])
            category = (3, 44, 90)[d.class_index]
            results.append((image_id, category, d.class_name, Path(name).name, (x1, y1, x2 - x1, y2 - y1)))
        rows += [] if found else [[name, "nothing", "found"]]
    assert len(results) > 3
    assert [line.split() for line in out.splitlines()[3:-2]] == rows
    written = json.loads((here / "predictions/detections.json").read_text())
    keys = ("image_id", "category_id", "category_name", "file_name")
    assert [tuple(one[key] for key in keys) for one in written] == [result[:4] for result in results]
    assert [side for one in written for side in one["bbox"]] == pytest.approx(
        [side for result in results for side in result[4]], abs=1e-2
    )
    for name in drawn:
        with Image.open(here / name) as image:
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (33, 40))


def test_detect_in_json(capsys: pytest.CaptureFixture[str], here: Path, detector: str):
    assert run("predict", detector, "photos/c.png", "photos/a.png", "--json", "--out", "new/boxes") == 1
    out, err = capsys.readouterr()
    bad, good = map(json.loads, out.splitlines())
    assert bad == {"image": "photos/c.png", "error": err.removeprefix("mobilevit: ").rstrip()}
    assert (good["image"], good["drawing"]) == ("photos/a.png", "new/boxes/a_boxes.jpg")
    found = load_detector(detector).predict("photos/a.png")
    assert len(found) > 3
    assert [(d["class"], d["index"]) for d in good["detections"]] == [(d.class_name, d.class_index) for d in found]
    assert [d["score"] for d in good["detections"]] == pytest.approx([d.score for d in found], abs=1e-4)
    assert good["detections"][0]["box"] == pytest.approx(found[0].box, abs=1e-2)
    assert names(here / "new") == {"boxes/a_boxes.jpg", "boxes/detections.json"}


def test_detections_are_coco_results(capsys: pytest.CaptureFixture[str], here: Path, detector: str):
    coco = pytest.importorskip("pycocotools.coco").COCO()
    (here / "photos/d.jpg").rename(here / "photos/000000000139.jpg")
    assert run("predict", detector, "photos/*.jpg", "photos/a.png") == 0
    coco.dataset = {
        "images": [{"id": 139, "width": 33, "height": 40}, {"id": "a", "width": 33, "height": 40}],
        "categories": [{"id": i, "name": name} for i, name in zip((3, 44, 90), NAMES, strict=True)],
        "annotations": [],
    }
    coco.createIndex()
    loaded = coco.loadRes("predictions/detections.json")
    found = load_detector(detector).predict([here / "photos/000000000139.jpg", here / "photos/a.png"])
    assert [len(loaded.getAnnIds(imgIds=[image])) for image in (139, "a")] == [len(one) for one in found]
    for annotation in loaded.dataset["annotations"]:
        x, y, width, height = annotation["bbox"]
        assert min(x, y, width, height) >= 0
        assert x + width <= 33 + 1e-4
        assert y + height <= 40 + 1e-4
        assert coco.cats[annotation["category_id"]]["name"] == annotation["category_name"]


def test_detections_without_category_ids(capsys: pytest.CaptureFixture[str], here: Path, detector: str):
    model = load_detector(detector)
    model.category_ids = ()
    save(model, here / "unknown.safetensors")
    assert run("predict", "unknown.safetensors", "photos/a.png", "photos/d.jpg") == 0
    said = "unknown.safetensors: knows no category ids; in detections.json they are the number of the class + 1"
    assert capsys.readouterr().err == f"mobilevit: {said}\n"
    written = json.loads((here / "predictions/detections.json").read_text())
    assert {(one["category_id"], one["category_name"]) for one in written} <= set(enumerate(NAMES, 1))
    assert len(written) > 3


def test_segment(capsys: pytest.CaptureFixture[str], here: Path, segmenter: str):
    before = names(here)
    assert run("predict", segmenter, "photos", "--out", "masks") == 1
    out, err = capsys.readouterr()
    assert re.fullmatch(r"mobilevit: photos/c\.png: damaged image .+\n", err)
    assert out.endswith("\nmasks: class numbers (.png), and the images with the classes painted over (_overlay.jpg)\n")
    assert names(here) - before == {f"masks/{stem}{end}" for stem in "abd" for end in (".png", "_overlay.jpg")}
    model = load_segmenter(segmenter)
    shares: dict[str, float] = {}
    for stem, name in (("b", "photos/[old]/b.png"), ("a", "photos/a.png"), ("d", "photos/d.jpg")):
        expected = model.predict(here / name)
        with Image.open(here / f"masks/{stem}.png") as image:
            assert (image.mode, image.size) == ("P", (33, 40))
            mask = np.asarray(image)
            assert np.asarray(image.convert("RGB"))[mask == 1].tolist() == [[128, 0, 0]] * int((mask == 1).sum())
        assert (mask == expected).mean() > 0.98  # batch norms that are folded round otherwise
        with Image.open(here / f"masks/{stem}_overlay.jpg") as image:
            assert image.width == 33
            assert image.height > 40  # there is a legend
        shares |= {f"{stem} {model.class_name(c)}": (mask == c).mean() for c in np.unique(mask).tolist()}
    printed = [line.split() for line in out.splitlines() if line.rstrip().endswith("%")]
    assert len(printed) == len(shares) > 3
    assert sorted(float(line[-2]) for line in printed) == pytest.approx(
        sorted(100 * share for share in shares.values()), abs=0.051
    )


def test_segment_in_json(capsys: pytest.CaptureFixture[str], here: Path, segmenter: str):
    assert run("predict", segmenter, "photos/d.jpg", "--json") == 0
    out, err = capsys.readouterr()
    assert err == ""
    (line,) = map(json.loads, out.splitlines())
    assert (line["image"], line["mask"]) == ("photos/d.jpg", "predictions/d.png")
    assert line["overlay"] == "predictions/d_overlay.jpg"
    mask = np.asarray(Image.open(here / line["mask"]))
    numbers, counts = np.unique(mask, return_counts=True)
    assert {one["index"]: one["share"] for one in line["classes"]} == dict(
        zip(numbers.tolist(), (counts / mask.size).tolist(), strict=True)
    )
    assert [one["share"] for one in line["classes"]] == sorted((counts / mask.size).tolist(), reverse=True)
    assert all(one["class"] == ("background", *NAMES)[one["index"]] for one in line["classes"])


def test_a_image_that_goes_before_it_is_drawn_on(
    capsys: pytest.CaptureFixture[str], here: Path, detector: str, monkeypatch: pytest.MonkeyPatch
):
    predict = Detector.predict_pixels

    def gone(*args: Any) -> Any:
        (here / "photos/a.png").unlink()
        return predict(*args)

    monkeypatch.setattr(Detector, "predict_pixels", gone)
    assert run("predict", detector, "photos/a.png", "photos/d.jpg") == 1
    assert capsys.readouterr().err == "mobilevit: photos/a.png: no such file or directory\n"
    assert names(here / "predictions") == {"d_boxes.jpg", "detections.json"}
    assert {one["image_id"] for one in json.loads((here / "predictions/detections.json").read_text())} == {"d"}


@pytest.mark.parametrize(
    ("number", "said", "code"), [(signal.SIGINT, "interrupted", 130), (signal.SIGTERM, "terminated", 143)]
)
def test_interrupted_detections_are_kept(
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
    here: Path,
    detector: str,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
    said: str,
    code: int,
):
    predict, calls = Detector.predict_pixels, []

    def interrupted(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == stop_at:
            signal.raise_signal(number)
        return predict(*args)

    monkeypatch.setattr(Detector, "predict_pixels", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts beside itself ignores it
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    images = ("photos/d.jpg", "photos/a.png", "photos/[[]old]/b.png")
    stop_at = 1
    assert run("predict", detector, *images, "--batch-size", "1") == code
    assert capsys.readouterr() == ("", f"mobilevit: {said}\n")
    assert not (here / "predictions").exists()
    stop_at, calls = 3, []
    assert run("predict", detector, *images, "--batch-size", "1") == code
    out, err = capsys.readouterr()
    assert "photos/d.jpg" in out
    assert "b.png" not in out
    assert out.endswith("\npredictions: detections.json, and the images with their boxes\n")
    expected = f"{said} after 2 of 3 images; missing are photos/[old]/b.png and what comes after it"
    assert err == f"mobilevit: {expected}\n"
    assert names(here / "predictions") == {"d_boxes.jpg", "a_boxes.jpg", "detections.json"}
    written = json.loads((here / "predictions/detections.json").read_text())
    assert len(written) == sum(map(len, load_detector(detector).predict([here / name for name in images[:2]])))


def test_results_that_would_be_lost(
    capsys: pytest.CaptureFixture[str], here: Path, weights: str, detector: str, segmenter: str
):
    for name in ("photos/a.jpg", "classes/7.png", "classes/007.png"):
        (here / name).write_bytes((here / "photos/d.jpg").read_bytes())
    (here / "other").symlink_to("photos")
    before = names(here)
    for args, said in {
        (detector, "photos"): r"photos/a\.jpg and photos/a\.png: .* both would be called a; .* --out",
        (segmenter, "photos"): r"photos/a\.jpg and photos/a\.png: .* both would be called a; .* --out",
        (segmenter, "classes"): r"classes/x/0\.png and classes/y/0\.png: .* both would be called 0",
        (detector, "classes/*.png"): r"classes/007\.png and classes/7\.png: .* both would be called 7",
        (segmenter, "photos/d.jpg", "--out", "photos"): r"photos/d\.jpg: lies in photos, where results are written",
        (detector, "photos/d.jpg", "--out", "other"): r"photos/d\.jpg: lies in other, where results are written",
        (detector, "photos/d.jpg", "--out", "photos/a.png"): r"photos/a\.png: is a file",
        (detector, "photos/d.jpg", "--out", "photos/a.png/new"): r"photos/a\.png",
        (weights, "photos", "--out", "new"): r"--out is for weights to detect or segment; .* only names classes",
        (weights, "photos", "--score-threshold", "0.5"): "--score-threshold is for weights to detect;",
        (segmenter, "photos", "--score-threshold", "0.5"): "--score-threshold is for weights to detect;",
        (detector, "photos", "--top-k", "3"): "--top-k is for weights to classify; .* above a score",
        (detector, "photos/d.jpg", "--score-threshold", "30"): "score_threshold is 30",
        (detector, "photos/d.jpg", "--batch-size", "0"): "batch size is 0",
    }.items():
        assert re.search(said, mistake(capsys, "predict", *args)), args
    assert names(here) == before
    assert run("predict", segmenter, "classes/*.png") == 0  # masks keep their whole stems


def test_mistakes_of_predict(capsys: pytest.CaptureFixture[str], here: Path, weights: str):
    (here / "empty").mkdir()
    headless = str(here / "headless.safetensors")
    save(Classifier("xxs", num_classes=0), headless)
    for args, said in {
        (): "WEIGHTS",
        (weights,): "no image is named",
        (weights, "missing.jpg"): "missing.jpg: no such image",
        (weights, "empty"): "empty: no images",
        (weights, "photos", "--top-k", "0"): "top_k is 0",
        (weights, "photos", "--top-k", "many"): "--top-k is 'many'; it must be an integer",
        (weights, "photos", "--batch-size", "-1"): "batch size is -1",
        (weights, "photos", "--bach-size", "1"): "no option --bach-size; did you mean --batch-size",
        (weights, "photos", "--device", "toaster"): "device 'toaster' cannot be used",
        (headless, "photos"): "no classifier",
        ("missing.safetensors", "photos"): "missing.safetensors: no such file",
        ("photos/a.png", "photos"): "is it really weights",
        ("empty", "photos"): "empty: a folder of weights holds",
    }.items():
        assert re.search(said, mistake(capsys, "predict", *args)), args


# ---------------------------------------------------------------------------------------------------------------------
# Info


@pytest.mark.parametrize(
    ("size", "shown", "feature_map"),
    [([], "256 x 256", "8 x 8"), (["--size", "97"], "97 x 97", "4 x 4"), (["--size", "64", "97"], "64 x 97", "2 x 4")],
    ids=["default", "one", "two"],
)
def test_info_of_a_name(capsys: pytest.CaptureFixture[str], size: list[str], shown: str, feature_map: str):
    assert run("info", "xs", *size) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"MobileViT-XS, {shown} px")
    assert "2,317,848 parameters" in out  # paper, table 1: 2.3 M
    assert re.search(rf"stage5\D+96\D+{feature_map} ", out)


def test_info_of_weights(capsys: pytest.CaptureFixture[str], weights: str):
    assert run("info", weights) == 0
    out = capsys.readouterr().out
    assert f"classes: 3 ({', '.join(NAMES)})" in out
    assert "short side to 36 px bilinear, middle 32 px" in out
    assert "MobileViT-XXS, 32 x 32 px" in out


def test_info_of_weights_that_see_the_whole_image(capsys: pytest.CaptureFixture[str], here: Path, detector: str):
    assert run("info", detector) == 0
    assert "input: RGB, the whole image to 64 x 64 px bilinear, / 255" in capsys.readouterr().out
    assert run("convert", detector, "apple.pt", "--to", "apple") == 0
    assert run("info", "apple.pt", "--size", "64") == 0
    assert capsys.readouterr().err == (
        "mobilevit: apple.pt: says nothing of its input; assumed is what was published: the whole image to 320 x 320 "
        "px bilinear, and no class names\n"
    )


def test_mistakes_of_info(capsys: pytest.CaptureFixture[str]):
    for args, said in {
        (): "NETWORK",
        ("xxl",): "xxl: no such file",
        ("xs", "--size", "31"): "from 32 px up",
        ("xs", "--size", "64", "64", "64"): "one side or height and width",
        ("xs", "--size", "big"): "--size",
        ("nobody/nothing",): "--download",
    }.items():
        assert re.search(said, mistake(capsys, "info", *args)), args


# ---------------------------------------------------------------------------------------------------------------------
# Convert


@pytest.mark.parametrize(
    ("to", "target", "files"),
    [
        ("mobilevit", "new/a.safetensors", {"new/a.safetensors"}),
        ("timm", "a.safetensors", {"a.safetensors"}),
        ("apple", "a.pt", {"a.pt"}),
        ("transformers", "a", {"a/config.json", "a/preprocessor_config.json", "a/model.safetensors"}),
    ],
)
def test_convert(capsys: pytest.CaptureFixture[str], here: Path, weights: str, to: str, target: str, files: set[str]):
    before = names(here)
    assert run("convert", weights, target, "--to", to) == 0
    assert capsys.readouterr().out.startswith(f"{target}: MobileViT-XXS, 3 classes, {to} format\n")
    assert names(here) - before == files
    original, converted = read(weights), read(target)
    assert all(converted.tensors[key].equal(tensor) for key, tensor in original.tensors.items())

    stamps = {file: (here / file).stat().st_mtime_ns for file in files}
    assert "exists already" in mistake(capsys, "convert", weights, target, "--to", to)
    assert stamps == {file: (here / file).stat().st_mtime_ns for file in files}
    assert run("convert", weights, target, "--to", to, "--overwrite") == 0
    assert names(here) - before == files


def test_mistakes_of_convert(
    capsys: pytest.CaptureFixture[str], here: Path, weights: str, monkeypatch: pytest.MonkeyPatch
):
    (here / "folder.safetensors").mkdir()
    (here / "mine.safetensors").write_text("precious")
    monkeypatch.setenv("HOME", str(here))
    before = names(here)
    for args, said in {
        (weights,): "TARGET",
        (weights, "a.pt"): "ends in .safetensors",
        (weights, "a.safetensors", "--to", "apple"): "ends in .pt",
        (weights, "a.safetensors", "--to", "transformers"): "is a folder",
        (weights, "a.onnx", "--to", "onnx"): "'onnx'",
        (weights, "photos/a.png/a.safetensors"): "photos/a.png: ",
        (weights, "folder.safetensors", "--overwrite"): "folder.safetensors: is a directory",
        (weights, "mine.safetensors"): "exists already",
        (weights, "~/mine.safetensors"): "exists already",
        ("missing.pt", "a.safetensors"): "missing.pt: no such file",
        (weights, "a.safetensors", "more"): "'more' is not expected here",
    }.items():
        assert re.search(said, mistake(capsys, "convert", *args)), args
    assert names(here) == before
    assert (here / "mine.safetensors").read_text() == "precious"


# ---------------------------------------------------------------------------------------------------------------------
# Train and evaluate


TRAIN = ["--epochs", "2", "--batch-size", "3", "--num-workers", "0", "--device", "cpu"]


def test_train_then_use(capsys: pytest.CaptureFixture[str], here: Path, weights: str):
    overrides = ["--optimizer.lr", "1e-4", "--data.flip", "--weights", weights]
    assert run("train", "tiny", "--data=classes", *TRAIN, *overrides) == 0
    out, err = capsys.readouterr()
    result = "runs/classes/model.safetensors"
    assert re.fullmatch(
        rf"{result}: weights of the last epoch, validation top-1 [\d.]+ %\n"
        r"runs/classes/report.html: curves, metrics by class, images\n"
        rf"try next: mobilevit predict {result} IMAGE...\n",
        out,
    )
    assert "classes: has no validation split: 2 of 6 images are used for validation" in err
    assert "MobileViT-XXS from the given weights; 4 images of 2 classes for training, 2 for validation" in err
    files = {"model.safetensors", "best.safetensors", "raw.safetensors", "metrics.jsonl", "steps.jsonl", "report.html"}
    files |= {"run.json", ".lock", "checkpoints/000000001.pt", "checkpoints/000000002.pt"}  # a step an epoch
    assert names(here / "runs") == {f"classes/{name}" for name in files}
    recipe = json.loads(Path("runs/classes/run.json").read_text())["recipe"]
    assert (recipe["epochs"], recipe["optimizer"]["lr"], recipe["data"]["flip"]) == (2, 1e-4, True)
    assert recipe["data"]["size_px"] == RECIPES["tiny"].data.size_px
    trained = load(result)
    assert trained.class_names == ("x", "y")
    assert trained.architecture.name == "xxs"

    assert run("predict", "runs/classes", "photos/a.png", "--json") == 0
    assert {p["class"] for p in json.loads(capsys.readouterr().out)["predictions"]} == {"x", "y"}

    before = {name: (here / "runs" / name).read_bytes() for name in names(here / "runs")}
    capsys.readouterr()
    assert run("train", "tiny", "--data", "classes", *TRAIN, *overrides) == 0
    again = capsys.readouterr().err
    assert all(part in again for part in ("runs/classes", "finished", "--epochs"))
    other = mistake(capsys, "train", "tiny", "--data", "classes", *TRAIN, *overrides, "--seed", "3")
    said = "runs/classes: holds another run (recipe.seed is 0 there, 3 here); name another folder, or remove this one"
    assert other == f"mobilevit: {said}\n"
    assert "weights is " in mistake(capsys, "train", "tiny", "--data", "classes", *TRAIN, *overrides[:-2])
    assert {name: (here / "runs" / name).read_bytes() for name in names(here / "runs")} == before


def test_a_disk_that_fills_up(capsys: pytest.CaptureFixture[str], here: Path, monkeypatch: pytest.MonkeyPatch):
    saved: list[Path] = []
    save_whole = torch.save

    def save_once(state: object, file: Path) -> None:
        if saved:
            file.write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        saved.append(file)
        save_whole(state, file)

    train = ["train", "tiny", "--data", "classes", *TRAIN]
    with monkeypatch.context() as change:
        change.setattr(torch, "save", save_once)
        assert run(*train) == 2
    out, err = capsys.readouterr()
    assert out == ""
    last = "runs/classes/checkpoints/000000002.pt: no space left on device"
    assert [line for line in err.splitlines() if line.startswith("mobilevit: ")] == [f"mobilevit: {last}"]
    assert names(here / "runs/classes/checkpoints") == {"000000001.pt"}
    assert run(*train) == 0  # there is space again
    out, err = capsys.readouterr()
    assert "going on after step 1, in epoch 2" in err


@pytest.mark.parametrize(
    ("given", "data", "out"),
    [
        ("hf:owner/flowers", "hf:owner/flowers", "runs/flowers"),
        ("~/photos", "HOME/photos", "runs/photos"),
        ("classes", "classes", "runs/classes"),
        (".", ".", "runs/HERE"),
    ],
)
def test_what_train_hands_on(here: Path, monkeypatch: pytest.MonkeyPatch, given: str, data: str, out: str):
    handed_on: list[Any] = []

    def note(*arguments: Any, **options: Any) -> None:
        handed_on.append((arguments, options))
        raise ValueError("enough")

    monkeypatch.setattr(loop, "train", note)
    monkeypatch.setenv("HOME", str(here / "home"))
    assert run("train", "finetune", f"--data={given}", "--device", "cpu", "--checkpoint-minutes", "7") == 2
    expected = (RECIPES["finetune"], data.replace("HOME", str(here / "home")), Path(out.replace("HERE", here.name)))
    options = {"pretrained": None, "device": "cpu", "checkpoint_minutes": 7.0, "tensorboard": False, "extend": True}
    options["origin"] = Origin(
        "finetune", f"mobilevit train finetune {shlex.quote(f'--data={given}')} --device cpu --checkpoint-minutes 7"
    )
    assert handed_on == [(expected, options)]


def test_evaluate(capsys: pytest.CaptureFixture[str], here: Path, weights: str):
    model = load(weights)
    model.class_names = ("x", "y", "z")
    save(model, here / "xyz.safetensors")
    right, loss = 0, 0.0
    for file in sorted((here / "classes").rglob("*.png")):
        probabilities = {p.class_name: p.probability for p in model.predict(file)}
        right += max(probabilities, key=lambda name: probabilities[name]) == file.parent.name
        loss -= float(np.log(probabilities[file.parent.name])) / 6
    evaluate = ["evaluate", "xyz.safetensors", "--data", "classes", "--num-workers", "0", "--batch-size", "4"]
    assert run(*evaluate, "--json") == 0
    expected = {"top1": 100 * right / 6, "top5": 100.0, "loss": loss, "num_images": 6}
    line = json.loads(capsys.readouterr().out)
    assert (line.pop("weights"), line.pop("size_px"), line.pop("split")) == ("xyz.safetensors", 32, "all")
    assert line == pytest.approx(expected, rel=1e-4)
    assert run(*evaluate) == 0
    *table, said = (line for line in capsys.readouterr().out.splitlines() if line.strip(" ─"))
    assert [line.split() for line in table] == [
        ["weights", "split", "px", "top-1", "%", "top-5", "%", "loss", "images"],
        ["xyz.safetensors", "all", "32", f"{100 * right / 6:.2f}", "100.00", f"{loss:.4f}", "6"],
    ]
    assert said.startswith("evaluated: all of classes, 6 images; if the weights were trained on some")


def test_evaluate_several_weights_at_several_sizes(capsys: pytest.CaptureFixture[str], here: Path, weights: str):
    model = load(weights)
    answers: dict[tuple[str, int], list[tuple[str, str]]] = {}
    for file in ("a.safetensors", "b.safetensors"):
        model.class_names = ("x", "y", "[z]")
        save(model, here / file)
        for size_px in (64, 32):
            model.preprocessing = Preprocessing(resize_px=round(36 * size_px / 32), crop_px=size_px)
            images = sorted((here / "classes").rglob("*.png"))
            answers[file, size_px] = [(p.parent.name, model.predict(p)[0].class_name) for p in images]
        model.preprocessing = Preprocessing(resize_px=36, crop_px=32)
        with torch.no_grad():
            model.get_parameter("classifier.bias").add_(torch.tensor([1.0, 0.0, -1.0]))  # for the second one
    evaluate = ["evaluate", "a.safetensors", "b.safetensors", "--data", "classes", "--size", "64", "32"]
    evaluate += ["--num-workers", "0", "--per-class"]

    assert run(*evaluate, "--json") == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["weights"], line["size_px"]) for line in lines] == list(answers)
    for line in lines:
        pairs = answers[line["weights"], line["size_px"]]
        assert line["top1"] == pytest.approx(100 * np.mean([right == answer for right, answer in pairs]))
        expected = []
        for name in ("x", "y", "[z]"):
            of_class, named_so = ([pair for pair in pairs if pair[i] == name] for i in (0, 1))
            hits = pairs.count((name, name))
            expected.append(
                {
                    "class": name,
                    "num_images": len(of_class),
                    "recall": 100 * hits / len(of_class) if of_class else None,
                    "precision": 100 * hits / len(named_so) if named_so else None,
                }
            )
        assert line["classes"] == expected
    assert len({json.dumps(line["classes"]) for line in lines}) > 1  # or it would not matter which is which

    assert run(*evaluate) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip(" ─")]
    assert [row[:4] for row in rows[1:5]] == [
        [f, "all", str(px), f"{line['top1']:.2f}"] for (f, px), line in zip(answers, lines, strict=True)
    ]
    for i, line in enumerate(lines):
        title, _, *classes = rows[5 + 5 * i : 10 + 5 * i]
        assert title == [line["weights"], "at", str(line["size_px"]), "px"]
        assert classes == [
            [one["class"], str(one["num_images"])]
            + ["-" if one[name] is None else f"{one[name]:.2f}" for name in ("recall", "precision")]
            for one in line["classes"]
        ]
    assert len(rows) == 5 + 5 * 4 + 1


def test_evaluate_a_run(capsys: pytest.CaptureFixture[str], here: Path, weights: str):
    (here / "run").mkdir()
    (here / "run/run.json").write_text("{}")
    evaluate = ["evaluate", "run", "--data", "classes", "--num-workers", "0", "--json"]
    for command in (evaluate, ["predict", "run", "photos"], ["export", "run"], ["info", "run"], ["demo", "run"]):
        assert "run: this run has no weights yet" in mistake(capsys, *command), command
    model = load(weights)
    model.class_names = ("x", "y", "z")
    for name in ("model", "raw", "best"):
        save(model, here / f"run/{name}.safetensors")
    assert run(*evaluate) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["weights"] for line in lines] == ["run/model.safetensors", "run/raw.safetensors"]
    assert "classes" not in lines[0]


def test_export_names_files_after_the_weights(here: Path, weights: str, monkeypatch: pytest.MonkeyPatch):
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr("mobilevit.export.export", lambda *args, **options: asked.append(options) or [])
    (here / "pets").mkdir()
    (here / "pets/run.json").write_text("{}")
    sources = {"pets": "pets", "pets/model.safetensors": "pets", "pets/raw.safetensors": "pets_raw"}
    sources |= {"mine.safetensors": "mine", "model.safetensors": ""}
    for source, expected in sources.items():
        save(load(weights), here / (source if "." in source else f"{source}/model.safetensors"))
        assert run("export", source) == 0
        assert (asked[-1]["prefix"], asked[-1]["overwrite"]) == (expected, False), source
    monkeypatch.chdir("pets")
    assert run("export", ".", "--overwrite") == 0
    assert (asked[-1]["prefix"], asked[-1]["overwrite"]) == ("pets", True)


def test_evaluate_says_what_is_wrong_before_it_begins(capsys: pytest.CaptureFixture[str], here: Path, weights: str):
    model = load(weights)
    model.class_names = ("x", "y", "z")
    save(model, here / "xyz.safetensors")
    for args, said in {
        ("xyz.safetensors", "missing.pt"): "missing.pt: no such file",
        ("xyz.safetensors", "--size", "32", "31"): r"size is \(32, 31\); sides are from 32 px up",
        ("xyz.safetensors", "--size", "big"): "--size",
        (): "no weights are named",
    }.items():
        assert re.search(said, mistake(capsys, "evaluate", *args, "--data", "classes", "--json")), args


def test_evaluate_on_the_hub(capsys: pytest.CaptureFixture[str], here: Path, weights: str, monkeypatch: Any):
    from mobilevit import tasks

    asked: list[Any] = []

    def note(weights: object, data: object, **options: Any) -> None:
        asked.append(data)
        raise ValueError("enough")

    monkeypatch.setattr(tasks, "evaluate_weights", note)
    assert "enough" in mistake(capsys, "evaluate", weights, "--data", "hf:owner/flowers", "--split", "test")
    assert asked == ["hf:owner/flowers"]


def test_mistakes_of_train_and_evaluate(capsys: pytest.CaptureFixture[str], here: Path, weights: str):
    for args, said in {
        ("train",): "--data",
        ("train", "papar", "--data", "classes"): rf"RECIPE is 'papar'; did you mean paper-.*{', '.join(RECIPES)}",
        ("train", "--data", "missing"): "missing: no such folder",
        ("train", "--data", "photos/[old]"): "found no folders",
        ("train", "--data", "classes", "--epochs", "0"): "epochs is 0",
        ("train", "--data", "classes", "--optimizer.lr", "-1"): "--lr is -1",
        ("train", "--data", "classes", "--optimiser.lr", "1"): "no option --optimiser.lr; .*--optimizer.lr",
        ("train", "--data", "classes", "--architecture", "xl"): "'xl'",
        ("train", "--data", "classes", "--weights", "missing.pt"): "missing.pt: no such file",
        ("train", "--data", "classes", "--weights", weights, "--architecture", "s"): (
            rf"--architecture is s, but {weights} is MobileViT-XXS; leave out --architecture"
        ),
        ("train", "--data", "classes", "--num-threads", "0"): "num threads is 0; it must be 1 or more",
        ("predict", weights, "photos", "--num-threads", "-1"): "num threads is -1",
        ("evaluate", weights, "--data", "classes", "--num-threads", "0"): "num threads is 0",
        ("train", "--data", "classes", "--out", "photos/a.png", *TRAIN): r"photos/a.png: .*\(not a directory\)",
        ("train", "--data", "classes", "--out", "photos/a.png/b", *TRAIN): r"photos/a.png/b: .*\(not a directory\)",
        ("train", "--data", "classes", "--checkpoint-minutes", "0"): "checkpoint minutes are 0.0; they must be above 0",
        ("train", "--data", "classes", "--checkpoint-minutes", "nan"): "checkpoint minutes are nan",
        (
            "train",
            "--data",
            "classes",
            "--checkpoint-minutes",
            "soon",
        ): "--checkpoint-minutes is 'soon'; .* a number",
        ("train", "--data", "classes", "--compute.precision", "float8"): "'float8'",
        ("train", "--data", "classes", "--compute.micro-batch-size", "1"): "--compute.micro-batch-size is 1",
        ("train", "--data", "classes", "--optimizer.freeze", "stage9"): "'stage9'",
        ("train", "--data", "classes", "--sampler.sizes-px"): r"--sampler.sizes-px is given without a value",
        ("train", "--data", "classes", "--data.max-unreadable", "-1"): "--max-unreadable is -1",
        ("train", "--data", "hf:", *TRAIN): "hf:",
        ("evaluate", weights): "--data",
        ("evaluate", weights, "--data", "missing"): "missing: no such folder",
        ("evaluate", weights, "--data", "classes"): "'x' is not one of the 3 classes",
        ("evaluate", weights, "--data", "classes", "--batch-size", "0"): "batch size is 0",
        ("evaluate", weights, "--data", "classes", "--max-unreadable", "-1"): "max unreadable is -1; .* 0 or more",
        ("evaluate", weights, "--data", "classes", "--max-megapixels", "0"): "max megapixels is 0.0; .* above 0",
        ("evaluate", weights, "--data", "classes", "--split", "dev"): "'dev'",
        ("train", "--data", "https://host/flowers.zip"): "https://host/flowers.zip: a URL; download it first",
        ("trian", "--data", "classes"): "no command 'trian'; did you mean train\\? the commands are predict, train",
        ("--verbose",): "no command '--verbose'",
    }.items():
        assert re.search(said, mistake(capsys, *args)), args
    assert not (here / "runs").exists()


MISTAKES = {
    # What it is that is said: the option or file, the value, and what would do.
    "predict W photos --top-k 1.5": "--top-k is '1.5'; it must be an integer",
    "predict W photos --top-k": "--top-k.* expected 1 .*; mobilevit predict --help",
    "predict W photos --top-k 1 --top-k 2": "--top-k is given 2 times; give it once",
    "predict W photos --epochs 3": "no option --epochs; mobilevit predict --help",
    "predict W photos --jsn": "no option --jsn; did you mean --json?",
    "predict W photos -k 3": "no option -k; mobilevit predict --help",
    "predict W photos --out ''": "--out is ''; it must be a non-empty path",
    "predict '' photos": "WEIGHTS is ''; it must be a non-empty string",
    "predict W ''": "IMAGE is ''; it must be a non-empty string",
    "predict W": "give files, folders or quoted patterns",
    "train": "--data is missing; mobilevit train --help",
    "train --dta classes": "no option --dta; did you mean --data?",
    "train --data ''": "--data is ''; it must be a non-empty string",
    "train --data classes/x/0.png": "classes/x/0.png: neither a folder nor",
    "train --data classes --size 1e3": "--size is '1e3'; it must be an integer",
    "train --data classes --size 16": "--size is 16; it must be 32 or more",
    "train --data classes --data.size-px 16": "--size is 16; it must be 32 or more",
    "train --data classes --lr nan": "--lr is nan; it must be above 0",
    "train --data classes --lr big": "--lr is 'big'; it must be a number",
    "train --data classes --val-fraction 2": "--val-fraction is 2.0; it must be between 0 and 1",
    "train --data classes --num-workers -1": "--num-workers is -1; it must be 0 or more",
    "train --data classes --precision fp16": "--precision is 'fp16'; it must be one of float32, bfloat16, float16",
    "train --data classes --freeze stage7": "--freeze is 'stage7'; .*it must be one of nothing, stem, stage1",
    "train --data classes --freeze stage3": "--freeze is stage3, .*--weights",
    "train --data classes --batch-size 1": "--batch-size is 1; it must be 2 or more",
    "train --data classes --sampler.start-lr 1": "no option --sampler.start-lr; did you mean .*--optimizer.start-lr",
    "train --data classes --no-fip": "no option --no-fip; did you mean --no-flip",
    "train tinny --data classes": "RECIPE is 'tinny'; did you mean tiny?",
    "train tiny small --data classes": "'small' is not expected here; mobilevit train --help",
    "evaluate W": "--data is missing; mobilevit evaluate --help",
    "evaluate W --data classes --per-clas": "no option --per-clas; did you mean --per-class?",
    "evaluate W --data classes --num-workers -2": "num workers is -2; it must be 0 or more",
    "info": "NETWORK is missing; mobilevit info --help",
    "info xxs xs": "'xs' is not expected here; mobilevit info --help",
    "info xxs --size": "--size is given without a value; give one or more",
    "convert W": "TARGET is missing; mobilevit convert --help",
    "convert W ''": "TARGET is ''; it must be a non-empty path",
    "convert W a.pt --to aple": "--to is 'aple'; .*it must be one of mobilevit, apple, timm, transformers",
    "export W --to onxx": "--to is 'onxx'; .*it must be one of onnx, executorch, openvino, litert, coreml, all",
    "export W --to": "--to is given without a value; give one or more",
    "export W --precision int4": "--precision is 'int4'; .*it must be one of fp32, fp16, bf16, int8",
    "export W --images nothere": "nothere: no such image, folder or pattern; check the name",
    "benchmark": "nothing is named; give artifacts, weights",
    "benchmark xxs --runtime onx": "--runtime is 'onx'; .*it must be one of torch, compiled, onnx",
    "benchmark nothere.onnx": "nothere.onnx: no such file",
    "demo W --port abc": "--port is 'abc'; it must be an integer",
    "demo W --port -1 --no-open": "port is -1; it must be from 0",
    "demo W --drawing cats": "--drawing is 'cats'; it must be one of optdigits, mnist",
    "demo W --open": "no option --open; did you mean --no-open?",
    "explain W photos/a.png --at 1": "--at.* expected 2 .*; mobilevit explain --help",
    "explain W photos/a.png --at 1 b": "--at is 'b'; it must be a number",
    "explain W photos": "photos: is a directory",
    "compare --seeds a": "--seeds is 'a'; it must be an integer",
    "compare --data classes --recipe paper-s": "--recipe is 'paper-s'; it must be one of small, plain, tiny",
    "compare extra": "'extra' is not expected here; mobilevit compare --help",
    "pretict W photos": "no command 'pretict'; did you mean predict?",
}


@pytest.mark.parametrize("command", MISTAKES)
def test_plausible_mistakes(capsys: pytest.CaptureFixture[str], here: Path, weights: str, command: str):
    args = [weights if arg == "W" else arg for arg in shlex.split(command)]
    assert re.search(MISTAKES[command], mistake(capsys, *args), re.IGNORECASE)


def test_evaluate_on_a_damaged_image(capsys: pytest.CaptureFixture[str], here: Path):
    model = Classifier("xxs", num_classes=2)
    model.class_names, model.preprocessing = ("x", "y"), Preprocessing(36, 32)
    save(model, here / "xy.safetensors")
    (here / "classes/y/1.png").write_bytes((here / "photos/c.png").read_bytes())
    evaluate = ["evaluate", "xy.safetensors", "--data", "classes", "--num-workers", "0"]
    said = mistake(capsys, *evaluate)
    assert said.startswith("mobilevit: classes/y/1.png: damaged image")
    assert "--max-unreadable" in said
    assert run(*evaluate, "--max-unreadable", "1") == 0
    out, err = capsys.readouterr()
    assert "evaluated: all of classes, 5 images" in out
    assert err == "mobilevit: cannot be read, left out: classes/y/1.png\n"


def test_evaluate_takes_the_validation_split_of_the_run(capsys: pytest.CaptureFixture[str], here: Path):
    options = ["--data.size-px", "32", "--data.num-workers", "0", "--data.val-fraction", "0.4", "--batch-size", "2"]
    with Image.open(here / "classes/x/1.png") as image:
        image.convert("RGBA").save(here / "classes/x/1.png")
    assert run("train", "tiny", "--data", "classes", "--out", "run", "--epochs", "1", *options) == 0
    validation = json.loads((here / "run/metrics.jsonl").read_text())
    assert "images with transparency: 1; " in capsys.readouterr().err
    evaluate = ["evaluate", "run/model.safetensors", "--data", "classes", "--num-workers", "0"]
    for args, split, num in (((), "val", 2), (("--split", "train"), "train", 4), (("--split", "all"), "all", 6)):
        assert run(*evaluate, *args, "--json") == 0
        line = json.loads(capsys.readouterr().out)
        assert (line["split"], line["num_images"]) == (split, num)
        if split == "val":
            assert line["loss"] == pytest.approx(validation["val_loss"], rel=1e-5)
        assert run(*evaluate, *args) == 0
        which = "all" if split == "all" else f"the {split} split"
        assert f"evaluated: {which} of classes, {num} images\n" in capsys.readouterr().out
    assert "no split 'test'" in mistake(capsys, *evaluate, "--split", "test")
    assert run("convert", "run/model.safetensors", "again.safetensors") == 0
    assert "transparent color; training composited them on white" in capsys.readouterr().err


def test_large_images_name_the_limit_and_the_option(capsys: pytest.CaptureFixture[str], here: Path, weights: str):
    assert run("predict", weights, "photos/a.png", "--max-megapixels", "1e-4") == 1
    assert re.search(r"photos/a.png: too large \(\d+ x \d+ px, .*--max-megapixels", capsys.readouterr().err)
    said = mistake(capsys, "train", "--data", "classes", "--data.max-megapixels", "1e-4")
    assert re.search(r"classes/x/0.png: too large .*--max-megapixels.*; and 1 more; .*--max-unreadable 6", said)


# ---------------------------------------------------------------------------------------------------------------------
# Benchmark


@pytest.fixture
def no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    from mobilevit.benchmark import run as benchmark_run
    from mobilevit.benchmark import timing

    monkeypatch.setattr(
        benchmark_run, "run_alone", lambda side, num_threads: {"load_ms": 2.5, "memory_bytes": 3_000_000}
    )
    monkeypatch.setattr(timing, "PEAK_SIDE", 256)


def test_benchmark(capsys: pytest.CaptureFixture[str], here: Path, weights: str, no_processes: None):
    options = ["--rounds", "2", "--num-threads", "1", "--batch-size", "2", "1", "--against", "timm"]
    assert run("benchmark", "XXS", weights, "--size", "32", "64", *options, "--out", "a.json", "--figure", "a.svg") == 0
    out, err = capsys.readouterr()
    *shown, line = out.splitlines()
    report = json.loads(line)
    assert (here / "a.json").read_text() == f"{line}\n"
    assert "<svg" in (here / "a.svg").read_text()
    rows = [(row["name"], row["batch_size"]) for row in report["rows"]]
    assert rows == [(name, size) for size in (2, 1) for name in ("XXS", "timm", weights, "timm")]
    assert {tuple(row["size_px"]) for row in report["rows"]} == {(32, 64)}
    assert {row["memory_bytes"] for row in report["rows"]} == {3_000_000}
    assert [row["against"] for row in report["rows"][:4]] == [None, "XXS torch fp32", None, f"{weights} torch fp32"]
    assert (report["num_rounds"], report["num_threads"]) == (2, 1)
    assert all(row["error"] < 1e-4 for row in report["rows"])
    first = next(text for text in shown if text.split()[:1] == ["XXS"]).split()
    assert first[1:5] == ["torch", "fp32", "2", f"{report['rows'][0]['latency_ms']['p10']:.2f}"]
    assert "torch fp32: writing timm for batches of 2 ..." in err


def test_benchmark_of_a_note(capsys: pytest.CaptureFixture[str], here: Path, monkeypatch: pytest.MonkeyPatch):
    from mobilevit.benchmark import run as benchmark_run

    report = {"rows": [], "notes": ["int8 is not faster"], "peak_gflops": {}, "num_threads": 2, "num_rounds": 40}
    report |= {"date": "2000-01-01", "processor": "[abacus]"}
    asked: list[Any] = []
    monkeypatch.setattr(benchmark_run, "sides_of_weights", lambda *args, **options: asked.append(options) or [])
    monkeypatch.setattr(benchmark_run, "benchmark", lambda *args, **options: report)
    assert run("benchmark", "s", "s", "--runtime", "torch", "onnx", "torch", "--precision", "fp32", "int8") == 0
    *_, note, line = capsys.readouterr().out.splitlines()
    assert note == "int8 is not faster"
    assert json.loads(line) == report
    (options,) = asked
    assert (options["runtimes"], options["precisions"]) == (("torch", "onnx"), ("fp32", "int8"))
    assert (options["batch_sizes"], options["size"], options["against"]) == ((1,), None, ())


def test_mistakes_of_benchmark(capsys: pytest.CaptureFixture[str], here: Path, weights: str):
    (here / "a.onnx").write_bytes(b"")
    for args, said in {
        (): "nothing is named; give artifacts, weights, or xxs, xs, s",
        ("xxl",): "xxl: no such file",
        ("missing.onnx",): "missing.onnx: no such file",
        ("a.onnx", "--runtime", "onnx"): "an artifact has its runtime and precision; leave out",
        ("a.onnx", "--precision", "int8"): "an artifact has its runtime and precision; leave out",
        ("xxs", "--rounds", "0"): "rounds is 0; it must be 1 or more",
        ("xxs", "--num-threads", "0"): "num threads is 0",
        ("xxs", "--batch-size", "1", "0"): "batch size is 0",
        ("xxs", "--size", "31"): "from 32 px up",
        ("xxs", "--runtime", "abacus"): "'abacus'",
        ("xxs", "--precision", "int8"): "torch is timed in fp32 alone; leave out int8 or torch",
        (
            "xxs",
            "--against",
            "resnet5000",
        ): "no network 'resnet5000' to compare with; did you mean resnet50 .*there are self, timm",
        ("xxs", "--figure", "a.doc"): "a.doc: a figure ends in .png, .svg or .pdf",
        ("xxs", "--out", "missing/a.json"): "missing/a.json: there is no such folder",
    }.items():
        assert re.search(said, mistake(capsys, "benchmark", *args)), args


# ---------------------------------------------------------------------------------------------------------------------
# Explain


def test_explain(capsys: pytest.CaptureFixture[str], here: Path, weights: str, segmenter: str):
    before = names(here)
    assert run("explain", weights, "photos/a.png", "--at", "10", "20", "--class", ":BEE:", "--out", "why/a.png") == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert names(here) - before == {"why/a.png"}
    first, *_ = load(weights).predict(here / "photos/a.png")
    rows = [line.split() for line in out.splitlines() if line.rstrip().endswith("%")]
    assert rows[0][0] == ":bee:"  # the chosen class, then the likeliest
    assert [*first.class_name.split(), f"{100 * first.probability:.1f}", "%"] in rows
    assert "Stage 3: depends on 100.0 % of the pixels\n" in out
    assert re.search(r"^why/a\.png: \d+\.\d MB$", out, re.MULTILINE)
    assert run("explain", segmenter, "photos/d.jpg", "--size", "96") == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.startswith("Stage 2: depends on ")  # no classes
    assert names(here) - before == {"why/a.png", "explanation.html"}
    assert '"size":96' in (here / "explanation.html").read_text(encoding="utf-8")


def test_mistakes_of_explain(capsys: pytest.CaptureFixture[str], here: Path, weights: str, detector: str):
    before = names(here)
    for args, said in {
        (): "WEIGHTS and IMAGE are missing",
        (weights, "missing.png"): "missing.png: no such file",
        (weights, "photos/c.png"): r"photos/c\.png: damaged image",
        (weights, weights): "not an image",
        ("missing.safetensors", "photos/a.png"): "missing.safetensors: no such file",
        (weights, "photos/a.png", "--out", "a.jpg"): r"a\.jpg: ends in \.jpg; write a \.html or a \.png file",
        (weights, "photos/a.png", "--out", "photos"): "photos: ends in nothing",
        (weights, "photos/a.png", "--out", "photos/a.png"): r"photos/a\.png: is the image itself",
        (weights, "photos/a.png", "--class", "bee"): r"class is 'bee', which none of the 3 .* they are \[bold\]ant",
        (detector, "photos/a.png", "--class", ":bee:"): "class is ':bee:'; .* these are weights to detect",
        (
            weights,
            "photos/a.png",
            "--at",
            "33",
            "0",
        ): "the place is 33 0; of this image of 33 x 40 px .* from 2 to 30",
        (weights, "photos/a.png", "--at", "10"): "--at",
        (weights, "photos/a.png", "--size", "31"): "size is 31; it must be 32 px or more",
        (weights, "photos/a.png", "--device", "toaster"): "device 'toaster' cannot be used",
    }.items():
        assert re.search(said, mistake(capsys, "explain", *args).rstrip()), args
    assert names(here) == before


# ---------------------------------------------------------------------------------------------------------------------
# Compare


def test_compare(capsys: pytest.CaptureFixture[str], here: Path):
    assert run("compare", "--only", "mobilenetv3-small", "--no-time", "--out", "table") == 0
    out, err = capsys.readouterr()
    *shown, line = out.splitlines()
    assert [row["name"] for row in json.loads(line)["rows"]] == [
        "mobilenetv3-small",
        *(f"mobilevit-{size}" for size in ("xxs", "xs", "s")),
    ]
    assert (here / "table/table.json").read_text() == f"{line}\n"
    files = {"table.md", "table.csv", "table.json", "accuracy_parameters_cnn.png"}
    assert names(here / "table") == files
    assert {str(Path("table", file)) for file in files} == set(shown[-4:])
    first = next(text for text in shown if text.split()[:1] == ["mobilenetv3-small"]).split()
    assert first[1:6] == ["224", "2.54", "(2.5)", "0.057", "/"]
    assert "mobilenetv3-small: counting ..." in err


def test_what_compare_hands_on(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    from mobilevit.compare import run as compare_run

    asked: list[Any] = []

    def note(systems: Any, **options: Any) -> None:
        asked.append(options)
        raise ValueError("enough")

    monkeypatch.setattr(compare_run, "compare", note)
    assert "enough" in mistake(capsys, "compare")
    options = ["--runtime", "onnx", "--batch", "2", "1", "2", "--baseline", "mobilevit-s", "--size", "96"]
    assert "enough" in mistake(capsys, "compare", *options, "--rounds", "3", "--num-threads", "1")
    defaults, given = asked
    assert (defaults["runtimes"], defaults["batch_sizes"], defaults["size_px"]) == (("torch", "onnx"), (1,), None)
    assert (given["runtimes"], given["batch_sizes"], given["size_px"]) == (("onnx",), (2, 1), 96)
    assert (given["baseline"], given["num_rounds"], given["num_threads"]) == ("mobilevit-s", 3, 1)


def test_mistakes_of_compare(capsys: pytest.CaptureFixture[str], here: Path):
    for args, said in {
        ("--only", "mobilnetv2"): "no system 'mobilnetv2'; did you mean mobilenetv2-",
        ("--only", "deit-tiny", "--size", "100"): "size_px is 100; deit-tiny takes multiples of 32",
        ("--rounds", "0"): "rounds is 0; it must be 1 or more",
        ("--num-threads", "0"): "num threads is 0",
        ("--batch-size", "1", "0"): "batch size is 0",
        ("--no-time", "--runtime", "torch"): "--no-time times nothing; leave out --runtime",
        ("--runtime", "abacus"): "'abacus'",
        ("--baseline", "resnet"): "'resnet'",
        ("--device", "abacus"): "device 'abacus' cannot be used here",
        ("--out", "photos/a.png"): "photos/a.png: is a file; --out names a folder",
    }.items():
        assert re.search(said, mistake(capsys, "compare", *args)), args


@pytest.mark.slow
def test_compare_by_training(capsys: pytest.CaptureFixture[str], here: Path):
    args = ["compare", "--data", "classes", "--only", "deit-84-patch8", "--epochs", "1", "--seeds", "0"]
    args += ["--batch-size", "4", "--lr", "1e-3", "--no-flip"]
    assert run(*args, "--size", "32", "--out", "out", "--runtime", "torch", "--rounds", "2") == 0
    out, err = capsys.readouterr()
    *shown, line = out.splitlines()
    report = json.loads(line)
    assert [row["name"] for row in report["rows"]] == ["mobilevit-xxs", "deit-84-patch8"]
    recipe = report["recipe"]
    assert (recipe["epochs"], recipe["batch_size"], recipe["optimizer"]["lr"]) == (1, 4, 1e-3)
    assert recipe["optimizer"]["clip_norm"] == 1
    assert (recipe["data"]["size_px"], recipe["data"]["flip"], report["seeds"]) == (32, False, [0])
    assert (here / "out/table.json").read_text() == f"{line}\n"
    assert [timing["runtime"] for row in report["rows"] for timing in row["timings"]] == ["torch"] * 2
    figures = {"accuracy_parameters.png", "learning_curves.png", "accuracy_latency_torch.png"}
    assert {file.name for file in (here / "out").iterdir()} == {"runs", "table.md", "table.csv", "table.json", *figures}
    assert "deit-84-patch8, seed 0: run 2 of 2" in err
    assert any(text.endswith("mobilevit-xxs; one seed says nothing about chance") for text in shown)
    assert run(*args, "--size", "32", "--out", "out", "--no-time") == 0
    out, err = capsys.readouterr()
    untimed = [row | {"timings": []} for row in report["rows"]]
    assert json.loads(out.splitlines()[-1])["rows"] == untimed
    assert "validation top1" not in err  # what a run says of its epochs
    # Ours can be used like the weights of any run, those of others are refused by name.
    assert run("predict", "out/runs/mobilevit-xxs/seed-0/model.safetensors", "photos/a.png") == 0
    other = "out/runs/deit-84-patch8/seed-0/model.safetensors"
    assert "weights of deit-84-patch8, trained to compare with" in mistake(capsys, "predict", other, "photos/a.png")
    assert run(*args, "--size", "52", "--out", "odd", "--no-time") == 1
    out, err = capsys.readouterr()
    assert "size_px is 52; deit-84-patch8 takes multiples of 8" in out
    assert "mobilevit: deit-84-patch8: cannot be built for 52 px and 2 classes" in err


@pytest.mark.parametrize(
    "twice",
    [
        ("--lr", "1e-3", "--optimizer.lr", "2e-3"),
        ("--weights", "a.pt", "--backbone", "b.pt"),
        ("--flip", "--data.no-flip"),
    ],
)
def test_an_option_given_twice_by_two_names(capsys: pytest.CaptureFixture[str], twice: tuple[str, ...]):
    said = mistake(capsys, "train", "--data", "classes", *twice)
    assert "given 2 times" in said
    assert twice[0] in said


def test_mistakes_of_compare_by_training(capsys: pytest.CaptureFixture[str], here: Path):
    for args, said in {
        ("--data", "nowhere"): "nowhere: ",
        ("--data", "classes", "--only", "deit-84"): "no system 'deit-84'; did you mean deit-84-patch8",
        ("--data", "classes", "--epochs", "0"): "epochs is 0; it must be 1 or more",
        ("--data", "classes", "--lr", "0"): r"--lr is 0\.0",
        ("--data", "classes", "--batch-size", "8", "16"): r"batch size is \(8, 16\); with --data give one",
        ("--data", "classes", "--seeds", "1", "1"): "seeds are 1, 1; give one or more, each of them once",
        ("--data", "classes", "--no-time", "--runtime", "onnx"): "--no-time times nothing; leave out --runtime",
        ("--data", "classes", "--recipe", "abacus"): "'abacus'",
        ("--epochs", "3"): "--epochs is about training; give --data too",
        ("--seeds", "3"): "--seeds is about training; give --data too",
        ("--num-workers", "0"): "--num-workers is about training; give --data too",
        ("--data", "classes", "--seeds", "0", "-1"): "seed is -1; it must be",
        ("--data", "classes", "--clip-norm", "-1"): r"--clip-norm is -1\.0; it must be 0 or more",
    }.items():
        assert re.search(said, mistake(capsys, "compare", *args)), args


# ---------------------------------------------------------------------------------------------------------------------
# As a program


def test_program(here: Path, weights: str):
    done = subprocess.run(
        [PROGRAM, "predict", weights, "photos", "--json", "--top-k", "1"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert len([json.loads(line) for line in done.stdout.splitlines()]) == 4
    assert re.fullmatch(r"mobilevit: photos/c\.png: damaged image .+\n", done.stderr)


def test_whoever_reads_has_seen_enough(here: Path, weights: str):
    for i in range(300):  # more than a pipe holds
        (here / f"{i}{'x' * 200}.png").write_bytes((here / "photos/c.png").read_bytes())
    with subprocess.Popen(
        [PROGRAM, "predict", weights, *sorted(p.name for p in here.glob("*.png")), "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as program:
        assert program.stdout
        assert program.stderr
        assert json.loads(program.stdout.readline())["error"]
        program.stdout.close()
        assert [line for line in program.stderr if not line.startswith("mobilevit: ")] == []
    assert program.returncode == 0


def test_stopped_by_signals_and_taken_up_by_the_same_command(here: Path):
    command = [sys.executable, "-m", "mobilevit", "train", "tiny", "--data", "classes", "--device", "cpu"]
    command += ["--epochs", "1000", "--batch-size", "3", "--num-workers", "0", "--checkpoint-minutes", "1e-9"]
    checkpoints = here / "runs/classes/checkpoints"

    def last_step() -> int:
        return max((int(file.stem) for file in checkpoints.glob("[0-9]*.pt")), default=0)

    stopped_after = 0
    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as program:
            while last_step() < stopped_after + 2 and program.poll() is None:
                time.sleep(0.01)
            program.send_signal(number)
            out, err = program.communicate()
        assert program.returncode == code, err
        assert out == ""
        assert "Traceback" not in err
        if stopped_after:
            assert f"going on after step {stopped_after}, in epoch " in err
        said = err.splitlines()[-1]
        found = re.fullmatch(r"mobilevit: stopped in epoch \d+ after step (\d+) and kept in runs/classes; (.+)", said)
        assert found, err
        assert found[2] == "the same command goes on from there"
        stopped_after = int(found[1])
        assert stopped_after == last_step() < 1000
